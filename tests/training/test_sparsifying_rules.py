"""LOBSTER, SeReNe, MaskSparsity, WGSEF, HSPG and HESSO against their equations and worked numbers, on one small matrix
whose gradient a test chooses."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_sparse_peft import (
    Controller,
    GroupEnvelope,
    HalfSpace,
    Hesso,
    Lobster,
    MaskedLoraConfig,
    MaskSparsity,
    PlateauThreshold,
    SeReNe,
    SparseLoraConfig,
)
from hf_sparse_peft.rules import Run, Training
from hf_sparse_peft.rules.hesso import overall_scores, raw_scores
from hf_sparse_peft.rules.neuron_sensitivity import NeuronSensitivity
from hf_sparse_peft.sparsity import envelope, envelope_prox, envelope_shares, largest_within
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared.live_run import run_on

ROWS, COLS = 4, 6


class Matrix(nn.Module):
    """Two matrices; the loss is the sum of their entries' products with G: G is the gradient of each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(COLS, ROWS, bias=False) for _ in range(2))

    def forward(self, G):
        eye = torch.eye(COLS)
        return ((self.first(eye).t() + self.second(eye).t()) * G).sum()


def adapted(*rules, **options):
    torch.manual_seed(0)
    defaults = {"r": 0, "density": 1.0, "target_modules": ["first", "second"]}
    config = SparseLoraConfig(schedule=list(rules), **{**defaults, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Matrix(), config)
    return model.train(), adapter_layers(model)


def gated(*rules, r=3, **options):
    """Low-rank halves with gates of 1, all numbers drawn."""
    model, layers = adapted(*rules, r=r, density=0.0, gate="ones", lora_alpha=r, **options)
    for layer in layers:
        layer.sparse_lora_B["default"].data.normal_()
    return model, layers


def values_of(layers):
    return [layer.sparse_lora_values["default"] for layer in layers]


def factors_of(layer):
    return [getattr(layer, f"sparse_lora_{name}")["default"] for name in ("A", "B", "gate")]


def train(model, steps, G, lr=0.1, total=None, evaluate=None, scaler=None, look=None, **options):
    """`steps` steps of SGD; `look(step)` after each."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, **options)
    rules = Controller(model, optimizer, total or steps, evaluate=evaluate, scaler=scaler)
    for step in range(steps):
        rules.before_step()
        optimizer.zero_grad()
        model(G).backward()
        (optimizer if scaler is None else scaler).step(*([] if scaler is None else [optimizer]))
        rules.after_step()
        if look is not None:
            look(step + 1)
    events = rules.events
    rules.close()
    return events


# LOBSTER


def test_lobster_decays_the_updated_number_by_its_insensitivity():
    model, layers = adapted(Lobster(0.01))
    values_of(layers)[0].data.fill_(0.5)
    train(model, 1, torch.full((ROWS, COLS), 0.2))
    found = values_of(layers)[0]
    assert found.tolist() == pytest.approx([0.47616] * found.numel(), abs=1e-7)  # on the old weight 0.476, plain .4752


@pytest.mark.parametrize("held", [False, True])
def test_lobster_leaves_large_gradients_and_held_numbers_to_the_optimizer(held):
    G = torch.full((ROWS, COLS), 0.3 if held else 1.0)
    found = []
    for rules in ([Lobster(0.5)], []):
        model, layers = adapted(*rules)
        for values in values_of(layers):
            values.data.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        with Controller(model, optimizer, 2) as control:
            if held and rules:
                mask = run_on(model).mask
                mask.attach(optimizer)
                first = values_of(layers)[0]
                mask.hold_part("test", [(first, lambda first=first: torch.ones(len(first)))])
                before = first.detach().clone()
            control.before_step()
            model(G).backward()
            optimizer.step()
            control.after_step()
            if held and rules:
                assert torch.equal(first, before)
                return
        found.append([values.detach().clone() for values in values_of(layers)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Skipping:
    def get_scale(self):
        return 1.0

    def step(self, optimizer):
        pass


@pytest.mark.parametrize("rule", [Lobster(0.5), GroupEnvelope(5.0, start=0.0), HalfSpace(0.5, 0.9, start=0.0)])
def test_a_step_that_the_scaler_skips_changes_nothing(rule):
    model, layers = adapted(rule)
    for values in values_of(layers):
        values.data.uniform_(-1, 1)
    before = copy.deepcopy(values_of(layers))
    train(model, 1, torch.rand(ROWS, COLS), scaler=Skipping(), total=4)
    assert all(torch.equal(one, other) for one, other in zip(values_of(layers), before, strict=True))


# Thresholds


def test_bisection_ends_within_the_bound_and_evaluates_what_it_returns():
    seen = {}

    def loss(x):
        seen[x] = 1.0 if x < 0.37 else 3.0
        return seen[x]

    found, value = largest_within(loss, 1.05, 0.0, 1.0, 0.3, 1.0, resolution=1e-6)
    assert value == loss(found) == 1.0
    assert found in seen
    assert 0.37 - 1e-5 < found < 0.37
    found, value = largest_within(lambda x: float("nan"), 1.05, 0.1, 1.0, 0.3, 1.0)
    assert (found, value) == (0.1, 1.0)


def distance_to(target):
    def evaluate(model):
        with torch.no_grad():
            found = [layer.get_delta_weight("default") for layer in adapter_layers(model)]
            return 1.0 + sum(float((one - target).square().sum()) for one in found)

    return evaluate


def test_at_a_plateau_all_below_a_threshold_within_the_bound_leave_and_stay_away():
    rule = PlateauThreshold(tolerance=0.05, patience=2, every=1, slack=0.0)
    model, layers = adapted(rule)
    target = torch.linspace(0.01, 0.6, ROWS * COLS).view(ROWS, COLS)
    for values in values_of(layers):
        values.data.copy_(target.flatten())
    seen = []
    events = train(
        model, 6, torch.zeros(ROWS, COLS), evaluate=distance_to(target), momentum=0.9,
        look=lambda step: seen.append([len(layer.units("default")) for layer in layers]),
    )  # fmt: skip
    first = events[0]
    assert first["step"] == 3
    assert first["loss_before"] == pytest.approx(1.0)
    assert 1.0 < first["loss_after"] <= 1.05 == pytest.approx(1.05)
    assert distance_to(target)(model) <= 1.05 * 1.05
    kept = [torch.tensor(sorted(target.flatten()[target.flatten() >= first["threshold"]].tolist())) for _ in layers]
    assert seen[2] == [len(one) for one in kept]
    assert seen == sorted(seen, reverse=True)
    for layer, values in zip(layers, values_of(layers), strict=True):
        living = values[: len(layer.units("default"))].detach()
        assert torch.equal(living, kept[0][-len(living) :])  # what stays has every bit


def test_the_best_values_are_restored_before_the_search():
    losses = iter([1.0, 5.0] + [9.0] * 50)
    model, layers = adapted(PlateauThreshold(0.05, patience=1, every=1, slack=0.0))
    best = {}

    def look(step):
        if step == 1:
            best.update(enumerate(values.detach().clone() for values in values_of(layers)))

    G = torch.rand(ROWS, COLS) + 0.1
    train(model, 2, G, evaluate=lambda model: next(losses), look=look, total=3)
    for at, values in enumerate(values_of(layers)):
        living = values[: len(layers[at].units("default"))]
        assert set(living.tolist()) <= set(best[at].tolist())


def test_a_fresh_lora_is_not_read_as_pruned():
    losses = iter([1.0] * 9)
    model, layers = adapted(PlateauThreshold(0.05, patience=1, every=1, slack=0.0), r=3, density=0.0)
    with pytest.warns(UserWarning, match="no threshold was applied"):
        train(model, 3, torch.zeros(ROWS, COLS), evaluate=lambda model: next(losses))
    assert all(layer.alive_components("default") == 3 for layer in layers)


def test_a_threshold_without_an_evaluation_is_refused_with_the_mend():
    model, _ = adapted(PlateauThreshold(patience=1, every=1))
    with pytest.raises(ValueError, match=r"Controller\(evaluate=\.\.\.\), or set data='training'"):
        train(model, 3, torch.zeros(ROWS, COLS))


def test_entries_of_a_masked_base_leave_at_a_plateau_and_merging_keeps_them_zero():
    torch.manual_seed(0)
    rules = [Lobster(1e-3), PlateauThreshold(0.05, patience=1, every=1, slack=0.0)]
    config = MaskedLoraConfig(r=2, lora_alpha=2, mask="all", target_modules=["first", "second"], schedule=rules)
    model = get_peft_model(Matrix(), config).train()
    layers = adapter_layers(model)
    target = [layer.get_base_layer().weight.detach().clone() for layer in layers]

    def evaluate(model):
        merged = [layer.unit_spaces("default")[0] for layer in layers]
        kept = [space.current_weight() * layer.kept("default") for space, layer in zip(merged, layers, strict=True)]
        return 1.0 + sum(float((one - goal).square().sum()) for one, goal in zip(kept, target, strict=True))

    events = train(model, 2, torch.full((ROWS, COLS), 1e-3), evaluate=evaluate, momentum=0.9, total=3)
    (event,) = [one for one in events if "threshold" in one]
    assert event["loss_after"] <= 1.05 * event["loss_before"]
    gone = [~layer.kept("default") for layer in layers]
    assert sum(int(one.sum()) for one in gone) == event["pruned"] > 4
    for layer, one, goal in zip(layers, gone, target, strict=True):
        assert goal[one].abs().max() < event["threshold"] + 1e-3
        assert torch.equal(layer.get_base_layer().weight, goal)
    merged = model.merge_and_unload()
    for linear, one in zip((merged.first, merged.second), gone, strict=True):
        assert not linear.weight[one].any()
        assert linear.weight[~one].all()


# SeReNe


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return SimpleNamespace(logits=self.two(torch.relu(self.one(x))))


def sensitivities(kind, x, sign=None):
    torch.manual_seed(3)
    net = Net()
    net.one.bias.data[1] = -100.0  # a dead unit
    if sign is not None:
        net.two.weight.data.abs_()
    config = SparseLoraConfig(r=2, density=0.3, target_modules=["one", "two"], lora_alpha=2)
    model = get_peft_model(net, config).train()
    for layer in adapter_layers(model):
        layer.sparse_lora_B["default"].data.normal_(std=0.1)
    spaces = [s for layer in adapter_layers(model) for s in layer.unit_spaces("default") if s.kind != "module"]
    read = NeuronSensitivity(spaces, kind, 4, 0, 8.0)
    with read.reading(model):
        model(x)
    found = {(s.name, s.kind, of): read.insensitivity(s, of) for s in spaces for of in ("output", "component")
             if of == "output" or s.kind == "rank"}  # fmt: skip
    return found, model


def expected_sensitivities(model, x, kind):
    """By autograd, sample by sample and output by output."""
    one, two = adapter_layers(model)
    W1, W2 = (layer.get_base_layer().weight + layer.get_delta_weight("default") for layer in (one, two))
    parts = {"one": 0.0, "two": 0.0}
    for sample in x:
        p1 = W1 @ sample + one.get_base_layer().bias
        p1 = p1.detach().requires_grad_(True)
        p2 = W2.detach() @ torch.relu(p1) + two.get_base_layer().bias.detach()
        p2.retain_grad()
        for name, p in (("one", p1), ("two", p2)):
            rows = torch.stack([torch.autograd.grad(y, p, retain_graph=True)[0] for y in p2])
            parts[name] += (rows.abs().mean(0) if kind == "full" else rows.mean(0).abs()) / len(x)
    return parts


@pytest.mark.parametrize("kind", ["full", "lower_bound"])
def test_sensitivities_of_a_relu_net_are_those_of_single_samples(kind):
    x = torch.randn(6, 5)
    found, model = sensitivities(kind, x)
    expected = expected_sensitivities(model, x, kind)
    for name, S in expected.items():
        assert torch.allclose(found[name, "rank", "output"], (1 - S).clamp_min(0), atol=1e-5)
        assert torch.equal(found[name, "rank", "output"], found[name, "support", "output"])
    assert found["one", "rank", "output"][1] == 1.0  # dead: decays in full
    doubled, _ = sensitivities(kind, torch.cat([x, x]))
    assert all(torch.allclose(found[key], doubled[key], atol=1e-6) for key in found)


def test_the_lower_bound_is_one_and_is_tight_where_derivatives_share_a_sign():
    x = torch.randn(6, 5)
    full, lower = (sensitivities(kind, x)[0] for kind in ("full", "lower_bound"))
    assert all((lower[key] >= full[key] - 1e-6).all() for key in full)  # of insensitivities
    assert (lower["one", "rank", "output"] > full["one", "rank", "output"] + 1e-3).any()
    full, lower = (sensitivities(kind, x, sign=1)[0]["one", "support", "output"] for kind in ("full", "lower_bound"))
    assert torch.allclose(full, lower, atol=1e-5)


def test_all_incoming_weights_of_a_neuron_lose_the_same_fraction():
    x, found = torch.randn(6, 5), []
    for rules in ([SeReNe(0.2, "full")], []):
        torch.manual_seed(3)
        config = SparseLoraConfig(
            r=2, lora_alpha=2, density=0.5, target_modules=["one", "two"], schedule=list(rules)
        )  # fmt: skip
        model = get_peft_model(Net(), config).train()
        for layer in adapter_layers(model):
            layer.sparse_lora_B["default"].data.normal_(std=0.1)
            layer.sparse_lora_values["default"].data.normal_(std=0.5)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        with Controller(model, optimizer, 1) as control:
            control.before_step()
            model(x).logits.square().sum().backward()
            optimizer.step()
            control.after_step()
        layer = adapter_layers(model)[0]
        own = [getattr(layer, f"sparse_lora_{name}")["default"].detach() for name in ("values", "A", "B")]
        found.append([*own, layer.units("default").long() // 5])
    (values, A, B, rows), (plain, plain_A, plain_B, _) = found
    ratio = values / plain
    for row in rows.unique():
        assert torch.allclose(ratio[rows == row], (B / plain_B)[row].mean(), atol=1e-5)
    assert torch.allclose(A / plain_A, (A / plain_A)[:, :1], atol=1e-4)
    assert ((A / plain_A) < 1 - 1e-4).any()


def test_readers_of_dense_gradients_see_the_loss_alone():
    torch.manual_seed(3)
    model = get_peft_model(Net(), SparseLoraConfig(r=2, density=0.3, target_modules=["one", "two"])).train()
    spaces = [layer.unit_spaces("default")[0] for layer in adapter_layers(model)]
    seen = []
    adapter_layers(model)[0].add_gradient_reader("default", seen.append)
    with NeuronSensitivity(spaces, "full", 4, 0, 1.0).reading(model):
        model(torch.randn(6, 5)).logits.sum().backward()
    assert len(seen) == 1
    assert all(parameter.grad is None or not parameter.grad.isnan().any() for parameter in model.parameters())


@pytest.mark.parametrize("rule", [MaskSparsity(0.5, 0.5, start=0.0, end=1.0), HalfSpace(0.5)])
def test_pulls_are_in_the_scale_of_gradients_that_nobody_has_unscaled(rule):
    found = []
    for scale in (1.0, 64.0):
        model, layers = gated(rule, r=4)
        spaces = [s for layer in layers for s in layer.unit_spaces("default") if s.kind == "rank"]
        run = Run(Training(model, 4, loss_scale=scale, clips=False), rule, "default", None, spaces)
        rule.begin(run)
        (model(torch.rand(ROWS, COLS, generator=torch.Generator().manual_seed(5))) * scale).backward()
        rule.gradients(run)
        found.append([factor.grad / scale for layer in layers for factor in factors_of(layer)])
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*found, strict=True))


# MaskSparsity


def test_only_what_is_to_go_is_pulled_and_falls_by_lr_times_s():
    rule = MaskSparsity(0.5, 1 / 3, start=0.0, end=0.75, scope="layer")
    model, layers = gated(rule)
    for layer in layers:
        layer.sparse_lora_gate["default"].data.copy_(torch.tensor([1.0, 0.06, 1.0]))
    seen, before = [], copy.deepcopy([factors_of(layer) for layer in layers])

    def look(step):
        seen.append([factors_of(layer)[2].detach().clone() for layer in layers])

    train(model, 4, torch.zeros(ROWS, COLS), lr=0.1, look=look)
    for at, layer in enumerate(layers):
        assert [round(float(one[at][1]), 6) for one in seen] == [0.01, -0.04, 0.0, 0.0]  # oscillates, is removed
        A, B, gate = factors_of(layer)
        assert torch.equal(gate, torch.tensor([1.0, 0.0, 1.0]))
        for now, then, axis in ((A, before[at][0], 0), (B, before[at][1], 1)):
            assert torch.equal(now.movedim(axis, 0)[[0, 2]], then.movedim(axis, 0)[[0, 2]])


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_what_stays_has_the_gradients_of_plain_training(weight):
    gradients = []
    for rules in ([MaskSparsity(weight, 0.5, start=0.0, end=1.0)], []):
        model, layers = gated(*rules, r=4)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with Controller(model, optimizer, 2) as control:
            control.before_step()
            model(torch.rand(ROWS, COLS, generator=torch.Generator().manual_seed(5))).backward()
            optimizer.step()
            gradients.append([factor.grad.clone() for layer in layers for factor in factors_of(layer)])
            if rules:
                marked = [layer.rule_state("default")["marked_rank"].bool() for layer in layers]
            control.after_step()
    assert sum(int(one.sum()) for one in marked) == 4
    for at, (ours, plain) in enumerate(zip(*gradients, strict=True)):
        if ours.dim() == 1:
            assert torch.equal(ours[~marked[at // 3]], plain[~marked[at // 3]])
            assert torch.allclose(ours[marked[at // 3]] - plain[marked[at // 3]], torch.tensor(weight), atol=1e-6)
        else:
            assert torch.equal(ours, plain)


# WGSEF


def test_worked_numbers_of_the_envelope():
    t = torch.tensor
    assert [float(envelope(t(n), k)) for n, k in (([3.0, 1.0], 1), ([3.0, 1.0], 2), ([3.0, 1.0, 1.0], 2))] == [
        8,
        5,
        6.5,
    ]
    assert envelope_shares(t([3.0, 1.0, 1.0]), 2).tolist() == pytest.approx([1, 0.5, 0.5])
    norms = t([3.0, 1.0, 0.5])
    assert (norms * envelope_prox(norms, 1, 1.0)).tolist() == pytest.approx([1.5, 0, 0])
    assert (norms * envelope_prox(norms, 1, 0.1)).tolist() == pytest.approx([2.65385, 0.65385, 0.15385], abs=1e-5)
    assert envelope_shares(norms, 1, step=0.1).tolist() == pytest.approx([0.76667, 0.18889, 0.04444], abs=1e-5)
    assert (norms * envelope_prox(norms, 3, 0.7)).tolist() == pytest.approx((norms / 1.7).tolist())


@pytest.mark.parametrize("sizes", [None, [1.0, 4.0]])
def test_the_prox_is_the_minimum_that_a_grid_finds(sizes):
    v, k, step = torch.tensor([2.0, 1.2], dtype=torch.float64), 1.0 if sizes is None else 2.0, 0.3
    d = None if sizes is None else torch.tensor(sizes, dtype=torch.float64)
    found = v * envelope_prox(v, k, step, d)

    def objective(w):
        return float((w - v).square().sum() / 2 + step * envelope(w, k, d))

    grid = [found + torch.tensor([a, b], dtype=torch.float64) * 0.02 for a in (-1, 0, 1) for b in (-1, 0, 1)]
    assert min(grid, key=objective) is grid[4]


def test_gates_take_the_proximal_step_of_the_whole_model():
    model, layers = gated(GroupEnvelope(10.0, kept=1 / 3, start=0.0))
    gates = torch.tensor([3.0, 1.0, 0.5, -2.0, 0.25, 1.5])
    for layer, own in zip(layers, gates.split(3), strict=True):
        layer.sparse_lora_gate["default"].data.copy_(own)
    G = torch.full((ROWS, COLS), 1e-6)
    train(model, 1, G, lr=0.1, total=2)
    expected = gates * envelope_prox(gates.abs(), 2, 1.0)
    found = torch.cat([layer.sparse_lora_gate["default"].detach() for layer in layers])
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert [layer.alive_components("default") for layer in layers] == [int((e != 0).sum()) for e in expected.split(3)]


# HSPG


def test_half_space_steps_are_the_papers_loop():
    lam, eps, lr, G = 1.0, 0.9, 0.2, 0.3 * torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(7))
    model, layers = gated(HalfSpace(lam, eps, start=0.25), r=4)
    groups = []
    for layer in layers:
        A, B, gate = (factor.detach().double() for factor in factors_of(layer))
        for i in range(4):
            groups.append([A[i].clone(), B[:, i].clone(), gate[i].clone()])
    for step in range(8):
        for x in groups:
            norm = sum((part**2).sum() for part in x) ** 0.5
            if norm == 0:
                continue
            a, b, g = x
            grads = [g * (b @ G.double()), g * (G.double() @ a), b @ G.double() @ a]
            new = [part - lr * (grad + lam * part / norm) for part, grad in zip(x, grads, strict=True)]
            inner = sum((n * o).sum() for n, o in zip(new, x, strict=True))
            cut = step >= 2 and inner < eps * norm**2
            x[:] = [torch.zeros_like(part) for part in new] if cut else new
    train(model, 8, G, lr=lr)
    dead = 0
    for at, layer in enumerate(layers):
        A, B, gate = factors_of(layer)
        for i, (a, b, g) in enumerate(groups[4 * at : 4 * at + 4]):
            assert torch.allclose(A[i].double(), a, atol=1e-4)
            assert torch.allclose(B[:, i].double(), b, atol=1e-4)
            assert gate[i].item() == pytest.approx(float(g), abs=1e-4)
            dead += float(g) == 0
    assert 0 < dead < 8
    assert sum(layer.alive_components("default") for layer in layers) == 8 - dead


# HESSO


def test_a_period_of_five_multiplies_by_four_factors_and_what_is_gone_stays_gone():
    model, layers = gated(Hesso(0.5, start=0.2, end=0.7, periods=1), r=4)  # S = 2, P = 5 of 10 steps
    start = copy.deepcopy([factors_of(layer) for layer in layers])
    found = {}

    def look(step):
        found[step] = [[round((a / b).item(), 4) for a, b in zip(factors_of(layer)[2], one[2], strict=True)]
                       for layer, one in zip(layers, start, strict=True)]  # fmt: skip

    G = torch.full((ROWS, COLS), 1e-3)
    train(model, 10, G, momentum=0.9, lr=1e-3, look=look)
    shrunk = {step: sorted({v for rows in one for v in rows}) for step, one in found.items()}
    assert shrunk[2] == [1.0]
    assert [shrunk[step][0] for step in (3, 4, 5, 6, 7, 10)] == [0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert all(one[-1] == 1.0 for one in shrunk.values())
    assert sum(v == 0 for rows in found[10] for v in rows) == 4
    for layer in layers:
        A, B, gate = factors_of(layer)
        for i in (gate == 0).nonzero().flatten():
            assert not A[i].any()
            assert not B[:, i].any()


def test_groups_that_left_stay_exactly_zero_with_momentum_and_decay():
    model, layers = gated(Hesso(0.5, start=0.1, end=0.5, periods=2), r=4)
    train(model, 12, torch.randn(ROWS, COLS), lr=0.01, momentum=0.9, weight_decay=0.1)
    dead = [(gate == 0).nonzero().flatten() for gate in (factors_of(layer)[2] for layer in layers)]
    assert sum(map(len, dead)) == 4
    for layer, gone in zip(layers, dead, strict=True):
        A, B, _ = factors_of(layer)
        assert not A[gone].any()
        assert not B[:, gone].any()


def test_scores_are_normalised_over_the_model_and_not_by_layer():
    x = [torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
    d = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [0.5, 0.0]])]
    scores = [raw_scores([a], [b]) for a, b in zip(x, d, strict=True)]
    assert scores[0]["magnitude"].tolist() == pytest.approx([5, 0.5])
    assert scores[0]["avg_magnitude"].tolist() == pytest.approx([2.5, 0.25], rel=1e-5)
    assert scores[0]["cosine_similarity"].tolist() == pytest.approx([1.6, 1.8], rel=1e-5)
    assert scores[1]["cosine_similarity"].tolist() == pytest.approx([0, 1], abs=1e-6)
    assert scores[0]["taylor_second_order"].tolist() == pytest.approx([4.5, 0.08])
    only = {"magnitude": 1.0}
    assert overall_scores(scores, only).argmin() == 1
    ten = [raw_scores([10 * x[0]], [d[0]]), scores[1]]
    assert overall_scores(ten, only).argmin() == 2
