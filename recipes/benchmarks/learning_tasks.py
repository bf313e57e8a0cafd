"""What `learning.py` has methods learn: tasks with a base, training data of a seed, and figures of a trained model.

Test examples are two halves that share nothing with the training data: rates are chosen by one (`choose`) and methods
are compared by the other (`score`). The halves of word problems share sums with each other: 800 of them are made of 243
chains of two sums. Every task has

    base        folder or name of the pretrained model
    metric      what `choose` and `score` are, larger is better
    targets     modules that adapters train; `head` trains in full, at `head_rate`, whatever the method
    model()     a fresh base, in fp32 or NF4
    training_data(seed), score(model)

Language models also tell what they forget: the loss on held-out text of the base's pretraining, and the mean KL
divergence KL(base || model), in nats per answer token of the test half. Encoders tell the mean distance, 1 - cosine, of
pooled hidden states of the base and the model on sentences of another data set (`drift`).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

# isort: split
import demo_data  # found by harness
from evaluation import text_loss

DEMO_BASE = Path(__file__).resolve().parents[1] / "demo_base"


def load_options(bits: str, device: str = "cpu") -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base in fp32, bf16 or NF4; what is not 4-bit is fp32, on a GPU bf16."""
    dtype = torch.float32 if bits == "fp32" or (device == "cpu" and bits == "nf4") else torch.bfloat16
    if bits != "nf4":
        return {"dtype": dtype}
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"dtype": dtype, "quantization_config": quantised, "device_map": {"": device}}


def halves(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Every second row, and the others."""
    return rows.select(range(0, len(rows), 2)), rows.select(range(1, len(rows), 2))


class LanguageTask:
    """Answers after prompts on a causal language model; the loss is that of the answers and their end token."""

    targets, head, head_rate, task_type = "all-linear", None, 0.0, "CAUSAL_LM"
    default_base: Any = DEMO_BASE
    batch, held_out_rows, max_length = 100, 60, 0

    def __init__(self, options: Any) -> None:
        self.base, self.examples = options.base or self.default_base, options.examples
        self.load_options = load_options(options.bits, options.device)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.collator = DataCollatorForSeq2Seq(self.tokenizer)
        self.test_pairs = halves(self.pairs(options.test_examples, "test", 0))
        self.test = tuple(map(self._tokenized, self.test_pairs))
        rows = demo_data.chunk_text(self.held_out_text(), self.tokenizer)
        self.held_out = rows.select(range(min(self.held_out_rows, len(rows))))
        self._data: dict[int, Dataset] = {}
        self._base_log_probs: list[torch.Tensor] = []

    def pairs(self, n: int, split: str, seed: int) -> Dataset:
        """`n` examples, `prompt` and `answer`."""
        raise NotImplementedError

    def held_out_text(self) -> Dataset:
        """Documents that the base has not read: the demo's, or what pretrain_demo_base.py held out of a file."""
        path = Path(self.base) / "heldout.jsonl"
        if not path.exists():
            return demo_data.pretraining_text(100, seed=0, split="heldout")
        return Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])

    def model(self) -> nn.Module:
        """A fresh base."""
        return AutoModelForCausalLM.from_pretrained(self.base, **self.load_options)

    def _tokenized(self, pairs: Dataset) -> Dataset:
        return demo_data.tokenize_pairs(pairs, self.tokenizer, self.max_length)

    def training_data(self, seed: int) -> dict[str, Any]:
        """Data of one run; the examples are another draw for every seed."""
        if seed not in self._data:
            self._data[seed] = self._tokenized(self.pairs(self.examples, "train", seed))
        return {"train_dataset": self._data[seed], "data_collator": self.collator}

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Share of answers whose tokens, each after the right ones before it, are all the likeliest, percent: what
        greedy generation gets right. Loss, KL divergence to the base, and loss on pretraining text."""
        model.eval()
        (choose, _, _), (score, loss, kl) = (self._figures(model, half) for half in self.test)
        figures = {"choose": choose, "score": score, "test_loss": loss} | ({} if math.isnan(kl) else {"kl": kl})
        return figures | {"held_out_loss": text_loss(model, self.held_out)}

    def answers(self, model: nn.Module, rows: Dataset) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Log-probabilities before each answer token [n, vocabulary], the tokens [n], and their rows [n], by batch."""
        for at in range(0, len(rows), self.batch):
            batch = self.collator([rows[i] for i in range(at, min(at + self.batch, len(rows)))]).to(model.device)
            labels = batch.pop("labels")[:, 1:]
            found = model(**batch).logits[:, :-1]
            row, place = (labels != demo_data.IGNORED).nonzero(as_tuple=True)
            yield found[row, place].float().log_softmax(-1), labels[row, place], row

    def of_base(self, model: nn.Module, rows: Dataset) -> Iterator[torch.Tensor] | None:
        """The base's log-probabilities, by batch, kept after the first time; None: there are none."""
        if not self._base_log_probs:
            base = self.model().to(model.device).eval()
            self._base_log_probs = [found for found, _, _ in self.answers(base, rows)]
        return iter(self._base_log_probs)

    def _figures(self, model: nn.Module, rows: Dataset) -> tuple[float, float, float]:
        """Share of right answers, percent, loss, and KL divergence to the base (on the half that is scored)."""
        right, loss, kl, tokens = 0, 0.0, 0.0, 0
        bases = self.of_base(model, rows) if rows is self.test[1] else None
        for found, labels, row in self.answers(model, rows):
            wrong = torch.zeros(int(row.max()) + 1, dtype=torch.bool, device=row.device)
            wrong[row[found.argmax(-1) != labels]] = True
            right += int((~wrong).sum())
            loss += F.nll_loss(found, labels, reduction="sum").item()
            if bases is not None:
                kl += F.kl_div(found, next(bases), reduction="sum", log_target=True).item()
            tokens += len(labels)
        return 100 * right / len(rows), loss / tokens, kl / tokens if bases is not None else math.nan


class WordTask(LanguageTask):
    """The demo's word problems with two changes, where the base has read such questions after one only."""

    metric = "exact match, %"

    def pairs(self, n: int, split: str, seed: int) -> Dataset:
        """Problems; no sum of the test half is in the training half."""
        return demo_data.word_problems(n, seed=seed, split=split, changes=2)


class SpelledTask(WordTask):
    """The same problems, answered in words: "Answer in words :" instead of "Answer :"."""

    def pairs(self, n: int, split: str, seed: int) -> Dataset:
        """Problems and answers such as " twelve"."""
        return (
            super()
            .pairs(n, split, seed)
            .map(
                lambda row: {
                    "prompt": row["prompt"].replace("Answer :", "Answer in words :"),
                    "answer": f" {demo_data.WORDS[int(row['answer'])]}",
                }
            )
        )


class TwoTasks(WordTask):
    """Word problems, and then, with the same adapter, these answered in words: `second`, see `learning_runs.run`."""

    metric = "mean exact match of both tasks after the second, %"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.second = SpelledTask(options)


class E2ETask(LanguageTask):
    """Restaurant descriptions from slots (Novikova et al., 2017): the loss, and slots that greedy generation names.

    `choose` and `score` are minus the loss, nats per token of the reference.
    """

    metric = "minus test loss"
    batch = 25
    generated = 40
    """Meanings of the test half that descriptions are generated of."""

    def __init__(self, options: Any) -> None:
        need(options.base, "base", "causal language model that has read English, such as pretrain_demo_base.py makes")
        self.folder = need(options.data, "data", "folder with e2e/dev.csv and e2e/test.csv") / "e2e"
        super().__init__(options)

    def pairs(self, n: int, split: str, seed: int) -> Dataset:
        """References of `dev.csv` to train on, and one reference a meaning of `test.csv`."""
        with (self.folder / ("test.csv" if split == "test" else "dev.csv")).open(newline="") as file:
            rows = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [rows[i] for i in order]
        if split == "test":
            rows = list(dict(rows).items())
        return Dataset.from_list([{"prompt": f"{mr} :", "answer": f" {ref}"} for mr, ref in rows[:n]])

    def score(self, model: nn.Module) -> dict[str, float]:
        """Losses of both halves, KL divergence, loss on pretraining text, and slots named, percent."""
        found = super().score(model)
        with torch.no_grad():
            choose = self._figures(model, self.test[0])[1]
        return found | {"choose": -choose, "score": -found["test_loss"], "slots": self._slots_named(model)}

    @torch.no_grad()
    def _slots_named(self, model: nn.Module) -> float:
        rows, named, slots = self.test[1].select(range(min(self.generated, len(self.test[1])))), 0, 0
        prompts = [[t for t, label in zip(r["input_ids"], r["labels"], strict=True) if label < 0] for r in rows]
        padded = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        made = model.generate(**padded, max_new_tokens=120, do_sample=False)[:, padded["input_ids"].shape[1] :]
        for prompt, text in zip(prompts, self.tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            values = re.findall(r"\[(.*?)\]", self.tokenizer.decode(prompt))
            values = [value for value in values if value.lower() not in ("yes", "no")]
            named, slots = named + sum(value.lower() in text.lower() for value in values), slots + len(values)
        return 100 * named / slots


def need(path: Any, name: str, what: str) -> Any:
    """`path`, or the end of the program with a word on what to pass."""
    if path is None:
        raise SystemExit(f"this task needs --{name}: a {what}.")
    return path


class EncoderTask:
    """Sentences and labels on a pretrained encoder with a new head."""

    targets, task_type = r".*encoder.*(query|key|value|dense)", "SEQ_CLS"
    head, head_rate = ["pooler", "classifier"], 2e-3
    """The head is new, trains in full, and learns at one rate whatever the candidate."""

    def __init__(self, options: Any) -> None:
        self.examples, self.load_options = options.examples, load_options(options.bits, options.device)
        self.base = need(options.encoder, "encoder", "model folder, such as all-MiniLM-L6-v2")
        what = f"folder with {self.name}/train.tsv, {self.name}/dev.tsv and gsm8k/test.jsonl"
        self.folder = need(options.data, "data", what)
        self.others = (self.folder / "gsm8k" / "test.jsonl").read_text().splitlines()[:48]
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.train = self._read("train")
        self.test = halves(self._read("dev").select(range(min(options.test_examples, len(self._read("dev"))))))
        self._others: list[dict[str, torch.Tensor]] = []
        self._pooled: list[torch.Tensor] = []

    def _read(self, split: str) -> Dataset:
        lines = [line.split("\t") for line in (self.folder / self.name / f"{split}.tsv").read_text().splitlines()]
        tokens = self.tokenizer([line[self.text] for line in lines], truncation=True, max_length=48)
        return Dataset.from_dict({**tokens, "labels": [int(line[self.label]) for line in lines]})

    def model(self) -> nn.Module:
        """A fresh encoder with a fresh head: the same for all candidates of a seed."""
        if "quantization_config" in self.load_options:
            self.load_options["quantization_config"].llm_int8_skip_modules = self.head
        return AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=2, **self.load_options)

    def training_data(self, seed: int) -> dict[str, Any]:
        """Data of one run: `examples` sentences, another draw for every seed; 0: all."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        kept = order[: self.examples or None].tolist()
        return {"train_dataset": self.train.select(kept), "data_collator": self.collator}

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """The metric and the loss on both halves, and how far hidden states of other sentences went."""
        model.eval()
        (choose, _), (score, loss) = (self._figures(model, half) for half in self.test)
        return {"choose": choose, "score": score, "test_loss": loss, "drift": self._drift(model)}

    def _figures(self, model: nn.Module, rows: Dataset) -> tuple[float, float]:
        logits = [model(**batch).logits for batch in self._batches(rows, model.device)]
        labels = torch.tensor(rows["labels"])
        found = torch.cat(logits).float().cpu()
        return self.measure(labels, found.argmax(-1)), F.cross_entropy(found, labels).item()

    def _batches(self, rows: Dataset, device: Any) -> Iterator[Any]:
        for at in range(0, len(rows), 128):
            yield self.collator([rows[i] for i in range(at, min(at + 128, len(rows)))]).to(device)

    def _drift(self, model: nn.Module) -> float:
        if not self._others:
            lines = [json.loads(line)["question"] for line in self.others]
            others = self.tokenizer(lines, truncation=True, max_length=32, padding=True, return_tensors="pt")
            self._others = [others.to(model.device)]
            base = self.model().to(model.device).eval()
            self._pooled = [pooled(base, batch) for batch in self._others]
        pairs = zip(self._others, self._pooled, strict=True)
        return torch.cat([1 - F.cosine_similarity(pooled(model, b), was) for b, was in pairs]).mean().item()


def pooled(model: nn.Module, batch: Any) -> torch.Tensor:
    """Mean of the last hidden states over each sentence's tokens [batch, width]."""
    states = model(**batch, output_hidden_states=True).hidden_states[-1].float()
    mask = batch["attention_mask"][..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


class ColaTask(EncoderTask):
    """CoLA (Warstadt et al., 2018): Matthews correlation x 100 on the in-domain development set."""

    name, text, label = "cola", 3, 1
    metric = "Matthews correlation x 100"

    @staticmethod
    def measure(labels: torch.Tensor, predicted: torch.Tensor) -> float:
        """Pearson's correlation of two 0/1 vectors; 0 where one of them is constant."""
        pairs = torch.stack([labels, predicted]).double()
        return 100 * float(torch.corrcoef(pairs)[0, 1].nan_to_num())


class Sst2Task(EncoderTask):
    """SST-2 (Socher et al., 2013): accuracy, percent, on the development set."""

    name, text, label = "sst2", 0, 1
    metric = "accuracy, %"

    @staticmethod
    def measure(labels: torch.Tensor, predicted: torch.Tensor) -> float:
        """Accuracy, percent."""
        return 100 * (labels == predicted).double().mean().item()
