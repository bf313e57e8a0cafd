"""The first support of methods that read the base weight, or share a budget out by shapes, computed anew in float64."""

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import methods
from hf_sparse_peft.tuners import adapter_layers


def chosen(name: str, base=None, **options) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> its weight in float64 and its units."""
    model = get_peft_model(base if base is not None else tiny.llama(layers=1), methods.get(name, **options).config)
    found = {}
    for layer in adapter_layers(model):
        weight = layer.base_layer.weight.detach().double()
        found[layer.module_name] = weight, layer.units("default").long()
    return found


def smallest(weight: torch.Tensor, count: int) -> set[int]:
    return set(weight.abs().flatten().argsort()[:count].tolist())


def largest(weight: torch.Tensor, count: int) -> set[int]:
    return set(weight.abs().flatten().argsort(descending=True)[:count].tolist())


def approximation(weight: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, V = torch.linalg.svd(weight)
    return U[:, :rank] * S[:rank] @ V[:rank]


# name -> options, and the units of a weight
READS_THE_WEIGHT = {
    "super-tuning": ({"density": 0.05}, lambda w: largest(w, int(0.05 * w.numel()))),
    "sparse-mezo": ({}, lambda w: smallest(w, w.numel() // 4)),  # the paper's sparsity, 0.75
    "sara": ({}, lambda w: smallest(w, int(0.1 * w.numel()))),
    "lift": (
        {"budget_rank": 2, "filter_rank": 3, "exact": True},
        lambda w: largest(approximation(w, 3), 2 * sum(w.shape)),
    ),
}


@pytest.mark.parametrize("name", READS_THE_WEIGHT)
def test_the_support_is_the_published_choice_in_every_matrix(name):
    options, expected = READS_THE_WEIGHT[name]
    if name == "sara":
        options = {**options, "nuclear_weight": 0.0}
    for weight, units in chosen(name, **options).values():
        assert set(units.tolist()) == expected(weight)


def test_lifts_randomised_svd_chooses_what_a_full_one_does():
    base, generator = tiny.llama(layers=1, hidden=96), torch.Generator().manual_seed(0)
    for module in base.modules():
        if isinstance(module, torch.nn.Linear):  # singular values fall slowly, as those of pretrained weights do
            U, S, V = torch.linalg.svd(torch.randn(module.weight.shape, generator=generator), full_matrices=False)
            module.weight.data.copy_(U * torch.arange(1.0, S.numel() + 1) ** -0.5 @ V)
    overlaps = []
    for weight, units in chosen("lift", base, budget_rank=4, filter_rank=8).values():
        best = largest(approximation(weight, 8), 4 * sum(weight.shape))
        overlaps.append(len(best & set(units.tolist())) / len(best))
    assert min(overlaps) > 0.95


def test_sara_below_a_threshold_takes_every_entry_there():
    for weight, units in chosen("sara", threshold=0.02, nuclear_weight=0.0).values():
        assert set(units.tolist()) == set((weight.abs().flatten() < 0.02).nonzero().flatten().tolist())


def test_dsee_finds_spikes_below_the_largest_entries_of_a_low_rank_weight():
    base, spikes = tiny.llama(layers=1, hidden=96), {}
    generator = torch.Generator().manual_seed(0)
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            rows, cols = module.weight.shape
            weight = (
                0.1 * torch.randn(rows, 8, generator=generator) @ torch.randn(8, cols, generator=generator) / 8**0.5
            )
            at = torch.randperm(rows * cols, generator=generator)[:30]
            weight.view(-1)[at] += 0.2 * torch.randn(30, generator=generator).sign()
            module.weight.data.copy_(weight)
            spikes[name] = set(at.tolist())
    found = chosen("dsee", base, num_sparse=30, criterion={"type": "decomposition_residual", "rounds": 3})
    assert sorted(found) == sorted(spikes)
    for name, (weight, units) in found.items():
        assert len(spikes[name] & set(units.tolist())) >= 27
        assert len(spikes[name] & largest(weight, 30)) < 15


@pytest.mark.parametrize("name", ["random-pruning", "set", "rigl"])
def test_layer_densities_follow_erdos_renyi(name):
    found = chosen(name, density=0.1)
    total, sizes = sum(w.numel() for w, _ in found.values()), {n: sum(w.shape) for n, (w, _) in found.items()}
    assert len(set(sizes.values())) > 2
    for module, (weight, units) in found.items():
        assert weight.numel() > units.numel()  # no layer is dense, so the densities are eps (m + n) / (m n)
        assert abs(units.numel() - 0.1 * total * sizes[module] / sum(sizes.values())) < 1
    assert sum(units.numel() for _, units in found.values()) == int(0.1 * total)


@pytest.mark.parametrize("name", ["shira", "spiel-ag", "spiel-ma", "gradual-pruning", "sltrain"])
def test_layer_densities_are_the_same_everywhere(name):
    for weight, units in chosen(name, density=0.1).values():
        assert units.numel() == int(0.1 * weight.numel())
