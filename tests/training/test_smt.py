"""SMT (arXiv:2405.15525): blocks by signed sums of gradients over all layers, against plain autograd in float64."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from hf_sparse_peft import Controller, calibrate, callbacks_for, methods
from hf_sparse_peft.sparsity import BlockGradient, GlobalByGroup, Targets, UnitGrid
from hf_sparse_peft.sparsity.ranking import GlobalRanking
from hf_sparse_peft.tuners import adapter_layers

SIZE, SCORES = 8, ("abs_of_mean", "mean_of_abs", "l2")
WORKED = torch.tensor([[4.0, -4, 1, 1], [-4, 4, 1, 1], [0, 0, 0, 0], [0, 0, 3, 0]])


def batches(count, labels=(40, 24), size=2, seed=0):
    """Batches of unequal numbers of labels: a sum over tokens is another one than that of steps' means."""
    gen, found = torch.Generator().manual_seed(seed), []
    for number in range(count):
        ids = torch.randint(tiny.VOCAB, (size, 24), generator=gen)
        targets = ids.clone()
        targets[:, labels[number % len(labels)] // size :] = -100
        found.append({"input_ids": ids, "labels": targets})
    return found


def smt(**options):
    options = {"attention": 3, "mlp": 4, "block_size": SIZE, "warmup_steps": 4, "task_type": "CAUSAL_LM", **options}
    return methods.get("smt", **options).config


def units(model):
    return {layer.module_name: layer.units("default").tolist() for layer in adapter_layers(model)}


def summed_gradients(base, data, per_step, targets):
    """Sum over steps of the gradient of the mean loss over all labels of the step, float64, by plain autograd."""
    base = copy.deepcopy(base).double()
    weights = {name: module.weight for name, module in base.named_modules() if name.rpartition(".")[2] in targets}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for start in range(0, len(data), per_step):
        step = data[start : start + per_step]
        labels = [int((batch["labels"][:, 1:] != -100).sum()) for batch in step]
        loss = sum(base(**batch).loss * n for batch, n in zip(step, labels, strict=True)) / sum(labels)
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += gradient
    return total


def block_scores(total, score, size=SIZE):
    """`[blocks]`, row-major, by loops over the blocks."""
    rows, cols = total.shape
    found = []
    for top in range(0, rows, size):
        for left in range(0, cols, size):
            block = total[top : top + size, left : left + size]
            found.append(
                {"abs_of_mean": block.mean().abs(), "mean_of_abs": block.abs().mean(), "l2": block.pow(2).sum().sqrt()}[
                    score
                ]
            )
    return torch.stack(found)


def best_over_layers(totals, score, count):
    ranked = sorted(
        ((float(value), name, unit) for name, t in totals.items() for unit, value in enumerate(block_scores(t, score))),
        reverse=True,
    )
    chosen = {name: [] for name in totals}
    for _, name, unit in ranked[:count]:
        chosen[name].append(unit)
    return {name: sorted(found) for name, found in chosen.items()}


@pytest.mark.parametrize(
    ("score", "expected", "best"),
    [("abs_of_mean", [0, 1, 0, 0.75], 1), ("mean_of_abs", [4, 1, 0, 0.75], 0), ("l2", [8, 2, 0, 3], 0)],
)
def test_the_worked_blocks_under_every_name(score, expected, best):
    criterion, grid = BlockGradient(score=score, block_size=2), UnitGrid(4, 4, "block", 2)
    state = criterion.start(4, 4)
    for part in (0.25, 0.75):  # two steps
        criterion.update(state, criterion.reduce(WORKED * part))
    found = torch.cat(list(criterion.scores(state, grid)()))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert int(found.argmax()) == best
    assert state["sum"].numel() == (4 if score == "abs_of_mean" else 16) == criterion.state_numel(4, 4)


@pytest.mark.parametrize("score", SCORES)
def test_a_block_whose_gradient_flips_its_sign_at_every_step_ranks_last(score):
    criterion, grid = BlockGradient(score=score, block_size=2), UnitGrid(4, 4, "block", 2)
    steady = torch.ones(4, 4)
    steady[:2, :2] = 0
    flips, state = torch.zeros(4, 4), criterion.start(4, 4)
    flips[:2, :2] = 100
    for sign in (1, -1, 1, -1):
        step = steady + sign * flips
        assert int(block_scores(step.double(), score, 2).argmax()) == 0, "by itself every step ranks it first"
        criterion.update(state, criterion.reduce(step.clone()))
    assert int(torch.cat(list(criterion.scores(state, grid)())).argmin()) == 0


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("per_step", [1, 2])
def test_probe_takes_the_best_blocks_of_all_layers_by_the_sum_of_steps(score, per_step):
    base, data = tiny.llama(layers=2), batches(4 * per_step)
    attention = summed_gradients(base, data, per_step, ("q_proj", "k_proj", "v_proj"))
    mlp = summed_gradients(base, data, per_step, ("gate_proj", "up_proj", "down_proj"))
    expected = best_over_layers(attention, score, 3) | best_over_layers(mlp, score, 4)
    model = get_peft_model(copy.deepcopy(base), smt(score=score))
    calibrate(model, data + batches(2, seed=9), batches_per_step=per_step, show_progress=False)  # four steps are read
    assert units(model) == expected
    assert sum(map(len, expected.values())) == 7
    assert sorted(model.peft_config["default"].sizes) == sorted(expected)


def test_half_of_the_blocks_are_all_of_the_layer_whose_gradients_are_ten_times_as_large():
    criterion, grid = BlockGradient(block_size=2), UnitGrid(4, 4, "block", 2)
    budget = GlobalByGroup({"a|b": 0.5})
    [group] = budget.competitions(Targets({"a": grid, "b": grid}, find=lambda patterns, name: "a|b"))
    assert (group.units, group.least) == (4, 0)
    ranking = GlobalRanking(group.units, least=group.least)
    for name, scale in (("a", 1.0), ("b", 10.0)):
        gradient = scale * (1 + torch.rand(4, 4, generator=torch.Generator().manual_seed(3)))
        ranking.add({name: criterion.scores({"sum": criterion.reduce(gradient)}, grid)})
    assert {name: found.tolist() for name, found in ranking.units().items()} == {"a": [], "b": [0, 1, 2, 3]}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("phase1", ["probe", "full"])
def test_the_second_phase_starts_at_the_base_bit_for_bit(phase1, kind):
    base, data = tiny.base(kind), batches(4)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, smt(phase1=phase1, warmup_lr=0.1)).eval()
    with torch.no_grad(), model.disable_adapter():
        output = model(**data[0]).logits
    calibrate(model, data, show_progress=False)
    with torch.no_grad():
        assert torch.equal(model(**data[0]).logits, output)
    after = {name.replace(".base_layer", ""): t for name, t in model.get_base_model().state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert sum(map(len, units(model).values())) == 7


@pytest.mark.parametrize("score", ["abs_of_mean", "l2"])
def test_full_adds_up_the_gradients_of_the_dense_run_before_they_are_clipped(score):
    base, data, lr = tiny.llama(layers=1), batches(5), 0.02
    dense = copy.deepcopy(base).double()
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    weights = {name: m.weight for name, m in dense.named_modules() if name.rpartition(".")[2] in names}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step, batch in enumerate(data, 1):  # AdamW(0.9, 0.95), no decay, clipped to 1, falling linearly to 0
        gradients = torch.autograd.grad(dense(**batch).loss, list(weights.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient
            gradient = gradient * min(1.0, 1 / (float(norm) + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            root = (second[name] / (1 - 0.95**step)).sqrt() + 1e-8
            with torch.no_grad():
                weights[name] -= lr * (1 - (step - 1) / 5) * first[name] / (1 - 0.9**step) / root
    at_base = summed_gradients(base, data, 1, names)
    groups = [[n for n in weights if ("self_attn" in n) == attention] for attention in (True, False)]

    def chosen_by(totals):
        return {
            name: found
            for group, count in zip(groups, (6, 8), strict=True)
            for name, found in best_over_layers({n: totals[n] for n in group}, score, count).items()
        }

    model = get_peft_model(copy.deepcopy(base), smt(phase1="full", score=score, attention=6, mlp=8, warmup_steps=5,
                                                    warmup_lr=lr))  # fmt: skip
    calibrate(model, data, show_progress=False)
    assert units(model) == chosen_by(total)
    assert chosen_by(total) != chosen_by(at_base), "the run moved far enough to choose otherwise"


def test_the_preset_never_chooses_the_output_projection():
    model = get_peft_model(tiny.llama(), smt(mlp=None, attention=20, target_modules="all-linear"))
    calibrate(model, batches(4), show_progress=False)
    found = {name.rpartition(".")[2] for name, chosen in units(model).items() if chosen}
    assert found <= {"q_proj", "k_proj", "v_proj"}
    assert sum(map(len, units(model).values())) == 20
    assert smt(mlp=None, target_modules=["q_proj"]).budget.groups == {"(q_proj|k_proj|v_proj)": 3}


def test_a_fraction_is_of_all_two_dimensional_weights_of_the_model():
    for kind in ("fp32", "nf4"):
        base = tiny.base(kind)
        entries = sum(p.numel() for n, p in tiny.base("fp32").named_parameters() if p.ndim == 2)
        model = get_peft_model(base, smt(attention=0.01, mlp=None))
        calibrate(model, batches(4), show_progress=False)
        assert sum(map(len, units(model).values())) == int(0.01 * entries) // SIZE**2 > 0


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_one_column_of_blocks_keeps_its_slice_of_the_input_not_all_of_it(kind):
    model = get_peft_model(tiny.base(kind), smt(attention=6, mlp=None))
    calibrate(model, batches(4), show_progress=False)
    layer = next(layer for layer in adapter_layers(model) if layer.units("default").numel())
    count, dtype = layer.units("default").numel(), torch.bfloat16 if kind == "bf16" else torch.float32
    layer.write_support("default", torch.arange(count, dtype=torch.int32) * 4 + 2)  # 32 columns are four of blocks
    x, kept = torch.randn(20, 32, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    activations = [t for t in kept if t is not None and t.shape[:1] == (20,)]
    assert [tuple(t.shape) for t in activations] == [(20, SIZE)]
    assert activations[0].untyped_storage().nbytes() == 20 * SIZE * dtype.itemsize
    y.float().sum().backward()
    expected = x.detach()[:, 2 * SIZE : 3 * SIZE].double().sum(0).expand(count, SIZE, SIZE)
    torch.testing.assert_close(layer.sparse_lora_values["default"].grad.double(), expected, rtol=1e-2, atol=1e-1)


def test_blocks_that_do_not_divide_a_weight_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match=r"q_proj.*block_size=24 does not divide.*: 1, 2, 4, 8, 16, 32"):
        get_peft_model(tiny.llama(), smt(block_size=24))
    config = smt()
    config.block_size = 16
    with pytest.raises(ValueError, match=r"block_size=8.*blocks of 16.*same block_size"):
        get_peft_model(tiny.llama(), config)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attention": None, "mlp": None}, "leave no group"),
        ({"phase1": "lora"}, "phase1='lora'"),
        ({"score": "mean_abs"}, "mean_abs.*abs_of_mean"),
        ({"attention": 10**6}, "1000000.*It takes 1 to"),
        ({"attention": 1e-9}, "1e-09"),
        ({"criterion": "random"}, "'random' ranks nothing"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(tiny.llama(), smt(**options))


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_run_resumed_in_the_middle_is_the_whole_run_bit_for_bit(kind, tmp_path):
    def model():
        return get_peft_model(tiny.base(kind), smt())

    first, checkpoint = model(), tmp_path / "checkpoint-3"
    whole = tiny.train(first, tmp_path, 6, callbacks=callbacks_for(first), save_strategy="steps", save_steps=3)
    second = PeftModel.from_pretrained(tiny.base(kind), checkpoint, is_trainable=True)
    resumed = tiny.train(second, tmp_path / "again", 6, callbacks=callbacks_for(second), resume=str(checkpoint))
    left, right = whole.model.state_dict(), resumed.model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    assert any("values" in name and tensor.any() for name, tensor in left.items())


def test_a_plain_loop_gets_its_blocks_from_the_controllers_data():
    model, data = get_peft_model(tiny.llama(), smt()), batches(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    with Controller(model, optimizer, total_steps=4, dataloader=data) as rules:
        for batch in data:
            rules.before_step()
            model(**batch).loss.backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
    assert sum(map(len, units(model).values())) == 7
