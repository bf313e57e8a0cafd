"""The bars that `step_cost.py` holds its figures to, and the comparison of two checkouts."""

from __future__ import annotations

from typing import Any

Figures = dict[str, Any]
SPARSE = ("entry", "block32", "row", "column")
STRUCTURED = ("block32", "row", "column")
EVERY = (*SPARSE, "hybrid")
NUMBERS = (*EVERY, "subnet", "entry_grid")
ALL, BF16, FP32, NF4 = ("bf16", "fp32", "nf4"), ("bf16",), ("fp32",), ("nf4",)
CPU, CUDA, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")


def _all(candidates: tuple[str, ...], limit: float) -> dict[str, float]:
    return dict.fromkeys(candidates, limit)


BARS = (
    ("saved bytes", "lora_lean", BF16, BOTH, {**_all(EVERY, 0.89), "column": 0.80, "subnet": 0.84, "entry_grid": 0.85}),
    ("saved bytes", "lora", BF16, BOTH, _all(("entry", "block32", "row", "hybrid"), 0.56)),
    ("step time", "lora_lean", BF16, CPU, dict(zip(EVERY, (1.12, 1.05, 0.88, 0.93, 1.20), strict=True))),
    ("step time", "lora", BF16, CPU, _all(SPARSE, 0.86)),
    ("step time", "lora", FP32, CPU, {"entry": 1.18, "block32": 1.00, "row": 0.88, "column": 0.93}),
    ("step time", "lora", NF4, BOTH, {"entry": 1.05, "block32": 1.00, "row": 1.00, "column": 1.00}),
    ("step time", "frozen", BF16, CUDA, {**_all(STRUCTURED, 1.06), "subnet": 1.04, "entry_grid": 1.10}),
    ("step time", "frozen", BF16, CPU, {"entry_grid": 1.15}),
    ("step time", "lora", BF16, CUDA, _all((*STRUCTURED, "subnet"), 0.73)),
    ("step time", "shira", ALL, BOTH, {"entry": 0.85}),
    ("step time", "supertuning", ALL, BOTH, {"entry": 0.85}),
    ("peak bytes", "lora", NF4, BOTH, _all(SPARSE, 1.00)),
    ("peak bytes", "lora", NF4, CPU, {"hybrid": 0.65, "subnet": 0.60}),
    ("peak bytes", "lora", BF16, CUDA, _all((*STRUCTURED, "subnet"), 0.84)),
    ("peak bytes", "lora", NF4, CUDA, {"hybrid": 0.85}),
    ("state", "lora", ALL, BOTH, _all(NUMBERS, 1.00)),
    ("state + index", "lora", ALL, BOTH, _all(NUMBERS, 1.15)),
    ("state + index + ages", "lora", ALL, BOTH, _all(EVERY, 1.28)),
    ("file", "lora", ALL, BOTH, _all(EVERY, 1.45)),
    ("file, bf16", "lora", ALL, BOTH, _all(EVERY, 0.90)),
    ("move_share", None, ALL, BOTH, _all(EVERY, 0.05)),
    ("collect_over_plain", None, ALL, BOTH, _all(EVERY, 1.60)),
    ("callback_share", None, ALL, BOTH, _all(EVERY, 0.01)),
)
"""Figure, reference (None: the candidate's own figure), bases, devices, and the highest value that each may have. State
is gradient and optimizer state; it and files are bytes a trained number."""
CHANGE = 1.03
"""What a figure may grow to from one checkout to the other: ratios of times repeat within a few percent."""


def check(base: str, device: str, figures: Figures) -> list[dict[str, Any]]:
    """Every bar that applies to what was measured over `base`: name, what was got and wanted, whether it is met."""
    results = []
    for key, reference, bases, devices, limits in BARS:
        if base not in bases or device not in devices:
            continue
        for candidate in (name for name in limits if name in figures):
            row, over = figures[candidate], f" / {reference}" if reference else ""
            got = row["over"].get(reference, {}).get(key) if reference else row.get(key)
            if got is not None:
                results.append(_result(f"[{base}] {key}: {candidate}{over}", got, limits[candidate]))
    return results


def expected() -> list[dict[str, Any]]:
    """What is expected of a GPU alone: `name` as in `check`, and `wanted`."""
    return [
        {"name": f"[{base}] {key}: {candidate} / {reference}", "wanted": limit}
        for key, reference, bases, devices, limits in BARS
        if devices == CUDA
        for base in bases
        for candidate, limit in limits.items()
    ]


def compare(base: str, row: Figures, earlier: list[Figures]) -> list[dict[str, Any]]:
    """Bars against another checkout's `rows`: every figure over LoRA's of the same process, now over before.

    Raises:
        ValueError: `earlier` holds no run of this base in the same setting on the same machine.
    """
    same = [old for old in earlier if old["base"] == base and _setting(old) == _setting(row)]
    if not same:
        raise ValueError(f"--against has no run of {base} in this setting on this machine: use the same options.")
    before, results = same[-1]["figures"], []
    for candidate in (name for name in row["figures"] if name in before):
        old = before[candidate].get("over", {}).get("lora", {})
        for key, now in row["figures"][candidate].get("over", {}).get("lora", {}).items():
            if old.get(key):
                name = f"[{base}] {key}, now / before: {candidate}"
                results.append(_result(name, now / old[key], CHANGE))
    return results


def _setting(row: Figures) -> dict[str, Any]:
    return {name: value for name, value in row["setting"].items() if name != "code"}


def _result(name: str, got: float, wanted: float) -> dict[str, Any]:
    return {"name": name, "got": got, "wanted": wanted, "met": round(got, 3) <= wanted}
