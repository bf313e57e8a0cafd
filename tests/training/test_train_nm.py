"""N:M sparsity while weights train: SR-STE, progressive gradient flow, BDWP and Bi-Mask against float64 by hand;
phases, what meets there, and what is left at the end."""

import copy

import pytest
import torch
from mask_toolbox import LAYERS, gradients_by_hand, loss_of, masked_net, run, spaces_of, start_of, top_of_groups

from hf_sparse_peft import TrainNM
from hf_sparse_peft.rules import OutputGroups, PermutedOutputGroups
from hf_sparse_peft.sparsity import MaskDecay, StructureDecay, n_of_m_mask
from hf_sparse_peft.tuners import adapter_layers


def by_hand(model, steps, lr, decay=0.0, keep=2, of=4, removed=None, gradient=None, input_mask=None):
    """Weights after SGD, from the equations."""
    weights = start_of(model)
    for step in range(steps):
        masks = {name: top_of_groups(w, keep, of) for name, w in weights.items()}
        beta = 0.0 if removed is None else removed(step)
        factor = 1.0 if gradient is None else gradient(step)
        blend = {name: mask + (~mask) * beta for name, mask in masks.items()}
        forward = {name: weights[name] * blend[name] for name in weights}
        backward = forward
        if input_mask is not None:
            backward = {name: weights[name] * input_mask(weights[name], masks[name]) for name in weights}
        G = gradients_by_hand(weights, forward, backward, step)
        for name, mask in masks.items():
            found = torch.where(mask, G[name], factor * G[name]) + decay * (~mask) * weights[name]
            weights[name] = weights[name] - lr * found
    return weights


def assert_weights(model, expected, tolerance=2e-6):
    for name, space in spaces_of(model).items():
        assert torch.allclose(space.current_weight().double(), expected[name], atol=tolerance), name


def kept_in_groups(weight, of):
    return (weight != 0).view(-1, of).sum(1)


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.5])
def test_sr_ste_follows_the_equation_over_several_steps(decay):
    model = masked_net(TrainNM(decay=decay))
    expected = by_hand(model, 6, 0.3, decay)
    other = by_hand(model, 6, 0.3, 0.25)
    run(model, 6, lr=0.3)
    assert_weights(model, expected)
    assert not torch.allclose(expected["first"], other["first"], atol=1e-4)
    for layer in adapter_layers(model):
        layer.merge()
        assert set(kept_in_groups(layer.get_base_layer().weight, 4).tolist()) == {2}


def test_the_worked_gradient_of_sr_ste():
    """w = (.4, -.1, .3, -.2), 2:4, upstream gradient 1 everywhere: (1, 1 - 2e-5, 1, 1 - 4e-5)."""
    model = masked_net(TrainNM(), target_modules=["second"])
    (layer,) = adapter_layers(model)
    with torch.no_grad():
        layer.get_base_layer().weight.copy_(torch.tensor([0.4, -0.1, 0.3, -0.2]).repeat(4, 3))
    found = {}

    def look(step, model):
        (space,) = spaces_of(model).values()
        space.dense_change().grad.fill_(1.0)
        found["parameter"] = space.dense_change()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    optimizer.register_step_post_hook(lambda *_: found.update(before=found["parameter"].grad.clone()))
    run(model, 1, optimizer, at_step=look)
    want = torch.tensor([1, 1 - 2e-5, 1, 1 - 4e-5])
    assert torch.allclose(found["before"][0, :4], want, rtol=0, atol=1e-7)


def test_removed_entries_get_the_dense_gradient_and_the_mask_is_that_of_the_pass():
    model, seen = masked_net(TrainNM(decay=0.0)), []

    def look(step, model):
        weights = {name: space.current_weight().double() for name, space in spaces_of(model).items()}
        masks = {name: top_of_groups(w, 2, 4) for name, w in weights.items()}
        masked = {name: weights[name] * masks[name] for name in LAYERS}
        G = gradients_by_hand(weights, masked, masked, step)
        for name, space in spaces_of(model).items():
            assert torch.allclose(space.dense_change().grad.double(), G[name], atol=1e-6)
        seen.append(masks)

    run(model, 5, lr=1.0, at_step=look)
    assert any(not torch.equal(seen[0][name], seen[-1][name]) for name in LAYERS)


@pytest.mark.parametrize("decay", ["linear", "exponential"])
@pytest.mark.parametrize("removed_gradient", ["scaled", "ste"])
def test_mask_decay_follows_the_equation(decay, removed_gradient):
    flow = MaskDecay(decay, rate=0.2)
    rule = TrainNM(decay=0.0, flow=flow, removed_gradient=removed_gradient, dense=0.2, final=0.3)
    model = masked_net(rule)

    def beta(step):
        if step < 2:
            return 1.0
        if step >= 7:
            return 0.0
        return max(1 - 0.2 * (step - 2), 0.0) if decay == "linear" else 2.718281828459045 ** (-0.2 * (step - 2))

    assert [rule.removed_weight(step, 10) for step in range(10)] == pytest.approx([beta(step) for step in range(10)])
    expected = by_hand(model, 10, 0.2, removed=beta, gradient=beta if removed_gradient == "scaled" else None)
    run(model, 10, lr=0.2)
    assert_weights(model, expected)


def test_beta_has_the_worked_values_and_starts_dense():
    assert MaskDecay("linear", 1e-4).removed_weight(2500, 9) == pytest.approx(0.75)
    assert MaskDecay("exponential", 1e-4).removed_weight(2500, 9) == pytest.approx(0.77880, abs=1e-5)
    assert MaskDecay("linear").removed_weight(0, 9) == MaskDecay().removed_weight(0, 9) == 1
    assert MaskDecay("linear", 1e-4).removed_weight(20_000, 9) == 0
    assert [MaskDecay("linear").removed_weight(step, 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert MaskDecay().removed_weight(7, 7) == pytest.approx(1e-3)
    with pytest.warns(UserWarning, match="still count 0.90 when the final phase begins"):
        run(masked_net(TrainNM(flow=MaskDecay("linear", 0.01))), 10, stop=1)


def test_stages_are_those_of_the_official_code():
    stepwise, geometric = StructureDecay(), StructureDecay("geometric")
    assert stepwise.patterns(1, 16) == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert stepwise.patterns(1, 8) == [(7, 8), (4, 8), (2, 8), (1, 8)]
    assert stepwise.patterns(2, 8) == [(7, 8), (4, 8), (2, 8)]
    assert geometric.patterns(1, 8) == [(8, 64), (4, 32), (2, 16), (1, 8)]
    assert StructureDecay("densify").patterns(1, 8) == [(1, 64), (1, 32), (1, 16), (1, 8)]
    rule = TrainNM(1, 16, decay=0.0, flow=stepwise, dense=0.1, final=0.2)
    found = [rule.pattern(step, 100) for step in range(101)]
    # frame = (100 - 10 - 20) / 5 = 14: stages begin at 10, 24, 38, 52, 66
    assert found[:10] == [None] * 10
    for number, kept in enumerate((15, 8, 4, 2, 1)):
        assert set(found[10 + 14 * number : 24 + 14 * number]) == {(kept, 16)}
    assert set(found[80:]) == {(1, 16)}
    uneven = TrainNM(1, 16, decay=0.0, flow=stepwise)
    starts = [step for step in range(1, 52) if uneven.pattern(step, 52) != uneven.pattern(step - 1, 52)]
    assert starts == [int(number * 52 / 5) for number in range(1, 5)]
    with pytest.raises(ValueError, match="must be a power of 2"):
        TrainNM(3, 8, flow=stepwise)


def test_structure_decay_masks_along_its_stages_and_ends_exactly_n_of_m():
    model, kept = masked_net(TrainNM(1, 4, decay=0.0, flow=StructureDecay(), final=0.25)), []
    run(model, 8, lr=0.2, at_step=lambda step, model: kept.append(spaces_of(model)["first"].count / 96))
    assert kept == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_bdwp_sends_the_input_gradient_through_groups_of_outputs():
    weight = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    assert n_of_m_mask(weight, 1, 2).int().tolist() == [[1, 0], [1, 0]]
    assert OutputGroups()(None, None, weight, None, 1, 2).int().tolist() == [[1, 0], [0, 1]]
    model = masked_net(TrainNM(decay=0.1, input_mask=OutputGroups()))
    expected = by_hand(model, 6, 0.3, 0.1, input_mask=lambda w, mask: top_of_groups(w.t(), 2, 4).t())
    plain = by_hand(model, 6, 0.3, 0.1)
    run(model, 6, lr=0.3)
    assert_weights(model, expected)
    assert not torch.allclose(expected["first"], plain["first"], atol=1e-4)
    assert all(space.layer.masked_lora_input_mask == {} for space in spaces_of(model).values())


def test_bi_masks_order_keeps_most_and_its_mask_lies_within_the_forwards():
    part = PermutedOutputGroups(draws=40)
    model = masked_net(TrainNM(input_mask=part))
    space = spaces_of(model)["first"]
    weight, mask = space.current_weight(), n_of_m_mask(space.current_weight().abs(), 2, 4)
    magnitude = (weight * mask).abs()
    order = part._best_order(magnitude, mask, 2, 4, seed=3)
    found = part._within(magnitude, mask, order, 2, 4)
    assert (found <= mask).all()
    groups = found[order].view(-1, 4, found.shape[1]).sum(1)
    assert int(groups.max()) <= 2
    plain = part._within(magnitude, mask, torch.arange(12), 2, 4)
    assert found.sum() >= plain.sum()
    best = max(
        int(part._within(magnitude, mask, torch.randperm(12, generator=torch.Generator().manual_seed(s)), 2, 4).sum())
        for s in range(10)
    )
    assert int(found.sum()) >= best - 2
    run(model, 3)
    order = {name: space.state() for name, space in spaces_of(model).items()}
    assert order == {name: {} for name in LAYERS}  # dropped when training has ended


@pytest.mark.parametrize(
    "rule",
    [
        TrainNM(decay=0.1),
        TrainNM(decay=0.0, flow=MaskDecay(rate=0.2), removed_gradient="scaled", dense=0.1, final=0.3),
        TrainNM(1, 4, decay=0.0, flow=StructureDecay()),
        TrainNM(input_mask=PermutedOutputGroups(draws=3, every=4)),
    ],
    ids=["sr-ste", "mdgf", "sdgf", "bi-mask"],
)
def test_a_run_that_goes_on_in_the_middle_ends_with_the_same_bits(rule):
    whole = masked_net(rule)
    run(whole, 10, lr=0.2)
    first = masked_net(rule)
    optimizer, state = run(first, 10, lr=0.2, stop=6)
    second = masked_net(rule)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other = torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=0.2)
    other.load_state_dict(optimizer.state_dict())
    run(second, 10, other, state=state)
    ours, theirs = whole.state_dict(), second.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_evaluation_sees_the_binary_mask_of_its_own_weights():
    model = masked_net(TrainNM(decay=0.0, flow=MaskDecay(rate=0.1), final=0.2))
    run(model, 10, lr=0.2, stop=4)
    model.eval()
    by_layers = loss_of(model, 50)
    for space in spaces_of(model).values():
        assert torch.equal(space.layer.kept("default"), n_of_m_mask(space.current_weight().abs(), 2, 4))
    merged = model.merge_and_unload()
    assert torch.allclose(loss_of(merged, 50), by_layers, atol=1e-6)


def test_widths_that_a_stage_does_not_divide_are_refused_by_name():
    model = masked_net(TrainNM(1, 4, decay=0.0, flow=StructureDecay("geometric")))
    with pytest.raises(ValueError, match="groups of 32 do not divide the 8 inputs of 'first'"):
        run(model, 4)
    model = masked_net(TrainNM(4, 8, input_mask=OutputGroups()), target_modules=["first"])
    with pytest.raises(ValueError, match="groups of 8 do not divide the 12 outputs of 'first'"):
        run(model, 4)
