"""One candidate's training step, driven by hand: what it takes in time, and the bytes that it keeps."""

from __future__ import annotations

import inspect
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_sparse_peft.methods import Method

TOTAL_STEPS = 10_000
"""Length of the run that schedules are told of: figures are those of its beginning."""


class Trial:
    """A model, its optimizer, its callbacks and its batch: everything that belongs to one candidate's step.

    A step calls what Trainer calls, in its order. Where the method leaves the choice, the optimizer is Trainer's own.
    """

    def __init__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        method: Method | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.model, self.input_ids, self.clock = model, input_ids, clock
        self.trained = [p for p in model.parameters() if p.requires_grad]
        on_cpu = input_ids.device.type == "cpu"
        args = TrainingArguments("runs", max_steps=TOTAL_STEPS, learning_rate=1e-4, report_to=[], use_cpu=on_cpu)
        self.optimizer = method.optimizer(model, args) if method else None
        if self.optimizer is None and self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.callbacks = method.callbacks(model) if method else []
        self.callback_seconds = 0.0
        self.state = TrainerState(max_steps=TOTAL_STEPS)
        examples = [{"input_ids": row, "labels": row} for row in input_ids]
        data = DataLoader(examples, batch_size=len(examples))  # for supports that are chosen by data
        self._told = (args, self.state, TrainerControl())
        self._given = {"model": model, "optimizer": self.optimizer, "train_dataloader": data}
        self._call("on_train_begin")

    def begin(self) -> None:
        """What comes before the forward pass."""
        self._call("on_step_begin")

    def forward_backward(self) -> None:
        """Loss and gradients of one batch."""
        self.model(input_ids=self.input_ids, labels=self.input_ids).loss.backward()

    def update(self) -> None:
        """The optimizer's part of the step."""
        if self.optimizer is not None:
            self._call("on_pre_optimizer_step")
            self.optimizer.step()
            self._call("on_optimizer_step")
            self.optimizer.zero_grad(set_to_none=True)
        self.state.global_step += 1

    def end(self) -> None:
        """What follows a step, such as a move of the support."""
        self._call("on_step_end")

    def step_without_end(self) -> None:
        """All of a step but what follows it."""
        self.begin()
        self.forward_backward()
        self.update()

    def step(self) -> None:
        """One optimizer step with everything that belongs to it."""
        self.step_without_end()
        self.end()

    def seconds(self, work: Callable[[], Any] | None = None) -> float:
        """Time of `work`, of one step by default."""
        wait = torch.cuda.synchronize if self.input_ids.is_cuda else lambda: None
        wait()
        start = self.clock()
        (work or self.step)()
        wait()
        return self.clock() - start

    def _call(self, event: str) -> None:
        start = self.clock()
        for callback in self.callbacks:
            getattr(callback, event)(*self._told, **self._given)
        self.callback_seconds += self.clock() - start


def first_step(trial: Trial, weight_shapes: set[tuple[int, int]]) -> dict[str, Any]:
    """Run one step and count bytes: saved for the backward pass, gradients, optimizer state, indices.

    Saved bytes are those of distinct storages that autograd packs, without parameters, buffers and indices.
    `saved_tensors_of_weight_shape` is None where `weight_shapes` is empty.
    """
    trial.forward_backward()  # decodes indices, which then stay: not something a step saves
    trial.model.zero_grad(set_to_none=True)
    held = {t.untyped_storage().data_ptr() for t in _at_rest(trial.model)}
    saved: dict[int, int] = {}
    weight_sized = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal weight_sized
        for part in [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]:
            storage = part.untyped_storage()
            if storage.data_ptr() not in held and storage.data_ptr() not in saved:
                saved[storage.data_ptr()] = storage.nbytes()
                weight_sized += tuple(part.shape) in weight_shapes or tuple(part.shape)[::-1] in weight_shapes
        return tensor  # held by the graph, so no address is handed out twice

    trial.begin()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trial.forward_backward()
    gradients = sum(p.grad.nbytes for p in trial.trained if p.grad is not None)
    trial.update()
    trial.end()
    state = optimizer_bytes(trial.optimizer)
    return {
        "trained_numbers": sum(p.numel() for p in trial.trained),
        "saved_bytes": sum(saved.values()),
        "saved_tensors_of_weight_shape": weight_sized if weight_shapes else None,
        "gradient_bytes": gradients,
        "optimizer_bytes": state,
        "gradient_optimizer_bytes": gradients + state,
        "index_bytes": _unique_bytes(_index_tensors(trial.model)),
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of the optimizer's state."""
    return _unique_bytes(_state_tensors(optimizer))


def peak_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None, step: Callable[[], Any], device: str) -> int:
    """Most memory that a step needs: its model and optimizer state, plus what comes and goes in between.

    Models of other candidates are alive in this process too. What they hold at rest is taken off.
    """
    at_rest = _unique_bytes([*_at_rest(model), *_state_tensors(optimizer)])
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return at_rest + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return at_rest + highest


def host_waits(work: Callable[[], Any], device: str) -> int | None:
    """How often `work` makes the host wait for the GPU (`.item()`, `nonzero`, copies to the host); None on a CPU."""
    if device != "cuda":
        work()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def file_bytes(model: nn.Module) -> dict[str, int]:
    """Size of the adapter's safetensors file, and with bf16 values where the method offers that. Ends the training."""
    if not hasattr(model, "peft_config"):
        return {}
    sizes = {"file_bytes": _saved_size(model)}
    if hasattr(model, "compact") and "values_dtype" in inspect.signature(model.compact).parameters:
        model.compact(values_dtype="bfloat16")
        sizes["file_bytes_bf16"] = _saved_size(model)
    return sizes


def _saved_size(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _unique_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _state_tensors(optimizer: torch.optim.Optimizer | None) -> Iterator[torch.Tensor]:
    states = optimizer.state.values() if optimizer is not None else ()
    return (t for state in states for t in state.values() if torch.is_tensor(t))


def _at_rest(model: nn.Module) -> Iterator[torch.Tensor]:
    """All tensors that a model holds between steps."""
    yield from (*model.parameters(), *model.buffers(), *_index_tensors(model))
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if torch.is_tensor(t))
            state = state.state2


def _index_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Integer tensors of adapter layers, saved or cached, their base layers' own ones left out."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            yield from _integers(vars(module))
            for name, child in module.named_children():
                yield from _integers(dict(child.named_buffers()) if name != "base_layer" else {})
        elif "indices" in module._buffers:  # SpIEL's reference
            yield module.indices


def _integers(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        if not value.is_floating_point():
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)
