"""How `step_cost.py` measures: one training step, the bytes it keeps, what a moving support costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_sparse_peft import RegrowthConfig
from hf_sparse_peft.optim import AgedAdamW
from hf_sparse_peft.training.base import AdaptedLayer, unit_sums
from hf_sparse_peft.training.candidates import CandidateCollector
from hf_sparse_peft.training.regrowth import choose_units
from hf_sparse_peft.training.support_moves import replace_units
from hf_sparse_peft.tuners.shared.live_run import begin_run
from hf_sparse_peft.tuners.sparse_lora.layer import SparseLoraLayer

REPLACED = 0.2
COLLECT_STEPS = 5
INTERVAL = 20
"""SpIEL's defaults: every 20 steps a fifth of the support moves, after 5 steps that collect candidates."""


class Trial:
    """A model, its optimizer and its batch: everything one method's step needs."""

    def __init__(self, model: nn.Module, input_ids: torch.Tensor, clock: Callable[[], float] = time.perf_counter):
        self.model, self.input_ids, self.device = model, input_ids, input_ids.device.type
        self.clock = clock
        self.trained = [p for p in model.parameters() if p.requires_grad]
        # What Trainer takes unless told otherwise.
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True) if self.trained else None

    def forward_backward(self) -> None:
        """Loss and gradients of one batch."""
        self.model(input_ids=self.input_ids, labels=self.input_ids).loss.backward()

    def step(self) -> None:
        """One optimizer step with everything that belongs to it."""
        self.forward_backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, work: Callable[[], Any] | None = None) -> float:
        """Time of `work`, of one step by default."""
        self._wait()
        start = self.clock()
        (work or self.step)()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def first_step(trial: Trial, weight_shapes: set[tuple[int, int]]) -> dict[str, Any]:
    """Run one step and count bytes: saved for the backward pass, gradients, optimizer state, indices.

    Saved bytes are those of distinct storages that autograd packs, without parameters, buffers and indices.
    """
    for layer in sparse_layers(trial.model):
        layer.units("default")  # decoded once, then cached: an index, not something a step saves
    held = {t.untyped_storage().data_ptr() for t in (*trial.model.parameters(), *trial.model.buffers())}
    held |= {t.untyped_storage().data_ptr() for t in _index_tensors(trial.model)}
    saved: dict[int, int] = {}
    weight_sized = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal weight_sized
        parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        for part in parts:
            storage = part.untyped_storage()
            if storage.data_ptr() not in held and storage.data_ptr() not in saved:
                saved[storage.data_ptr()] = storage.nbytes()
                weight_sized += tuple(part.shape) in weight_shapes or tuple(part.shape)[::-1] in weight_shapes
        return tensor  # held by the graph, so no address is handed out twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trial.forward_backward()
    figures = {
        "trained_numbers": sum(p.numel() for p in trial.trained),
        "trained_bytes": sum(p.nbytes for p in trial.trained),
        "saved_bytes": sum(saved.values()),
        "saved_tensors_of_weight_shape": weight_sized,
        "gradient_bytes": sum(p.grad.nbytes for p in trial.trained if p.grad is not None),
        "optimizer_bytes": 0,
        "age_bytes": 0,
    }
    if trial.optimizer is not None:
        figures["age_bytes"] = _age_bytes(trial)
        trial.optimizer.step()
        trial.optimizer.zero_grad(set_to_none=True)
        figures["optimizer_bytes"] = _state_bytes(trial.optimizer)
    figures["gradient_optimizer_bytes"] = figures["gradient_bytes"] + figures["optimizer_bytes"]
    figures["index_bytes"] = _unique_bytes(_index_tensors(trial.model))
    return figures


def _age_bytes(trial: Trial) -> int:
    """What ages per unit add to the optimizer state, from one step of `AgedAdamW` at a learning rate of 0."""
    values = [p for layer in sparse_layers(trial.model) for p in layer.sparse_lora_values.values()]
    if not values:
        return 0
    aged = AgedAdamW([{"params": values, "per_unit_age": True}], lr=0.0)
    aged.step()
    moments = 2 * sum(p.nbytes for p in values)
    return _state_bytes(aged) - moments


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return _unique_bytes(t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def _unique_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _index_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Integer tensors of adapter layers, saved or cached, their base layers' own ones left out."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for value in (*vars(module).values(), *module.children()):
                yield from _integers(value)
        elif "indices" in module._buffers:  # the SpIEL reference
            yield module.indices


def _integers(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        if not value.is_floating_point():
            yield value
    elif isinstance(value, BufferDict):
        yield from (t for t in value.values() if not t.is_floating_point())
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)


def peak_bytes(trial: Trial) -> int:
    """Most memory this method's step needs: its model and optimizer state, plus what comes and goes in between.

    Other methods' models are alive in this process too. What they hold at rest is taken off.
    """
    tensors = [*trial.model.parameters(), *trial.model.buffers(), *_index_tensors(trial.model), trial.input_ids]
    for p in trial.model.parameters():
        tensors += _quantisation_tensors(getattr(p, "quant_state", None))
    if trial.optimizer is not None:
        tensors += [t for state in trial.optimizer.state.values() for t in state.values()]
    at_rest = _unique_bytes(t for t in tensors if torch.is_tensor(t))
    if trial.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trial.step()
        torch.cuda.synchronize()
        return at_rest + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trial.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return at_rest + highest


def _quantisation_tensors(state: Any) -> list[torch.Tensor]:
    if state is None:
        return []
    own = [t for t in (state.absmax, state.code, getattr(state, "offset", None)) if torch.is_tensor(t)]
    return own + _quantisation_tensors(getattr(state, "state2", None))


def sparse_layers(model: nn.Module) -> list[SparseLoraLayer]:
    """Adapted layers with a support."""
    return [m for m in model.modules() if isinstance(m, SparseLoraLayer) and "default" in m.sparse_lora_values]


def file_bytes(model: nn.Module) -> dict[str, int]:
    """Size of the adapter's safetensors file, and with bf16 values where the method offers that. Ends the training."""
    if not hasattr(model, "peft_config"):
        return {}
    sizes = {"file_bytes": _saved_size(model)}
    if sparse_layers(model):
        model.compact(values_dtype="bfloat16")
        sizes["file_bytes_bf16"] = _saved_size(model)
    return sizes


def _saved_size(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


class Collection:
    """One phase of SpIEL-AG's candidate collection, with the collectors that `MaskRegrowthCallback` uses."""

    def __init__(self, model: nn.Module):
        self.parts = [AdaptedLayer(layer, "default") for layer in sparse_layers(model)]
        self.steps = 0
        self.run = begin_run(model, sparse_layers(model))
        for part in self.parts:
            part.config.regrowth = RegrowthConfig(interval=INTERVAL, collect_steps=COLLECT_STEPS, fraction=REPLACED)
            self.run.attend(part.config, "regrowth")  # no Trainer here, and no warning that its callback is missing
            part.layer.allocate_training_state("default")

    def step(self, trial: Trial) -> None:
        """One training step that also collects."""
        collectors = [CandidateCollector(part, starts=self.steps == 0) for part in self.parts]
        for collector in collectors:
            collector.part.layer.sparse_lora_sink["default"] = collector
        trial.step()
        for collector in collectors:
            collector.finish_step()
            del collector.part.layer.sparse_lora_sink["default"]
        self.steps += 1


@torch.no_grad()
def move_supports(collection: Collection, optimizer: torch.optim.Optimizer, fraction: float = REPLACED) -> int:
    """End a phase: the smallest values of every support give way to its best candidates. Returns the units moved."""
    moved = 0
    for part in collection.parts:
        collector, age = CandidateCollector(part), collection.steps
        gradients, squares = collector.sums
        count = max(1, round(fraction * part.units.numel()))
        units = choose_units(part.units, unit_sums(part.values.data), collector.units, gradients, count)
        means = {"grad_mean": gradients / age, "grad_sq_mean": squares / age}
        moved += replace_units(part, units, optimizer, {"units": collector.units, "age": age, **means})
        part.layer.drop_training_state("default")
        part.config.regrowth = None
    return moved
