"""Two linear layers under masked adapters, steps of a plain loop, and the same steps in float64 by hand."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from hf_sparse_peft import Controller, MaskedLoraConfig, make_optimizer
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.masked_lora import DenseUpdate

LAYERS = ("first", "second")


class Net(nn.Module):
    """`second(tanh(first(x)))`, 8 inputs, 12 in between, 4 outputs."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(8, 12, bias=False), nn.Linear(12, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def masked_net(*rules, seed: int = 0, **options):
    """A net with a masked adapter; by default all weights train, and all live."""
    defaults = {"update": DenseUpdate(), "mask": "all", "target_modules": list(LAYERS)}
    torch.manual_seed(seed + 1)
    return get_peft_model(Net(seed), MaskedLoraConfig(**{**defaults, **options}, schedule=list(rules))).train()


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(6, 8, generator=generator), torch.randn(6, 4, generator=generator)


def loss_of(model, step: int) -> torch.Tensor:
    x, y = data(step)
    return (model(x) - y).square().mean()


def spaces_of(model) -> dict:
    """The mask of each layer."""
    return {
        layer.module_name: next(s for s in layer.unit_spaces("default") if s.kind == "mask")
        for layer in adapter_layers(model)
    }


def run(model, steps: int, optimizer=None, lr: float = 0.1, at_step=None, state=None, stop: int | None = None):
    """Train in a plain loop; `at_step(step, model)` looks after each backward pass. Returns optimizer and state."""
    if optimizer is None:
        optimizer = make_optimizer(model, lr=lr)
    if optimizer is None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    rules = Controller(model, optimizer, total_steps=steps, state=state)
    for step in range(rules.step, steps if stop is None else stop):
        rules.before_step()
        loss_of(model, step).backward()
        if at_step is not None:
            at_step(step, model)
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()
    state = rules.state_dict()
    rules.close()
    return optimizer, state


def top_of_groups(weight: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """N:M along the inputs, group by group in plain Python; of equals the later is kept."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for begin in range(0, weight.shape[1], of):
            order = sorted(range(begin, begin + of), key=lambda at: (abs(float(weight[row, at])), at))
            mask[row, order[-keep:]] = True
    return mask


def gradients_by_hand(weights, forward, backward, step):
    """Dense gradients of both layers, in float64 by the chain rule: `forward` are the weights that inputs meet,
    `backward` those that gradients go back through."""
    x, y = (one.double() for one in data(step))
    hidden = torch.tanh(x @ forward["first"].t())
    out = hidden @ forward["second"].t()
    d_out = 2 * (out - y) / out.numel()
    d_hidden = (d_out @ backward["second"]) * (1 - hidden**2)
    return {"first": d_hidden.t() @ x, "second": d_out.t() @ hidden}


def start_of(model) -> dict[str, torch.Tensor]:
    """The base weights in float64."""
    return {layer.module_name: layer.dense_base_weight().double().clone() for layer in adapter_layers(model)}
