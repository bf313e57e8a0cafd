"""Federated training, simulated over processes: FedAvg of sparse adapters, FedDIP and Ferret against pooled training.

Without arguments it runs offline on the demo base beside it, in a few minutes on two CPU cores:

    python recipes/federated.py

Word problems are split over clients of different sizes; with `skew` each client has mostly results of its own range.
Clients live in `processes` workers, which receive and send the bytes that would go over a network, and nothing else.
With `drop_out` some of the chosen clients send nothing back, and the round goes on without them. Every algorithm ends
with a row: bytes of all messages, and exact match against training on all data in one place with as many examples.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import common
import demo_data
import torch
from datasets import Dataset
from evaluation import exact_match
from peft import PeftModel, get_peft_model
from reporting import print_table
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from hf_sparse_peft import Controller, SparseLoraConfig, make_optimizer, set_masks
from hf_sparse_peft import federated as fed
from hf_sparse_peft.sparsity import stream_seed
from hf_sparse_peft.training.recipe_files import checked_options
from hf_sparse_peft.utils.option_types import NonNegativeInt, PositiveFloat, PositiveFraction, PositiveInt
from hf_sparse_peft.utils.pictures import new_figure, save_picture


@dataclass
class RecipeArguments(common.RecipeArguments):
    """Who takes part, and in what."""

    output_dir: str = field(default="runs/federated", metadata={"help": "Where adapters, figures and picture go."})
    load_in_4bit: bool = field(default=False, metadata={"help": "NF4 with double quantisation; False: a dense base."})
    algorithms: list[str] = field(default_factory=list, metadata={"help": "Of fedavg, feddip, ferret; empty: all."})
    clients: PositiveInt = field(default=6, metadata={"help": "Clients that there are."})
    fraction: PositiveFraction = field(default=0.5, metadata={"help": "Fraction of them that is chosen in a round."})
    rounds: PositiveInt = field(default=8, metadata={"help": "Rounds."})
    local_steps: PositiveInt = field(default=10, metadata={"help": "Optimizer steps of a client in a round."})
    batch_size: PositiveInt = field(default=16, metadata={"help": "Examples of a local step."})
    skew: float = field(default=0.5, metadata={"help": "Fraction of the examples that is dealt out by their results."})
    drop_out: float = field(default=0.0, metadata={"help": "Probability that a chosen client sends nothing back."})
    processes: NonNegativeInt = field(default=2, metadata={"help": "Workers that clients live in; 0: this process."})
    fedavg_rate: PositiveFloat = field(default=1e-2, metadata={"help": "Learning rate of FedAvg's clients (AdamW)."})
    feddip: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of FedDIP."})
    ferret: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of Ferret."})
    ferret_rate: PositiveFloat = field(default=0.3, metadata={"help": "Learning rate of Ferret's clients (SGD)."})
    seed: int = field(default=0, metadata={"help": "Of data, clients, supports and masks."})
    bf16: bool = field(default=False, metadata={"help": "A dense base in bf16."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Keep inputs of layers only."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave GPUs alone."})


# Data


def shares_of(recipe: RecipeArguments) -> dict[str, Dataset]:
    """Client -> its examples: client i has a share in proportion to i + 1, of which `skew` are neighbours by result."""
    rows = demo_data.word_problems(recipe.train_examples or 1000, seed=recipe.seed, split="train")
    generator = torch.Generator().manual_seed(stream_seed(recipe.seed, "skew"))
    keys = torch.rand(len(rows), generator=generator)
    by_result = torch.rand(len(rows), generator=generator) < recipe.skew
    results = torch.tensor([float(answer) for answer in rows["answer"]])
    keys = torch.where(by_result, (results - results.min() + keys) / (results.max() - results.min() + 1), keys)
    total = recipe.clients * (recipe.clients + 1) // 2
    ends = [len(rows) * (i + 1) * (i + 2) // 2 // total for i in range(recipe.clients)]
    order = keys.argsort().tolist()
    parts = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return {f"client-{i}": rows.select(sorted(part)) for i, part in enumerate(parts)}


def batches(rows: Dataset, size: int, count: int, tokenizer: Any, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """`count` batches, drawn anew when all rows were seen."""
    collate, order = DataCollatorForSeq2Seq(tokenizer), []
    generator = torch.Generator().manual_seed(seed)
    tokenizer.padding_side = "right"
    for _ in range(count):
        while len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        picked, order = order[:size], order[size:]
        yield collate([rows[at] for at in picked])


# Algorithms: what the server and a client do in a round. `Side` is one process' view: a model, and what it trains on.


@dataclass
class Side:
    """A process with a model; the server's has no data."""

    recipe: RecipeArguments
    tokenizer: Any
    model: PeftModel
    data: Mapping[str, Dataset]
    """Tokenized, of the clients that live here."""

    def train(self, client: str, number: int, optimizer: Any, rule: Any = None) -> int:
        """A client's local steps; returns how many examples it has."""
        rows, steps = self.data[client], self.recipe.local_steps
        seed = stream_seed(self.recipe.seed, client, number)
        set_seed(seed % 2**32)
        self.model.train()
        with Controller(self.model, optimizer, steps, rule=rule) as rules:
            for batch in batches(rows, self.recipe.batch_size, steps, self.tokenizer, seed):
                rules.before_step()
                self.model(**batch.to(self.model.device)).loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                rules.after_step()
                optimizer.zero_grad()
        return len(rows)


def adapter_optimizer(model: PeftModel, rate: float) -> torch.optim.Optimizer:
    """The config's, or AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return make_optimizer(model, lr=rate) or torch.optim.AdamW(trained, lr=rate)


class FedAvg:
    """Sparse adapters, averaged."""

    name = "fedavg"

    def __init__(self, side: Side) -> None:
        self.side, self.global_tensors = side, fed.adapter_tensors(side.model)
        self.held: dict[str, dict[str, torch.Tensor]] = {}
        """Client -> what it was last sent."""

    @staticmethod
    def config(recipe: RecipeArguments) -> Any:
        options = checked_options(recipe.adapter, SparseLoraConfig, "adapter")
        return SparseLoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **options})

    def message(self, client: str, number: int) -> bytes:
        found = fed.adapter_message(self.side.model, number, known=self.held.get(client))
        self.held[client] = self.global_tensors
        return found

    def local(self, client: str, number: int, data: bytes) -> bytes:
        known = self.held.get(client, self.global_tensors)
        received = fed.read_adapter_message(data, "server", known, number=number).tensors
        fed.write_adapter_tensors(self.side.model, received)
        self.held[client] = received
        optimizer = adapter_optimizer(self.side.model, self.side.recipe.fedavg_rate)
        examples = self.side.train(client, number, optimizer)
        return fed.adapter_message(self.side.model, number, client=client, examples=examples, known=received)

    def read(self, number: int) -> Callable[[bytes, str], Any]:
        config = self.side.model.peft_config["default"]
        return lambda data, client: fed.read_adapter_message(
            data, client, self.global_tensors, number=number, config=config
        )

    def step(self, found: fed.Round) -> None:
        averaged = fed.fedavg(found.replies, found.shares(), seed=self.side.recipe.seed)
        fed.write_adapter_tensors(self.side.model, averaged.tensors)
        self.global_tensors = averaged.tensors


class FedDIP:
    """Full weights under a global mask."""

    name = "feddip"

    def __init__(self, side: Side) -> None:
        self.side = side
        self.options = fed.FedDIP(**{"rounds": side.recipe.rounds, "seed": side.recipe.seed, **side.recipe.feddip})
        self.masks: dict[str, dict[str, torch.Tensor]] = {}
        """Client -> the masks that it has."""
        if not side.data:
            fed.feddip_start(side.model, self.options)

    @staticmethod
    def config(recipe: RecipeArguments) -> Any:
        return fed.feddip_config(task_type="CAUSAL_LM")

    def message(self, client: str, number: int) -> bytes:
        found = fed.feddip_server_message(self.side.model, self.options, number, known=self.masks.get(client))
        self.masks[client] = fed.masks_of(self.side.model)
        return found

    def local(self, client: str, number: int, data: bytes) -> bytes:
        if client in self.masks:  # several clients share this process' model
            set_masks(self.side.model, {name: ~bits for name, bits in self.masks[client].items()})
        fed.feddip_receive(self.side.model, data, self.options, number, client)
        self.masks[client] = fed.masks_of(self.side.model)
        optimizer = self.options.local_optimizer(self.side.model, number)
        examples = self.side.train(client, number, optimizer, self.options.local_rule(number))
        return fed.feddip_client_message(self.side.model, self.options, number, client, examples)

    def read(self, number: int) -> Callable[[bytes, str], Any]:
        return lambda data, client: fed.read_feddip_message(self.side.model, data, client, self.options, number)

    def step(self, found: fed.Round) -> None:
        fed.feddip_server_step(self.side.model, found.replies, found.shares(), self.options, found.number)


class Ferret:
    """Full weights, whose updates are sent as coordinates in random bases."""

    name = "ferret"

    def __init__(self, side: Side) -> None:
        self.side = side
        self.options = fed.Ferret(**{"seed": side.recipe.seed, **side.recipe.ferret})
        self.log: list[bytes] = []
        """The server's messages of all rounds; of a worker those that it has applied."""
        self.held: dict[str, int] = {}
        """Client -> rounds whose messages it has."""
        self.tensors = self.trained()

    @staticmethod
    def config(recipe: RecipeArguments) -> Any:
        return fed.feddip_config(task_type="CAUSAL_LM")

    def trained(self) -> dict[str, torch.Tensor]:
        """What takes part, by name: the masks keep everything, and are the same for all."""
        return {key: one for key, one in fed.adapter_tensors(self.side.model).items() if one.is_floating_point()}

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        fed.write_adapter_tensors(self.side.model, {**fed.adapter_tensors(self.side.model), **tensors})

    def message(self, client: str, number: int) -> bytes:
        """What the client has missed; a client that is new begins with the base."""
        missed = self.log[self.held.get(client, 0) :]
        self.held[client] = number
        return fed.pack_all(missed)

    def local(self, client: str, number: int, data: bytes) -> bytes:
        for at, message in enumerate(fed.unpack_all(data, "server"), start=self.held.get(client, 0)):
            if at == len(self.log):  # the clients of this process share its copy of the global tensors
                self.tensors = fed.ferret_receive(self.tensors, message, self.options, at)
                self.log.append(message)
        self.held[client] = number
        self.write(self.tensors)
        trained = [parameter for parameter in self.side.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=self.side.recipe.ferret_rate)
        examples = self.side.train(client, number, optimizer)
        return fed.ferret_client_message(self.tensors, self.trained(), self.options, number, client, examples)

    def read(self, number: int) -> Callable[[bytes, str], Any]:
        return lambda data, client: fed.read_ferret_message(data, client, self.tensors, self.options, number)

    def step(self, found: fed.Round) -> None:
        self.tensors, terms = fed.ferret_server_step(self.tensors, found.replies, found.shares(), self.options)
        self.log.append(fed.ferret_server_message(terms, found.number, self.options.step))
        self.write(self.tensors)


ALGORITHMS: dict[str, Any] = {one.name: one for one in (FedAvg, FedDIP, Ferret)}


def side_of(recipe: RecipeArguments, algorithm: str, clients: Mapping[str, Dataset]) -> Any:
    """The algorithm on a fresh model of the base."""
    name = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = common.load_base(AutoModelForCausalLM, name, recipe, recipe)
    set_seed(recipe.seed)
    model = get_peft_model(base, ALGORITHMS[algorithm].config(recipe))
    data = {client: demo_data.tokenize_pairs(rows, tokenizer) for client, rows in clients.items()}
    return ALGORITHMS[algorithm](Side(recipe, tokenizer, model, data))


# Workers


def work(pipe: Any, recipe: RecipeArguments, algorithm: str, clients: Mapping[str, Dataset]) -> None:
    """A worker: clients' replies, until there is nothing to do."""
    torch.set_num_threads(1)
    held = side_of(recipe, algorithm, clients)
    while (task := pipe.recv()) is not None:
        client, number, data = task
        try:
            reply: Any = held.local(client, number, data)
        except Exception as error:  # of one client: the others, and the round, go on
            reply = RuntimeError(f"{type(error).__name__}: {error}")
        pipe.send(reply)


@contextmanager
def clients_of(recipe: RecipeArguments, algorithm: str) -> Iterator[Callable[[int, dict[str, bytes]], dict[str, Any]]]:
    """Inside, `replies(number, messages)` lets the clients that were sent something train."""
    data, gone = shares_of(recipe), torch.Generator().manual_seed(stream_seed(recipe.seed, "drop out"))

    def dropped(messages: dict[str, bytes]) -> set[str]:
        return {client for client in messages if torch.rand((), generator=gone).item() < recipe.drop_out}

    if not recipe.processes:
        here = side_of(recipe, algorithm, data)

        def in_turn(number: int, messages: dict[str, bytes]) -> dict[str, Any]:
            lost = dropped(messages)
            return {c: None if c in lost else here.local(c, number, message) for c, message in messages.items()}

        yield in_turn
        return
    context, count = multiprocessing.get_context("spawn"), min(recipe.processes, len(data))
    places = {client: at % count for at, client in enumerate(sorted(data))}
    pipes, workers = [], []
    try:
        for at in range(count):
            ours, theirs = context.Pipe()
            mine = {client: data[client] for client, place in places.items() if place == at}
            workers.append(context.Process(target=work, args=(theirs, recipe, algorithm, mine), daemon=True))
            workers[-1].start()
            pipes.append(ours)

        def together(number: int, messages: dict[str, bytes]) -> dict[str, Any]:
            found: dict[str, Any] = dict.fromkeys(messages)
            lost, waiting = dropped(messages), [[c for c in messages if places[c] == at] for at in range(count)]
            busy = {}
            # One task at a time: a pipe is full long before a message is through.
            while busy or any(waiting):
                for pipe, names in zip(pipes, waiting, strict=True):
                    if names and pipe not in busy:
                        busy[pipe] = names.pop(0)
                        pipe.send((busy[pipe], number, messages[busy[pipe]]))
                for pipe in wait(list(busy)):
                    client = busy.pop(pipe)
                    reply = pipe.recv()
                    found[client] = None if client in lost else reply
            return found

        yield together
    finally:
        for pipe, worker in zip(pipes, workers, strict=False):
            if worker.is_alive():
                pipe.send(None)
            worker.join(30)


# The run


def run(recipe: RecipeArguments, algorithm: str, test: Dataset) -> dict[str, Any]:
    """All rounds of one algorithm: bytes and exact match after each."""
    server, clients = side_of(recipe, algorithm, {}), sorted(shares_of(recipe))
    history = []
    with clients_of(recipe, algorithm) as replies:
        for number in range(recipe.rounds):
            chosen = fed.choose_clients(clients, recipe.fraction, number, recipe.seed)
            messages = {client: server.message(client, number) for client in chosen}
            found = fed.collect(number, replies(number, messages), server.read(number))
            server.step(found)
            row = {
                "round": number, "clients": len(found.replies), "refused": found.refused,
                "bytes_down": sum(len(data) for data in messages.values()), "bytes_up": found.bytes_up,
                "exact_match": exact_match(server.side.model, server.side.tokenizer, test),
            }  # fmt: skip
            history.append(row)
            print(
                f"{algorithm}, round {number + 1} of {recipe.rounds}: {row['clients']} clients, "
                f"{row['bytes_down']:,} bytes down, {row['bytes_up']:,} up, exact match {row['exact_match']:.1f} %",
                flush=True,
            )
    folder = Path(recipe.output_dir) / algorithm
    common.save_adapter(
        server.side.model, folder, metrics={"exact_match": history[-1]["exact_match"]},
        training_data="word problems that recipes/demo_data.py generates",
        notes=f"{algorithm}, {recipe.rounds} rounds, seed {recipe.seed}; recipes/federated.py.",
    )  # fmt: skip
    return {"history": history, "bytes": sum(row["bytes_down"] + row["bytes_up"] for row in history)}


def pooled(recipe: RecipeArguments, algorithm: str, test: Dataset) -> float:
    """Exact match of the algorithm's adapter, trained with its client's optimizer on all data in one place: as many
    steps as a client that takes part in every round, of as many examples as the clients of a round have together."""
    rows = common.datasets.concatenate_datasets(list(shares_of(recipe).values()))
    alone = side_of(recipe, algorithm, {"all": rows})
    together = max(1, int(recipe.fraction * recipe.clients))
    side = alone.side
    side.recipe = replace(
        recipe, local_steps=recipe.rounds * recipe.local_steps, batch_size=recipe.batch_size * together
    )
    if algorithm == "fedavg":
        optimizer = adapter_optimizer(side.model, recipe.fedavg_rate)
    else:
        trained = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
        rate = alone.options.learning_rate if algorithm == "feddip" else recipe.ferret_rate
        optimizer = torch.optim.SGD(trained, lr=rate)
    side.train("all", 0, optimizer)
    return exact_match(side.model, side.tokenizer, test)


def main(argv: list[str]) -> common.Figures:
    """Run what `algorithms` names, print the table, draw; returns the figures."""
    (recipe,) = common.begin(__file__, argv, RecipeArguments)
    wanted = recipe.algorithms or list(ALGORITHMS)
    unknown = sorted(set(wanted) - set(ALGORITHMS))
    if unknown:
        raise SystemExit(f"federated.py: algorithms={unknown} is unknown; it takes {', '.join(ALGORITHMS)}.")
    test = demo_data.word_problems(recipe.test_examples, seed=recipe.seed, split="test")
    figures: dict[str, Any] = {}
    for algorithm in wanted:
        figures[algorithm] = run(recipe, algorithm, test)
        figures[algorithm]["pooled"] = pooled(recipe, algorithm, test)
    output = Path(recipe.output_dir)
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(figures, output / "federated.png", f"{recipe.clients} clients, {recipe.rounds} rounds, seed {recipe.seed}")
    rows = [
        (
            name, f"{found['bytes']:,}", f"{found['history'][-1]['bytes_up'] // found['history'][-1]['clients']:,}",
            f"{found['history'][-1]['exact_match']:.1f}", f"{found['pooled']:.1f}",
        )
        for name, found in figures.items()
    ]  # fmt: skip
    columns = ("bytes in all", "up, a client, last round", "exact match, %", "pooled, %")
    print_table(rows, title=f"{recipe.rounds} rounds of {recipe.clients} clients", columns=columns)
    print(f"adapters, figures.json and federated.png: {output}")
    return figures


def draw(figures: Mapping[str, Any], path: Path, title: str) -> None:
    """Exact match over rounds, and over the bytes that were sent."""
    figure = new_figure(9, 3.6, "The picture")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    for name, found in figures.items():
        history, sent = found["history"], []
        for row in history:
            sent.append((sent[-1] if sent else 0) + row["bytes_down"] + row["bytes_up"])
        scores = [row["exact_match"] for row in history]
        (line,) = left.plot(range(1, len(history) + 1), scores, marker=".", label=name)
        left.axhline(found["pooled"], color=line.get_color(), linestyle=":", linewidth=1)
        right.plot(sent, scores, marker=".", color=line.get_color())
    left.set(xlabel="round", ylabel="exact match, %")
    left.legend(title="dotted: pooled")
    right.set(xlabel="bytes sent", xscale="log")
    save_picture(figure, path, 120)


if __name__ == "__main__":
    main(sys.argv[1:])
