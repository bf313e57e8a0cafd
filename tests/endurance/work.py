"""What is killed: trainings, saves, exports, pruning walks, calibrations, as a user's script would run them twice.

Each work is a function of a folder that begins or goes on, whatever it finds there, and returns a digest of all that it
made. `look` raises where something that is there after a kill is not whole.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_sparse_peft import (
    AccumulatedGradient,
    AgedAdamWSpec,
    Allocate,
    AverageRank,
    Linear,
    MaskedLoraConfig,
    Prune,
    Regrow,
    SampleLayers,
    SparseLoraConfig,
    SupportTelemetryCallback,
    calibrate,
    hub,
    methods,
    save_masks,
    save_support,
    trainer_options,
)
from hf_sparse_peft.merging import binarise_adapter, compress_adapter
from hf_sparse_peft.pruning import NM, LoRAPruneCallback, PruneUnits, prune_model, reconstruct, save_sliced, slice_model
from hf_sparse_peft.tuners.masked_lora import DenseUpdate, MagnitudeMask
from hf_sparse_peft.utils.file_length import read_safetensors

STEPS, SAVE_STEPS = 12, 3
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SAFETENSORS = (".safetensors", ".compeft", ".bitdelta")
NOTHING_WHOLE = ("No valid checkpoint found", "No checkpoint before it is whole")


@dataclass(frozen=True)
class Work:
    """A user's script."""

    run: Callable[[Path], str]
    """Does it, or goes on with it, in a folder; returns the digest of what it made."""
    prepare: Callable[[Path], object] = lambda folder: None
    """What is in the folder before."""
    look: Callable[[Path], object] = lambda folder: None
    """Raises where something in the folder is torn."""


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = torch.as_tensor(tensors[name]).detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()


def files_digest(folder: Path) -> str:
    """Of all files' contents; safetensors, by whatever name, of their tensors and metadata, as the order in the header
    is free. Cards, which a bad disk may cost alone, stand behind a `|`."""
    found, cards = hashlib.sha256(), hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and not _is_leftover(file)):
        of = cards if file.name == "README.md" else found
        of.update(f"{file.relative_to(folder)}\n".encode())
        if file.suffix in SAFETENSORS:
            tensors, metadata = read_safetensors(file)
            of.update((digest(tensors) + json.dumps(metadata, sort_keys=True)).encode())
        else:
            of.update(file.read_bytes())
    return f"{found.hexdigest()}|{cards.hexdigest()}"


def _is_leftover(file: Path) -> bool:
    return any(".writing-" in part for part in file.parts)


def whole_files(folder: Path) -> None:
    """Every JSON and safetensors file that is there under its own name can be read."""
    for file in folder.rglob("*"):
        if _is_leftover(file):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix in SAFETENSORS:
            read_safetensors(file)


# Trainings


def moving():
    schedule = [
        Prune(start=0.1, end=0.9, every=2),
        Regrow(every=4, grow=AccumulatedGradient(steps=2), fraction=Linear(0.9, 0.1)),
        Allocate(budget=AverageRank(2), every=2, initial_warmup=0.1, final_warmup=0.2),
    ]
    config = SparseLoraConfig(r=4, density=0.1, schedule=schedule, optimizer=AgedAdamWSpec(), **TARGETS)
    return get_peft_model(tiny.llama(layers=1), config)


def _layers():
    config = SparseLoraConfig(r=2, density=0.1, schedule=[SampleLayers(trained=0.5, every=3, probe_batch=2)], **TARGETS)
    return get_peft_model(tiny.llama(layers=2), config)


def _masked():
    schedule = [Regrow(every=3, grow="gradient", fraction=0.5, space="mask")]
    config = MaskedLoraConfig(update=DenseUpdate(), mask=MagnitudeMask(0.5), schedule=schedule, **TARGETS)
    return get_peft_model(tiny.llama(layers=1), config)


def _calibrated():
    return get_peft_model(tiny.llama(layers=1), SparseLoraConfig(r=0, density=0.1, criterion="fisher", **TARGETS))


def _lora():
    return get_peft_model(tiny.llama(layers=3), LoraConfig(r=3, **{**TARGETS, "target_modules": "all-linear"}))


def trainer_of(make, out: Path, steps: int, **options) -> Trainer:
    torch.manual_seed(0)
    model = make()
    defaults = {
        "save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "dataloader_pin_memory": False,
    }  # fmt: skip
    args = tiny.arguments(out, steps, **{**defaults, **options})
    if make is _lora:
        found = {"args": args, "callbacks": [LoRAPruneCallback(PruneUnits(every=2, whole_first=0.0))]}
    else:
        found = trainer_options(model, args)
        found["callbacks"] = [*found["callbacks"], SupportTelemetryCallback(every=2)]
    return Trainer(model=model, train_dataset=tiny.TokenData(48), **found)


def train_or_go_on(make: Callable[[], Trainer]) -> Trainer:
    """Train from the newest checkpoint, or from the start where none is whole."""
    trainer = make()
    try:
        trainer.train(resume_from_checkpoint=True)
    except ValueError as error:
        if not any(text in str(error) for text in NOTHING_WHOLE):
            raise
        trainer = make()
        trainer.train()
    return trainer


def training(make, steps: int = STEPS, **options) -> Callable[[Path], str]:
    """Trains, from the newest checkpoint where there is one; digest of model, optimizer and the shipped adapter."""

    def run(folder: Path) -> str:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(Training goes on from|has one scalar step|damaged or of another run)")
            trainer = train_or_go_on(lambda: trainer_of(make, folder / "run", steps, **options))
        assert trainer.state.global_step == steps
        readable_log(folder / "run" / "support_log.jsonl", steps)
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        state = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
        for parameter, held in trainer.optimizer.optimizer.state.items():
            state |= {f"optimizer.{names[parameter]}.{key}": torch.as_tensor(value) for key, value in held.items()}
        masks = getattr(trainer.model.get_base_model(), "unit_masks", None)
        state |= {} if masks is None else {f"mask.{n}": mask.factors for n, mask in enumerate(masks.masks)}
        trainer.save_model(str(folder / "shipped"))
        return digest(state) + digest(read_safetensors(folder / "shipped" / "adapter_model.safetensors")[0])

    return run


def readable_log(file: Path, last: int) -> None:
    """Every line is a record, and steps rise to the last one."""
    if file.exists():
        steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
        assert steps == sorted(set(steps)), steps
        assert steps[-1] == last, steps


# Saves and exports


def _filled(value: float, granularity: str = "row", r: int = 2):
    config = SparseLoraConfig(r=r, density=0.1, granularity=granularity, **TARGETS)
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(layers=1), config)
    generator = torch.Generator().manual_seed(int(value * 100))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def saving(save: Callable, *, over: bool = False, new: str | None = None, **model) -> Work:
    """Saves once; over an older save with `over`. With `new`, a folder that is whole where it is there, and is not
    written again."""

    def run(folder: Path) -> str:
        place = folder / "out"
        if new is None or not (place / new).exists():
            save(_filled(0.5, **model), place)
        leftovers = [file for file in folder.rglob("*") if _is_leftover(file)]
        assert new is not None or not leftovers, leftovers
        return files_digest(place)

    before = (lambda folder: save(_filled(0.25, **model), folder / "out")) if over else (lambda folder: None)
    return Work(run, before, whole_files)


def _save_sliced(model, place: Path) -> None:
    base = tiny.llama(layers=2)
    report = prune_model(base, batches(), method="cfsp", sparsity=0.5, show_progress=False)
    save_sliced(slice_model(base, report.kept), place)


def _export_slime(model, place: Path) -> None:
    hub.export_patch(model, place, "slime")


def _save_masks(model, place: Path) -> None:
    report = prune_model(tiny.llama(layers=1), method="magnitude", pattern=NM(2, 4), show_progress=False)
    save_masks(report.masks, place / "masks.safetensors")


def _compress(model, place: Path) -> None:
    """Both codes of an adapter, whose own files are the input."""
    hub.save_adapter(model, place.parent / "adapter")
    place.mkdir(exist_ok=True)
    compress_adapter(place.parent / "adapter", place / "adapter.compeft", density=0.2, show_progress=False)
    binarise_adapter(place.parent / "adapter", place / "adapter.bitdelta", show_progress=False)


# Walks


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, tiny.VOCAB, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids]


def walk(**options) -> Callable[[Path], str]:
    """Prunes a model that is loaded anew each time, with the folder as its checkpoint."""

    def run(folder: Path) -> str:
        model = tiny.llama(layers=3)
        report = prune_model(model, batches(), checkpoint=folder / "walk", show_progress=False, **options)
        return digest(model.state_dict()) + str(report.zeros)

    return run


def _reconstruct(folder: Path) -> str:
    dense, model = tiny.llama(layers=3), tiny.llama(layers=3)
    prune_model(model, method="magnitude", pattern=NM(2, 4), show_progress=False)
    torch.manual_seed(2)
    model = get_peft_model(model, methods.get("perp").config)
    data = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches(3)]
    report = reconstruct(
        model, dense, data, steps=4, learning_rate=2e-3, checkpoint=folder / "tuned", show_progress=False
    )  # fmt: skip
    return digest(model.state_dict()) + str((report.before, report.after))


def _calibrate(folder: Path) -> str:
    model = _calibrated()
    calibrate(model, batches(4), show_progress=False)
    save_support(model, folder / "support.safetensors")
    model.save_pretrained(str(folder / "adapter"))
    return digest(model.state_dict()) + files_digest(folder)


WORKS: dict[str, Work] = {
    "train: supports, ranks": Work(training(moving)),
    "train: layers": Work(training(_layers)),
    "train: masks of the base": Work(training(_masked)),
    "train: calibrated at the start": Work(training(_calibrated, steps=6)),
    "train: LoRAPrune": Work(training(_lora)),
    "save_pretrained, over another": saving(lambda model, place: model.save_pretrained(str(place)), over=True),
    "save_adapter": saving(hub.save_adapter),
    "save_adapter, over another": saving(hub.save_adapter, over=True),
    "save_support": saving(lambda model, place: save_support(model, place / "support.safetensors")),
    "save_masks": saving(_save_masks, over=True),
    "save_sliced": saving(_save_sliced, new="."),
    "export_lora, over another": saving(hub.export_lora, over=True),
    "export_shira": saving(hub.export_shira, granularity="entry", r=0),
    "export_patch, vllm": saving(hub.export_patch, new=".", r=0),
    "export_patch, slime": saving(
        lambda model, place: hub.export_patch(model, place, "slime"), new="weight_v000001", r=0
    ),
    "export_lora_for_llama_cpp": saving(hub.export_lora_for_llama_cpp),
    "compress_adapter, over another": saving(_compress, over=True),
    "merge_to_dense": saving(hub.merge_to_dense, new="."),
    "prune_model, sparsegpt": Work(walk(method="sparsegpt", pattern=NM(2, 4)), look=whole_files),
    "prune_model, wanda": Work(walk(method="wanda", sparsity=0.5), look=whole_files),
    "prune_model, cfsp": Work(walk(method="cfsp", sparsity=0.5), look=whole_files),
    "reconstruct": Work(_reconstruct, look=whole_files),
    "calibrate, save": Work(_calibrate, look=whole_files),
}
SMALL = ("save_pretrained, over another", "prune_model, wanda")
"""Of which the default suite runs a sample."""
