"""`LayerSamplingCallback`: the adapters of a few transformer layers train at a step, drawn by importance (IST)."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.trainer_callback import ExportableState

from ..rules.collectives import all_reduce_mean
from ..sparsity import random_units, stream_seed
from ..tuners import AdapterLayer
from ..tuners.shared.base_weight import keep_4bit_weight_stable
from ..tuners.shared.best_model import warn_of_best_model
from ..tuners.sparse_lora import LayerSamplingConfig
from ..tuners.sparse_lora.schedule_config import nested
from .base import AdaptedLayer, ScheduleCallback
from .trainer_checks import refuse_sharded

_COMMON = "layers|h|block|blocks|layer"


@dataclass
class _Layer:
    """The adapters inside one transformer layer."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    scalings: list[tuple[dict[str, float], str]] = field(default_factory=list)


class LayerSamplingCallback(ScheduleCallback, ExportableState):
    r"""Trains the adapters of a few transformer layers at a time (IST; Yao et al., 2024); any peft adapter of linear
    layers that has a `scaling`, upstream LoRA and DoRA included, and every adapter of this package.

    Each step draws `int(trained * L)` layers with probability :math:`\propto \sigma(-I)`, in every stack of L layers
    where a model has several; only their adapters get gradients. Every `interval` steps, `probes` sets of
    `int(suppressed * L)` layers are drawn by :math:`\sigma(I)`, the scaling of their adapters is multiplied by
    `suppression`, and the loss :math:`\ell_k` of one training batch is taken in eval mode. With
    :math:`\rho_k = e^{-\ell_k}`, :math:`p_i = \sigma(I_i)` from before the probes:
    :math:`I_i \mathrel{+}= \eta (\rho_k - \bar\rho)\, p_i (1 - p_i)` for each suppressed i. A high `I` marks a layer
    that is not missed.

    `options` are for adapters whose config has no `layer_sampling`. `importance` (float64) is saved in
    `trainer_state.json` and comes back on resume; all draws follow from the seed and the step. What trains outside the
    layers (`modules_to_save`, an adapted head) always trains.
    """

    option = "layer_sampling"

    def __init__(self, options: LayerSamplingConfig | dict | None = None) -> None:
        super().__init__()
        self.given = nested(LayerSamplingConfig, options, "options")
        self.options = self.given or LayerSamplingConfig()
        self.importance: list[float] = []
        self.layers: dict[str, _Layer] = {}
        self.trained: list[int] = []
        """Numbers of the layers that train at this step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries (`trainer_state.json`)."""
        return {
            "args": {"options": None if self.given is None else asdict(self.given)},
            "attributes": {"importance": list(self.importance)},
        }

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Find the layers, and the importance that a checkpoint brought.

        Raises:
            ValueError: no options, no adapter inside numbered layers, an adapter without a scaling, a sharded run, DDP
                that waits for every gradient, or a checkpoint without the importance of these layers.
        """
        refuse_sharded(args, self.option, model)
        warn_of_best_model(args, state, model)
        refuse_fixed_ddp(args, self.option)
        self.total_steps = state.max_steps
        self.join(model, kwargs.get("optimizer"))
        asking = {}
        for module in model.modules():
            keep_4bit_weight_stable(module)  # the probes run without gradients
            if isinstance(module, AdapterLayer):
                for name in module.active_adapters:
                    config = module.adapter_configs.get(name)
                    if getattr(config, self.option, None) is not None:
                        asking[id(config)] = AdaptedLayer(module, name)
        self.parts = list(asking.values())
        if self.given is None and not self.parts:
            raise ValueError(
                "LayerSamplingCallback has no options: pass LayerSamplingCallback(LayerSamplingConfig()), or set "
                "layer_sampling in the SparseLoraConfig."
            )
        self.options = self.given or self.parts[0].config.layer_sampling
        for config in self.configs():
            self.run.attend(config, self.option)
            config.training_finished = False
        self.layers = _find_layers(model, self.options.layers_pattern)
        self._restore(state)
        if not state.global_step:
            self._check_effect()

    def _check_effect(self) -> None:
        """Say where nothing is sampled, or nothing is learned about the layers."""
        options, count = self.options, min(len(stack) for stack in self._stacks())
        trained, suppressed = int(options.trained * count), int(options.suppressed * count)
        said = []
        if trained == count or count == 1:
            said.append(f"trained={options.trained} of {count} layers trains all of them at every step: none is drawn")
        elif trained == 0:
            said.append(f"trained={options.trained} of {count} layers rounds to 0; 1 layer trains at a step")
        if suppressed == count or count == 1:
            said.append(
                f"suppressed={options.suppressed} of {count} layers suppresses all of them in every probe: the "
                "importance never changes"
            )
        elif suppressed == 0:
            said.append(f"suppressed={options.suppressed} of {count} layers rounds to 0; a probe suppresses 1 layer")
        if options.interval >= self.total_steps:
            said.append(
                f"interval={options.interval} leaves no probe in {self.total_steps} steps: all layers are drawn alike, "
                "and the importance never changes"
            )
        if said:
            warnings.warn(
                f"layer_sampling: {'; '.join(said)}. Change these options, adapt more layers, train longer, or set "
                "layer_sampling=None.",
                stacklevel=3,
            )

    def _restore(self, state: Any) -> None:
        count = len(self.layers)
        if not state.global_step:
            self.importance = [0.0] * count
            return
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        found = None if saved is None else saved["attributes"]["importance"]
        if found is None or len(found) != count:
            raise ValueError(
                f"The checkpoint has the importance of {len(found or [])} layers for {count} adapted ones. Resume from "
                "a run of LayerSamplingCallback on the same model, or start afresh."
            )
        self.importance = [float(value) for value in found]

    def on_step_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        """Probe where it is due, then draw the layers of the coming step."""
        step = state.global_step
        if step and step % self.options.interval == 0:
            self._probe(model, args, step, train_dataloader)
        weights = torch.sigmoid(-torch.tensor(self.importance, dtype=torch.float64))
        self.trained = self._draw_in_stacks(weights, self.options.trained, step, "trained")
        others = [layer for number, layer in enumerate(self.layers.values()) if number not in self.trained]
        self.run.mask.hold(self, [parameter for layer in others for parameter in layer.parameters])

    def release(self) -> None:
        """Let every layer train again, for the next run's optimizer."""
        if self.run is not None:
            self.run.mask.hold(self, [])

    def _stacks(self) -> list[list[int]]:
        """Numbers of the layers of each stack: an encoder and a decoder, a vision and a text tower."""
        stacks: dict[str, list[int]] = {}
        for number, name in enumerate(self.layers):
            stacks.setdefault(name.rpartition(".")[0], []).append(number)
        return list(stacks.values())

    def _draw_in_stacks(self, weights: torch.Tensor, share: float, *stream: Any) -> list[int]:
        """`int(share * L)` layers, at least one, of every stack of L layers.

        Of every stack, because a batch may reach one tower only: were all drawn layers in another one, nothing would
        train, and the backward pass would fail.
        """
        drawn = []
        for which, numbers in enumerate(self._stacks()):
            seed = stream_seed(self.options.seed, *stream, *((which,) if which else ()))
            found = _draw(weights[numbers], max(1, int(share * len(numbers))), seed)
            drawn += [numbers[place] for place in found]
        return drawn

    def _probe(self, model: nn.Module, args: Any, step: int, train_dataloader: Any) -> None:
        sets = self._suppressed_sets(step)
        with _evaluating(model):
            batch = self._batch(args, step, train_dataloader)
            losses = []
            for chosen in sets:
                with self._suppressed(chosen):
                    losses.append(_loss(model, batch))
        self.importance = updated_importance(self.importance, sets, losses, self.options.step_size)

    def _suppressed_sets(self, step: int) -> list[list[int]]:
        """The layers of each probe, no two probes alike where there are enough choices."""
        sizes = [(len(stack), max(1, int(self.options.suppressed * len(stack)))) for stack in self._stacks()]
        choices = math.prod(math.comb(count, size) for count, size in sizes)
        weights = torch.sigmoid(torch.tensor(self.importance, dtype=torch.float64))
        sets: list[list[int]] = []
        attempt = 0
        while len(sets) < self.options.probes:
            found = self._draw_in_stacks(weights, self.options.suppressed, step, "suppressed", attempt)
            attempt += 1
            if found not in sets or len(sets) >= choices or attempt > 100:
                sets.append(found)
        return sets

    @contextmanager
    def _suppressed(self, numbers: list[int]):
        layers = list(self.layers.values())
        kept = [(held, name, held[name]) for number in numbers for held, name in layers[number].scalings]
        try:
            for held, name, value in kept:
                held[name] = value * self.options.suppression
            yield
        finally:
            for held, name, value in kept:
                held[name] = value

    def _batch(self, args: Any, step: int, train_dataloader: Any) -> Any:
        """Random training samples, collated as in training; ranks share them out."""
        dataset, collate = getattr(train_dataloader, "dataset", None), getattr(train_dataloader, "collate_fn", None)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError("LayerSamplingCallback draws its probes by index, and this training data has no index.")
        generator = torch.Generator().manual_seed(stream_seed(self.options.seed, step, "batch"))
        rows = random_units(len(dataset), min(self.options.probe_batch, len(dataset)), generator).tolist()
        rows = rows[args.process_index :: args.world_size] or rows
        return _to(collate([dataset[row] for row in rows]), args.device)


def updated_importance(
    importance: list[float], sets: list[list[int]], losses: list[float], step_size: float
) -> list[float]:
    r""":math:`I_i + \eta \sum_{k: i \in S_k} (\rho_k - \bar\rho)\, p_i (1 - p_i)`, :math:`\rho_k = e^{-\ell_k}`,
    :math:`p = \sigma(I)`, in float64; unchanged where all losses are equal, or one is not a number (every reward
    would be none) or below -700 (its reward would be infinite)."""
    if len(set(losses)) == 1 or not all(loss > -700 for loss in losses):
        return list(importance)
    rewards = [math.exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    shares = torch.sigmoid(torch.tensor(importance, dtype=torch.float64)).tolist()
    updated = list(importance)
    for chosen, reward in zip(sets, rewards, strict=True):
        for i in chosen:
            updated[i] += step_size * (reward - mean) * shares[i] * (1 - shares[i])
    return updated


def _draw(weights: torch.Tensor, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.multinomial(weights, count, replacement=False, generator=generator).tolist())


def _find_layers(model: nn.Module, pattern: str | None) -> dict[str, _Layer]:
    """Transformer layers with trained adapters, by name up to their number, in model order."""
    place = re.compile(rf"(?:^|\.)(?:{pattern or _COMMON})\.\d+(?=\.|$)")
    layers: dict[str, _Layer] = {}
    outside: set[str] = set()
    frozen: str | None = None
    for name, module in model.named_modules():
        found = place.search(name)
        if not isinstance(module, BaseTunerLayer):
            continue
        if found is None:
            outside |= set(re.findall(r"([^.]+)\.\d+\.", name)[:1])
            continue
        held = [getattr(module, attribute) for attribute in module.adapter_layer_names]
        for adapter in module.active_adapters:
            tensors = [one[adapter] for one in held if adapter in one]
            parameters = [p for one in tensors for p in ([one] if isinstance(one, nn.Parameter) else one.parameters())]
            parameters = [p for p in parameters if p.requires_grad]
            if not parameters:
                frozen = frozen or (name if tensors else None)
                continue
            scalings = [getattr(module, n) for n in module.other_param_names if n.endswith("scaling")]
            scalings = [(one, adapter) for one in scalings if isinstance(one, dict) and adapter in one]
            if not scalings:
                raise ValueError(
                    f"'{name}' ({type(module).__name__}) has no scaling that could be suppressed. "
                    "LayerSamplingCallback works on adapters with one: LoRA, DoRA, and those of this package."
                )
            layer = layers.setdefault(name[: found.end()], _Layer())
            layer.parameters += parameters
            layer.scalings += scalings
    if frozen and not layers:
        raise ValueError(
            f"LayerSamplingCallback found no trained adapter: those of '{frozen}' are frozen. An adapter that is "
            "loaded does not train by default; load it with PeftModel.from_pretrained(base, path, is_trainable=True)."
        )
    if not layers:
        raise ValueError(
            f"LayerSamplingCallback found no trained adapter inside numbered layers "
            f"({pattern or _COMMON}). Set layers_pattern to the name of the model's list of layers."
        )
    if outside:
        warnings.warn(
            f"layer_sampling draws in {pattern or _COMMON}: adapters in the numbered modules {sorted(outside)} always "
            f"train. To sample them too, set layers_pattern='{'|'.join([pattern or _COMMON, *sorted(outside)])}'.",
            stacklevel=4,
        )
    return layers


def refuse_fixed_ddp(args: Any, option: str) -> None:
    """Raises `ValueError` where DDP would wait for gradients of frozen parameters."""
    if args.world_size > 1 and getattr(args, "ddp_find_unused_parameters", None) is False:
        raise ValueError(
            f"{option} freezes parameters in turns, and ddp_find_unused_parameters=False makes DDP wait for their "
            "gradients. Set it to True, or leave it out."
        )


@contextmanager
def _evaluating(model: nn.Module):
    """Eval mode, no gradients and a copy of the random state; every module goes back to the mode it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _loss(model: nn.Module, batch: Any) -> float:
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError("LayerSamplingCallback needs the loss of a probe, and the model gave none: add labels.")
    return float(all_reduce_mean(loss.detach().double().mean()))


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    return {k: _to(v, device) for k, v in batch.items()} if isinstance(batch, Mapping) else batch
