"""Methods that `learning.py` compares, at equal trained numbers, and where the sweep of each begins.

`$numbers` are those of a LoRA of `$rank` on all targeted linears; `$half` is half of the rank and `$rest` what it
leaves of the numbers, `$low` and `$high` a quarter and three of the rank and `$high_rest` what `$low` leaves; `$alpha`
and `$double` are twice the rank, `$more` is half as much again, `$blocks` four times it (OFT's blocks of as many
numbers); `$share` is the share of rows and of columns of a subnet with as many numbers, `$sparsity` the share of
weights that is left; `$every`, `$fifth` and `$middle` are a tenth, a fifth and half of the steps. Learning rates are
the middle of the sweep on the demo base.

Not equal in all: full fine-tuning trains everything. AdaLoRA starts with half as many more, `joint-budget` with twice
as many before it chooses (`joint-budget-start` chooses before the first step); LIFT keeps room for as many retired
entries as it trains; DoRA has a number a row more; rows, columns, blocks and OFT are up to 8 % below, where units do
not divide the budget. LoSiA keeps its own schedule of the rate (cosine with restarts), LIFT its betas (0.9, 0.95),
RoSA its dropout (0.05) and its rates' ratio (2/7).
"""

from __future__ import annotations

from typing import NamedTuple

NUMBERS = "budget={type: numbers, numbers: $numbers}"
REST = "budget={type: numbers, numbers: $rest}"
ENTRIES = f"shira:{NUMBERS}"
HYBRID = f"sparse-lora:r=$half,{REST}"
GRADIENT = "criterion=gradient"


class Candidate(NamedTuple):
    """A method with options, the middle of its sweep, and what it is compared as."""

    text: str
    rate: float
    family: str


CANDIDATES = {
    # Upstream's.
    "full": Candidate("full", 4e-4, "upstream"),
    "lora": Candidate("lora:r=$rank,lora_alpha=$alpha", 4e-3, "upstream"),
    "rslora": Candidate("rslora:r=$rank,lora_alpha=16", 2e-3, "upstream"),
    "dora": Candidate("dora:r=$rank,lora_alpha=$alpha", 4e-3, "upstream"),
    "pissa": Candidate("pissa:r=$rank,lora_alpha=$rank", 2e-3, "upstream"),
    "adalora": Candidate(
        "adalora-peft:init_r=$more,target_r=$rank,tinit=$every,tfinal=$middle,every=2,lora_alpha=$alpha",
        8e-3, "upstream",
    ),
    "miss": Candidate("miss:r=$double", 4e-3, "upstream"),
    "oft": Candidate("oft:oft_block_size=$blocks", 8e-3, "upstream"),
    "peft-shira": Candidate("peft-shira:r=$rank", 8e-3, "upstream"),
    "peft-supertuning": Candidate("peft-supertuning:sparsity=$sparsity", 8e-3, "upstream"),
    # Entries chosen once.
    "entries-random": Candidate(f"{ENTRIES},criterion=random", 8e-3, "entries"),
    "entries-magnitude": Candidate(f"{ENTRIES},criterion=magnitude", 8e-3, "entries"),
    "entries-gradient": Candidate(f"{ENTRIES},{GRADIENT}", 2e-3, "entries"),
    "entries-fisher": Candidate(f"{ENTRIES},criterion=fisher", 2e-3, "entries"),
    "entries-snip": Candidate(f"{ENTRIES},criterion=snip", 2e-3, "entries"),
    "entries-low-rank": Candidate(f"{ENTRIES},criterion={{type: low_rank_magnitude, rank: 32}}", 8e-3, "entries"),
    "entries-grid": Candidate(
        f"{ENTRIES},{GRADIENT},pattern={{type: grid, rows: 0.5, columns: 0.5}}", 2e-3, "entries"
    ),
    # Other units.
    "blocks": Candidate(f"{ENTRIES},{GRADIENT},granularity=block,block_size=16", 2e-3, "structured"),
    "rows": Candidate(f"{ENTRIES},{GRADIENT},granularity=row", 1e-3, "structured"),
    "columns": Candidate(f"{ENTRIES},{GRADIENT},granularity=column", 2e-3, "structured"),
    "rows-random": Candidate(f"{ENTRIES},criterion=random,granularity=row", 1e-3, "structured"),
    "columns-random": Candidate(f"{ENTRIES},criterion=random,granularity=column", 4e-3, "structured"),
    "blocks-random": Candidate(f"{ENTRIES},criterion=random,granularity=block,block_size=16", 4e-3, "structured"),
    "subnet": Candidate("shira:granularity=subnet,subnet_shares=[$share, $share],criterion=random", 4e-3, "structured"),
    # Supports that move.
    "spiel-ag": Candidate(f"spiel-ag:{NUMBERS},every=$every,steps=3", 8e-3, "moving"),
    "rigl": Candidate(f"rigl:{NUMBERS},every=$every", 8e-3, "moving"),
    "lift": Candidate("lift:budget_rank=$rank,filter_rank=32,every=$fifth", 8e-3, "moving"),
    "losia": Candidate("losia:share=$share,every=$every", 8e-3, "moving"),
    "entries-gradient-moving": Candidate(f"spiel-ag:{NUMBERS},{GRADIENT},every=$every,steps=3", 2e-3, "moving"),
    "entries-low-rank-moving": Candidate(
        "lift:budget_rank=$rank,filter_rank=32,every=$every,per_unit_age=True", 8e-3, "moving"
    ),
    # Sparse and low-rank.
    "rosa": Candidate(f"rosa:r=$half,lora_alpha=$rank,{REST},warmup=$every", 4e-3, "hybrid"),
    "sparse-lora": Candidate("sparse-lora:r=$high", 4e-3, "hybrid"),
    "sparse-lora-random": Candidate("sparse-lora:r=$high,criterion=random", 4e-3, "hybrid"),
    "sparse-lora-gradient": Candidate(f"sparse-lora:r=$high,{GRADIENT}", 4e-3, "hybrid"),
    "sparse-lora-columns": Candidate("sparse-lora:r=$high,granularity=column", 4e-3, "hybrid"),
    "hybrid": Candidate(HYBRID, 4e-3, "hybrid"),
    "hybrid-low-share": Candidate("sparse-lora:r=$low,budget={type: numbers, numbers: $high_rest}", 4e-3, "hybrid"),
    "hybrid-equal-rates": Candidate(f"{HYBRID},{GRADIENT},values_ratio=1.0", 2e-3, "hybrid"),
    "hybrid-quarter": Candidate(f"{HYBRID},{GRADIENT},values_ratio=0.25", 4e-3, "hybrid"),
    "hybrid-quarter-alpha": Candidate(f"{HYBRID},{GRADIENT},values_ratio=0.25,lora_alpha=$alpha", 4e-3, "hybrid"),
    "hybrid-random-double": Candidate(f"{HYBRID},criterion=random,values_ratio=2.0,lora_alpha=$alpha", 4e-3, "hybrid"),
    "joint-budget": Candidate(
        "joint-budget:r=$rank,lora_alpha=$alpha,budget={type: numbers, numbers: $numbers},fraction=0.5", 4e-3, "hybrid"
    ),
    "joint-budget-start": Candidate(
        "joint-budget:r=$rank,lora_alpha=$alpha,budget={type: numbers, numbers: $numbers},fraction=0.5,at_start=True",
        4e-3, "hybrid",
    ),
}  # fmt: skip
"""By name; every other candidate is a method with options, see harness.py, and its sweep is `lora`'s."""


def find(name: str) -> Candidate:
    """A candidate of `CANDIDATES`, or a method with options."""
    return CANDIDATES.get(name) or Candidate(name, CANDIDATES["lora"].rate, "given")
