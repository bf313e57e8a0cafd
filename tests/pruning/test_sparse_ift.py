"""Sparse-IFT: as many multiplications as the dense model's, the equations of the four members, training under masks."""

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_sparse_peft import Gradient, Regrow, methods, trainer_options
from hf_sparse_peft.methods.repair import NORMS
from hf_sparse_peft.pruning import sparse_ift

MEMBERS = ["wide", "parallel", "factorized", "doped"]
OUTSIDE = ("lm_head", "embed_tokens", "wte", "wpe", "norm", "ln_1", "ln_2", "ln_f")


def matrices(model):
    """Weights of the trunk's linear layers, by name."""
    found = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if n.endswith(".weight")}
    return {n: p.detach() for n, p in found.items() if n.rpartition(".")[2].split("_norm")[0] not in OUTSIDE}


def multiplications(model, names):
    """Entries that are not 0, by the dense layer that they stand for."""
    return {name: sum(int((w != 0).sum()) for n, w in matrices(model).items() if n == name or n.startswith(f"{name}."))
            for name in names}  # fmt: skip


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_every_layer_makes_the_dense_ones_multiplications(base, sparsity, member):
    dense = getattr(tiny, base)(layers=1)
    names = {n: w.numel() for n, w in matrices(dense).items() if w.dim() == 2}
    model = sparse_ift(dense.config, member, sparsity)
    assert multiplications(model, names) == names
    sparse = [w for n, w in matrices(model).items() if w.dim() == 2 and bool((w == 0).any())]
    share = 1 - sum(int((w != 0).sum()) for w in sparse) / sum(w.numel() for w in sparse)
    assert share == pytest.approx(sparsity, abs=0.1 if member == "wide" else 0.03)  # heads are whole
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_masks_are_drawn_and_the_same_arguments_give_the_same_model():
    config = tiny.llama(layers=1).config
    state = torch.get_rng_state()
    first, again, other = (sparse_ift(config, "factorized", 0.5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(
        matrices(first).items(), matrices(again).values(), matrices(other).values(), strict=True
    ):
        assert torch.equal(a, b), name
        overlap = float(((a != 0) & (c != 0)).sum() / (a != 0).sum())
        assert overlap == pytest.approx(float((a != 0).float().mean()), abs=0.1)  # chance


def test_the_members_compute_their_equations():
    config, x = tiny.gpt2(layers=1).config, torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).double()
    name = "transformer.h.0.mlp.c_fc"
    for member in ("parallel", "factorized", "doped"):
        module = sparse_ift(config, member, 0.75).double().get_submodule(name)
        w = {
            n: p.detach().normal_(generator=torch.Generator().manual_seed(len(n))) for n, p in module.named_parameters()
        }
        if member == "parallel":
            expected = sum((x @ w[f"branch_{j}.linear.weight"].T + w[f"branch_{j}.linear.bias"]).clamp(min=0)
                           for j in range(4))  # fmt: skip
        elif member == "factorized":
            assert w["down.weight"].shape == (103, 32)  # ceil(128 * 32 / (160 * 0.25))
            expected = (x @ w["down.weight"].T).clamp(min=0) @ w["up.weight"].T + w["up.bias"]
        else:
            assert w["dense.down.weight"].shape == (19, 32)  # floor(0.75 * 128 * 32 / 160)
            low_rank = w["dense.up.weight"] @ w["dense.down.weight"]
            expected = x @ (w["sparse.weight"] + low_rank).T + w["sparse.bias"]
        torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=1e-12)
    chain = sparse_ift(config, "factorized", 0.75, activation=None).get_submodule(name)
    assert [child for child, _ in chain.named_children()] == ["down", "up"]


def test_a_wide_model_is_an_ordinary_one_of_its_config(tmp_path):
    model = sparse_ift(tiny.llama(layers=1).config, "wide", 0.75)
    assert (model.config.hidden_size, model.config.intermediate_size) == (64, 128)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (8, 4, 8)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("member", ["wide", "factorized", "doped"])
@pytest.mark.parametrize("moving", [False, True])
def test_it_trains_under_its_masks(tmp_path, member, moving):
    base = sparse_ift(tiny.llama(layers=1).config, member, 0.75)
    before = {name: weight.clone() for name, weight in matrices(base).items()}
    schedule = [Regrow(every=1, fraction=0.3, grow=Gradient(), space="mask")] if moving else []
    method = methods.get("spdf", phase="sparse", schedule=schedule, modules_to_save=[*NORMS, "embed_tokens", "lm_head"])
    model = get_peft_model(base, method.config)
    options = trainer_options(model, tiny.arguments(tmp_path, 3))
    tiny.train(model, tmp_path, 3, callbacks=options["callbacks"], learning_rate=1e-2)
    merged = matrices(model.merge_and_unload())
    moved = 0
    for name, weight in before.items():
        zeros = (weight == 0).sum()
        assert not torch.equal(merged[name], weight)
        if moving and zeros:  # an entry that returned in the last step is 0 until the next
            assert int((merged[name] == 0).sum()) >= int(zeros)
            moved += int(((merged[name] != 0) & (weight == 0)).sum())
        else:
            assert torch.equal(merged[name] == 0, weight == 0)
    assert (moved > 0) == moving


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"member": "deep"}, "member='deep'"),
        ({"sparsity": 0.0}, "sparsity=0.0"),
        ({"sparsity": 0.3, "member": "parallel"}, "gives '.*' .* one branch"),
        ({"sparsity": 0.01, "member": "doped"}, "no rank"),
        ({"activation": "sharp"}, "activation='sharp'"),
        ({"activation": None, "member": "parallel"}, "activation=None"),
    ],
)
def test_what_makes_no_transformation_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparse_ift(tiny.llama(layers=1).config, **{"member": "factorized", "sparsity": 0.5, **options})
