"""What the config of every tuner says about targets, files and schedules."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ...rules import Rule
from ...utils.file_length import check_file_length
from ...utils.file_writing import replace_file, temporary_folder
from ...utils.option_types import check_types
from ...utils.parts import UnknownPart, load_part, plain
from .module_patterns import check_names, check_pattern

INSTALL_HINT = "pip install hf-sparse-peft, then `import hf_sparse_peft` before peft loads this adapter"


@dataclass
class AdapterConfig(PeftConfig):
    """Base of the configs: which modules, what else is trained and saved, whether schedules run.

    Raises:
        ValueError: options about targets contradict each other.
    """

    schedules: ClassVar[tuple[str, ...]] = ()
    """Options that a callback carries out."""
    unattended: ClassVar[str] = ""
    """What training without the callbacks means, for the warning."""

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
    training_finished: bool = field(
        default=False, metadata={"help": "Written when training ends: schedules are over, their state is dropped."}
    )
    base_overrides: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Labels and vocabulary of the base that was trained. Written when the adapter is saved."},
    )
    saved_base_weights: list[str] | None = field(
        default=None,
        metadata={"help": "Written when saved: base weights in the file too, embeddings of a resized vocabulary."},
    )
    install_hint: str = field(default=INSTALL_HINT, metadata={"help": "For whoever reads adapter_config.json."})

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, (list, tuple)):
            raise ValueError(f"schedule={self.schedule!r} is not a list: pass schedule=[...], e.g. [Prune()].")
        self.schedule = [load_part(Rule, one, f"schedule[{at}]") for at, one in enumerate(self.schedule)]
        self._make_nested()
        check_types(self)
        super().__post_init__()
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
        """The options as JSON takes them."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    @property
    def rules(self) -> list[Rule]:
        """The rules of `schedule` that can run here."""
        return [rule for rule in self.schedule if isinstance(rule, Rule)]

    def check_runnable(self) -> None:
        """Refuse to train with rules that this installation does not have.

        Raises:
            ValueError: names the rule.
        """
        for at, rule in enumerate(self.schedule):
            if isinstance(rule, UnknownPart):
                raise ValueError(
                    f"schedule[{at}]={rule.data} cannot run here: {rule.reason}. Import the package that registers it, "
                    "or update hf-sparse-peft; without training the adapter works as it is."
                )

    @property
    def asked_schedules(self) -> list[str]:
        """Names of the options that ask for a schedule, and types of the rules."""
        rules = [rule.part_type if isinstance(rule, Rule) else str(rule.data.get("type")) for rule in self.schedule]
        return [name for name in self.schedules if getattr(self, name) is not None] + rules

    @property
    def has_schedule(self) -> bool:
        """Whether something happens during training that a callback has to do."""
        return not self.training_finished and bool(self.asked_schedules)
