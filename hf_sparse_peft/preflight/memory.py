"""What training an adapter takes in memory, from the model's config alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from peft import PeftConfig

from .. import methods
from ..methods.upstream import upstream_config
from ..optim import OptimizerSpec
from ..utils.option_types import PositiveInt, check_value
from ..utils.tables import Table, table
from .dry_run import CONSTANTS, FROZEN, INDICES, STATE, VALUES, WEIGHTS, DryRun, dry_run
from .memory_trace import ADAPTER, GRADIENTS, LOGITS, NETWORK, WORKING
from .meta_base import meta_base, read_model_config

RESERVE = 1 << 30
"""Held back of a GPU for its context, its libraries and gaps between blocks. Assumed, not measured."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LABELS = {
    WEIGHTS: "base weights",
    CONSTANTS: "quantisation constants",
    VALUES: "adapter values",
    INDICES: "indices",
    FROZEN: "frozen parts of the adapter",
    STATE: "state of rules",
    "optimizer": "optimizer state",
    GRADIENTS: "gradients",
    NETWORK: "kept by the frozen network",
    ADAPTER: "kept by adapted layers",
    LOGITS: "logits and loss",
    WORKING: "working memory",
    "move": "dense gradient at a move",
}


@dataclass(frozen=True)
class Part:
    """Memory of one kind."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What training would take; bytes are those of the highest point of a step."""

    model: str
    """The model's class."""
    method: str
    """The method's name, or the config's class."""
    options: dict[str, Any]
    """Bits, batch, seq, optimizer, gradient_checkpointing, and what `fit` chose."""
    base_numbers: int
    """Numbers of the base, each once, however they are stored."""
    trained_numbers: int
    """Numbers that train."""
    modules: int
    """Adapted modules."""
    parts: tuple[Part, ...]
    """What makes up `training`."""
    kept: int
    """Bytes between the forward and the backward pass: activations, logits."""
    saved: int
    """Of it, what autograd saved for the backward pass."""
    training: int
    """Bytes at the highest point of a step."""
    calibration: int
    """Bytes at the highest point of choosing a start from data; 0 for methods that do not."""
    gpu: int | None
    """Bytes of the GPU that was asked about."""
    assumptions: tuple[str, ...]
    """What was taken for granted."""
    warnings: tuple[str, ...]
    """What was said when the adapter was made."""

    @property
    def total(self) -> int:
        """Bytes at the highest point of the run."""
        return max(self.training, self.calibration)

    @property
    def fits(self) -> bool | None:
        """Whether that and `RESERVE` fit into the GPU; None where none was named."""
        return None if self.gpu is None else self.total + RESERVE <= self.gpu

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {**asdict(self), "total": self.total, "fits": self.fits}

    def table(self) -> Table:
        """The parts, in MiB."""
        rows = [(part.name, _mib(part.bytes), f"{part.bytes / self.training:.1%}") for part in self.parts]
        rows.append(("training, at its highest", _mib(self.training), "100.0%"))
        if self.calibration:
            share = f"{self.calibration / self.training:.1%}"
            rows.append(("before it, choosing from data", _mib(self.calibration), share))
        if self.gpu is not None:
            verdict = "fits" if self.fits else "does not fit"
            rows.append((f"GPU, {_mib(RESERVE)} MiB of it held back", _mib(self.gpu), verdict))
        made = table(("memory", "MiB", "share"), rows)
        for column in made.columns[1:]:
            column.justify = "right"
        return made

    @property
    def headline(self) -> str:
        """What was estimated."""
        about = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method} on {self.model}: {about}"

    @property
    def summary(self) -> str:
        """How many numbers train, and what was taken for granted or warned of, a line each."""
        share = self.trained_numbers / self.base_numbers
        trains = f"{self.trained_numbers:,} numbers train in {self.modules} modules, {share:.3%} of the base's "
        lines = [f"{trains}{self.base_numbers:,}.", *(f"- {line}" for line in (*self.assumptions, *self.warnings))]
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.headline}\n\n{self.table()}\n\n{self.summary}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


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
        options: of the method, where it is given by name.

    Raises:
        ValueError: an unknown method, bits, optimizer; an adapter that does not fit the model, or whose shapes follow
            from weights; nothing to choose with `fit`, or nothing that fits.
        TypeError: a model or a config of another kind.
    """
    for name, number in (("seq", seq), ("batch", batch)):
        check_value(number, PositiveInt, name)
    capacity = None if fit is None and gpu is None else parse_bytes(gpu if fit is None else fit, "gpu")
    base_config = read_model_config(model)
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
        return f"{type(base).__name__} {label}", found

    chosen: dict[str, Any] = {}
    if fit is None:
        label, found = measure()
    else:
        chosen, (label, found) = largest_that_fits(measure, *knob(config_or_method, options), capacity - RESERVE)
    cls, label = label.split(" ", 1)
    about = {"bits": bits, "batch": batch, "seq": seq, "optimizer": found.optimizer}
    about |= ({"gradient_checkpointing": True} if gradient_checkpointing else {}) | options | chosen
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
        assumptions=_assumptions(found, bits, gradient_checkpointing, capacity is not None),
        warnings=tuple(found.warnings),
    )


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
    return tuple(Part(label, sizes[name]) for name, label in _LABELS.items() if sizes.get(name))


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
