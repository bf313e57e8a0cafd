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
from peft import get_peft_model
from reporting import print_table
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from hf_sparse_peft import Controller, SparseLoraConfig, make_optimizer
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


# The clients' training


@dataclass
class Clients:
    """The clients of one process: a party, and the data that each has."""

    recipe: RecipeArguments
    tokenizer: Any
    party: fed.Party
    data: Mapping[str, Dataset]
    """Tokenized."""

    def local(self, client: str, number: int, data: bytes) -> bytes:
        """What the client sends back."""
        return self.party.local(client, number, data, lambda model, rule: self.train(client, number, rule))

    def train(self, client: str, number: int, rule: Any) -> int:
        """A client's local steps; returns how many examples it has."""
        model, recipe = self.party.model, self.recipe
        rows, seed = self.data[client], stream_seed(recipe.seed, client, number)
        set_seed(seed % 2**32)
        optimizer = optimizer_of(self.party, recipe, number)
        model.train()
        with Controller(model, optimizer, recipe.local_steps, rule=rule) as rules:
            for batch in batches(rows, recipe.batch_size, recipe.local_steps, self.tokenizer, seed):
                rules.before_step()
                model(**batch.to(model.device)).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rules.after_step()
                optimizer.zero_grad()
        return len(rows)


def optimizer_of(party: fed.Party, recipe: RecipeArguments, number: int) -> torch.optim.Optimizer:
    """A client's: AdamW for adapters, SGD for full weights, as the papers have it."""
    trained = [parameter for parameter in party.model.parameters() if parameter.requires_grad]
    if isinstance(party, fed.FedDIPParty):
        return party.options.local_optimizer(party.model, number)
    if isinstance(party, fed.FerretParty):
        return torch.optim.SGD(trained, lr=recipe.ferret_rate)
    rate = recipe.fedavg_rate
    return make_optimizer(party.model, lr=rate) or torch.optim.AdamW(trained, lr=rate)


def party_of(recipe: RecipeArguments, algorithm: str, server: bool = False) -> tuple[fed.Party, Any]:
    """The algorithm on a fresh model of the base, and the base's tokenizer."""
    name = recipe.model_name_or_path or common.DEMO_BASE
    base = common.load_base(AutoModelForCausalLM, name, recipe, recipe)
    given = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    config = fed.feddip_config(**given)
    if algorithm == "fedavg":
        config = SparseLoraConfig(**{**given, **checked_options(recipe.adapter, SparseLoraConfig, "adapter")})
    set_seed(recipe.seed)
    model = get_peft_model(base, config)
    options = {
        "fedavg": lambda: {"seed": recipe.seed},
        "feddip": lambda: {"options": fed.FedDIP(**{"rounds": recipe.rounds, "seed": recipe.seed, **recipe.feddip})},
        "ferret": lambda: {"options": fed.Ferret(**{"seed": recipe.seed, **recipe.ferret})},
    }[algorithm]()
    return fed.PARTIES[algorithm](model, server=server, **options), AutoTokenizer.from_pretrained(name)


def clients_here(recipe: RecipeArguments, algorithm: str, data: Mapping[str, Dataset]) -> Clients:
    """Those with that data, on a model of their own."""
    party, tokenizer = party_of(recipe, algorithm)
    held = {client: demo_data.tokenize_pairs(rows, tokenizer) for client, rows in data.items()}
    return Clients(recipe, tokenizer, party, held)


# Workers


def work(pipe: Any, recipe: RecipeArguments, algorithm: str, clients: Mapping[str, Dataset]) -> None:
    """A worker: clients' replies, until there is nothing to do."""
    torch.set_num_threads(1)
    held = clients_here(recipe, algorithm, clients)
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
        here = clients_here(recipe, algorithm, data)

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
    server, tokenizer = party_of(recipe, algorithm, server=True)
    clients, history = sorted(shares_of(recipe)), []
    with clients_of(recipe, algorithm) as replies:
        for number in range(recipe.rounds):
            chosen = fed.choose_clients(clients, recipe.fraction, number, recipe.seed)
            messages = {client: server.message(client, number) for client in chosen}
            found = fed.collect(number, replies(number, messages), server.reader(number))
            server.step(found)
            row = {
                "round": number, "clients": len(found.replies), "refused": found.refused,
                "bytes_down": sum(len(data) for data in messages.values()), "bytes_up": found.bytes_up,
                "exact_match": exact_match(server.model, tokenizer, test),
            }  # fmt: skip
            history.append(row)
            print(
                f"{algorithm}, round {number + 1} of {recipe.rounds}: {row['clients']} clients, "
                f"{row['bytes_down']:,} bytes down, {row['bytes_up']:,} up, exact match {row['exact_match']:.1f} %",
                flush=True,
            )
    folder = Path(recipe.output_dir) / algorithm
    common.save_adapter(
        server.model, folder, metrics={"exact_match": history[-1]["exact_match"]},
        training_data="word problems that recipes/demo_data.py generates",
        notes=f"{algorithm}, {recipe.rounds} rounds, seed {recipe.seed}; recipes/federated.py.",
    )  # fmt: skip
    return {"history": history, "bytes": sum(row["bytes_down"] + row["bytes_up"] for row in history)}


def pooled(recipe: RecipeArguments, algorithm: str, test: Dataset) -> float:
    """Exact match of the algorithm's adapter, trained with its client's optimizer on all data in one place: as many
    steps as a client that takes part in every round, of as many examples as the clients of a round have together."""
    rows = common.datasets.concatenate_datasets(list(shares_of(recipe).values()))
    together = max(1, int(recipe.fraction * recipe.clients))
    steps, size = recipe.rounds * recipe.local_steps, recipe.batch_size * together
    alone = clients_here(replace(recipe, local_steps=steps, batch_size=size), algorithm, {"all": rows})
    alone.train("all", 0, None)
    return exact_match(alone.party.model, alone.tokenizer, test)


def main(argv: list[str]) -> common.Figures:
    """Run what `algorithms` names, print the table, draw; returns the figures."""
    (recipe,) = common.begin(__file__, argv, RecipeArguments)
    wanted = recipe.algorithms or list(fed.PARTIES)
    unknown = sorted(set(wanted) - set(fed.PARTIES))
    if unknown:
        raise SystemExit(f"federated.py: algorithms={unknown} is unknown; it takes {', '.join(fed.PARTIES)}.")
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
