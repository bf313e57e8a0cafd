"""LASER: ranks, errors and touched matrices by the equations; the search keeps what raises a score and nothing else."""

import pytest
import tiny
import torch

from hf_sparse_peft.pruning import laser, search_laser


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_one_matrix_becomes_its_truncated_svd_and_no_other_changes():
    model = tiny.llama(layers=3).double()
    before = bits(model)
    errors = laser(model, 1, "up", 0.25)
    name = "model.layers.1.mlp.up_proj"
    after, W = bits(model), before[f"{name}.weight"]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(after[f"{name}.weight"], U[:, :8] * S[:8] @ Vh[:8], atol=1e-12)
    assert errors == {name: pytest.approx(float(S[8:].square().sum().sqrt() / W.norm()))}
    assert [key for key in before if not torch.equal(before[key], after[key])] == [f"{name}.weight"]


def test_groups_fractions_and_the_randomised_svd():
    model = tiny.llama(layers=2)
    assert set(laser(model, -1, "mlp", 1.0)) == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert max(laser(model, None, "attention", 1.0).values()) < 1e-5
    before = bits(model)
    exact = laser(tiny.llama(layers=2), 0, "down", 0.25)
    randomised = laser(tiny.llama(layers=2), 0, "down", 0.25, randomized=True)
    assert exact["model.layers.0.mlp.down_proj"] <= randomised["model.layers.0.mlp.down_proj"]
    laser(model, 0, "query", 0.01)
    assert not model.model.layers[0].self_attn.q_proj.weight.any()  # int(0.01 * 32) = 0
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, before["model.layers.1.self_attn.q_proj.weight"])
    gpt2 = tiny.gpt2()
    W = gpt2.transformer.h[0].mlp.c_fc.weight.detach().double().clone()
    laser(gpt2, 0, "up", 0.25)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(gpt2.transformer.h[0].mlp.c_fc.weight.double(), U[:, :8] * S[:8] @ Vh[:8], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((9, "up", 0.1), "layer=9"), ((0, "wide", 0.1), "matrices='wide'"), ((0, "up", 1.5), "fraction=1.5")],
)
def test_what_is_not_there_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        laser(tiny.llama(), *arguments)


def test_quantised_bases_are_refused_and_told_of_the_factors():
    with pytest.raises(ValueError, match="FactoredConfig"):
        laser(tiny.base("nf4"), 0, "up", 0.5)


def test_the_search_applies_what_raises_the_score_and_puts_everything_else_back():
    model = tiny.llama(layers=2)
    before = bits(model)
    wanted = model.model.layers[1].mlp.up_proj.weight

    def score(candidate):
        W = wanted.detach().double()
        low = torch.linalg.svdvals(W)[8:].sum() < 1e-3
        others = sum(
            not torch.equal(t, before[n]) for n, t in candidate.state_dict().items() if "layers.1.mlp.up" not in n
        )
        return float(low) + float(W.any()) - others

    found = search_laser(model, score, matrices=["up", "down"], fractions=[0.5, 0.25], edits=3, show_progress=False)
    assert [(edit.layer, edit.matrices, edit.fraction) for edit, _ in found] == [(1, "up", 0.25)]
    assert [value for _, value in found] == [2.0]
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
    untouched = tiny.llama(layers=2)
    assert search_laser(untouched, lambda m: 0.0, show_progress=False) == []
    assert all(torch.equal(t, before[n]) for n, t in untouched.state_dict().items())

    def broken(candidate):
        if not torch.equal(candidate.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"]):
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        search_laser(untouched, broken, show_progress=False)
    assert all(torch.equal(t, before[n]) for n, t in untouched.state_dict().items())
