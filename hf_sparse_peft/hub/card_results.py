"""What a card says of evaluations: the Hub's `EvalResult`s, and a table of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

Metrics = Mapping[str, Any] | Sequence[EvalResult]


def eval_results(metrics: Metrics, evaluated_on: str | None, pipeline: str | None) -> list[EvalResult]:
    """`metrics` as the Hub keeps them; names and values are given the data set `evaluated_on`.

    Raises:
        ValueError: neither a mapping of names to values nor a list of `EvalResult`.
    """
    if not isinstance(metrics, Mapping):
        if not isinstance(metrics, Sequence) or not all(isinstance(one, EvalResult) for one in metrics):
            raise ValueError(
                f"metrics={metrics!r} is not a mapping; pass names and numbers, e.g. {{'accuracy': 0.91}}, or a list "
                "of huggingface_hub.EvalResult."
            )
        return list(metrics)
    data = evaluated_on or ""
    return [EvalResult(pipeline or "other", data, data, str(name), value) for name, value in metrics.items()]


def for_metadata(results: Sequence[EvalResult], is_hub_id: Callable[[str], bool]) -> list[EvalResult]:
    """Those that the Hub takes: finite numbers, on one of its data sets."""
    return [one for one in results if is_hub_id(one.dataset_type) and _is_finite(one.metric_value)]


def result_rows(results: Sequence[EvalResult]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table; the data have a column where any are named."""
    named = any(one.dataset_name for one in results)
    rows = [(one.metric_name or one.metric_type, _shown(one.metric_value), one.dataset_name) for one in results]
    return ("metric", "value", "data")[: 2 + named], [row[: 2 + named] for row in rows]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
