"""The worked example that all rules share: two sparse updates on 8 entries, in float64, and their parts with given
masks in place of draws."""

from dataclasses import dataclass

import torch

from hf_sparse_peft.merging import Deltas, Kept, Scan, Sparsify
from hf_sparse_peft.utils.parts import register_part

T1 = (0.9, -0.1, None, 0.4, -0.6, None, 0.2, -0.3)
T2 = (-0.5, -0.25, 0.7, None, -0.8, None, -0.2, 0.1)
F1, F2 = (4, 1, 0, 1, 2, 0, 1, 3), (1, 1, 2, 0, 2, 0, 0, 1)
MASKS = ("10110110", "01101111")


def numbers(row):
    return torch.tensor([0.0 if one is None else one for one in row], dtype=torch.float64)


def deltas(*rows, name="w", shape=None, importance=None):
    """Rows of numbers, None where an adapter holds nothing, on the union of what is held."""
    held = torch.tensor([[one is not None for one in row] for row in rows])
    at = held.any(0).nonzero().squeeze(1)
    values = torch.stack([numbers(row) for row in rows])[:, at]
    if importance is not None:
        importance = torch.tensor(importance, dtype=torch.float64)[:, at]
    return Deltas(name, shape or (1, len(rows[0])), at, values, held[:, at], importance)


def merged(method, *layers, weights=None):
    """The merged updates of some weights, dense."""
    by_name = {layer.name: layer for layer in layers}
    scan = Scan(sorted(by_name), len(layers[0].values), by_name.__getitem__)
    found = list(method.updates(scan, weights or [1.0] * len(layers[0].values)))
    dense = [update.dense().reshape(-1) for update in found]
    return dense[0] if len(dense) == 1 else dense


@register_part("given_masks")
@dataclass(frozen=True)
class GivenMasks(Sparsify):
    """Keeps what the strings say, as if each entry had stayed with probability `stay`."""

    masks: tuple[str, ...] = MASKS
    stay: float = 0.5
    draws = True

    def __call__(self, deltas, plan, seed):
        places = range(deltas.values.shape[1]) if deltas.positions is None else deltas.positions.tolist()
        mask = torch.tensor([[one[place] == "1" for place in places] for one in self.masks])
        return Kept(mask & deltas.held, torch.full_like(deltas.values, self.stay))
