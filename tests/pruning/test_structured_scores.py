"""Scores of heads and channels against references in float64, on weights and from the equations."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from test_structure import build
from tiny import llama

from hf_sparse_peft.pruning import (
    CFSP,
    OBA,
    HessianSaliency,
    LoRAPrune,
    importance_lora_config,
    prune_model,
    structures_of,
)
from hf_sparse_peft.pruning.criteria import apoptosis
from hf_sparse_peft.pruning.criteria.cfsp import allotted, relative
from hf_sparse_peft.pruning.reading.calibration_batches import read_batches
from hf_sparse_peft.pruning.units.structure import Member
from hf_sparse_peft.pruning.units.unit_gates import Gate, unit_gates
from hf_sparse_peft.pruning.units.unit_scores import kept_over_all, lora_gradient
from hf_sparse_peft.sparsity import stream_seed

KINDS = frozenset({"heads", "channels"})
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def data():
    generator = torch.Generator().manual_seed(5)
    for size in (2, 2):
        ids = torch.randint(1, 64, (size, 8), generator=generator)
        yield {"input_ids": ids, "labels": ids.clone()}


def scored(method, model=None):
    model = llama().eval() if model is None else model
    batches = read_batches(data(), "cpu")
    return method.score(model, structures_of(model), KINDS, batches, 0).scores


def wide(**config):
    """The model in float64, and its linear weights by block and name."""
    model = llama(**config).eval().double()
    model.config._attn_implementation = "eager"
    found = {}
    for block, layer in enumerate(model.model.layers):
        for name in LAYERS:
            part = layer.self_attn if name[0] in "qkvo" else layer.mlp
            found[block, name] = getattr(part, name).weight
    return model, found


def by_unit(name, matrix):
    """Sums over the units of a matrix: of key and value head u with query heads 2u and 2u + 1, or of channel u."""
    if name in ("q_proj", "k_proj", "v_proj"):
        return matrix.view(2, -1).sum(1)
    if name == "o_proj":
        return matrix.view(32, 2, 16).sum((0, 2))
    return matrix.sum(0) if name == "down_proj" else matrix.sum(1)


def members(found, block, kind):
    return [name for name in LAYERS if (block, name) in found and (name[0] in "qkvo") == (kind == "heads")]


def every():
    return [(block, kind) for block in (0, 1) for kind in ("heads", "channels")]


def assert_close(found, expected, tolerance=1e-4):
    for block, kind in every():
        got, wanted = found[f"model.layers.{block}"][kind].double(), expected[block, kind]
        assert torch.allclose(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())), (block, kind)
        assert wanted.std() > 0  # a constant would pass nothing


def test_the_estimate_of_lora_is_what_a_step_changes_and_is_not_linear():
    torch.manual_seed(0)
    a, b, ga, gb = (torch.randn(shape).double() for shape in ((3, 5), (4, 3), (3, 5), (4, 3)))
    assert torch.allclose(lora_gradient(a, b, ga, gb), b @ a - (b - gb) @ (a - ga))
    one = [torch.tensor([[x]]) for x in (3.0, 2.0, 1.0, 0.5)]
    assert lora_gradient(*one).item() == 3
    assert lora_gradient(one[0], one[1], 2 * one[2], 2 * one[3]).item() == 5
    assert lora_gradient(one[0], one[1], 1024 * one[2], 1024 * one[3]).item() == -520704


def test_lora_prunes_score_equals_the_equation_on_the_dense_gradient():
    """gB = s G A^T and gA = s B^T G = 0, G from autograd of the dense weights; averaged with 0.9 from 0."""
    method = LoRAPrune(r=4, alpha=8, first=0, last=0)
    model, matrices = wide()
    expected = dict.fromkeys(every(), 0)
    for batch in data():
        gradients = dict(zip(matrices, torch.autograd.grad(model(**batch).loss, list(matrices.values())), strict=True))
        for block, kind in every():
            total = 0
            for name in members(matrices, block, kind):
                weight = matrices[block, name].detach()
                part = "self_attn" if kind == "heads" else "mlp"
                generator = torch.Generator().manual_seed(stream_seed(0, f"model.layers.{block}.{part}.{name}"))
                a = (torch.rand(4, weight.shape[1], generator=generator).double() * 2 - 1) / weight.shape[1] ** 0.5
                estimate = 2 * gradients[block, name] @ a.t() @ a
                units = by_unit(name, (estimate * weight).abs())
                total = total + units / units.norm()
            expected[block, kind] = 0.9 * expected[block, kind] + 0.1 * total
    assert_close(scored(method), expected)


def test_the_first_tenth_of_the_blocks_and_the_last_keep_all():
    model = llama(layers=11)
    kept = prune_model(model, list(data()), method=LoRAPrune(), sparsity=0.5, show_progress=False).kept
    assert [len(one.heads) for one in kept.blocks.values()] == [2] + [1] * 9 + [2]
    assert [len(one.channels) for one in kept.blocks.values()] == [64] + [32] * 9 + [64]


def test_hessian_saliency_is_the_square_of_the_sum_averaged_over_batches():
    model, matrices = wide()
    expected = dict.fromkeys(every(), 0)
    for batch in data():
        gradients = dict(zip(matrices, torch.autograd.grad(model(**batch).loss, list(matrices.values())), strict=True))
        for block, kind in every():
            total = sum(by_unit(name, gradients[block, name] * matrices[block, name].detach())
                        for name in members(matrices, block, kind))  # fmt: skip
            expected[block, kind] = expected[block, kind] + total.square() / 2
    assert_close(scored(HessianSaliency()), expected, 1e-3)


def gated(weight, groups):
    """A gate a group of a vector of weights, and the gated weights."""
    value = torch.ones(len(groups), dtype=torch.float64, requires_grad=True)
    factors = torch.empty(len(weight), dtype=torch.float64)
    index = torch.tensor([next(g for g, group in enumerate(groups) if at in group) for at in range(len(weight))])
    factors = value[index]
    return Gate("block", "channels", Member("up", "up", 0, 0, 1), value), factors * weight


def test_the_squared_sum_of_the_worked_groups():
    gate, weight = gated(torch.tensor([1.0, 2.0, 0.5, -1.0]).double(), [(0, 1), (2, 3)])
    gradient = torch.tensor([3.0, -1.0, 1.0, 0.5]).double()
    (read,) = torch.autograd.grad((gradient * weight).sum(), [gate.value])
    assert read.square().tolist() == [1.0, 0.0]  # 13 as a sum of squares, 5 of absolute values


def test_scaling_values_and_outputs_against_each_other_changes_no_saliency_but_magnitude():
    one, other = llama().eval(), llama().eval()
    with torch.no_grad():
        attention = other.model.layers[0].self_attn
        attention.v_proj.weight[8:] *= 16
        attention.o_proj.weight[:, 16:] /= 16
    before, after = scored(HessianSaliency(), one), scored(HessianSaliency(), other)
    for block, kind in every():
        name = f"model.layers.{block}"
        assert torch.allclose(before[name][kind], after[name][kind], rtol=1e-3, atol=1e-9)
    kept = [prune_model(m, method="magnitude", pattern="heads", show_progress=False).kept for m in (one, other)]
    assert kept[0].blocks["model.layers.0"].heads.tolist() != [1] or kept[1].blocks[
        "model.layers.0"
    ].heads.tolist() == [1]


def test_latency_lets_the_slower_kind_go_first_and_is_subtracted():
    plain, timed = scored(HessianSaliency()), scored(HessianSaliency(latency={"heads": 3.0}, eta=0.5))
    assert torch.allclose(timed["model.layers.0"]["heads"], plain["model.layers.0"]["heads"] - 1.5)
    assert torch.equal(timed["model.layers.0"]["channels"], plain["model.layers.0"]["channels"])
    same = {"a": {"heads": torch.ones(2) - 0.5 * 3, "channels": torch.ones(2)}}
    kept = kept_over_all(same, {"a": {"heads": 1, "channels": 1}}, 0.25)["a"]
    assert [len(kept["heads"]), len(kept["channels"])] == [1, 2]
    with pytest.raises(ValueError, match="takes 'heads' and 'channels'"):
        HessianSaliency(latency={"rows": 1.0})


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt", "gpt2", "bert"])
def test_a_gate_at_zero_is_the_unit_removed(kind):
    model = build(kind)
    structures, ids = structures_of(model), torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    removed = copy.deepcopy(model)
    kept = prune_model(removed, method="magnitude", pattern=["heads", "rows"], show_progress=False).kept
    with unit_gates(model, structures, KINDS, biases=True) as gates, torch.no_grad():
        assert torch.equal(model(ids).logits, gated_off(model, ids, gates, None))
        assert torch.allclose(gated_off(model, ids, gates, kept), removed(ids).logits, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def gated_off(model, ids, gates, kept):
    for gate in gates:
        gate.value[[] if kept is None else kept.blocks[gate.block].removed(gate.kind)] = 0
    return model(ids).logits


H = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 1.0]]).double()
THETA, SLOPE = torch.tensor([1.0, -1.0, 2.0]).double(), torch.tensor([0.5, 0.0, -1.0]).double()


def quadratic(weight):
    return 0.5 * weight @ H @ weight + SLOPE @ weight


def test_apoptosis_on_the_worked_quadratic():
    gate, weight = gated(THETA, [(0,), (1,), (2,)])
    first = torch.autograd.grad(quadratic(weight), [gate.value], create_graph=True)
    assert apoptosis._hessian_row_sums(first, [gate.value])[0].tolist() == [1, 4, 6]
    gate, weight = gated(THETA, [(0, 1), (2,)])
    first = torch.autograd.grad(quadratic(weight), [gate.value], create_graph=True)
    assert apoptosis._hessian_row_sums(first, [gate.value])[0].tolist() == [5, 6]
    exact = OBA(curvature="group")._changes(first, [gate], 0, 0)[0]
    left = THETA.clone()
    left[:2] = 0
    assert exact[0].item() == (quadratic(left) - quadratic(THETA)).item() == -4
    full = -first[0].detach() + apoptosis._hessian_row_sums(first, [gate.value])[0] / 2
    assert full[0].item() == -3  # what units share with others is no part of the change
    assert torch.allclose(OBA(curvature="group", probes=500)._changes(first, [gate], 0, 0)[0], exact, atol=0.3)
    value = torch.ones(2, dtype=torch.float64, requires_grad=True)
    linear = torch.autograd.grad(value @ SLOPE[:2], [value], create_graph=True)
    assert apoptosis._hessian_row_sums(linear, [value])[0].tolist() == [0, 0]


def test_the_fast_score_is_theta_times_hessian_theta_of_all_linear_weights():
    model, matrices = wide()
    expected, parts = dict.fromkeys(every(), 0), list(matrices.values())
    sums = dict.fromkeys(matrices, 0)
    for batch in data():
        first = torch.autograd.grad(model(**batch).loss, parts, create_graph=True)
        dot = sum((g * w.detach()).sum() for g, w in zip(first, parts, strict=True))
        rows = torch.autograd.grad(dot, parts)
        for key, row in zip(matrices, rows, strict=True):
            sums[key] = sums[key] + by_unit(key[1], row * matrices[key].detach()) / 2
    joined = {}
    for block, kind in every():
        found = [sums[block, name] for name in members(matrices, block, kind)]
        expected[block, kind] = sum(one.abs() for one in found)
        joined[block, kind] = sum(found).abs()
        expected[block, kind] /= expected[block, kind].max()
        joined[block, kind] /= joined[block, kind].max()
    assert_close(scored(OBA()), expected, 2e-3)
    assert_close(scored(OBA(over_members="sum")), joined, 2e-3)


def test_the_group_score_is_the_second_order_change_when_the_unit_goes():
    """f(t) = loss with the unit's weights times 1 - t: f'(0) + f''(0) / 2, by autograd of t."""
    model, matrices = wide(intermediate_size=6)
    batches = list(data())

    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def change(block, kind, unit):
        t, without = torch.zeros((), dtype=torch.float64, requires_grad=True), {}
        for name in members(matrices, block, kind):
            weight = matrices[block, name]
            mask, span = torch.zeros_like(weight), {"q": 16, "o": 16, "k": 8, "v": 8}.get(name[0], 1)
            lines = slice(unit * span, unit * span + span)
            mask[(slice(None), lines) if name in ("o_proj", "down_proj") else lines] = 1
            without[names[id(weight)]] = weight.detach() * (1 - t * mask)
        loss = sum(torch.func.functional_call(model, without, (), batch).loss for batch in batches) / len(batches)
        (first,) = torch.autograd.grad(loss, t, create_graph=True)
        (second,) = torch.autograd.grad(first, t)
        return abs(first.item() + second.item() / 2)

    small = llama(intermediate_size=6).eval()
    found = scored(OBA(curvature="group"), small)
    for block, kind in every():
        got = found[f"model.layers.{block}"][kind].double()
        wanted = torch.tensor([change(block, kind, unit) for unit in range(len(got))], dtype=torch.float64)
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5), (block, kind)


def test_channels_are_allotted_by_importance_and_their_mean_is_kept():
    spread = {"a": 1000.0, "b": 20000.0, "c": 9000.0, "d": 0.0}
    for sparsity in (0.0, 0.2, 0.5, 0.9):
        kept = allotted(spread, sparsity)
        assert math.fsum(kept.values()) / 4 == pytest.approx(1 - sparsity, abs=1e-12)
        assert max(kept.values()) <= 1
        assert sparsity == 0 or kept["b"] > kept["c"] > kept["a"] > kept["d"]
    q = {name: 1 / (1 + math.exp(-(one - 7500) / 1e4)) for name, one in spread.items()}
    mean = sum(q.values()) / 4
    assert allotted(spread, 0.5) == pytest.approx({name: 0.5 * one / mean for name, one in q.items()})
    assert max(allotted(spread, 0.2).values()) == pytest.approx(1 - 0.2 + 0.2 / 1.05)  # it would pass 1, and shrinks
    assert set(allotted(dict.fromkeys("abc", 7.0), 0.3).values()) == {0.7}
    assert set(allotted(spread, 0.0).values()) == {1.0}
    assert set(allotted(spread, 0.3, sharpness=0.0).values()) == {0.7}


@pytest.mark.parametrize("released", [False, True])
def test_channels_score_by_their_share_of_each_weight_and_the_norm_of_what_reaches_down(released):
    model, matrices = wide()
    method = CFSP(down_power=0.5, power=2.0, as_released=released)
    found = method.score(llama().eval(), structures_of(llama(), ["channels"]), frozenset({"channels"}),
                         read_batches(data(), "cpu"), 0)  # fmt: skip
    for block, layer in enumerate(model.model.layers):
        seen, states = [], []
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, at=seen: at.append(x[0].detach())),
            layer.register_forward_hook(lambda _, x, y, at=states: at.append((x[0].detach(), y.detach()))),
        ]
        with torch.no_grad():
            for batch in data():
                model(**batch)
        for hook in hooks:
            hook.remove()
        x, y = (torch.cat([one[side].flatten(0, 1) for one in states]) for side in (0, 1))
        cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
        angle = cosine.arccos() / math.pi
        importance = angle.sum() if released else angle.mean() * 128 * 2048
        name = f"model.layers.{block}"
        assert found.importance[name] == pytest.approx(float(importance), rel=1e-4)
        activation = (torch.cat([one.flatten(0, 1) for one in seen]).square().sum(0) / 4).sqrt()
        gate, up, down = (matrices[block, key].detach().abs() for key in ("gate_proj", "up_proj", "down_proj"))
        down = down * activation**0.5
        dim = 0 if released else 1
        terms = sum(one / one.sum(dim, keepdim=True) for one in (down, up.t(), gate.t()))
        expected = terms.mean(0) * activation**2
        got = found.scores[name]["channels"].double()
        assert torch.allclose(got, expected, rtol=1e-4)
        assert torch.equal(got.argsort(), activation.argsort()) == released  # the released score is the norm alone
        if released:
            assert torch.allclose(got, 3 / 32 * activation**2, rtol=1e-4)


def test_as_many_channels_stay_as_allotted_in_multiples_or_as_released():
    counts = {
        (128, False): [(0.5, 128), (0.3, 128), (0.66, 256)],
        (1, False): [(0.5, 150), (0.29, 87), (1.0, 300)],
        (1, True): [(0.5, 151), (0.29, 88), (1.0, 300)],
    }
    for (multiple, released), cases in counts.items():
        for ratio, expected in cases:
            found = CFSP(multiple_of=multiple, as_released=released)._count(ratio, 300)
            assert found == expected
            assert multiple == 1 or found == int((ratio * 300 + 64) / 128) * 128
    with pytest.raises(ValueError, match=r"CFSP\.multiple_of=128 leaves a block of 300 channels none"):
        CFSP(multiple_of=128)._count(0.1, 300)


def test_nothing_goes_at_sparsity_zero_and_a_channel_without_weights_is_no_nan():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    for released in (False, True):
        report = prune_model(model, list(data()), method=CFSP(as_released=released), sparsity=0.0, show_progress=False)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not any(len(one.removed("channels")) for one in report.kept.blocks.values())
    assert relative(torch.zeros(3, 2), 0).tolist() == [[0, 0]] * 3


def test_ranks_follow_importance_at_the_same_total_and_the_same_scaling():
    importance = {"model.layers.0": 3.0, "model.layers.1": 1.0}
    config = importance_lora_config(importance, r=8, lora_alpha=16, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config)
    up = [layer.mlp.up_proj for layer in model.base_model.model.model.layers]
    assert [layer.r["default"] for layer in up] == [12, 4]
    assert [layer.scaling["default"] for layer in up] == [2.0, 2.0]
    many = importance_lora_config({f"model.layers.{n}": float(n == 3) for n in range(12)}, r=2)
    assert list(many.rank_pattern.values()) == [1, 1, 1, 13, *[1] * 8]
    uneven = importance_lora_config({f"model.layers.{n}": 1.0 + n for n in range(7)}, r=5)
    assert sum(uneven.rank_pattern.values()) == 35
    assert sorted(uneven.rank_pattern.values()) == list(uneven.rank_pattern.values())
    for wrong in ({}, {"a": -1.0}, {"a": float("nan")}, {"a": 0.0}):
        with pytest.raises(ValueError, match="must hold a number >= 0"):
            importance_lora_config(wrong)
    with pytest.raises(ValueError, match="r=0 must be a whole number"):
        importance_lora_config(importance, r=0)
