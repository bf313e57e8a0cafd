"""Methods whose support is fixed, and chosen by what data or another run has shown."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..hub.analysis import support_from_checkpoints
from ..rules import L1Penalty
from ..sparsity import DeltaMagnitude, Fisher, Global
from ..tuners import SparseLoraConfig
from .registry import FirstRun, Method, register, with_overrides


@register(
    "fish",
    paper="Sung et al., 2021",
    moves="nothing",
    use_when="a fixed support is wanted, and labelled examples can say which entries the loss depends on",
    cost="one backward pass for each of 1024 examples before training; 4 bytes a targeted entry, or more passes",
)
def fish(density: float = 0.005, examples: int = 1024, mode: str = "square", **overrides: Any) -> Method:
    """FISH mask: the entries with the largest empirical Fisher information over the whole model, fixed for the run.

    The numbers of `modules_to_save` (the classifier) train in full and are paid out of the budget, as published. Two
    departures: the paper ranks biases, norms and embeddings too, here the targeted weights compete, and `density` is a
    share of those; and every module keeps at least its best entry.
    """
    criterion = overrides.get("criterion", Fisher(examples=examples, mode=mode))
    entries = overrides.get("granularity", "entry") == "entry" and isinstance(criterion, Fisher)
    options = {"r": 0, "budget": Global(density, pay_head=entries), "criterion": criterion}
    return Method(SparseLoraConfig(**with_overrides({**options, "target_modules": "all-linear"}, overrides)))


@register(
    "lt-sft",
    paper="Ansell et al., 2022",
    moves="nothing",
    use_when="adapters are to be added to each other; the support is what a dense warm-up moved farthest",
    cost="a dense warm-up before training: 16 bytes a targeted entry while it lasts",
)
def lt_sft(
    density: float = 0.01,
    warmup_steps: int = 100,
    warmup_lr: float = 5e-5,
    warmup_l1: float = 0.0,
    l1: float = 0.0,
    n_iterations: int = 1,
    sparse_steps: int | None = None,
    **overrides: Any,
) -> Method:
    """Lottery-ticket sparse fine-tuning: train everything, keep the largest changes' places, rewind, train those.

    The Trainer's run is the second phase, with an optimizer of its own; use no weight decay. Adapters add up:
    `add_weighted_adapter([task, language], [1.0, 1.0], name, "linear")`. `warmup_l1` and `l1` are the two phases' pulls
    to the start (0.1 both for languages in the paper, 0 for tasks). `model.compact()` drops changes within 1e-7 of 0.
    With `n_iterations` above 1 each warm-up chooses a part of the budget and `sparse_steps` steps of sparse training
    (None: `warmup_steps`) come between two, as in the released code; the run starts from the values these reached.
    LayerNorms and biases stay as they are unless `bias` says otherwise.
    """
    warmup = DeltaMagnitude(
        warmup_steps=warmup_steps,
        warmup_lr=warmup_lr,
        l1=warmup_l1,
        n_iterations=n_iterations,
        sparse_steps=sparse_steps,
    )
    options = {"budget": Global(density), "criterion": warmup}
    options = {"schedule": [L1Penalty(weight=l1)] if l1 else [], "compact_tolerance": 1e-7, **options}
    options = with_overrides({"r": 0, "target_modules": "all-linear", **options}, overrides)
    return Method(SparseLoraConfig(**options))


@register(
    "rl-subnetwork",
    paper="Mukherjee et al., 2025",
    moves="nothing",
    use_when="a finished run's update was sparse and is to be repeated or inspected as an adapter",
    cost="two checkpoints, read tensor by tensor; about 20 bytes a changed entry while it trains",
)
def rl_subnetwork(
    before: str | Path | None = None, after: str | Path | None = None, atol: float = 0.0, **overrides: Any
) -> Method:
    """Train only the entries that differ between two checkpoints, by more than `atol`.

    `method.prepare(model)` reads them from the folders or safetensors files `before` and `after`; without those,
    `method.prepare(model, first_run)` makes them by a run of its own. `measure_update_sparsity` says beforehand how
    many entries there will be, `measure_mask_overlap` whether two runs agree on them.
    """
    if (before is None) != (after is None):
        raise ValueError(f"before={before!r} and after={after!r} are two checkpoints of one model: give both or none.")
    options = {"r": 0, "criterion": "given", "target_modules": "all-linear", **overrides}
    ready = partial(_take_subnetwork, before, after, atol)
    return Method(SparseLoraConfig(**options), make_ready=ready)


def _take_subnetwork(before: Any, after: Any, atol: float, model: nn.Module, first_run: FirstRun | None) -> None:
    if before is None and first_run is None:
        raise ValueError(
            "Method 'rl-subnetwork' trains what another run changed. Name that run's checkpoints, methods.get("
            "'rl-subnetwork', before=..., after=...), or pass method.prepare(model, first_run=...)."
        )
    if before is None:
        before, after = first_run()
    support_from_checkpoints(model, before, after, atol=atol)
