"""`KernelLoraConfig`: an update that is a kernel of two small point sets, thinned by competition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...utils.option_types import check_types
from ..shared.config import AdapterConfig
from ..sparse_lora.schedule_config import nested

KERNELS = ("distance", "mixed")
MODES = ("paper", "code")


@dataclass
class BudgetCompetitionConfig:
    """How the entries that live are shared out between matrices while training: SNELLA's outer competition (Shen et
    al., 2025). The total falls from `1 - initial_sparsity` to `1 - sparsity` of all entries along a cubic curve, and
    each matrix gets a part in proportion to the smoothed sensitivity x uncertainty of its factors.

    Steps are optimizer steps, and the warm-ups are shares of the run. The official code counts epochs for the curve and
    the allocation, so that runs of few epochs hardly move; `interval` set to the steps of an epoch does what it does.
    """

    initial_sparsity: float = 0.0
    """Fraction of zeros that the run starts with (`init_thres`)."""
    initial_warmup: float = 0.1
    """Share of the run before the budget falls and is shared out; until then matrices keep what they started with."""
    final_warmup: float = 0.3
    """Share of the run at the end with the budget reached; it goes on being shared out anew."""
    interval: int = 1
    """Optimizer steps between two allocations."""
    beta1: float = 0.85
    """Smoothing of the sensitivity |w g|."""
    beta2: float = 0.85
    """Smoothing of the uncertainty |I - I_mean|."""

    def __post_init__(self) -> None:
        check_types(self)
        total = self.initial_warmup + self.final_warmup
        checks = {
            "initial_sparsity": (0 <= self.initial_sparsity < 1, "a fraction of zeros in [0, 1)"),
            "initial_warmup": (0 <= self.initial_warmup < 1, "a share in [0, 1)"),
            "final_warmup": (0 <= self.final_warmup < 1, "a share in [0, 1)"),
            "interval": (self.interval >= 1, "an integer >= 1"),
            "beta1": (0 < self.beta1 < 1, "a number in (0, 1)"),
            "beta2": (0 < self.beta2 < 1, "a number in (0, 1)"),
        }
        for name, (fits, accepted) in checks.items():
            if not fits:
                raise ValueError(
                    f"BudgetCompetitionConfig.{name}={getattr(self, name)!r} is out of range: it takes {accepted}."
                )
        if total >= 1:
            raise ValueError(
                f"BudgetCompetitionConfig.initial_warmup + final_warmup={total} leave no step for the budget to fall "
                "in; give shares that sum to less than 1."
            )


@dataclass
class KernelLoraConfig(AdapterConfig):
    r"""Configuration of a kernel adapter, :math:`\Delta W = \mathrm{compete}(K(P, Q))` (SNELL: Shen et al., 2024).

    `P` `[2, in, r/2]` and `Q` `[2, out, r/2]` are points, :math:`D^\top_{ij} = c\,(\|P_{1i} - Q_{1j}\| - \|P_{2i} -
    Q_{2j}\|)`. The kernel `"distance"` is :math:`K = D`; `"mixed"` is :math:`D + a\,\mathrm{softmax}_{out}(D/g) + b`
    with learned numbers that start at `a = g = 1, b = 0` (SNELLA: Shen et al., 2025).

    The fraction `sparsity` of the entries of each matrix, those smallest in size, is zero; :math:`\tau` is the largest
    of them. `mode="paper"` keeps :math:`w \max(|w| - \tau, 0)`, `mode="code"` what the official code computes,
    :math:`w\,|w|` where :math:`|w| > \tau`, with the second factor cut from the gradient. :math:`\tau` has no gradient.
    `sparsity=0` without `budget_competition` is the kernel itself, not squared. The update is not zero at the start.

    Raises:
        ValueError: an option is out of range; the message names the option and the mend.
    """

    tuner: ClassVar[str] = "kernel_lora"
    schedules: ClassVar[tuple[str, ...]] = ("budget_competition",)
    unattended: ClassVar[str] = "every matrix keeps its first share of the budget."

    r: int = field(default=32, metadata={"help": "Numbers trained for each input and each output; even."})
    kernel: Literal["distance", "mixed"] = field(
        default="distance", metadata={"help": "Difference of distances (SNELL), or with a softmax beside it (SNELLA)."}
    )
    sparsity: float = field(
        default=0.3, metadata={"help": "Fraction of zeros in each matrix, in all of them with budget_competition."}
    )
    mode: Literal["paper", "code"] = field(
        default="paper", metadata={"help": "What winners keep: w max(|w| - tau, 0), or the official code's w |w|."}
    )
    scale: float = field(default=0.1, metadata={"help": "The fixed factor c of the distances."})
    drop_path: float = field(
        default=0.0, metadata={"help": "Share of samples trained without the update (the paper's ViT recipe: 0.1)."}
    )
    budget_competition: BudgetCompetitionConfig | None = field(
        default=None, metadata={"help": "Competition of matrices for the entries that live; None: the same share each."}
    )
    tile_entries: int = field(
        default=1 << 22,
        metadata={"help": "Entries of the update that exist at once; a larger update is built again for every pass."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True is the paper's start; False starts with larger points (tests)."}
    )
    bias: Literal["none", "all", "kernel_lora_only"] = field(
        default="none", metadata={"help": "Which biases train: none, all of the model's, or the adapted layers'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = {"kernel": KERNELS, "mode": MODES, "bias": ("none", "all", "kernel_lora_only")}
        for name, choices in accepted.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {list(choices)}.")
        if self.r < 2 or self.r % 2:
            raise ValueError(f"r={self.r} cannot be split over two point sets; give an even number >= 2, such as 32.")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} is not a fraction of zeros; give a number from 0 to below 1.")
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale} must be above 0; the paper's is 0.1.")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} is not a share; give a number from 0 to below 1.")
        if self.tile_entries < 1:
            raise ValueError(f"tile_entries={self.tile_entries} is not a size; give an integer >= 1, such as 4194304.")

    def _make_nested(self) -> None:
        self.budget_competition = nested(BudgetCompetitionConfig, self.budget_competition, "budget_competition")

    @property
    def competes(self) -> bool:
        """Whether entries compete at all; without that the update is the kernel itself."""
        return self.sparsity > 0 or self.budget_competition is not None

    @property
    def initial_sparsity(self) -> float:
        """Fraction of zeros at injection."""
        return self.sparsity if self.budget_competition is None else self.budget_competition.initial_sparsity
