"""A run: train a method's adapter, measure before and after, leave the adapter with its card and pictures."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .. import hub
from ..hub.push import check_base_name
from ..methods import Method
from ..training import RunReportCallback, SupportTelemetryCallback, draw_support_history
from ..tuners.shared.config import AdapterConfig
from ..utils.file_writing import whole_file
from ..utils.tables import Table, table
from .method import full_fine_tuning, method_of_card

Figures = dict[str, float]


@dataclass(frozen=True)
class FineTuned:
    """What a run did and left."""

    figures: Figures
    """Measured before (`..._before`) and after, `train_loss`, `seconds_per_step`, `trainable` numbers, bytes of the
    adapter's file."""
    folder: Path
    """Adapter and card."""
    picture: Path | None
    """Supports and ranks over the run; None where there are none, or matplotlib is not installed."""
    model: PeftModel = field(repr=False)
    trainer: Trainer = field(repr=False)
    method: Method = field(repr=False)

    def table(self) -> Table:
        """A line for each figure, before and after; `str()` of it is aligned text."""
        names = [name for name in self.figures if not name.endswith("_before")]
        return table(
            ("figure", "before", "after"), [(n, self.figures.get(f"{n}_before"), self.figures[n]) for n in names]
        )


def fine_tune(
    method: Method,
    base: nn.Module,
    args: TrainingArguments,
    *,
    data: Mapping[str, Any],
    measure: Callable[[Trainer], Figures] = lambda trainer: {},
    trainer_class: type[Trainer] = Trainer,
    load_dense: Callable[[], PreTrainedModel] | None = None,
    card: Mapping[str, Any] | None = None,
    around: Callable[[PeftModel], nn.Module] = lambda model: model,
    telemetry: SupportTelemetryCallback | None = None,
    report: RunReportCallback | None = None,
) -> FineTuned:
    """Train `method` on `base` and leave `adapter/` (with its card), `figures.json` and `support.png` in
    `args.output_dir`. With `args.push_to_hub` the adapter is uploaded, once, at the end.

    Args:
        method: what is trained.
        base: the base model, prepared for training.
        args: the Trainer's; `resume_from_checkpoint` is a folder, or "true" for the newest.
        data: what `trainer_class` takes beside model, arguments, callbacks and optimizer.
        measure: figures of the model in a Trainer, called before and after.
        trainer_class: the Trainer, or a subclass.
        load_dense: the base without quantisation, for the methods that learn from full fine-tuning.
        card: further arguments of `adapter_card`.
        around: gives the model that is trained, where the adapted one is a part of it.
        telemetry: records the run in place of one with its defaults, every `logging_steps`.
        report: writes `report.html`, and tells the card of the run; the card's results are then those of `measure`.

    Raises:
        ValueError: the method needs another Trainer, or `load_dense`; an upload would name the base by a path; or what
            the Trainer refuses.
    """
    push, args.push_to_hub = args.push_to_hub, False  # not by every checkpoint
    cls = trainer_for(method, trainer_class)
    model = get_peft_model(base, method.config)
    if push and isinstance(method.config, AdapterConfig):
        check_base_name(model, base_model=(card or {}).get("base_model"))
    resume = True if str(args.resume_from_checkpoint).lower() == "true" else args.resume_from_checkpoint
    if not resume:  # a checkpoint brings what was prepared
        method.prepare(model, full_fine_tuning(load_dense, args, **data) if load_dense else None)
    telemetry = telemetry or SupportTelemetryCallback(every=max(1, int(args.logging_steps)))
    trainer = cls(
        model=around(model),
        args=args,
        **data,
        callbacks=[*method.callbacks(model), telemetry, *([report] if report else [])],
        optimizers=(method.optimizer(model, args), None),
    )
    telemetry.attach(trainer)
    figures = {f"{name}_before": value for name, value in measure(trainer).items()}
    figures["trainable_before"] = model.get_nb_trainable_parameters()[0]
    result = trainer.train(resume_from_checkpoint=resume)
    # Training leaves its autocast around forward; the model is measured and shipped without it, as it was before.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if hasattr(model, "compact"):  # adapters of other types have nothing that died
        model.compact()
    card = dict(card or {})
    measured = measure(trainer)
    if report is not None:
        card = {"metrics": {name: round(value, 4) for name, value in measured.items()}, "run": report.record, **card}
    figures |= measured | {
        "train_loss": result.training_loss,
        "seconds_per_step": result.metrics["train_runtime"] / max(result.global_step, 1),
        "trainable": model.get_nb_trainable_parameters()[0],
    }
    folder = Path(args.output_dir) / "adapter"
    picture = None
    if trainer.is_world_process_zero():
        picture = _write(model, method, trainer, telemetry, figures, folder, card, push)
    return FineTuned(figures, folder, picture, model, trainer, method)


def trainer_for(method: Method, trainer_class: type[Trainer] = Trainer) -> type[Trainer]:
    """`trainer_class`, or the one that the method needs in the place of a plain one.

    Raises:
        ValueError: the method needs another.
    """
    needed = method.trainer_class
    if issubclass(trainer_class, needed):
        return trainer_class
    if trainer_class is Trainer:
        return needed
    name = method.info.name if method.info else "This config"
    raise ValueError(f"{name} trains with {needed.__name__}, and this run with {trainer_class.__name__}.")


def _write(
    model: PeftModel, method: Method, trainer: Trainer, telemetry: SupportTelemetryCallback, figures: Figures,
    folder: Path, card: dict[str, Any], push: bool,
) -> Path | None:  # fmt: skip
    args = trainer.args
    shown = {name: round(value, 4) for name, value in figures.items() if name != "seconds_per_step"}  # the machine's
    notes = f"Trained for {trainer.state.global_step} steps by hf_sparse_peft.finetuning, seed {args.seed}."
    card = {**method_of_card(method), "metrics": shown, "notes": notes, **card}
    ours = isinstance(method.config, AdapterConfig)
    hub.save_adapter(model, folder, **card) if ours else model.save_pretrained(str(folder))
    figures["adapter_bytes"] = (folder / "adapter_model.safetensors").stat().st_size
    with whole_file(folder.parent / "figures.json") as file:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    picture, last = None, telemetry.history[-1] if telemetry.history else {}
    if (last.get("density") or last.get("rank")) and importlib.util.find_spec("matplotlib"):
        title = f"{card['method']}, seed {args.seed}"
        picture = draw_support_history(telemetry.history, folder.parent / "support.png", title)
    if push:
        repo = args.hub_model_id or folder.parent.name
        options = {"private": args.hub_private_repo, "token": args.hub_token}
        hub.push_to_hub(model, repo, **options, **card) if ours else model.push_to_hub(repo, **options)
    return picture
