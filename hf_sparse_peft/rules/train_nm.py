"""`TrainNM`: N:M sparsity whose mask is chosen anew by every update (SR-STE, progressive gradient flow, BDWP)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..sparsity import GradientFlow, n_of_m_mask, pack_bits, unpack_bits, whole_steps
from ..utils.option_types import Fraction, NonNegativeFloat, PositiveInt, Range
from ..utils.parts import register_part, require
from ..utils.tensors import TensorSpec
from .input_masks import InputMask
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("train_nm")
@dataclass(frozen=True)
class TrainNM(Rule):
    r"""Weights :math:`V = W + D` train under the mask of their own `keep` largest magnitudes of every `of` inputs:
    :math:`Y = X (M \odot V)^\top`, :math:`dV = G + \lambda (1 - M) \odot V` with the dense gradient
    :math:`G = dY^\top X` (SR-STE; Zhou et al., 2021).

    `M` follows from `V` and is written after every update, so that each pass of a step has the mask of its own weights;
    evaluation and files have the mask of the weights that they have. Exactly N of M are kept, ties going to the later
    input. Micro-batches share a step's mask, and the decay is added once, after clipping. Without an update the
    gradient reaches `D` through what that is: a matrix or low-rank factors.

    With `flow` the sparsity sets in gradually, between `dense` and `final` (progressive gradient flow); with
    `input_mask` the gradient of the input goes through another mask (BDWP, Bi-Mask).

    Raises:
        ValueError: groups that do not divide a layer's inputs, of any stage; options that exclude each other; phases
            that leave no step.
    """

    keep: PositiveInt = 2
    """N."""
    of: PositiveInt = 4
    """M."""
    decay: NonNegativeFloat = 2e-4
    r""":math:`\lambda` (SR-STE: 2e-4, with SGD). It is part of the gradient: Adam rescales it. 0: straight-through
    alone."""
    removed_gradient: Literal["ste", "scaled"] = "ste"
    r"""Gradient of weights off the mask: `ste`: all of it; `scaled`: :math:`\beta` times it, as that of the product
    with :math:`M + (1 - M)\beta` is (the argument of progressive gradient flow, whose code has `ste`). The decay is
    apart from it."""
    flow: GradientFlow | None = None
    """How sparsity sets in: `MaskDecay()`, `StructureDecay()`; None: at once."""
    dense: Fraction = 0.0
    """Fraction of the run's steps, at its beginning, without a mask."""
    final: Annotated[float, Range(least=0, below=1)] = 0.0
    """Fraction at its end with the binary N:M mask, where there is a `flow`. The official code of progressive gradient
    flow enters it one count (of its epochs) later than this says."""
    input_mask: InputMask | None = None
    """Another mask for the gradient of the input: `OutputGroups()`, `PermutedOutputGroups()`; None: `M`."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"mask"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "gradient", "forward"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.keep < self.of, self, "keep", f"fewer than of={self.of}")
        require(self.dense + self.final <= 1, self, "final", f"at most 1 - dense={1 - self.dense}")
        if self.flow is not None:
            self.flow.patterns(self.keep, self.of)
            require(self.input_mask is None, self, "input_mask", "None beside a flow: one mask for both directions")

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """What `input_mask` keeps."""
        return [] if self.input_mask is None else self.input_mask.state(space)

    def begin(self, run: Run) -> None:
        """Check all widths, and write the first masks."""
        run.memory.patterns = {}
        patterns = [(self.keep, self.of)] if self.flow is None else self.flow.patterns(self.keep, self.of)
        widest = max(of for _, of in patterns)
        for space in run.spaces(training=False):
            _check_space(space, "TrainNM", widest)
            if self.input_mask is not None:
                self.input_mask.check_space(space, self.keep, self.of)
        self._write_masks(run, run.spaces(training=False))
        dense, end = self._phases(run.total_steps)
        left = 0.0 if self.flow is None else self.flow.removed_weight(end - dense, end - dense)
        if left > 0.1 and not run.resumed:
            warnings.warn(
                f"TrainNM.flow={self.flow}: weights off the mask still count {left:.2f} when the final phase begins, "
                "and 0 from then on. Raise rate, or set None, which follows from the run's length.",
                stacklevel=2,
            )

    def before_step(self, run: Run) -> None:
        """Set what removed weights count and get, and the masks of input gradients, for the passes of this step."""
        beta = self.removed_weight(run.step, run.total_steps)
        factor = beta if self.removed_gradient == "scaled" else 1.0
        numbers = {"removed_weight": beta, "removed_gradient": factor}
        self._write_masks(run, [s for s in run.spaces() if run.memory.patterns[s] != self._pattern(run)])
        for space in run.spaces():
            bits = None
            if self.input_mask is not None:
                mask = self._mask(space)
                bits = pack_bits(self.input_mask(run, space, space.current_weight(), mask, self.keep, self.of))
            run.for_this_step([_passes(space, numbers, bits)])

    def gradients(self, run: Run) -> None:
        """Add the decay."""
        if not self.decay or run.step < whole_steps(self.dense, run.total_steps):
            return
        for space in run.spaces():
            removed = ~self._mask(space)
            space.add_gradient(space.current_weight() * removed, run.gradient_scale * self.decay)

    def after_step(self, run: Run) -> None:
        """Write the masks of the weights that have moved."""
        self._write_masks(run, run.spaces())

    def finish(self, run: Run) -> None:
        """Layers that were held still get the final pattern too."""
        self._write_masks(run, [s for s in run.all_spaces if run.memory.patterns[s] != self._pattern(run)])

    # Where in the run

    def pattern(self, step: int, total: int) -> tuple[int, int] | None:
        """N:M of the mask at a step; None: no mask."""
        dense, end = self._phases(total)
        if step < dense:
            return None
        if self.flow is None or step >= end:
            return self.keep, self.of
        return self.flow.stage(step - dense, end - dense, self.keep, self.of)

    def removed_weight(self, step: int, total: int) -> float:
        r""":math:`\beta` at a step."""
        dense, end = self._phases(total)
        if step < dense:
            return 1.0
        return 0.0 if self.flow is None or step >= end else self.flow.removed_weight(step - dense, end - dense)

    def _phases(self, total: int) -> tuple[int, int]:
        return whole_steps(self.dense, total), total - whole_steps(self.final, total)

    def _pattern(self, run: Run) -> tuple[int, int] | None:
        return self.pattern(run.step, run.total_steps)

    @torch.no_grad()
    def _write_masks(self, run: Run, spaces: list[UnitSpace]) -> None:
        pattern = self._pattern(run)
        for space in spaces:
            run.memory.patterns[space] = pattern
            if pattern is None:
                space.write_bits(torch.full_like(space.bits, 255))
            else:
                space.write_bits(pack_bits(n_of_m_mask(space.current_weight().abs(), *pattern)))
        run.record_change(pattern="dense" if pattern is None else f"{pattern[0]}:{pattern[1]}")

    def _mask(self, space: UnitSpace) -> Tensor:
        return unpack_bits(space.bits, space.size).view(space.weight_shape)


def _check_space(space: UnitSpace, owner: str, of: int) -> None:
    if space.counted:
        raise ValueError(
            f"{owner} writes the mask of '{space.name}', which its masking computes. Set masking=HardMask()."
        )
    if space.weight_shape[1] % of:
        raise ValueError(
            f"{owner}: groups of {of} do not divide the {space.weight_shape[1]} inputs of '{space.name}'. Choose "
            "another N:M (or stages), or name the module in exclude_modules."
        )


@contextmanager
def _passes(space: UnitSpace, numbers: dict[str, float], input_bits: Tensor | None) -> Iterator[None]:
    """Inside, passes of the space's layer have these numbers and this mask of the input's gradient."""
    space.numbers.update(numbers)
    if input_bits is not None:
        space.write_input_bits(input_bits)
    try:
        yield
    finally:
        for name in numbers:
            space.numbers.pop(name, None)
        if input_bits is not None:
            space.write_input_bits(None)
