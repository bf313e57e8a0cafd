"""SNELLA's sharing of the budget: when it begins, and what every matrix gets, by the official code's rules."""

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import callbacks_for, methods
from hf_sparse_peft.tuners import adapter_layers


def run(out, steps: int, initial_sparsity: float, **budget):
    """Survivors of every matrix after each step, and the factors' values and gradients at each."""
    torch.manual_seed(1)
    config = methods.get(
        "snella", r=4, initial_sparsity=initial_sparsity, target_modules=["q_proj", "v_proj", "down_proj"],
        schedule=[tiny.kernel_allocation(0.6, **budget)], init_weights=False,
    ).config  # fmt: skip
    model = get_peft_model(tiny.llama(layers=1), config)
    layers, survivors, products = adapter_layers(model), {}, {}

    def see(step, model, optimizer):
        products[step] = [
            [
                (held["default"].detach().double() * held["default"].grad.double()).abs()
                for held in (layer.kernel_lora_P, layer.kernel_lora_Q)
            ]
            for layer in layers
        ]

    def look(step, model, optimizer):
        survivors[step] = [int(layer.kernel_lora_survivors["default"]) for layer in layers]

    watch = tiny.At(on_optimizer_step=see)
    tiny.train(model, out, steps, callbacks=[watch, *callbacks_for(model), tiny.At(on_step_end=look)])
    return survivors, products, [layer.numel for layer in layers]


@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_matrices_keep_their_first_share_until_the_warm_up_is_over(initial, tmp_path):
    survivors, _, sizes = run(tmp_path, 12, initial_sparsity=initial, initial_warmup=0.5, final_warmup=0.25)
    first = [size - round(initial * size) for size in sizes]
    for step in range(1, 7):  # t <= t_init = 6: the official code hands out nothing
        assert survivors[step] == first, step
    assert survivors[7] != first
    shares = [count / size for count, size in zip(survivors[12], sizes, strict=True)]
    assert max(shares) - min(shares) > 0.05


def test_the_first_sharing_out_counts_what_was_seen_during_the_warm_up(tmp_path):
    steps, start, target = 10, 0.3, 0.6
    survivors, products, sizes = run(tmp_path, steps, initial_sparsity=start, initial_warmup=0.4, final_warmup=0.2)
    scores = []
    for number in range(len(sizes)):
        score = 0.0
        for factor in (0, 1):
            mean = spread = torch.zeros_like(products[1][number][factor])
            for step in range(1, 6):
                now = products[step][number][factor]
                mean = 0.85 * mean + 0.15 * now
                spread = 0.85 * spread + 0.15 * (now - mean).abs()
            score += float((mean * spread).mean())
        scores.append(score)
    total = sum(sizes)
    budget = (1 - target) * total + (target - start) * total * (1 - (5 - 4) / (steps - 2 - 4)) ** 3
    # B z_l, the surplus of full matrices shared out among the others by score until it is used up.
    shares, left, open_ones = [0.0] * len(sizes), budget, list(range(len(sizes)))
    while left > 1e-9:
        whole = sum(scores[i] for i in open_ones)
        gives = {i: min(left * scores[i] / whole, sizes[i] - shares[i]) for i in open_ones}
        for i, given in gives.items():
            shares[i] += given
        left -= sum(gives.values())
        open_ones = [i for i in open_ones if sizes[i] - shares[i] > 1e-9]
    for found, share in zip(survivors[5], shares, strict=True):
        assert abs(found - share) <= 2 + 1e-3 * share
