"""More of what is killed: runs that leave a page, a picture, a card or a log beside the adapter, and small files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import tiny
import torch
from endurance.work import (
    NOTHING_WHOLE,
    TARGETS,
    Work,
    batches,
    digest,
    files_digest,
    saving,
    train_or_go_on,
    whole_files,
)
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_sparse_peft import (
    Prune,
    RunReportCallback,
    SparseLoraConfig,
    SupportTelemetryCallback,
    initialize_support,
    methods,
    trainer_options,
)
from hf_sparse_peft.finetuning import fine_tune
from hf_sparse_peft.optim.zeroth_order_log import read_log
from hf_sparse_peft.pruning import EssentialSparsity, prune_model, recover_adapter, save_kept_units, slice_model
from hf_sparse_peft.training import ZerothOrderTrainer, draw_support_history
from hf_sparse_peft.utils.file_length import read_safetensors

STEPS = 6
OPTIONS = {
    "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "per_device_train_batch_size": 2,
    "dataloader_pin_memory": False, "logging_strategy": "steps", "logging_steps": 2,
}  # fmt: skip


def _quiet() -> None:
    warnings.filterwarnings("ignore", ".*(Training goes on from|damaged or of another run|could not be written)")


def whole_pages(folder: Path) -> None:
    """JSON, safetensors, pages and pictures that are there are whole."""
    whole_files(folder)
    for page in folder.rglob("*.html"):
        assert page.name.startswith(".") or page.read_text().rstrip().endswith("</html>"), page
    for picture in folder.rglob("*.png"):
        assert picture.name.startswith(".") or picture.read_bytes().endswith(b"IEND\xaeB`\x82"), picture


def _zeroth_order(folder: Path) -> str:
    method = methods.get("sparse-mezo", **TARGETS)

    def make() -> Trainer:
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(layers=1), method.config)
        args = tiny.arguments(folder / "run", STEPS, **OPTIONS)
        found = trainer_options(model, args, ZerothOrderTrainer)
        return ZerothOrderTrainer(model=model, train_dataset=tiny.TokenData(48), **found)

    with warnings.catch_warnings():
        _quiet()
        trainer = train_or_go_on(make)
    _, updates = read_log(next((folder / "run").glob("zeroth_order*")))
    assert len(list(updates)) == STEPS
    return digest(trainer.model.state_dict())


def _pruned():
    schedule = [Prune(final_fraction=0.5, start=0.0, end=0.8, every=1)]
    return SparseLoraConfig(r=2, density=0.1, schedule=schedule, **TARGETS)


def _report(folder: Path) -> str:
    telemetry = SupportTelemetryCallback(every=2)

    def make() -> Trainer:
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(layers=1), _pruned())
        found = trainer_options(model, tiny.arguments(folder / "run", STEPS, **OPTIONS))
        found["callbacks"] = [*found["callbacks"], telemetry, RunReportCallback(2)]
        return Trainer(model=model, train_dataset=tiny.TokenData(48), **found)

    with warnings.catch_warnings():
        _quiet()
        trainer = train_or_go_on(make)
        draw_support_history(telemetry.history, folder / "support.png")
    whole_pages(folder)
    return digest(trainer.model.state_dict()) + json.dumps([record["step"] for record in telemetry.history])


def _fine_tune(folder: Path) -> str:
    def run(resume: str | None):
        torch.manual_seed(0)
        args = tiny.arguments(folder / "run", STEPS, resume_from_checkpoint=resume, **OPTIONS)
        data = {"train_dataset": tiny.TokenData(48)}
        found = {"card": {"base_model": "org/base"}, "report": RunReportCallback(2)}
        return fine_tune(methods.Method(_pruned()), tiny.llama(layers=1), args, data=data, **found)

    with warnings.catch_warnings():
        _quiet()
        try:
            done = run("true")
        except ValueError as error:
            if not any(text in str(error) for text in NOTHING_WHOLE):
                raise
            done = run(None)
    figures = json.loads((folder / "run" / "figures.json").read_text())
    whole_pages(folder)
    shipped = read_safetensors(done.folder / "adapter_model.safetensors")[0]
    return digest(shipped) + str(figures["adapter_bytes"])


def _initialize_support(folder: Path) -> str:
    model = get_peft_model(tiny.llama(layers=1), SparseLoraConfig(r=0, density=0.1, **TARGETS))
    initialize_support(model, batches(4), "fisher", save_to=folder / "support.safetensors", show_progress=False)
    return digest(model.state_dict()) + files_digest(folder)


def _sliced():
    base = tiny.llama(layers=2)
    report = prune_model(base, batches(), method="cfsp", sparsity=0.5, show_progress=False)
    return slice_model(base, report.kept)


def _recover(model, place: Path) -> None:
    torch.manual_seed(0)
    small = get_peft_model(_sliced(), LoraConfig(r=2, init_lora_weights=False, **TARGETS))
    recover_adapter(small, place, tiny.llama(layers=2))


def _curve(model, place: Path) -> None:
    curve = EssentialSparsity("global", (0.0, 0.5), (1.0, 0.5), {"q_proj": (0.0, 0.5)})
    curve.save(place / "curve.json")


WORKS: dict[str, Work] = {
    "train: zeroth order, its log": Work(_zeroth_order),
    "train: page, picture": Work(_report, look=whole_pages),
    "train: fine_tune, card, figures": Work(_fine_tune, look=whole_pages),
    "initialize_support": Work(_initialize_support, look=whole_files),
    "save_kept_units": saving(lambda model, place: save_kept_units(_sliced(), place), over=True),
    "recover_adapter, over another": saving(_recover, over=True),
    "EssentialSparsity.save": saving(_curve, over=True),
}
