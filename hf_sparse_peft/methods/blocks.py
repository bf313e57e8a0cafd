"""Supports of large blocks: SMT's, chosen over all layers by gradients; DiaBlo's, on the diagonal."""

from __future__ import annotations

from typing import Any, Literal

from ..sparsity import BlockGradient, GlobalByGroup, WarmedBlockGradient
from ..sparsity.block_gradient import BlockScore
from .registry import Method, register, row

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


@register(
    "diablo",
    paper="Gurses et al., 2025",
    moves="nothing",
    use_when="updates of high rank are wanted at LoRA's cost, without an index, a choice of units or a start to tune",
    cost="none; keeps the whole input for the backward pass, as LoRA does",
    claim="competitive accuracy at memory and speed comparable to LoRA's; more expressive than LoRA on a linear "
    "problem, under mild low-rank conditions (abstract)",
)
def diablo(blocks: int = 64, **overrides: Any) -> Method:
    r"""DiaBlo (arXiv:2506.03230): N = `blocks` blocks on the diagonal of each weight, from 0, of
    :math:`\lceil m/N \rceil \times \lceil n/N \rceil` each, in all about :math:`mn/N` numbers; no scale, no factors.

    The update has a rank of up to :math:`\min(m, n)` and leaves merged, as a weight patch or as entries (SHiRA), not as
    a LoRA. Adapted are q, k, v, up and down, as published, by AdamW without weight decay after 100 steps of warm-up, at
    2.5e-4 (commonsense), 5e-4 (GSM8K) or 1.2e-3 (MetaMath). Two departures: the published code drops 5 % of the blocks'
    input, here there is no dropout; and a number of blocks that leaves some without a row or a column of the weight,
    which the code counts and which never learn, is refused.
    """
    options = {"r": 0, "granularity": "diagonal", "diagonal_blocks": blocks, "density": 1.0}
    return row(overrides, **options, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])


@register(
    "smt",
    paper="He et al., 2025",
    moves="nothing",
    use_when="a few large blocks should learn, where the gradient of the first steps is largest, at the price of dense "
    "products",
    cost="at the start the gradients of 100 steps; with phase1='full' 16 bytes a targeted entry meanwhile",
    claim="86.8 % on commonsense tasks with Llama-3 8B at 0.71 % of its numbers",
)
def smt(
    attention: float | int | None = 0.0084,
    mlp: float | int | None = None,
    block_size: int = 256,
    score: BlockScore = "abs_of_mean",
    phase1: Literal["probe", "full"] = "probe",
    warmup_steps: int = 100,
    warmup_lr: float = 9.65e-6,
    of: Literal["model", "group"] = "model",
    **overrides: Any,
) -> Method:
    """Sparse matrix tuning (arXiv:2405.15525): blocks of 256 x 256 with the largest summed gradient over all layers.

    `attention` (q, k and v, never o) and `mlp` (gate, up, down) have separate budgets: a whole number of blocks (890 in
    the released peft script), or a fraction, `of` all two-dimensional weights of the model, embeddings and head
    included, as released, or of the `group`'s own weights; None leaves the group out. `score` ranks the blocks:
    `abs_of_mean` (what the code does for attention, whatever it is asked for), `mean_of_abs`, `l2`.

    `phase1` is what happens in the first `warmup_steps` steps, whose gradients are added up. `probe`: nothing trains,
    the gradients are read at the pretrained weights. `full`: all targeted weights train at `warmup_lr`, as published,
    and are put back bit for bit; the published code never does that, so that its own update is dense. Either way the
    Trainer's run is the second phase, from the pretrained weights, with an optimizer of its own (AdamW, weight decay 0;
    paper: 9.65e-6, released peft script: 1e-4).

    For models that name their matrices otherwise pass `budget=GlobalByGroup({pattern: blocks})` and `target_modules`.
    """
    if phase1 not in ("probe", "full"):
        raise ValueError(f"phase1={phase1!r} is unknown; choose 'probe' (gradients are read) or 'full' (and rewound).")
    groups = {modules: budget for modules, budget in ((ATTENTION, attention), (MLP, mlp)) if budget is not None}
    if not groups:
        raise ValueError("attention=None and mlp=None leave no group with a budget. Give one of them, e.g. mlp=0.0084.")
    blocks = {"score": score, "block_size": block_size}
    if phase1 == "full":
        criterion = WarmedBlockGradient(warmup_steps=warmup_steps, warmup_lr=warmup_lr, **blocks)
    else:
        criterion = BlockGradient(steps=warmup_steps, **blocks)
    options = {
        "r": 0,
        "granularity": "block",
        "block_size": block_size,
        "criterion": criterion,
        "budget": GlobalByGroup({f"({'|'.join(modules)})": budget for modules, budget in groups.items()}, of=of),
        "target_modules": [name for modules in groups for name in modules],
    }
    return row(overrides, **options)
