"""What rules share that draw transformer layers: which there are, draws that follow from the seed, who is updated."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..sparsity import stream_seed
from ..utils.module_names import check_names
from .rule import Rule
from .run import Run, refuse_fixed_ddp
from .space import ModuleSpace

_COMMON = "layers|h|block|blocks|layer"


@dataclass(frozen=True)
class DrawnLayers(Rule):
    """Base of the rules that update the adapters of some drawn transformer layers at a time. They have the options
    `layers_pattern` and `seed`."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"module"})
    writes: ClassVar[frozenset[str]] = frozenset({"trains"})
    decides: ClassVar[str] = "layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self._pattern.split("|"), f"{type(self).__name__}.layers_pattern")

    @property
    def _pattern(self) -> str:
        return _COMMON if self.layers_pattern is None else self.layers_pattern

    def find(self, run: Run) -> None:
        """Note the trained adapters of each transformer layer in `run.memory.layers`, by the layer's name up to its
        number, in model order, and those of no layer in `run.memory.outside`.

        Raises:
            ValueError: no trained adapter lies in numbered layers.
        """
        rule = type(self).__name__
        refuse_fixed_ddp(run, rule)
        place = re.compile(rf"(?:^|\.)(?:{self._pattern})\.\d+(?=\.|$)")
        layers: dict[str, list[ModuleSpace]] = {}
        outside: list[ModuleSpace] = []
        frozen: str | None = None
        for space in run.spaces(training=False):
            found = place.search(space.name)
            if found is None:
                outside.append(space)
            elif not space.trains:
                frozen = frozen or space.name
            else:
                layers.setdefault(space.name[: found.end()], []).append(space)
        if frozen and not layers:
            raise ValueError(
                f"{rule} found no trained adapter: those of '{frozen}' are frozen. An adapter that is loaded does not "
                "train by default; load it with PeftModel.from_pretrained(base, path, is_trainable=True)."
            )
        if not layers:
            raise ValueError(
                f"{rule} found no trained adapter inside numbered layers ({self._pattern}). Set layers_pattern to the "
                "name of the model's list of layers."
            )
        lists = sorted({name for space in outside for name in re.findall(r"([^.]+)\.\d+\.", space.name)[:1]})
        if lists:
            warnings.warn(
                f"{rule} draws in {self._pattern}: adapters in the numbered modules {lists} always train. To sample "
                f"them too, set layers_pattern='{'|'.join([self._pattern, *lists])}'.",
                stacklevel=2,
            )
        run.memory.layers, run.memory.outside, run.memory.trained = layers, outside, []

    @staticmethod
    def stacks(run: Run) -> list[list[int]]:
        """Numbers of the layers of each stack: an encoder and a decoder, a vision and a text tower."""
        stacks: dict[str, list[int]] = {}
        for number, name in enumerate(run.memory.layers):
            stacks.setdefault(name.rpartition(".")[0], []).append(number)
        return list(stacks.values())

    def stream(self, run: Run, *stream: Any) -> int:
        """Seed of a draw."""
        return stream_seed(run.seed if self.seed is None else self.seed, *stream)

    def draw(self, run: Run, weights: Tensor, count: Callable[[int], int], *stream: Any) -> list[int]:
        """`count(L)` layers of every stack of L layers, drawn without replacement in proportion to ``weights``.

        Of every stack, because a batch may reach one tower only: were all drawn layers in another one, nothing would
        train, and the backward pass would fail.
        """
        drawn = []
        for which, numbers in enumerate(self.stacks(run)):
            generator = torch.Generator().manual_seed(self.stream(run, *stream, *((which,) if which else ())))
            found = torch.multinomial(weights[numbers], count(len(numbers)), replacement=False, generator=generator)
            drawn += [numbers[place] for place in sorted(found.tolist())]
        return drawn

    def train_only(self, run: Run, numbers: list[int], outside: bool = True) -> None:
        """Hold the adapters of all layers but `numbers` still until the next call, and those of no layer unless they
        are to train (`outside`)."""
        run.memory.trained = numbers
        run.updates.hold(run, self.parameters_at_rest(run, numbers, outside))

    @staticmethod
    def parameters_at_rest(run: Run, numbers: list[int], outside: bool = True) -> list[nn.Parameter]:
        """Parameters of all layers but `numbers`."""
        others = [spaces for at, spaces in enumerate(run.memory.layers.values()) if at not in numbers]
        others += [] if outside else [run.memory.outside]
        return [parameter for spaces in others for space in spaces for parameter in space.parameters()]

    def release(self, run: Run) -> None:
        """Let every layer train again, for the next run's optimizer."""
        run.updates.hold(run, [])
