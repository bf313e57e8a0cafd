"""Measuring adapters with lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..utils.tables import Table, table


@dataclass(frozen=True)
class Evaluation:
    """What lm-evaluation-harness measured."""

    scores: dict[str, dict[str, float]]
    """Task -> metric (with its filter, as in "exact_match,strict-match") -> value."""
    errors: dict[str, dict[str, float]] = field(repr=False)
    """Task -> metric -> standard error, as far as there is one."""
    examples: dict[str, int] = field(repr=False)
    """Task -> examples that were measured."""
    versions: dict[str, Any] = field(repr=False)
    """Task -> version of its definition."""

    def table(self) -> Table:
        """A line for each metric of each task; `str()` of it is aligned text."""
        rows = [
            (task, metric, value, self.errors.get(task, {}).get(metric), self.examples.get(task))
            for task, metrics in self.scores.items()
            for metric, value in metrics.items()
        ]
        return table(("task", "metric", "value", "standard error", "examples"), rows)

    def metrics(self) -> dict[str, float]:
        """Every value under "task metric", as `adapter_card(metrics=...)` takes them."""
        return {f"{task} {name}": value for task, found in self.scores.items() for name, value in found.items()}


def check_harness() -> None:
    """Refuse to begin without lm-evaluation-harness.

    Raises:
        ImportError: it is not installed; says how to get it.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Evaluation needs lm-evaluation-harness ({error}): pip install 'hf-sparse-peft[eval]', or pip install "
            "lm-eval."
        ) from error


def evaluate_adapter(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str | dict[str, Any]],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 1,
    apply_chat_template: bool = False,
    task_folder: str | None = None,
) -> Evaluation:
    """Measure a causal or sequence-to-sequence language model, adapted or not, on tasks of lm-evaluation-harness.

    The harness gets the model as it is, so what is active is measured, on the base as it was loaded, quantised or not.
    `hub.load_adapter` loads an adapter's folder.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: names of tasks, or definitions as the harness takes them.
        num_fewshot: examples in the prompt; None: what the task says.
        limit: examples of each task, or below 1 a fraction of them; None: all.
        batch_size: examples at once, or "auto".
        apply_chat_template: whether prompts go through the tokenizer's chat template.
        task_folder: folder with further task definitions (YAML).

    Raises:
        ImportError: lm-eval is not installed; says how to get it.
        ValueError: no tasks, or names that the harness does not know.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise ValueError("tasks is empty; name one or more, e.g. gsm8k,arc_easy.")
    manager = TaskManager(include_path=task_folder)
    unknown = [task for task in tasks if isinstance(task, str) and not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"tasks={unknown[0]!r} is no task of lm-eval. `lm-eval ls tasks` lists them.")
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        task_manager=manager,
        log_samples=False,
    )
    return _read(found)


def _read(found: dict[str, Any]) -> Evaluation:
    """From the harness's keys, which are "metric,filter" and "metric_stderr,filter" beside other things."""
    scores: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for task, entries in found["results"].items():
        for key, value in entries.items():
            name, comma, kind = key.partition(",")
            if not comma or not isinstance(value, (int, float)):
                continue
            is_error, plain = name.endswith("_stderr"), name.removesuffix("_stderr")
            shown = plain if kind == "none" else f"{plain},{kind}"
            (errors if is_error else scores).setdefault(task, {})[shown] = float(value)
    samples = {task: counts["effective"] for task, counts in found.get("n-samples", {}).items()}
    return Evaluation(scores, errors, samples, dict(found.get("versions", {})))
