"""Transfer pruning: gates, expected sparsity and updates against float64 by hand; the second loss; masks and files."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification, Trainer

from hf_sparse_peft import SparseLoraConfig, methods
from hf_sparse_peft.pruning import (
    LearnUnitMasks,
    LoRAPruneCallback,
    TransferPruningCallback,
    drop_blocks,
    load_sliced,
    mask_units,
    save_sliced,
    slice_model,
    structures_of,
    unit_masks_of,
    unmask_units,
)
from hf_sparse_peft.pruning.units.unit_masks import masked_spaces
from hf_sparse_peft.pruning.units.unit_scores import entries_of_unit
from hf_sparse_peft.pruning.while_training.gate_checkpoint import Progress, gates_from_json, gates_to_json
from hf_sparse_peft.pruning.while_training.hard_concrete import (
    drawn_gates,
    likely_open,
    open_probability,
    uniform_noise,
)
from hf_sparse_peft.pruning.while_training.unit_hard_concrete import UnitGates, expected_sparsity

LORA = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(24).view(2, 12) + 3
BETA = 2 / 3
FAST = {"start": 0.0, "full": 0.5, "end": 1.0, "gate_rate": 0.5, "multiplier_rate": 0.5, "transfer_weight": 0.0}

pytestmark = pytest.mark.filterwarnings("ignore:Masks remove", "ignore:gate_rate")


def adapted(base=None, config=None, layers=2, **options):
    torch.manual_seed(1)
    return get_peft_model(base or tiny.llama(layers=layers), config or LoraConfig(**{**LORA, **options}))


def batches(count=3, size=4, seed=5):
    ids = torch.randint(1, tiny.VOCAB, (count, size, 10), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": one, "labels": one.clone()} for one in ids]


def train(model, out, steps=4, *, data=None, callbacks=(), samples=None, options=(), **rule):
    callback = TransferPruningCallback(LearnUnitMasks(**{**FAST, **rule}), data)
    tiny.train(model, out, steps, callbacks=[*callbacks, callback], data=samples or tiny.TokenData(32), **dict(options))
    return callback


def gates_of(model, **options):
    masks = unit_masks_of(model) or mask_units(model)
    base = model.get_base_model()
    spaces = masked_spaces(model, masks)
    return [
        UnitGates.fresh(s, entries_of_unit(base, masks.structures[s.name], s.kind), 0.5, 0, **options) for s in spaces
    ]


# The distribution


def test_a_gate_is_open_as_often_as_its_probability_says():
    """Over an even grid of u; Louizos et al., eq. 10 to 12."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for log_alpha in (-4.0, -1.5, 0.0, 2.0, 4.0):
        s = 1 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + log_alpha) / BETA))
        z = torch.minimum(torch.ones(()), torch.maximum(torch.zeros(()), s * 1.2 - 0.1))
        alpha = torch.tensor(log_alpha, dtype=torch.float64)
        torch.testing.assert_close(drawn_gates(alpha, u, BETA), z)
        assert (z > 0).double().mean().item() == pytest.approx(open_probability(alpha, BETA).item(), abs=1e-5)
    assert open_probability(torch.zeros(()), BETA).item() == pytest.approx(0.8318, abs=1e-4)


def test_gradients_of_gates_and_of_what_is_expected_are_slopes():
    u = torch.tensor([0.3, 0.5, 0.9, 0.02], dtype=torch.float64)
    alpha = torch.tensor([0.2, -0.4, 0.1, 0.0], dtype=torch.float64, requires_grad=True)

    def z(a, u):
        return min(1.0, max(0.0, -0.1 + 1.2 / (1 + math.exp(-(math.log(u / (1 - u)) + a) / BETA))))

    def p(a):
        return 1 / (1 + math.exp(-(a + BETA * math.log(11))))

    (gates,) = torch.autograd.grad(drawn_gates(alpha, u, BETA).sum(), alpha)
    (expected,) = torch.autograd.grad(open_probability(alpha, BETA).sum(), alpha)
    for at, (a, one) in enumerate(zip(alpha.tolist(), u.tolist(), strict=True)):
        assert gates[at].item() == pytest.approx((z(a + 1e-6, one) - z(a - 1e-6, one)) / 2e-6, abs=1e-6)
        assert expected[at].item() == pytest.approx((p(a + 1e-6) - p(a - 1e-6)) / 2e-6, abs=1e-6)
    assert gates[3] == 0  # at 0 already


def test_as_many_gates_stay_as_are_expected_and_equal_ones_are_drawn_for():
    alpha = torch.linspace(-4, 4, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    count = 40 - round(40 - float(open_probability(alpha.double(), BETA).sum()))
    stays = likely_open(alpha, BETA, 0)
    assert int(stays.sum()) == count
    assert alpha[stays].min() > alpha[~stays].max()
    same = [likely_open(torch.full((40,), -1.0), BETA, seed) for seed in range(3)]
    assert {int(one.sum()) for one in same} == {40 - round(40 * (1 - 1 / (1 + math.exp(1 - BETA * math.log(11)))))}
    assert not torch.equal(same[0], same[1])
    assert torch.equal(same[0], likely_open(torch.full((40,), -1.0), BETA, 0))
    assert not any(bool(one[: int(one.sum())].all()) for one in same)


# What is expected to be gone


def sparsity_by_hand(model, gates):
    """Weights that units own, one unit after the other, times the chance that unit and part are both open."""
    stays = total = 0.0
    for structure in structures_of(model.get_base_model()):
        for kind in ("heads", "channels"):
            one = next(g for g in gates if g.key == f"{structure.name}.{kind}")
            part = 1 / (1 + math.exp(-(one.part.item() + BETA * math.log(11))))
            for unit in range(structure.units(kind)):
                owned = 0
                for member in structure.members(kind):
                    layer = model.get_base_model().get_submodule(member.module).get_base_layer()
                    owned += member.span * (layer.in_features if member.axis == 0 else layer.out_features)
                total += owned
                stays += owned * part / (1 + math.exp(-(one.units[unit].item() + BETA * math.log(11))))
    return 1 - stays / total


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_unit_counts_only_as_far_as_its_part_lives(kind):
    model = adapted(tiny.base(kind))
    gates = gates_of(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in gates:
            for leaf in one.leaves:
                leaf.copy_(torch.randn(leaf.shape, generator=generator) * 2)
    found = expected_sparsity(gates, BETA).item()
    assert found == pytest.approx(sparsity_by_hand(model, gates), abs=1e-5)
    with torch.no_grad():
        for one in gates:
            one.part.fill_(-100)
    assert expected_sparsity(gates, BETA).item() == pytest.approx(1.0)


def test_units_that_were_masked_before_count_as_gone_and_stay_masked():
    model = adapted()
    masks = mask_units(model)
    masks.masks[1].factors[10:] = 0
    gates = gates_of(model)
    with torch.no_grad():
        for one in gates:
            one.units.fill_(100)
            one.part.fill_(100)
    assert expected_sparsity(gates, BETA).item() == pytest.approx(54 * 3 * 32 / (2 * 9216))
    assert not gates[1].factors(gates[1].noise(0, 3), BETA)[10:].any()
    assert gates[1].likely(BETA, 0).tolist() == [1.0] * 10 + [0.0] * 54


# Training


class ByHand(tiny.TrainerCallback):
    """The updates of gates and multipliers in float64, from the gradients of the factors alone."""

    def __init__(self, rule, steps):
        self.rule, self.steps, self.callback = rule, steps, None
        self.signs = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gates = self.callback.runs[0].memory.gates
        if not state.global_step:
            self.leaves = [leaf.detach().double().requires_grad_() for one in gates for leaf in one.leaves]
            self.multipliers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            self.moments = [[torch.zeros_like(t), torch.zeros_like(t)] for t in (*self.leaves, self.multipliers)]
        gone = kept = loss = 0
        for at, one in enumerate(gates):
            units, part = self.leaves[2 * at : 2 * at + 2]
            probability = torch.sigmoid(units + BETA * math.log(11)).sum() * torch.sigmoid(part + BETA * math.log(11))
            kept, gone = kept + one.entries * probability, gone + one.entries * len(units)
            noise, z = one.noise(0, state.global_step), []
            for alpha, u in ((units, noise.units.double()), (part, noise.part.double())):
                s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + alpha) / BETA)
                z.append((1.2 * s - 0.1).clamp(0, 1))
            factors = one.space.layer.factors
            torch.testing.assert_close((z[0] * z[1]).float(), factors.detach(), rtol=1e-3, atol=1e-5)
            loss = loss + (z[0] * z[1] * factors.grad.double()).sum()
        distance = 1 - kept.squeeze() / gone - self.rule.target(state.global_step, self.steps)
        loss = loss + self.multipliers[0] * distance + self.multipliers[1] * distance**2
        self.signs.append(math.copysign(1, distance.item()))
        for tensor, gradient, moment in zip(
            (*self.leaves, self.multipliers), torch.autograd.grad(loss, (*self.leaves, self.multipliers)), self.moments,
            strict=True,
        ):  # fmt: skip
            is_gate = tensor is not self.multipliers
            moment[0].mul_(0.9).add_(0.1 * gradient)
            moment[1].mul_(0.999).add_(0.001 * gradient**2)
            t = state.global_step + 1
            step = moment[0] / (1 - 0.9**t) / ((moment[1] / (1 - 0.999**t)).sqrt() + 1e-8)
            with torch.no_grad():
                tensor += step * (-self.rule.gate_rate if is_gate else self.rule.multiplier_rate)
                if is_gate:
                    tensor.clamp_(-math.log(100), math.log(100))


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gates_descend_and_multipliers_ascend_as_by_hand(accumulation, tmp_path):
    """On the true gradients: what is compared is small where both signs of the Lagrangian's gradient occur."""
    rule = LearnUnitMasks(**{**FAST, "gate_rate": 0.3, "multiplier_rate": 2.0, "sparsity": 0.6})
    watch = ByHand(rule, 5)
    watch.callback = callback = TransferPruningCallback(rule)
    options = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    model = adapted()
    tiny.train(model, tmp_path, 5, callbacks=[watch, callback], data=tiny.TokenData(32), **options)
    memory = callback.runs[0].memory
    for own, wanted in zip([leaf for one in memory.gates for leaf in one.leaves], watch.leaves, strict=True):
        assert (own.detach().double() - wanted).abs().median() < 1e-3
        assert (own.detach().double() - wanted).abs().max() < 0.2
    torch.testing.assert_close(memory.multipliers.double(), watch.multipliers, rtol=1e-3, atol=1e-3)
    assert set(watch.signs) == {1.0, -1.0}
    assert memory.multipliers[1] > 0


@pytest.mark.slow
def test_multipliers_bring_the_expected_sparsity_to_the_target():
    """Gates alone, with a loss that wants every unit: without the multipliers nothing would close."""
    gates, multipliers = gates_of(adapted()), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([
        {"params": [leaf for one in gates for leaf in one.leaves], "lr": 0.02},
        {"params": [multipliers], "lr": 0.02, "maximize": True},
    ])  # fmt: skip
    memory = SimpleNamespace(gates=gates, multipliers=multipliers, optimizer=optimizer)
    rule, wants_all = LearnUnitMasks(sparsity=0.7), {one.space: torch.full_like(one.units, -1e-3) for one in gates}
    for step in range(1200):
        memory.noise = {one.key: one.noise(0, step) for one in gates}
        rule._move(memory, wants_all, 0.7 * min(1.0, step / 400))
    assert expected_sparsity(gates, BETA).item() == pytest.approx(0.7, abs=0.01)
    assert memory.multipliers[0] < 0  # it was below the target: closing is paid for


def test_the_target_rises_linearly_and_masks_are_hard_at_the_end():
    rule = LearnUnitMasks(sparsity=0.8, start=0.1, full=0.5, end=0.9)
    assert [round(rule.target(step, 10), 6) for step in range(10)] == [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert rule.open_steps(10) == range(1, 9)


def test_between_steps_and_from_the_end_on_factors_are_zero_or_one(tmp_path):
    drawn, between, gates = [], [], []
    model = adapted()

    def look(store):
        return lambda step, m, o: store.append([mask.factors.detach().clone() for mask in unit_masks_of(m).masks])

    watch = tiny.At(on_pre_optimizer_step=look(drawn), on_step_end=look(between))
    callback = TransferPruningCallback(LearnUnitMasks(**{**FAST, "start": 0.2, "full": 0.4, "end": 0.6}))
    keep = tiny.At(on_step_end=lambda *_: gates.append(callback.runs[0].memory.gates[1].units.detach().clone()))
    tiny.train(model, tmp_path, 5, callbacks=[callback, watch, keep], data=tiny.TokenData(32))
    is_hard = [all(set(one.tolist()) <= {0.0, 1.0} for one in step) for step in drawn]
    assert is_hard == [True, False, False, True, True]
    assert all(bool(one.all()) for one in drawn[0])
    assert all(set(one.tolist()) <= {0.0, 1.0} for step in between for one in step)
    assert torch.equal(gates[2], gates[4])
    assert not torch.equal(gates[0], gates[2])
    assert [event["step"] for event in callback.events] == [3]
    for mask in unit_masks_of(model).masks:
        assert not mask.factors.requires_grad
        assert mask.factors.grad is None


# The second data set


def gradients(store):
    def look(step, model, optimizer):
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        store.append(found | {mask.block + mask.kind: mask.factors.grad.clone() for mask in unit_masks_of(model).masks})

    return tiny.At(on_pre_optimizer_step=look)


@pytest.mark.parametrize(
    ("accumulation", "counted"),
    [pytest.param(1, True, marks=pytest.mark.slow), (2, True), pytest.param(2, False, marks=pytest.mark.slow)],
)
def test_gradients_are_those_of_the_task_plus_the_weighted_second_loss(accumulation, counted, tmp_path, monkeypatch):
    """Each loss by itself: at weights 0 and 1 the difference is the second one's, at 0.7 that much of it; whether the
    model divides by all labels of the step, or Trainer by its micro-batches."""
    if not counted:
        monkeypatch.setattr(Trainer, "_get_num_items_in_batch", lambda *_: None)
    found, data = {}, batches(accumulation)
    options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation, "learning_rate": 0.0}
    for weight in (0.0, 1.0, 0.7):
        store = []
        train(adapted(init_lora_weights=False), tmp_path, 1, data=data, callbacks=[gradients(store)],
              transfer_weight=weight, options=options)  # fmt: skip
        found[weight] = store[0]
    model = adapted(init_lora_weights=False)
    masks = mask_units(model)
    for mask, one in zip(masks.masks, gates_of(model), strict=True):
        mask.factors.copy_(one.factors(one.noise(0, 0), BETA).detach())
        mask.factors.requires_grad_()
    for batch in data:
        (model(**batch).loss / accumulation).backward()
    second = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    second |= {mask.block + mask.kind: mask.factors.grad for mask in masks.masks}
    assert set(second) == set(found[0.0])
    for name, gradient in second.items():
        torch.testing.assert_close(found[1.0][name] - found[0.0][name], gradient, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[0.7][name] - found[0.0][name], 0.7 * gradient, rtol=1e-3, atol=1e-5)


class Unread(list):
    def __iter__(self):
        raise AssertionError("the second data set was read")


def test_a_weight_of_zero_is_the_baseline_to_the_bit(tmp_path):
    states = []
    for data in (None, Unread(batches())):
        model = adapted(lora_dropout=0.1)
        train(model, tmp_path, 3, data=data)
        states.append((model.state_dict(), [mask.factors for mask in unit_masks_of(model).masks]))
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())
    assert all(torch.equal(a, b) for a, b in zip(states[0][1], states[1][1], strict=True))


def test_the_second_data_set_is_read_in_an_order_that_training_does_not_see(tmp_path):
    """Where its loss counts almost nothing, the run draws what it would without."""
    seen = {}
    for weight in (0.0, 1e-30):
        model, order = adapted(), []
        look = model.register_forward_pre_hook(lambda m, a, k, o=order: o.append(k["input_ids"]), with_kwargs=True)
        loader = torch.utils.data.DataLoader(tiny.TokenData(8, seed=9), batch_size=2, shuffle=True)
        train(model, tmp_path, 3, data=loader, transfer_weight=weight)
        look.remove()
        seen[weight] = (order, model.state_dict())
    assert len(seen[0.0][0]) == len(seen[1e-30][0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen[0.0][0], seen[1e-30][0], strict=True))


# Runs that go on


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_that_stops_goes_on_with_the_same_bits(stop, tmp_path):
    """Before gates train, while they do, and behind."""
    rule = {"start": 0.3, "full": 0.5, "end": 0.8, "transfer_weight": 0.5}
    options = {"save_steps": stop, "save_strategy": "steps", "gradient_accumulation_steps": 2}
    loader = torch.utils.data.DataLoader(tiny.TokenData(7, seed=9), batch_size=2, shuffle=True)
    first = adapted(lora_dropout=0.1)
    whole = train(first, tmp_path, 6, data=loader, options=options, **rule)
    again = adapted(lora_dropout=0.1)
    resumed = train(again, tmp_path, 6, data=loader, options={"resume": str(tmp_path / f"checkpoint-{stop}")} | options,
                    **rule)  # fmt: skip
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for one, other in zip(whole.runs[0].memory.gates, resumed.runs[0].memory.gates, strict=True):
        assert torch.equal(one.units, other.units)
        assert torch.equal(one.part, other.part)
    assert str(whole.masks.table()) == str(resumed.masks.table())
    assert torch.equal(whole.runs[0].memory.multipliers, resumed.runs[0].memory.multipliers)
    assert whole.runs[0].memory.transfer.batches.read == resumed.runs[0].memory.transfer.batches.read == 12


def test_a_checkpoint_that_lies_is_refused_before_anything_changes():
    model = adapted()
    gates = gates_of(model)
    multipliers = torch.zeros(2, requires_grad=True)
    leaves = [leaf for one in gates for leaf in one.leaves]
    optimizer = torch.optim.Adam([{"params": leaves}, {"params": [multipliers], "maximize": True}])
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    multipliers.grad = torch.ones(2)
    optimizer.step()
    good = gates_to_json(gates, multipliers, optimizer, Progress(0.25, 7))
    before = [leaf.detach().clone() for leaf in leaves]
    key = gates[0].key
    short = {**good["parts"][key], "units": good["parts"][key]["units"][:4]}
    lies = [
        (None, "no gates of the model's"),
        ({**good, "parts": {}}, "no gates of the model's"),
        ({**good, "parts": {**good["parts"], key: short}}, "gates of 'model.layers.0.heads'"),
        ({**good, "parts": {**good["parts"], key: {}}}, "damaged"),
        ({**good, "multipliers": "%%%"}, "multipliers are damaged"),
        ({**good, "multipliers": good["moments"]["0"]["step"]}, "multipliers are 1 numbers"),
        ({**good, "read": -1}, "read=-1"),
        ({**good, "expected": "0.2"}, "expected='0.2'"),
        ({**good, "moments": {"99": good["moments"]["0"]}}, "damaged"),
    ]
    for lie, message in lies:
        with pytest.raises(ValueError, match=message):
            gates_from_json(lie, gates, multipliers, optimizer)
        assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))
    assert gates_from_json(good, gates, multipliers, optimizer) == Progress(0.25, 7)
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))


def test_a_second_run_asks_for_more_than_is_gone(tmp_path):
    model = adapted()
    first = train(model, tmp_path, 4, sparsity=0.3)
    gone = first.masks.sparsity
    assert gone > 0
    with pytest.raises(ValueError, match="already"):
        train(model, tmp_path, 4, sparsity=gone)
    before = [mask.factors.clone() for mask in unit_masks_of(model).masks]
    second = train(model, tmp_path, 4, sparsity=0.95)
    assert all(bool((m.factors <= old).all()) for m, old in zip(unit_masks_of(model).masks, before, strict=True))
    assert second.masks.sparsity > gone
    unmask_units(model)
    train(model, tmp_path, 2, sparsity=0.3)


@pytest.mark.parametrize("how", ["interrupt", "skip", "masked"])
def test_a_step_that_is_no_step_moves_no_gate(how, tmp_path):
    model, starts = adapted(), {}

    def act(step, model, optimizer):
        memory = callback.runs[0].memory
        starts.setdefault("gates", [leaf.detach().clone() for one in memory.gates for leaf in one.leaves])
        starts.setdefault("multipliers", memory.multipliers.detach().clone())
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "skip":
            optimizer._is_overflow = True

    callback = TransferPruningCallback(LearnUnitMasks(**FAST))
    samples = tiny.TokenData(16, masked=how == "masked")
    watch = tiny.At(on_pre_optimizer_step=act)
    run = lambda: tiny.train(model, tmp_path, 2, callbacks=[watch, callback], data=samples)  # noqa: E731
    if how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            run()
    elif how == "masked":
        with pytest.warns(UserWarning, match="its gates did not move"):
            run()
    else:
        run()
    memory = callback.runs[0].memory
    leaves = [leaf for one in memory.gates for leaf in one.leaves]
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, starts["gates"], strict=True))
    assert torch.equal(memory.multipliers, starts["multipliers"])
    for mask in unit_masks_of(model).masks:
        assert not mask.factors.requires_grad
        assert set(mask.factors.tolist()) <= {0.0, 1.0}


# What is left


def close_some(model):
    """Masks by hand: a block without attention, another without channels, the rest in part."""
    masks = mask_units(model)
    masks.masks[0].factors.zero_()
    masks.masks[1].factors[::3] = 0
    masks.masks[3].factors.zero_()
    return masks


@pytest.mark.parametrize("merged", [False, True])
def test_parts_of_which_nothing_is_left_are_sliced_to_zeros(merged, tmp_path):
    model = adapted(init_lora_weights=False).eval()
    masks = close_some(model)
    assert masks.closed() == [("model.layers.0", "heads"), ("model.layers.1", "channels")]
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        if merged:
            kept = masks.kept()
            model = model.merge_and_unload()
            assert unit_masks_of(model) is masks
            small = slice_model(model)
            torch.testing.assert_close(small(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
            assert small.kept_units.to_dict() == kept.to_dict()
            save_sliced(small, tmp_path)
            small = load_sliced(tmp_path).eval()
        else:
            small = slice_model(model)
        torch.testing.assert_close(small(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    base = small.get_base_model() if not merged else small
    assert base.model.layers[0].self_attn.o_proj.weight.shape == (32, 16)
    assert not base.model.layers[0].self_attn.o_proj.weight.any()
    assert base.model.layers[1].mlp.down_proj.weight.shape == (32, 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 63}
    assert torch.equal(
        small.generate(input_ids=IDS, **options), small.generate(input_ids=IDS, use_cache=False, **options)
    )


def test_a_block_of_which_nothing_is_left_is_dropped(tmp_path):
    """Its block is the identity, and what is left is saved and loaded under its new numbers."""
    model = adapted(layers=3, init_lora_weights=False).eval()
    masks = mask_units(model)
    masks.masks[2].factors.zero_()
    masks.masks[3].factors.zero_()
    masks.masks[5].factors[7:] = 0
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        small = slice_model(model.merge_and_unload())
        assert drop_blocks(small, ["model.layers.1"]) == [0, 2]
        torch.testing.assert_close(small(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        save_sliced(small, tmp_path)
        again = load_sliced(tmp_path).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert [len(one.channels) for one in again.kept_units.blocks.values()] == [64, 7]


def test_masks_of_a_four_bit_base_cut_the_dense_one(tmp_path):
    model = adapted(tiny.base("nf4"))
    callback = train(model, tmp_path, 4, sparsity=0.8)
    masks = unit_masks_of(model)
    dense = tiny.llama()
    copied = masks.copied_to(dense)
    assert all(torch.equal(a.factors, b.factors) for a, b in zip(masks.masks, copied.masks, strict=True))
    assert copied.closed() == masks.closed() == callback.masks.closed
    with torch.no_grad():
        expected = dense.eval()(input_ids=IDS).logits
        torch.testing.assert_close(slice_model(dense)(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_trained_model_is_sliced_with_its_adapter_and_the_report_says_what_went(tmp_path):
    model = adapted()
    callback = train(model, tmp_path, 6, sparsity=0.6)
    with torch.no_grad():
        masked = model.eval()(input_ids=IDS).logits
        found, masks = callback.masks, unit_masks_of(model)
        gone = sum(
            int((mask.factors == 0).sum()) * (3 * 32 if mask.kind == "channels" else (16 + 8 + 8 + 16) * 32)
            for mask in masks.masks
        )
        assert found.sparsity == pytest.approx(gone / (2 * 9216))
        assert 0 < found.sparsity < 1
        assert found.kept.to_dict() == masks.kept().to_dict()
        assert str(found.table()).splitlines()[1].startswith("model.layers.0")
        torch.testing.assert_close(slice_model(model)(input_ids=IDS).logits, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SparseLoraConfig(r=2, density=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
        pytest.param(LoraConfig(**{**LORA, "use_dora": True}), marks=pytest.mark.slow),
    ],
    ids=["sparse_lora", "dora"],
)
def test_any_adapter_trains_beside_the_gates(config, tmp_path):
    model = adapted(config=config)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    callback = train(model, tmp_path, 2, data=batches(), transfer_weight=1.0)
    assert callback.masks.sparsity > 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed
    assert not any("base_layer" in name for name in changed)


def test_heads_that_are_saved_whole_train_on_both_data_sets(tmp_path):
    class Labelled(tiny.TokenData):
        def __getitem__(self, index):
            return {"input_ids": self.ids[index], "labels": torch.tensor(index % 3)}

    base = tiny.llama(LlamaForSequenceClassification, num_labels=3)
    model = adapted(base, task_type="SEQ_CLS", modules_to_save=["score"])
    head = model.get_base_model().score.modules_to_save["default"].weight
    start = head.detach().clone()
    data = [{**{"input_ids": b["input_ids"]}, "labels": torch.tensor([0, 1, 2, 0])} for b in batches()]
    callback = train(model, tmp_path, 2, data=data, transfer_weight=1.0, samples=Labelled(16))
    assert not torch.equal(head, start)
    assert callback.runs[0].memory.transfer.batches.read == 2


# What is refused


def trained_factors(model):
    mask_units(model, trained=True)
    return model


def below(model):
    base = model.unload()
    mask_units(base)
    return get_peft_model(base, LoraConfig(**LORA))


@pytest.mark.parametrize(
    ("prepare", "rule", "message"),
    [
        (None, {"transfer_weight": 0.5}, "there is none"),
        (None, {"start": 0.4, "full": 0.45, "end": 0.45}, "leave none of 2 steps"),
        (trained_factors, {}, "factors are parameters"),
        (below, {}, "lies below the adapter"),
    ],
    ids=["no second data", "no steps", "trained factors", "masks below the adapter"],
)
def test_what_cannot_be_trained_is_refused(prepare, rule, message, tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match=message):
        train(model if prepare is None else prepare(model), tmp_path, 2, **rule)
    assert prepare is not None or unit_masks_of(model) is None


def test_options_out_of_their_range_are_refused():
    for options, message in (
        ({"start": 0.3, "full": 0.2}, "start"),
        ({"full": 0.9, "end": 0.8}, "full"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"transfer_weight": -1.0}, "transfer_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            LearnUnitMasks(**options)
    with pytest.raises(ValueError, match="acts on units of"):
        SparseLoraConfig(density=0.1, schedule=[LearnUnitMasks()])


def test_two_rules_do_not_decide_over_one_head(tmp_path):
    with pytest.raises(ValueError, match="both decide which units"):
        train(adapted(), tmp_path, 2, callbacks=[LoRAPruneCallback()])


def test_a_run_too_short_for_any_gate_says_so(tmp_path):
    model = adapted()
    with pytest.warns(UserWarning, match="will hardly be reached"):
        callback = train(model, tmp_path, 2, gate_rate=1e-3)
    assert callback.masks.sparsity < 0.2


def test_an_iterator_or_a_model_without_a_loss_is_no_second_data_set(tmp_path):
    with pytest.raises(TypeError, match="cannot be read again"):
        train(adapted(), tmp_path, 2, data=iter(batches()), transfer_weight=1.0)
    with pytest.raises(ValueError, match="returns no loss"):
        train(adapted(), tmp_path, 2, data=[{"input_ids": IDS}], transfer_weight=1.0)


def test_the_method_is_this_on_upstreams_lora():
    method = methods.get("transfer-pruning", sparsity=0.25, transfer_data=(data := batches()))
    (callback,) = method.callbacks(adapted(config=LoraConfig(**LORA)))
    assert (method.config.r, method.config.lora_alpha) == (8, 16)
    assert callback.rule == LearnUnitMasks(sparsity=0.25)
    assert callback.transfer_data is data
    with pytest.raises(ValueError, match="No run"):
        _ = callback.masks


def test_noise_is_the_same_on_every_rank_and_another_at_every_step():
    gates = gates_of(adapted())
    one, other = gates[1].noise(0, 3), gates[1].noise(0, 4)
    assert torch.equal(one.units, gates[1].noise(0, 3).units)
    assert not torch.equal(one.units, other.units)
    assert not torch.equal(one.units, gates[3].noise(0, 3).units)
    generator = torch.Generator().manual_seed(0)
    many = uniform_noise(100_000, generator, torch.device("cpu"))
    assert 0 < many.min() < 1e-4
    assert 1 > many.max() > 1 - 1e-4
