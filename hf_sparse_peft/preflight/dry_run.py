"""One training step of an adapter on the meta device: what it holds, keeps, and needs at its highest."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..sparsity import Given
from ..sparsity.statistics import DeltaMagnitude
from ..training import TRAINERS, trainer_class_for
from ..training.calibration.passes import ACCUMULATOR_BYTES, groups_within
from ..tuners import AdapterLayer, adapter_layers
from ..tuners.shared.assumed_units import units_assumed
from ..tuners.shared.ranks import adapter_buffers
from .base_groups import BaseGroup, base_groups
from .communication import Traffic, move_traffic
from .memory_trace import trace_step
from .meta_answers import MetaAnswers
from .meta_base import batch_of, constants_of
from .optimizer_state import optimizer_of

ADAPTER_NAME = "default"
WEIGHTS, CONSTANTS, VALUES, INDICES, FROZEN, STATE = "weights", "constants", "values", "indices", "frozen", "rule_state"
_WARM_UP_BYTES = 16
"""Of a dense delta, its gradient and two moments, for each targeted entry (`criterion='delta_magnitude'`)."""


@dataclass
class DryRun:
    """What a step was found to take, in bytes."""

    trained_numbers: int
    base_numbers: int
    modules: int
    """Adapted modules."""
    optimizer: str
    optimizer_bytes: int
    at_rest: dict[str, int]
    """What lies there between steps, by kind; without the optimizer's state."""
    kept: dict[str, int]
    """What is alive between the forward and the backward pass, by what it is for."""
    saved: int
    """Of it, what autograd packed."""
    at_peak: dict[str, int]
    """What a step makes, at its highest."""
    at_move: int
    """What the step before a move takes beyond that."""
    calibration: int
    """What choosing a start from data takes beside the model, the adapter and what a step keeps; 0 without it."""
    shares_assumed: bool = False
    """Whether scores or data, which are not there, share a budget out over the modules."""
    warnings: list[str] = field(default_factory=list)
    """What was said at injection."""
    groups: tuple[BaseGroup, ...] = ()
    """The base's parameters, as they are gathered where they are sharded."""
    trained: tuple[tuple[int, int], ...] = ()
    """Numbers and bytes of each trained parameter."""
    buffers: int = 0
    """Bytes of the buffers that are none of an adapter's."""
    moves: tuple[Traffic, ...] = ()
    """Collectives of a move of each rule that is counted."""
    uncounted: tuple[str, ...] = ()
    """Rules whose collectives are not."""

    @property
    def training_peak(self) -> int:
        """Bytes at the highest point of training."""
        return sum(self.at_rest.values()) + self.optimizer_bytes + sum(self.at_peak.values()) + self.at_move

    @property
    def calibration_peak(self) -> int:
        """Bytes at the highest point before the first step; 0 where nothing is read from data."""
        if not self.calibration:
            return 0
        return sum(self.at_rest.values()) + sum(self.kept.values()) + self.calibration

    @property
    def peak(self) -> int:
        """The higher of both."""
        return max(self.training_peak, self.calibration_peak)


def adapt_on_meta(base: PreTrainedModel, config: PeftConfig) -> tuple[PeftModel | PeftMixedModel, list[str]]:
    """`base`, on the meta device, with an adapter of `config`, whose units lie anywhere; and what was warned of.

    Raises:
        ValueError: the adapter does not fit the model, or its start needs weights to know its shapes.
    """
    with warnings.catch_warnings(record=True) as caught, units_assumed():
        warnings.simplefilter("always")
        try:
            model = get_peft_model(base, copy.deepcopy(config), low_cpu_mem_usage=True)
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"{type(config).__name__} looks at weights to make its adapter, and a config.json has none: {error}"
            ) from error
    for layer, name in active_layers(model):
        layer.assume_units(name)
    return model.train(), [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


def dry_run(
    base: PreTrainedModel,
    config: PeftConfig | None,
    *,
    batch: int,
    seq: int,
    optimizer: Any = None,
    gradient_checkpointing: bool = False,
    input_gradients: bool | None = None,
) -> DryRun:
    """Follow one step of training an adapter of `config` over `base` (`meta_base`), which is changed; None: the frozen
    model alone.

    Raises:
        ValueError: see `adapt_on_meta`, `optimizer_of`, `batch_of`.
    """
    of_base = {_key(tensor) for tensor in (*base.parameters(), *base.buffers())}
    numbers, groups = _base_numbers(base), base_groups(base)
    model, told = (base, []) if config is None else adapt_on_meta(base, config)
    if gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    if gradient_checkpointing if input_gradients is None else input_gradients:
        base.get_input_embeddings().register_forward_hook(_require_gradient)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    needs = _needs(config)
    inputs, width = batch_of(base, batch, seq), getattr(base.config.get_text_config(), "vocab_size", None)
    kept: dict[str, int] = {}
    held = [*model.parameters(), *model.buffers(), *constants_of(model)]
    options = {"classes": width, "backward": "loss_differences" not in needs, "passes": 1 + ("two_passes" in needs)}
    trace = trace_step(model, inputs, held, after_forward=lambda trace: kept.update(trace.alive), **options)
    name, state = optimizer_of(model, optimizer) if trained else ("none", 0)
    moves, uncounted = _moves(model, DTYPE_BYTES.get(base.dtype, 2))
    return DryRun(
        sum(parameter.numel() for parameter in trained),
        numbers,
        sum(isinstance(module, BaseTunerLayer) for module in model.modules()),
        name,
        state,
        _at_rest(model, of_base),
        kept,
        sum(trace.packed.values()),
        trace.at_peak,
        _at_move(model, inputs, held, options, sum(trace.at_peak.values())) if "gradient" in needs else 0,
        _calibration(model, DTYPE_BYTES.get(base.dtype, 2)) if config is not None else 0,
        bool(getattr(config, "calibrates_sizes", False) or getattr(getattr(config, "budget", None), "ranks_units", 0)),
        told,
        groups,
        tuple((parameter.numel(), parameter.nbytes) for parameter in trained),
        _bytes(model.buffers()) - _bytes(buffer for _, buffer in adapter_buffers(model)),
        moves,
        uncounted,
    )


def _moves(model: nn.Module, itemsize: int) -> tuple[tuple[Traffic, ...], tuple[str, ...]]:
    """Collectives of a move of each rule, and the rules that nobody counts."""
    layers, found, uncounted = active_layers(model), [], []
    rules = layers[0][0].adapter_configs[layers[0][1]].rules if layers else ()
    with MetaAnswers():
        for rule in rules:
            spaces = [s for layer, name in layers for s in layer.unit_spaces(name) if s.kind in rule.acts_on]
            counted = move_traffic(rule, spaces, itemsize=itemsize)
            found += counted or ()
            uncounted += [rule.part_type] if counted is None else []
    return tuple(found), tuple(uncounted)


DTYPE_BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


def _require_gradient(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def active_layers(model: nn.Module) -> list[tuple[AdapterLayer, str]]:
    """Layers of this package with the active adapters that they hold."""
    return [(layer, name) for layer in adapter_layers(model) for name in layer.active_adapters if layer.holds(name)]


def _base_numbers(base: nn.Module) -> int:
    packed = {
        id(module.weight): module.in_features * module.out_features
        for module in base.modules()
        if isinstance(module, nn.Linear)
    }
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in base.parameters())


def _needs(config: PeftConfig | None) -> frozenset[str]:
    """What the loop must do for this config, and whether rules read dense gradients (`Rule.all_needs`)."""
    if config is None:
        return frozenset()
    found = {need for rule in getattr(config, "rules", ()) for need in rule.all_needs}
    cls = trainer_class_for(config)
    return frozenset(found | {need for need, trainer in TRAINERS.items() if trainer is cls})


def _at_rest(model: nn.Module, of_base: set[int]) -> dict[str, int]:
    found: dict[str, list[torch.Tensor]] = {kind: [] for kind in (WEIGHTS, CONSTANTS, VALUES, INDICES, FROZEN, STATE)}
    found[CONSTANTS] = constants_of(model)
    constants = {_key(tensor) for tensor in found[CONSTANTS]}
    rule_state = {_key(t) for layer, name in active_layers(model) for t in layer.rule_state(name).values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if _key(tensor) in of_base:
            kind = CONSTANTS if _key(tensor) in constants else WEIGHTS
        elif tensor.requires_grad:
            kind = VALUES
        elif _key(tensor) in rule_state:
            kind = STATE
        else:
            kind = FROZEN if tensor.is_floating_point() else INDICES
        found[kind].append(tensor)
    return {kind: _bytes(tensors) for kind, tensors in found.items()}


def _at_move(model: nn.Module, inputs: dict, held: list[torch.Tensor], options: dict, plain: int) -> int:
    """What a step whose dense gradients are read takes beyond a plain one: those, and what rules keep for a few layers
    at a time (`TensorSpec.passing`)."""
    readers = []
    for layer, name in active_layers(model):
        if type(layer).add_gradient_reader is not AdapterLayer.add_gradient_reader:
            reader = _Reader()
            layer.add_gradient_reader(name, reader)
            readers.append((layer, name, reader))
    for parameter in model.parameters():
        parameter.grad = None
    trace = trace_step(model, inputs, held, **options)
    for layer, name, reader in readers:
        layer.remove_gradient_reader(name, reader)
    passing = [
        sum(_spec_bytes(spec) for rule in layer.adapter_configs[name].rules for spec in _passing(layer, name, rule))
        for layer, name in active_layers(model)
    ]
    return max(0, sum(trace.at_peak.values()) - plain) + max(passing, default=0)


class _Reader:
    def __call__(self, gradient: torch.Tensor) -> None:
        """Looks at the dense gradient, and keeps nothing."""


def _passing(layer: AdapterLayer, name: str, rule: Any) -> list[Any]:
    spaces = [space for space in layer.unit_spaces(name) if space.kind in rule.acts_on]
    return [spec for space in spaces for spec in rule.state(space) if spec.passing]


def _spec_bytes(spec: Any) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize


def _calibration(model: nn.Module, width: int) -> int:
    """Statistics of as many layers as fit into a pass, and the dense gradient of one."""
    by_statistic: dict[Any, dict[str, nn.Module]] = {}
    for layer, name in active_layers(model):
        config = layer.adapter_configs[name]
        if config.needs_calibration and not isinstance(getattr(config, "criterion", None), Given):
            own = getattr(config, "awaits_start", False)
            statistic = config.start.statistic if own else layer.calibration_statistic(name)
            by_statistic.setdefault(statistic, {})[layer.module_name] = layer
    most = 0
    for statistic, layers in by_statistic.items():
        sizes = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
        if isinstance(statistic, DeltaMagnitude):
            most = max(most, _WARM_UP_BYTES * sum(sizes.values()))
            continue
        for group in groups_within(layers, statistic, ACCUMULATOR_BYTES):
            states = sum(_state_numel(statistic, layers[name]) for name in group)
            most = max(most, 4 * states + width * max(sizes[name] for name in group))
    return most


def _state_numel(statistic: Any, layer: AdapterLayer) -> int:
    rows, cols = layer.out_features, layer.in_features
    return statistic.state_numel(rows, cols) + (statistic.step_numel(rows, cols) if statistic.per_step else 0)
