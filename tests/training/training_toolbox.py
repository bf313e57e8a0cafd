"""Tiny models, runs of the real Trainer, and watchers that look at an adapter before and after its callbacks act."""

from __future__ import annotations

import copy

import tiny
import torch
from peft import get_peft_model
from support_codes import read_codes
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sparse_peft import SparseLoraConfig, callbacks_for
from hf_sparse_peft.optim import AgedAdamW, aged_adamw_groups
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.sparse_lora import SparseLoraLayer

VOCAB = 48


def tiny_llama(seed: int = 0, hidden: int = 32, layers: int = 1, dtype: torch.dtype = torch.float32):
    return tiny.llama(
        seed=seed, hidden=hidden, layers=layers, dtype=dtype, vocab_size=VOCAB, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=None,
    )  # fmt: skip


def make_config(**overrides) -> SparseLoraConfig:
    defaults = {
        "r": 0, "density": 0.05, "target_modules": ["q_proj", "v_proj", "down_proj"], "block_size": 8,
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    if "budget" in overrides:
        del defaults["density"]
    return SparseLoraConfig(**{**defaults, **overrides})


def adapted(config: SparseLoraConfig, seed: int = 0, base=None, **model_options):
    base = tiny_llama(seed, **model_options) if base is None else base
    torch.manual_seed(seed + 1)  # the draw of A and B
    return get_peft_model(base, copy.deepcopy(config))


class TokenData(torch.utils.data.Dataset):
    """Random token ids; `repeated` gives every sample that many times in a row."""

    def __init__(self, samples: int = 96, length: int = 10, seed: int = 3, repeated: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids, self.repeated = torch.randint(VOCAB, (samples, length), generator=generator), repeated

    def __len__(self) -> int:
        return len(self.ids) * self.repeated

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index // self.repeated]
        return {"input_ids": ids, "labels": ids.clone()}


class StopAt(TrainerCallback):
    """Saves after `step` and stops the run there, as a user's interruption would."""

    def __init__(self, step: int, stop: bool = True) -> None:
        self.step, self.stop = step, stop

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save, control.should_training_stop = True, self.stop


Hook = tiny.At
"""`Hook(on_step_end=f)` calls `f(update, model, optimizer)`, updates counted from 1 in every hook."""


def run(
    model, out, steps: int, *, callbacks=None, optimizer: str = "aged", lr: float = 1e-2, decay: float = 0.1,
    accumulation: int = 1, batch: int = 4, before=(), after=(), resume=None, data=None, train: bool = True,
    evaluated: bool = False, **arguments,
):  # fmt: skip
    """Train with the real Trainer. `before` and `after` surround the schedule callbacks in the order of calls."""
    options = {
        "max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
        "learning_rate": lr, "weight_decay": decay, "save_strategy": "no", "report_to": [], "logging_steps": 1000,
        "disable_tqdm": True, "use_cpu": True, "seed": 11,
    }  # fmt: skip
    args = TrainingArguments(str(out), **{**options, **arguments})
    optimizers = (None, None)
    if optimizer == "aged" and any("sparse_lora_values" in name for name, _ in model.named_parameters()):
        groups = aged_adamw_groups(model, lambda name, _: "sparse_lora_values" in name, decay)
        optimizers = (AgedAdamW(groups, lr=lr), None)
    schedule = callbacks_for(model) if callbacks is None else list(callbacks)
    data = TokenData() if data is None else data
    trainer = Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data if evaluated else None,
        callbacks=[*before, *schedule, *after], optimizers=optimizers,
    )  # fmt: skip
    trainer.schedule_callbacks = schedule
    if train:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def moves_of(trainer, rule: str = "regrow") -> list[dict]:
    """What a rule recorded, in order."""
    events = [event for callback in trainer.schedule_callbacks for event in getattr(callback, "events", ())]
    return [event for event in events if event["rule"] == rule]


def layers_of(model) -> list[SparseLoraLayer]:
    layers = adapter_layers(model)
    assert layers
    return layers


def support_of(layer: SparseLoraLayer, adapter: str = "default") -> list[int]:
    """Units in the saved buffer by the format's definition, decoded without the package."""
    return read_codes(layer.sparse_lora_support[adapter])


def snapshot(model, optimizer=None, adapter: str = "default") -> list[dict]:
    """Copies of every layer's units, values and their optimizer state."""
    taken = []
    for layer in layers_of(model):
        values = layer.sparse_lora_values[adapter]
        state = {} if optimizer is None else dict(optimizer.state.get(values, {}))
        taken.append(
            {
                "units": support_of(layer, adapter),
                "values": values.detach().clone(),
                "state": {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()},
            }
        )
    return taken


def all_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer, by name."""
    found = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    inner = getattr(optimizer, "optimizer", optimizer)
    for parameter, state in inner.state.items():
        for key, value in state.items():
            found[f"optimizer.{names[parameter]}.{key}"] = torch.as_tensor(value).clone()
    return found


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names that are missing on one side or differ in a bit."""
    changed = [
        name
        for name in sorted(set(left) & set(right))
        if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name])
    ]
    return sorted(set(left) ^ set(right)) + changed


def positions(units: list[int], granularity: str, rows: int, cols: int, size: int) -> torch.Tensor:
    """Flat row-major positions `[k, entries]` of units, from the definition of each kind of unit."""
    grid = torch.arange(rows * cols).view(rows, cols)
    pieces = {
        "entry": lambda u: grid.view(-1)[u : u + 1],
        "row": lambda u: grid[u],
        "column": lambda u: grid[:, u],
        "block": lambda u: grid[
            u // (cols // size) * size : u // (cols // size) * size + size,
            u % (cols // size) * size : u % (cols // size) * size + size,
        ],
    }
    return torch.stack([pieces[granularity](u).reshape(-1) for u in units])


def positions_of(layer: SparseLoraLayer, units: list[int] | None = None, adapter: str = "default") -> torch.Tensor:
    config = layer.adapter_configs[adapter]
    units = support_of(layer, adapter) if units is None else units
    return positions(units, config.granularity, layer.out_features, layer.in_features, config.block_size)


class DenseTwin:
    """Dense gradients of a sparse adapter's model, by float64 autograd on a plain Llama with dense weights."""

    def __init__(self, model, seed: int, **model_options) -> None:
        self.model = tiny_llama(seed, **model_options).double().requires_grad_(False)
        self.layers = {layer.module_name: layer for layer in layers_of(model)}
        self.base = {name: self.model.get_submodule(name).weight.detach().clone() for name in self.layers}
        self.batches: list[dict] = []
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        self.batches.append({k: v.clone() for k, v in kwargs.items() if k in ("input_ids", "labels")})
        self.items = int(kwargs["num_items_in_batch"])

    def step_gradients(self) -> dict[str, list[torch.Tensor]]:
        """Flat dense gradients of each micro-batch seen since the last call, at the current values."""
        found = {name: [] for name in self.layers}
        for batch in self.batches:
            for name, layer in self.layers.items():
                weight = self.model.get_submodule(name).weight
                dense = self.base[name].reshape(-1).clone()
                at = positions_of(layer)
                values = layer.sparse_lora_values["default"].detach()[: len(at)]
                dense[at.reshape(-1)] += values.reshape(-1).double()
                weight.data, weight.grad = dense.view_as(weight), None
                weight.requires_grad_()
            scores = self.model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
            (-scores.gather(-1, batch["labels"][:, 1:, None]).sum() / self.items).backward()
            for name in found:
                found[name].append(self.model.get_submodule(name).weight.grad.reshape(-1).clone())
        self.batches = []
        return found
