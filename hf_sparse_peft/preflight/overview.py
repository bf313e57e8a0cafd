"""What there is to choose from: every method with what it trains on a model, and what it becomes afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tqdm.auto import tqdm
from transformers import LlamaConfig

from .. import methods
from ..methods import Method
from ..tuners import adapter_layers
from ..tuners.shared.pieces import Decomposed, Entries, InputMap, LowRank, Nonlinear, OutputMap, Piece, Subgrid, Tiles
from ..utils.tables import Table, table
from .dry_run import adapt_on_meta
from .meta_base import meta_base, read_model_config


@dataclass(frozen=True)
class MethodRow:
    """One method."""

    name: str
    family: str
    """File of `hf_sparse_peft.methods` that it stands in, or the module of another package."""
    moves: str
    """What changes shape or place during training."""
    paper: str
    """Authors and year of the source."""
    use_when: str
    """When to reach for it."""
    cost: str
    """What it costs beyond a plain adapter."""
    four_bit: bool
    """Whether it trains on 4-bit bases."""
    leaves_as: str
    """What loads it without this package, exactly: "LoRA", "DoRA", "SHiRA or patch" (new values of some of the base's
    entries), "LoRA and patch" (one for each half); "dense" where only a merged model does, which all can become."""
    trained: int | None
    """Trained numbers on the model that was asked about, with the method's own defaults; None without a model."""
    problem: str
    """Why it does not fit that model; empty where it does."""


def families() -> list[str]:
    """The families of methods, sorted."""
    return sorted({_family(name) for name in methods.names()})


def method_rows(
    names: Sequence[str] | None = None, *, family: str | None = None, model: Any = None, show_progress: bool = False
) -> list[MethodRow]:
    """Methods by name, with what each trains on `model`.

    The model is built on the meta device, without weights. Numbers are those that an optimizer holds, as estimated
    before anything is calibrated: methods that share numbers out by data may move them between modules.

    Args:
        names: methods; None: all.
        family: those of one family (`families()`).
        model: a transformers model or config, a `config.json` or its folder, a Hub id; None: nothing is counted.
        show_progress: whether a bar shows on stderr.

    Raises:
        ValueError: an unknown method or family, or a config of no architecture known here.
    """
    if family is not None and family not in families():
        raise ValueError(f"family={family!r} is unknown; choose one of {families()}.")
    chosen = [methods.describe(name).name for name in names] if names else methods.names()
    chosen = [name for name in chosen if family in (None, _family(name))]
    config = None if model is None else read_model_config(model)
    rows = []
    for name in tqdm(chosen, "Methods", disable=not show_progress, leave=False):
        info, method = methods.describe(name), methods.get(name, task_type="CAUSAL_LM")
        trained, problem = (None, "") if config is None else _trained(method, config)
        rows.append(
            MethodRow(
                name, _family(name), info.moves, info.paper, info.use_when, info.cost, info.four_bit,
                _leaves_as(name), trained, problem,
            )
        )  # fmt: skip
    return rows


def methods_table(rows: Sequence[MethodRow]) -> Table:
    """The rows as a table, with a column of trained numbers where they were counted; `str()` of it is aligned text."""
    counted = any(row.trained is not None or row.problem for row in rows)
    columns = ("method", "family", "what moves", "source", "4-bit", "leaves as", *(("trained",) if counted else ()))
    cells = [
        (row.name, row.family, row.moves, row.paper, row.four_bit, row.leaves_as, *((row.trained,) if counted else ()))
        for row in rows
    ]
    return table(columns, cells)


def _family(name: str) -> str:
    return methods.describe(name).build.__module__.rpartition(".")[2].replace("_", "-")


def _trained(method: Method, config: Any) -> tuple[int | None, str]:
    try:
        model, _ = adapt_on_meta(meta_base(config, 16, method.config), method.config)
    except (ValueError, TypeError) as error:
        return None, str(error)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad), ""


_SIZES = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 16, "vocab_size": 8,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
"""A model that every method's defaults fit."""


@cache
def _leaves_as(name: str) -> str:
    """By the pieces of an adapter on a model without weights; those of upstream's by their config."""
    method = methods.get(name, task_type="CAUSAL_LM")
    if methods.describe(name).upstream:
        kind = method.config.peft_type.value
        dora = getattr(method.config, "use_dora", False)
        return ("DoRA" if dora else "LoRA") if kind in ("LORA", "ADALORA") else "dense"
    model, _ = adapt_on_meta(meta_base(LlamaConfig(**_SIZES), 16, method.config), method.config)
    pieces = [piece for layer in adapter_layers(model) for piece in layer.pieces("default")]
    if any(isinstance(piece, Decomposed) for piece in pieces):
        return "DoRA"
    if any(isinstance(piece, Nonlinear) for piece in pieces):
        return "nothing"
    if any(isinstance(piece, (InputMap, OutputMap)) or (isinstance(piece, Tiles) and piece.dense) for piece in pieces):
        return "dense"
    low_rank = [_is_low_rank(piece) for piece in pieces]
    return "LoRA" if all(low_rank) else "LoRA and patch" if any(low_rank) else "SHiRA or patch"


def _is_low_rank(piece: Piece) -> bool:
    lines = isinstance(piece, Entries) and piece.grid.granularity in ("row", "column")
    return lines or isinstance(piece, (LowRank, Subgrid))
