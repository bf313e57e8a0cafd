"""`SpectralLoraConfig`: two bases of which little or nothing is trained, around a small trained core."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from ...ops.seeded import GENERATOR
from ...rules import check_schedule
from ...utils.option_types import PositiveFloat, PositiveInt
from ...utils.parts import UnknownPart, load_part_by_name
from ..shared.config import AdapterConfig
from ..shared.module_patterns import pattern_key
from ..shared.sharing import Sharing, check_sharings
from .bases import Bases, Site
from .cores import Core, Diagonal, Full
from .found import SVD


@dataclass
class SpectralLoraConfig(AdapterConfig):
    r"""Configuration of a spectral adapter, :math:`\Delta W = s\,B\,C\,A` (or :math:`s\,B\,(C - C_0)\,A`).

    `bases` say what `B` `[out, a]` and `A` `[b, in]` are and what of them is trained, `core` the form of the trained
    matrix `C` `[a, b]`; without a core C is the identity. `s` is `lora_alpha / r`.

    Raises:
        ValueError: an option is out of range; the message names the option and the mend.
    """

    tuner: ClassVar[str] = "spectral_lora"
    possible_kinds: ClassVar[frozenset[str]] = frozenset({"core", "basis", "module"})

    r: PositiveInt = field(
        default=16,
        metadata={"help": "Components of the bases, at most the smaller side of a weight."},
    )
    lora_alpha: PositiveFloat | None = field(
        default=None, metadata={"help": "Numerator of the scaling s = lora_alpha / r; None: r, a scaling of 1."}
    )
    rank_pattern: dict[str, PositiveInt] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> r of the modules that match, instead of `r`."}
    )
    bases: Bases | UnknownPart = field(
        default_factory=SVD, metadata={"help": "The bases: SVD(), GradientSVD(), Random(), LDU(), Shared(), ..."}
    )
    core: Core | UnknownPart | None = field(
        default_factory=Full,
        metadata={"help": "The trained core: Full(), Diagonal(), ...; None: none."},
    )
    use_dora: bool = field(
        default=False,
        metadata={"help": "Whether the norms of the rows are trained apart from their directions (DoRA; EDoRA)."},
    )
    sizes: dict[str, list[str | int]] = field(
        default_factory=dict,
        metadata={
            "help": "Module name -> [owner, users, position]: the first of the modules that share bases with it, how "
            "many they are, and which of them it is. Written at injection."
        },
    )
    generator: str | None = field(
        default=None,
        metadata={"help": "How random bases follow from the seed. Written at injection, where files have no bases."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of random bases, mixed with module names."})
    bias: Literal["none", "all", "spectral_lora_only"] = field(
        default="none", metadata={"help": "Which biases train: none, all of the model's, or the adapted layers'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bases.dense and (self.core is not None or self.use_dora):
            raise ValueError(f"{type(self.bases).__name__} makes whole updates: set core=None and use_dora=False.")
        if self.core is None and not self.bases.trained:
            raise ValueError(f"core=None leaves nothing to train between {type(self.bases).__name__}. Set core=Full().")
        if self.core is not None and self.core.residual is not None and self.bases.shared:
            raise ValueError(
                f"core.residual={self.core.residual!r} keeps a part of each weight in the base, and shared bases have "
                "none. Set residual=None."
            )
        if self.generator not in (None, GENERATOR):
            raise ValueError(
                f"generator={self.generator!r} drew this adapter's bases, and {GENERATOR!r} is what is known here. "
                "Update hf-sparse-peft."
            )
        check_sharings(self.sizes)
        check_schedule(self.schedule, self)
        gates = [rule for rule in self.rules if "gate" in rule.needs]
        if gates and not isinstance(self.core, Diagonal):
            raise ValueError(f"{type(gates[0]).__name__} lets single components die; set core=Diagonal().")

    def _make_nested(self) -> None:
        self.bases = load_part_by_name(Bases, self.bases, "bases")
        if self.core is not None:
            self.core = load_part_by_name(Core, self.core, "core")
        for name in ("bases", "core"):
            part = getattr(self, name)
            if isinstance(part, UnknownPart):
                raise ValueError(
                    f"{name}={part.data} cannot be used here: {part.reason}, and without it nobody knows what the "
                    "adapter's tensors mean. Import the package that registers it, or update hf-sparse-peft."
                )

    def meet_needs(self) -> None:
        """Give a diagonal core a mask where a rule lets components die."""
        if isinstance(self.core, Diagonal) and any("gate" in rule.needs for rule in self.rules):
            self.core = replace(self.core, masked=True)

    @property
    def needs_calibration(self) -> bool:
        """Whether the bases are found in the training data."""
        return self.bases.statistic is not None

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Kinds of units that an adapter has."""
        bases = {"basis"} if self.bases.trained and not self.bases.shared else set()
        return frozenset({"module"} | bases | ({"core"} if self.core is not None else set()))

    def group(self, module_name: str, rows: int, cols: int) -> Hashable:
        """Modules of one group share bases."""
        return self.bases.group(self._site(module_name, rows, cols))

    def site(self, module_name: str, rows: int, cols: int) -> Site:
        """What bases are told of a module; r is `rank_pattern`'s match, else `r`, at most the smaller side.

        Raises:
            ValueError: `sizes` does not say with which modules it shares bases.
        """
        site = self._site(module_name, rows, cols)
        if not self.bases.shared:
            return site
        if module_name not in self.sizes:
            raise ValueError(
                f"sizes has no entry for '{module_name}', whose bases are shared: the config is incomplete."
            )
        site = site._replace(sharing=Sharing(*self.sizes[module_name]))
        return site._replace(r=self.bases.components(site))

    def _site(self, module_name: str, rows: int, cols: int) -> Site:
        r = self.rank_pattern.get(pattern_key(self.rank_pattern, module_name, "rank_pattern"), self.r)
        return Site(module_name, rows, cols, min(r, rows, cols), self.lora_alpha, self.seed)
