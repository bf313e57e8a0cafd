"""What the config of every tuner says about targets, files and schedules."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ...optim import OptimizerSpec
from ...rules import Rule
from ...utils.file_length import check_file_length
from ...utils.file_writing import replace_file, temporary_folder
from ...utils.installation import install_phrase
from ...utils.module_names import check_names
from ...utils.option_types import check_types
from ...utils.parts import UnknownPart, load_part, plain
from .module_patterns import check_pattern

ALWAYS_IN_FILE = frozenset(
    {"peft_type", "peft_version", "task_type", "base_model_name_or_path", "target_modules", "install_hint"}
)
"""Written to `adapter_config.json` also at their defaults: what peft, transformers, the Hub and readers look for."""
NOT_COMPARED = frozenset(
    {
        "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode", "install_hint",
        "auto_mapping", "schedule", "optimizer", "training_finished", "base_overrides", "saved_base_weights",
    }
)  # fmt: skip
"""Options that may be changed after saving: they do not say what the tensors mean."""
INSTALL_HINT = f"hf-sparse-peft ({install_phrase()}), then `import hf_sparse_peft` before peft loads this adapter"


class _FromFiles(type):
    # Sorts out what a file says that a config class does not know, before peft drops it. `PeftConfig.from_peft_type`
    # filters options by the signature of `__init__`, so that no method of the class ever sees the others. Files name
    # their `peft_type`. In code an unknown option is a `TypeError`, an unknown part a `ValueError`.

    # A metaclass with a docstring of its own hides from `help` those of its classes that are made when they are read.
    __doc__ = vars(type)["__doc__"]

    def __call__(cls, *args: Any, **options: Any) -> Any:
        from_file = "peft_type" in options
        if from_file:
            known = {field.name for field in fields(cls)}
            unknown = {name: options.pop(name) for name in sorted(set(options) - known)}
            if unknown:
                options["unknown_options"] = {**options.get("unknown_options", {}), **unknown}
                warnings.warn(
                    f"{cls.__name__}: the file has options that this installation does not know: {sorted(unknown)}. "
                    "They are kept and saved again, and the adapter is used without them; it cannot be trained here.",
                    stacklevel=1,  # one place, so that a file that is read twice is warned of once
                )
        made = super().__call__(*args, **options)
        if not from_file:
            made.check_runnable()
        return made


@dataclass
class AdapterConfig(PeftConfig, metaclass=_FromFiles):
    """Base of the configs: which modules, what else is trained and saved, which rules act during training.

    In `adapter_config.json` an absent option is at its default.

    Raises:
        ValueError: options about targets contradict each other.
    """

    tuner: ClassVar[str] = ""
    """Name of the tuner, lower case: "sparse_lora"; its `peft_type` is the same in capitals."""

    possible_kinds: ClassVar[frozenset[str]] = frozenset({"module"})
    """Kinds of units that adapters may have."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regex, or 'all-linear'; None: the architecture's default."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regex to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer numbers to adapt; needs target_modules as a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, if it is not in the common places."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )
    schedule: list[Rule | UnknownPart] = field(
        default_factory=list,
        metadata={"help": "Rules: what happens to the adapter while it trains, in the order in which they act."},
    )
    optimizer: OptimizerSpec | UnknownPart | None = field(
        default=None, metadata={"help": "Optimizer to train with, e.g. AgedAdamWSpec(); None: the Trainer's own."}
    )
    training_finished: bool = field(
        default=False, metadata={"help": "Written when training ends: schedules are over, their state is dropped."}
    )
    base_overrides: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Labels, vocabulary and quantisation of the base that was trained on. Written when saved."},
    )
    saved_base_weights: list[str] | None = field(
        default=None,
        metadata={"help": "Written when saved: base weights in the file too, embeddings of a resized vocabulary."},
    )
    install_hint: str = field(default=INSTALL_HINT, metadata={"help": "For readers of adapter_config.json."})
    unknown_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Read from a file: options of a newer release or a plugin, saved again as they were."},
    )

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, (list, tuple)):
            raise ValueError(f"schedule={self.schedule!r} is not a list: pass schedule=[...], e.g. [Prune()].")
        self.schedule = [load_part(Rule, one, f"schedule[{at}]") for at, one in enumerate(self.schedule)]
        if self.optimizer is not None:
            self.optimizer = load_part(OptimizerSpec, self.optimizer, "optimizer")
        self._make_nested()
        check_types(self)
        super().__post_init__()
        if self.tuner:
            self.peft_type = PeftType[self.tuner.upper()]
        self._check_patterns()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.install_hint = INSTALL_HINT
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be used when target_modules is a str; pass a list of names.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: give the layer numbers to adapt.")

    def _make_nested(self) -> None:
        """Turn fields that hold a config of their own from dicts, as JSON has them, into that config."""

    def _check_patterns(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                check_pattern(getattr(self, name), name)
        for name in ("layers_pattern", "modules_to_save"):
            check_names(getattr(self, name), name)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read `adapter_config.json`; a cut weights file beside it is found now, before any layer is changed for it.

        Raises:
            ValueError: no config there, an option out of range, or a truncated `adapter_model.safetensors`.
        """
        file = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if file.is_file():
            check_file_length(file)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` whole: a process that is killed leaves the file that was there."""
        target = Path(save_directory) / CONFIG_NAME
        if target.parent.is_file():
            super().save_pretrained(save_directory, **kwargs)  # says that it is a file
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent, CONFIG_NAME) as folder:
            super().save_pretrained(str(folder), **kwargs)
            replace_file(folder / CONFIG_NAME, target)

    def to_dict(self) -> dict[str, Any]:
        """The options as `adapter_config.json` has them: what is not at its default, what a reader looks for
        (`ALWAYS_IN_FILE`), and options of the file that this release does not know, as they were."""
        known = {
            one.name: plain(getattr(self, one.name))
            for one in fields(self)
            if one.name in ALWAYS_IN_FILE or getattr(self, one.name) != _default(one)
        }
        unknown = known.pop("unknown_options", {})
        return {**known, **unknown}

    def option_checksums(self) -> dict[str, str]:
        """CRC-32 of each option that says what the tensors of a file mean, as `adapter_config.json` has it: written
        beside the tensors, so that a config of another save is not taken for theirs."""
        known = {one.name for one in fields(self)} - NOT_COMPARED
        options = {name: value for name, value in self.to_dict().items() if name in known}
        return {
            name: f"{zlib.crc32(json.dumps(plain(value), sort_keys=True, default=str).encode()):08x}"
            for name, value in options.items()
        }

    def meet_needs(self) -> None:
        """Give the adapter what its rules need (`Rule.needs`); called at injection, on the adapter's own copy, so that
        a file says what its tensors are whether or not the rules are known where it is loaded."""

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Kinds of units that an adapter has."""
        return frozenset({"module"})

    @property
    def needs_calibration(self) -> bool:
        """Whether the adapter takes something from data before it trains (`tuners.shared.calibration`)."""
        return False

    @property
    def calibrates_sizes(self) -> bool:
        """Whether the sizes of layers are still to be found from data."""
        return False

    @property
    def rules(self) -> list[Rule]:
        """The rules of `schedule` that can run here."""
        return [rule for rule in self.schedule if isinstance(rule, Rule)]

    @property
    def freezes_units(self) -> bool:
        """Whether units may be frozen while others train."""
        return any(rule.freezes_units for rule in self.rules)

    def check_runnable(self) -> None:
        """Refuse to train with rules, an optimizer or options that this installation does not have.

        Raises:
            ValueError: names what it is.
        """
        if self.unknown_options:
            raise ValueError(
                f"unknown_options={self.unknown_options}: this installation does not know these options. Update "
                "hf-sparse-peft, or import the package that adds it; without training the adapter works as it is."
            )
        for where, part in self._parts():
            if isinstance(part, UnknownPart):
                raise ValueError(
                    f"{where}={part.data} cannot be used here: {part.reason}. Import the package that registers it, or "
                    "update hf-sparse-peft; without training the adapter works as it is."
                )

    def _parts(self) -> Iterator[tuple[str, Any]]:
        yield from ((f"schedule[{at}]", rule) for at, rule in enumerate(self.schedule))
        yield from vars(self).items()

    @property
    def rule_types(self) -> list[str]:
        """Types of the rules of `schedule`, in its order."""
        return [rule.part_type if isinstance(rule, Rule) else str(rule.data.get("type")) for rule in self.schedule]

    @property
    def has_schedule(self) -> bool:
        """Whether rules have to be run during training."""
        return not self.training_finished and bool(self.schedule)


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()
