"""The single checks of `doctor`: each looks at one kind of mistake and says what it finds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..optim.optimizer_kinds import unit_views
from ..training import make_optimizer, optimizer_spec, trainer_class_for
from ..training.executor import RuleExecutor
from ..training.trainer_checks import refuse_sharded
from ..tuners.shared.config import AdapterConfig
from ..tuners.shared.target_checks import name_left_out, refuse_unworkable
from .dry_run import active_layers
from .findings import Finding, from_message
from .memory_trace import trace_step
from .meta_base import batch_of, meta_base
from .optimizer_state import BNB, SMALLEST_8BIT
from .rehearsal import rehearse

_PACKAGES = ("transformers", "peft", "torch", "accelerate", "bitsandbytes")
_DURING_BACKWARD = ("lomo", "adalomo")
_TOKENS = 8


@dataclass
class Case:
    """What is examined."""

    base: PreTrainedModel
    """On the meta device; adapted in place."""
    config: PeftConfig
    model: nn.Module
    """With the adapter."""
    arguments: TrainingArguments | None
    steps: int | None
    """Optimizer steps of the run; None: unknown."""
    bits: int
    callbacks: Iterable[Any] | None
    """Those of the run; None: unknown."""

    @property
    def rules(self) -> list[Any]:
        """Rules of the config."""
        return list(getattr(self.config, "rules", ()))

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """Base layers of the adapted modules, by name."""
        return {
            name.removeprefix("base_model.model."): module.get_base_layer()
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }


def check_versions(config: PeftConfig) -> Iterator[Finding]:
    """Installed packages against the bounds of this one, and the peft that a file was written by."""
    try:
        bounds = [Requirement(line) for line in metadata.requires("hf-sparse-peft") or []]
    except metadata.PackageNotFoundError:  # used from its source
        bounds = []
    for bound in bounds:
        if bound.name not in _PACKAGES or bound.marker is not None:
            continue
        installed = metadata.version(bound.name)
        if not bound.specifier.contains(installed.split("+")[0], prereleases=True):
            yield Finding(
                "error",
                bound.name,
                f"{bound.name} {installed} is installed, and this package is made for {bound.specifier}.",
                f"Install one of these: pip install '{bound.name}{bound.specifier}'.",
            )
    written = str(getattr(config, "peft_version", None) or "").split("@")[0]
    try:
        newer = bool(written) and Version(written) > Version(metadata.version("peft"))
    except InvalidVersion:
        newer = False
    if newer:
        yield Finding(
            "warning",
            "peft_version",
            f"The config was written by peft {written}, and {metadata.version('peft')} is installed.",
            "Update peft within the bounds of this package, or see whether all options are known here.",
        )


def check_targets(case: Case) -> Iterator[Finding]:
    """Upstream's configs by this package's checks of targets; its own were asked at injection."""
    if isinstance(case.config, AdapterConfig):
        return
    bare, targets = case.base, case.adapted
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            refuse_unworkable(bare, targets)
        except ValueError as error:
            yield from_message("error", str(error), "target_modules")
        known = all(hasattr(case.config, name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern"))
        if known and not getattr(case.config, "target_parameters", None):
            name_left_out(case.config, case.config.target_modules, bare, targets)
    yield from (from_message("warning", str(one.message), "target_modules") for one in caught)


def check_shared_weights(case: Case) -> Iterator[Finding]:
    """Adapted weights that another module reads too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in case.base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removesuffix(".weight").removesuffix(".base_layer"))
    for name, base in case.adapted.items():
        weight = getattr(base, "weight", None)
        others = [one for one in owners.get(id(weight), ()) if one not in (name, f"{name}.base_layer")]
        if others:
            yield Finding(
                "warning",
                "target_modules",
                f"'{name}' shares its weight with '{others[0]}': the adapter changes what one of them computes, and "
                "merging it would change both.",
                f"Leave it out: exclude_modules=['{name.rpartition('.')[2]}'], or untie them in the base's config "
                "(tie_word_embeddings=False).",
            )


def check_forward(case: Case) -> Iterator[Finding]:
    """Whether the adapter runs on this base at all, and which of its layers a step of text does not reach."""
    ran: set[str] = set()
    layers = {name: one for name, one in case.model.named_modules() if isinstance(one, BaseTunerLayer)}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: ran.add(name)) for name, layer in layers.items()
    ]
    held = [*case.model.parameters(), *case.model.buffers()]
    try:
        trace_step(case.model, batch_of(case.base, 2, _TOKENS), held)
    except ValueError as error:
        yield Finding("note", "model", f"The forward pass was not followed: {error}", "")
        return
    except (RuntimeError, TypeError, NotImplementedError) as error:
        yield _why_it_does_not_run(case, str(error).splitlines()[0])
        return
    finally:
        for handle in handles:
            handle.remove()
        for parameter in case.model.parameters():
            parameter.grad = None
    idle = [name.removeprefix("base_model.model.") for name in layers if name not in ran]
    if idle:
        yield Finding(
            "warning",
            "target_modules",
            f"{len(idle)} of {len(layers)} adapted layers do not run in a step of text, such as '{idle[0]}': they get "
            "no gradient there (an expert without tokens, another tower, a weight that a fused kernel reads).",
            "Leave them out with exclude_modules, unless other batches reach them.",
        )


def _why_it_does_not_run(case: Case, message: str) -> Finding:
    bare = meta_base(case.base.config, case.bits, case.config)
    try:
        trace_step(bare, batch_of(bare, 2, _TOKENS), [*bare.parameters(), *bare.buffers()], backward=False)
    except (RuntimeError, TypeError, NotImplementedError):
        return Finding("note", "model", f"The model does not run without weights, and was not followed: {message}", "")
    return Finding(
        "error",
        "bits",
        f"The adapter does not run on a base of {case.bits} bits: {message}",
        "Use a base in 16 bits, or a method that takes quantised ones (methods.describe says 'dense bases only').",
    )


def check_schedule(case: Case) -> Iterator[Finding]:
    """Rules against the length of the run, as they check themselves when it begins."""
    if not case.rules:
        return
    if case.steps is None:
        yield Finding(
            "note",
            "max_steps",
            f"The schedule ({', '.join(type(rule).__name__ for rule in case.rules)}) was not held against a run.",
            "Pass training_arguments with max_steps, or with num_train_epochs and examples=....",
        )
        return
    try:
        optimizer = make_optimizer(case.model, lr=1e-4)
        said = rehearse(case.model, case.config, optimizer, case.arguments, case.steps)
    except ValueError as error:
        yield from_message("error", str(error), "schedule")
        return
    for name, message, error in said:
        if isinstance(error, ValueError) or error is None:
            yield from_message("warning" if error is None else "error", message, f"schedule ({name})")
        else:
            yield Finding("note", "schedule", f"{name} looks at values when a run begins, and was not tried.", "")


def check_runner(case: Case) -> Iterator[Finding]:
    """Whether somebody carries out the rules, and in the Trainer that they need."""
    waits = bool(getattr(case.config, "needs_calibration", False))
    if case.callbacks is not None and (case.rules or waits):
        if not any(isinstance(one, RuleExecutor) for one in case.callbacks):
            what = ", ".join(type(rule).__name__ for rule in case.rules) or "a start from data"
            yield Finding(
                "error",
                "callbacks",
                f"The config asks for {what}, and no callback of the run does it.",
                "Pass callbacks=hf_sparse_peft.callbacks_for(model), or all of trainer_options(model, args).",
            )
    elif case.rules or waits:
        yield Finding(
            "note",
            "callbacks",
            "The config has to be carried out by a callback.",
            "Pass **hf_sparse_peft.trainer_options(model, args) to the Trainer.",
        )
    try:
        needed = trainer_class_for(case.config)
    except ValueError as error:
        yield from_message("error", str(error), "schedule")
        return
    if needed is not Trainer:
        yield Finding(
            "note",
            "schedule",
            f"The config trains with {needed.__name__}.",
            "Take hf_sparse_peft.trainer_class_for(model) for the Trainer.",
        )


def check_optimizer(case: Case) -> Iterator[Finding]:
    """Whether the optimizer's state can follow units that move, and is the one that the config asks for."""
    name = "" if case.arguments is None else str(getattr(case.arguments.optim, "value", case.arguments.optim))
    try:
        spec = optimizer_spec(case.config) if isinstance(case.config, AdapterConfig) else None
    except ValueError as error:
        yield from_message("error", str(error), "optimizer")
        return
    moves = [type(rule).__name__ for rule in case.rules if "units" in rule.writes]
    if spec is not None or not moves or case.arguments is None:
        return
    if BNB.get(name, (0, False))[1]:
        yield from _refused_state(case, name)
    elif name.partition("_")[0] in _DURING_BACKWARD:
        yield Finding(
            "error",
            "optim",
            f"optim='{name}' updates within the backward pass, where {moves[0]} can neither see gradients nor move "
            "state.",
            "Use optim='adamw_torch', or set optimizer=AgedAdamWSpec() in the adapter's config.",
        )
    elif name.startswith("adamw"):
        yield Finding(
            "note",
            "optimizer",
            f"Under optim='{name}' the first update of a unit that {moves[0]} lets in is up to 3.2 times as large as "
            "the learning rate: its moments are not corrected for its age.",
            "Set optimizer=AgedAdamWSpec() in the adapter's config, and pass trainer_options(model, args).",
        )


def _refused_state(case: Case, name: str) -> Iterator[Finding]:
    kinds = {kind for rule in case.rules if "units" in rule.writes for kind in rule.acts_on}
    spaces = [space for layer, adapter in active_layers(case.model) for space in layer.unit_spaces(adapter)]
    moving = [p for space in spaces if space.kind in kinds for p in space.parameters()]
    large = next((parameter for parameter in moving if parameter.numel() >= SMALLEST_8BIT), None)
    if large is None:  # bitsandbytes keeps these in 32 bits
        return
    state = {"state1": torch.zeros(large.shape, dtype=torch.uint8, device="meta")}
    try:
        unit_views(torch.optim.AdamW([large]), large, state, "the values of supports")
    except ValueError as error:
        found = from_message("error", str(error).replace(" in AdamW ", f" under optim='{name}' "), "optim")
        yield Finding("error", "optim", found.what, found.mend)


def check_sharding(case: Case) -> Iterator[Finding]:
    """DeepSpeed, FSDP and the like under rules that need single units."""
    if not case.rules or case.arguments is None:
        return
    try:
        refuse_sharded(case.arguments, "schedule")
    except ValueError as error:
        yield from_message("error", str(error), "schedule")


def check_checkpointing(case: Case) -> Iterator[Finding]:
    """Traps of gradient checkpointing."""
    arguments = case.arguments
    if arguments is None or not arguments.gradient_checkpointing:
        return
    options = arguments.gradient_checkpointing_kwargs or {}
    if options.get("use_reentrant"):
        yield Finding(
            "warning",
            "gradient_checkpointing_kwargs",
            "Reentrant checkpoints pass gradients on only where their input asks for one, which frozen embeddings do "
            "not: without enable_input_require_grads nothing trains, and everything runs twice all the same.",
            "Set gradient_checkpointing_kwargs={'use_reentrant': False}, or call model.enable_input_require_grads().",
        )
    if options.get("preserve_rng_state") is False and _draws(case.config):
        yield Finding(
            "error",
            "gradient_checkpointing_kwargs",
            "preserve_rng_state=False draws other dropout masks when layers are computed again: gradients are those "
            "of another pass.",
            "Leave preserve_rng_state out, or set lora_dropout=0.",
        )
    spec = getattr(case.config, "optimizer", None)
    if "loss_differences" in getattr(spec, "needs", ()):
        yield Finding(
            "note",
            "gradient_checkpointing",
            "Training without gradients keeps nothing for a backward pass: checkpoints save no memory.",
            "Set gradient_checkpointing=False.",
        )


def _draws(config: PeftConfig) -> bool:
    return any(bool(getattr(config, name, 0)) for name in ("lora_dropout", "module_dropout", "dropout"))


def check_dtypes(case: Case) -> Iterator[Finding]:
    """Trained numbers that start in 16 bits, where small updates are rounded away."""
    narrow = [
        (name, parameter.dtype)
        for name, parameter in case.model.named_parameters()
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
    ]
    if not narrow:
        return
    name, dtype = narrow[0]
    scaled = case.arguments is not None and case.arguments.fp16 and dtype == torch.float16
    kind = str(dtype).removeprefix("torch.")
    yield Finding(
        "error" if scaled else "warning",
        "modules_to_save" if "modules_to_save" in name else "dtype",
        f"{len(narrow)} trained parameters start in {kind}, such as '{name}': "
        + ("a gradient scaler refuses them." if scaled else "updates below 1/256 of a value are rounded away."),
        "Make them fp32 before the optimizer is built: parameter.data = parameter.data.float().",
    )


CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    check_targets,
    check_shared_weights,
    check_forward,
    check_schedule,
    check_runner,
    check_optimizer,
    check_sharding,
    check_checkpointing,
    check_dtypes,
)
