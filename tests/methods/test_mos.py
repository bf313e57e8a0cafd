"""MoS (Wang et al., 2025; official code Forence1999/MoS) against its equations, in float64."""

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from spectral_toolbox import close, random
from test_sharelora import Blocks

from hf_sparse_peft import hub, methods
from hf_sparse_peft.tuners.spectral_lora import Shards, spectral_layers
from hf_sparse_peft.tuners.spectral_lora.bases import Sharing, Site


def mixed(count: int = 4, side: int = 6, **options):
    torch.manual_seed(0)
    options = {"e": 2, "p": 1, "shards": 2, "r": 3, "lora_alpha": 6, "target_modules": ["q"], **options}
    model = get_peft_model(Blocks(count, side), methods.get("mos", **options).config)
    return model, spectral_layers(model)


def pools(layers) -> tuple[torch.Tensor, torch.Tensor]:
    return layers[0].spectral_lora_A["default"], layers[0].spectral_lora_B["default"]


def indices(layer, side: str) -> list[int]:
    return layer._tensors("default")[f"indices_{side}"].tolist()


def gathered(pool: torch.Tensor, rows: list[int], shards: int = 2) -> torch.Tensor:
    """Components, one after the other, shard after shard."""
    parts = [rows[first : first + shards] for first in range(0, len(rows), shards)]
    return torch.stack([torch.cat([pool[row] for row in part]) for part in parts])


def test_a_component_is_the_concatenation_of_its_shards_in_order():
    bases, site = Shards(e=2, l=2, p=0), Site("q", 4, 4, 2, 1.0, 0, Sharing("q", 1, 0))
    pool = torch.arange(10.0).view(5, 2)
    held = {"spectral_lora_A": pool, "spectral_lora_B": pool + 100}
    held |= {"indices_A": torch.tensor([4, 0, 1, 3]), "indices_B": torch.tensor([2, 2, 0, 1])}
    B, A = bases.factors(held, site)
    assert A.tolist() == [[8, 9, 0, 1], [2, 3, 6, 7]]  # [P4 | P0], [P1 | P3]
    assert B.t().tolist() == [[104, 105, 104, 105], [100, 101, 102, 103]]


def test_indices_of_the_shared_rows_are_drawn_without_repetition_and_private_ones_are_nobody_elses():
    _, layers = mixed()
    assert [tuple(pool.shape) for pool in pools(layers)] == [(16, 3), (16, 3)]
    for at, layer in enumerate(layers):
        A, B = indices(layer, "A"), indices(layer, "B")
        assert A[4:] == B[4:] == [8 + 2 * at, 9 + 2 * at]  # layer 2: rows 12 and 13
        for drawn in (A, B):
            assert len(set(drawn)) == 6
            assert all(0 <= row < 8 for row in drawn[:4])
    assert any(indices(layer, "A")[:4] != indices(layer, "B")[:4] for layer in layers)
    assert len({tuple(indices(layer, "A")[:4]) for layer in layers}) > 1


def test_the_update_is_alpha_over_r_times_the_gathered_factors_and_its_gradient_is_scattered_back():
    model, layers = mixed()
    held = [pool.data.copy_(random(16, 3, seed=at)).double() for at, pool in enumerate(pools(layers))]
    leaves = [pool.clone().requires_grad_() for pool in held]
    x = random(5, 6, seed=7)
    model(x).square().sum().backward()
    y = x.double()
    for layer in layers:
        A = torch.stack(
            [torch.cat([leaves[0][row] for row in indices(layer, "A")[2 * k : 2 * k + 2]]) for k in range(3)]
        )
        B = torch.stack(
            [torch.cat([leaves[1][row] for row in indices(layer, "B")[2 * k : 2 * k + 2]]) for k in range(3)]
        )
        delta = 6 / 3 * B.t() @ A
        close(layer.get_delta_weight("default"), delta.detach())
        y = y + y @ (layer.base_layer.weight.double() + delta).t()
    y.square().sum().backward()
    for pool, leaf in zip(pools(layers), leaves, strict=True):
        close(pool.grad, leaf.grad)
    unused = set(range(8)) - {row for layer in layers for row in indices(layer, "A")}
    assert all(not pools(layers)[0].grad[row].any() for row in unused)


def test_with_all_rows_private_and_whole_vectors_it_is_a_lora():
    _, layers = mixed(e=3, p=3, shards=1, r=3)
    held = [pool.data.copy_(random(12, 6, seed=at)).double() for at, pool in enumerate(pools(layers))]
    for at, layer in enumerate(layers):
        own = slice(3 * at, 3 * at + 3)
        close(layer.get_delta_weight("default"), 2 * held[1][own].t() @ held[0][own])


def test_numbers_are_a_lora_of_rank_e_s_whatever_r_and_start_at_the_base(tmp_path):
    for r, components in ((1, 1), (3, 3), (9, 5)):  # 4 shared rows' worth and a private one
        model, layers = mixed(r=r)
        assert layers[0].pieces("default")[0].exact_rank == components
        assert model.get_nb_trainable_parameters()[0] == 2 * 4 * (6 + 6)
    A, B = pools(layers)
    assert 0.8 * 6**-0.5 < A.abs().max() <= 6**-0.5
    assert not B.any()
    x = random(5, 6, seed=7)
    assert torch.equal(model(x), Blocks(4)(x))


def test_files_hold_the_pools_once_and_no_index_and_the_lora_answers_alike(tmp_path):
    model, layers = mixed()
    for at, pool in enumerate(pools(layers)):
        pool.data.copy_(random(16, 3, seed=at))
    x = random(5, 6, seed=7)
    model.save_pretrained(tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for key, tensor in held.items() if not key.endswith("shape")) == 96
    assert torch.equal(PeftModel.from_pretrained(Blocks(4), tmp_path / "adapter")(x), model(x))
    assert set(hub.export_lora(model, tmp_path / "lora").ranks.values()) == {3}
    close(PeftModel.from_pretrained(Blocks(4), tmp_path / "lora")(x), model(x))
