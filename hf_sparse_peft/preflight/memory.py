"""What training an adapter takes in memory, from the model's config alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from peft import PeftConfig

from .. import methods
from ..methods.upstream import upstream_config
from ..optim import OptimizerSpec
from ..utils.option_types import PositiveInt, check_value
from .communication import Traffic, step_traffic
from .dry_run import DryRun, dry_run
from .estimates import LABELS, RESERVE, Estimate, Part
from .meta_base import meta_base, read_model_config
from .sharding import SHARDINGS, per_rank, said_of

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def estimate(
    model: Any,
    config_or_method: PeftConfig | methods.Method | str,
    *,
    bits: int = 16,
    seq: int = 512,
    batch: int = 1,
    optimizer: OptimizerSpec | str | None = None,
    gradient_checkpointing: bool = False,
    input_gradients: bool | None = None,
    gpu: str | int | None = None,
    fit: str | int | None = None,
    processes: int = 1,
    sharding: str | None = None,
    **options: Any,
) -> Estimate:
    """What training takes in memory, by part, without weights, data or a GPU.

    The model is built on the meta device, gets its adapter there, and runs forward and backward once: every storage
    that this makes is followed, so that what each method and granularity keeps is what its own code keeps. The
    optimizer takes a step there too. Works for this package's configs and methods, and for those of upstream peft.

    Args:
        model: a transformers model or config, a `config.json` or its folder, a Hub id.
        config_or_method: an adapter config, a method or its name (`methods.names()`, or "lora").
        bits: how the base's linear layers are stored: 4 (NF4, double quantisation), 8 (LLM.int8()), 16 (bf16), 32.
        seq: tokens of a sequence.
        batch: sequences of a micro-batch; gradient accumulation takes no more memory.
        optimizer: a Trainer's `optim`, e.g. "adamw_8bit", or a part of a config; None: the config's, else Trainer's.
        gradient_checkpointing: whether layers are computed again in the backward pass.
        input_gradients: whether embeddings ask for a gradient (`enable_input_require_grads`); None: with checkpointing.
        gpu: memory to compare with, "24G" or bytes (GiB and GB are both 2**30 here).
        fit: the same, and the largest density (of supports) or rank that fits is chosen.
        processes: ranks that train together; figures are those of the one that holds most.
        sharding: how they share: "ddp" (None), "fsdp2" (the base in shards, adapters whole) or "zero3"; see
            `preflight.sharding.per_rank`, and `preflight.communication` for what they send.
        options: of the method, where it is given by name.

    Raises:
        ValueError: an unknown method, bits, optimizer; an adapter that does not fit the model, or whose shapes follow
            from weights; nothing to choose with `fit`, or nothing that fits.
        TypeError: a model or a config of another kind.
    """
    for name, number in (("seq", seq), ("batch", batch)):
        check_value(number, PositiveInt, name)
    capacity = None if fit is None and gpu is None else parse_bytes(gpu if fit is None else fit, "gpu")
    check_value(processes, PositiveInt, "processes")
    sharding = _sharding(processes, sharding)
    base_config = read_model_config(model)
    hidden = getattr(base_config.get_text_config(), "hidden_size", 0)
    run = {"batch": batch, "seq": seq, "optimizer": optimizer, "gradient_checkpointing": gradient_checkpointing}

    def measure(**chosen: Any) -> tuple[str, DryRun]:
        label, config = adapter_config(config_or_method, **{**options, **chosen})
        base = meta_base(base_config, bits, config)
        try:
            found = dry_run(base, config, input_gradients=input_gradients, **run)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"{label} does not run on a base of {bits} bits without weights: {error} Methods for dense bases only "
                "(methods.describe) take bits=16."
            ) from error
        if sharding is not None:
            found = per_rank(found, sharding, processes, bits=bits, hidden=hidden)
        return f"{type(base).__name__} {label}", found

    chosen: dict[str, Any] = {}
    if fit is None:
        label, found = measure()
    else:
        chosen, (label, found) = largest_that_fits(measure, *knob(config_or_method, options), capacity - RESERVE)
    cls, label = label.split(" ", 1)
    about = {"bits": bits, "batch": batch, "seq": seq, "optimizer": found.optimizer}
    about |= {"gradient_checkpointing": True} if gradient_checkpointing else {}
    about |= {} if sharding is None else {"processes": processes, "sharding": sharding}
    about |= options | chosen
    return Estimate(
        model=cls,
        method=label,
        options={name: one if isinstance(one, (int, float, str)) else str(one) for name, one in about.items()},
        base_numbers=found.base_numbers,
        trained_numbers=found.trained_numbers,
        modules=found.modules,
        parts=_parts(found),
        kept=sum(found.kept.values()),
        saved=found.saved,
        training=found.training_peak,
        calibration=found.calibration_peak,
        gpu=capacity,
        assumptions=(
            *_assumptions(found, bits, gradient_checkpointing, capacity is not None),
            *(said_of(sharding, processes, found) if sharding else ()),
        ),
        warnings=tuple(found.warnings),
        traffic=_traffic(found, sharding, bits),
    )


def _sharding(processes: int, sharding: str | None) -> str | None:
    if sharding is not None and sharding not in SHARDINGS:
        raise ValueError(f"sharding={sharding!r} is unknown; choose one of {SHARDINGS}.")
    if sharding is not None and processes == 1:
        raise ValueError(
            f"sharding={sharding!r} with processes=1: one process holds everything. Set processes to the number of "
            "ranks, or leave sharding out."
        )
    return sharding or ("ddp" if processes > 1 else None)


def _traffic(found: DryRun, sharding: str | None, bits: int) -> tuple[Traffic, ...]:
    if sharding is None:
        return ()
    step = step_traffic(sharding, found.groups, found.trained, found.buffers, 4 if bits == 32 else 2)
    return (*step, *(() if sharding == "zero3" else found.moves))


def parse_bytes(size: str | int, name: str) -> int:
    """Bytes of "24G", "24GB", "24 GiB", "512M" or a number of them.

    Raises:
        ValueError: anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(size), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{name}={size!r} is no size of memory. Give one such as '24G', '512M', or a number of bytes.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def adapter_config(given: PeftConfig | methods.Method | str, **options: Any) -> tuple[str, PeftConfig]:
    """A name and the config of a config, a method, or a method by name with its options; "lora" is upstream's.

    Raises:
        ValueError: an unknown name or option.
        TypeError: something else.
    """
    if isinstance(given, str):
        if given == "lora":
            return given, upstream_config("LoraConfig", **{"target_modules": "all-linear", **options})
        return given, methods.get(given, **options).config
    if isinstance(given, methods.Method):
        given, label = given.config, given.info.name if given.info else type(given.config).__name__
    elif isinstance(given, PeftConfig):
        label = type(given).__name__
    else:
        raise TypeError(
            f"config_or_method is a {type(given).__name__}. Pass an adapter config, a method, or a method's name."
        )
    unknown = sorted(name for name in options if not hasattr(given, name))
    if unknown:
        raise ValueError(f"{label} has no option {unknown}.")
    return label, type(given)(**{**_fields(given), **options}) if options else given


def _fields(config: PeftConfig) -> dict[str, Any]:
    written = ("peft_type", "peft_version", "auto_mapping")  # by peft, not by who makes a config
    found = {one.name: getattr(config, one.name) for one in fields(config) if one.init and one.name not in written}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def knob(given: PeftConfig | methods.Method | str, options: dict[str, Any]) -> tuple[str, bool]:
    """Name of the option that says how large an adapter is, and whether it is a whole number: its density, else rank.

    Raises:
        ValueError: it has neither, or its size is said in another way (`budget`).
    """
    _, config = adapter_config(given, **options)
    if getattr(config, "density", 0) and getattr(config, "budget", None) is None and "density" not in options:
        return "density", False
    for name in ("r", "init_r"):
        if getattr(config, name, 0) and name not in options:
            return name, True
    raise ValueError(
        f"fit chooses a density or a rank, and {type(config).__name__} has neither that is free to choose. Leave fit "
        "out, and pass gpu to see whether it fits."
    )


_SMALLEST = {True: (1,), False: (1e-4, 1e-3, 1e-2, 0.1, 1.0)}
"""Ranks and densities to begin with: a density may leave layers without a unit, rows and blocks more than entries."""
_LARGEST = {True: 1024, False: 1.0}


def largest_that_fits(
    measure: Callable[..., tuple[str, DryRun]], name: str, whole: bool, room: int
) -> tuple[dict[str, Any], tuple[str, DryRun]]:
    """The largest value of the option `name` with which `measure(**{name: value})` needs at most `room` bytes, to two
    digits; memory grows with it, nearly in proportion, so a line through two tries gives the next one.

    Raises:
        ValueError: even the smallest does not fit.
    """
    best, found = _smallest(measure, name, whole)
    if found[1].peak > room:
        raise ValueError(
            f"{name}={best} needs {found[1].peak / 2**20:,.0f} MiB, and {room / 2**20:,.0f} MiB are there. Lower batch "
            "or seq, store the base in fewer bits, or set gradient_checkpointing=True."
        )
    value, too_large, above = _LARGEST[whole], None, None
    while value > best and value != too_large:
        try:
            tried = measure(**{name: value})
        except ValueError:  # more than a layer has
            tried = None
        if tried is not None and tried[1].peak <= room:
            best, found = value, tried
        else:
            too_large, above = value, None if tried is None else tried[1].peak
        if too_large is None:
            break
        share = 0.5 if above is None else (room - found[1].peak) / (above - found[1].peak)
        value = best + (too_large - best) * min(max(share, 0.05), 0.95)
        value = int(value) if whole else float(f"{value:.1e}")
    return {name: best}, found


def _smallest(measure: Callable[..., tuple[str, DryRun]], name: str, whole: bool) -> tuple[float, tuple[str, DryRun]]:
    *first, last = _SMALLEST[whole]
    for value in first:
        try:
            return value, measure(**{name: value})
        except ValueError:
            continue
    return last, measure(**{name: last})


def _parts(found: DryRun) -> tuple[Part, ...]:
    sizes = {**found.at_rest, "optimizer": found.optimizer_bytes, **found.at_peak, "move": found.at_move}
    return tuple(Part(label, sizes[name]) for name, label in LABELS.items() if sizes.get(name))


def _assumptions(found: DryRun, bits: int, checkpointing: bool, on_gpu: bool) -> tuple[str, ...]:
    stored = {
        4: "NF4 with double quantisation in blocks of 64 and 256, products in bf16, output embeddings in bf16",
        8: "LLM.int8() without outliers, output embeddings in bf16",
        16: "bf16",
        32: "fp32",
    }
    said = [
        f"The base is stored in {stored[bits]}, and is not cast afterwards (prepare_model_for_kbit_training would).",
        "Sequences are full, without padding and without packing's masks; attention runs in a fused kernel.",
        "One device, no torch.compile, no autocast beside the base's own dtype; memory that kernels take is not seen.",
    ]
    if checkpointing:
        said.append("Checkpoints are transformers' own, one a layer, without reentrance.")
    if found.shares_assumed:
        said.append("A budget that scores or data share out over the modules is shared out by the weights' sizes.")
    if found.at_move:
        said.append("Before a move dense gradients are there one layer at a time; what rules keep longer is counted.")
    if found.calibration:
        said.append("Data is read in micro-batches of the same size, and statistics of at most 4 GiB at a time.")
    if on_gpu:
        said.append(f"{RESERVE / 2**20:,.0f} MiB of the GPU are held back for context, libraries and gaps (assumed).")
    return tuple(said)
