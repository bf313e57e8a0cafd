"""`UpdateMask`: what rules hold still keeps every bit of value and state, in any loop, and is free again afterwards."""

import pytest
import torch
from torch import nn

from hf_sparse_peft.rules import UpdateMask


def made(weight_decay=0.1):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    parameters = [layer.weight for layer in model]
    return model, parameters, torch.optim.AdamW(parameters, lr=0.1, weight_decay=weight_decay)


def step(model, optimizer, closure=False):
    optimizer.zero_grad()
    x = torch.randn(5, 4)
    sum(layer(x).square().sum() for layer in model).backward() if any(
        p.requires_grad for layer in model for p in layer.parameters()
    ) else None
    optimizer.step()


def test_a_held_parameter_does_not_move_and_a_released_one_goes_on():
    model, (first, second), optimizer = made()
    mask = UpdateMask()
    mask.attach(optimizer)
    step(model, optimizer)
    mask.hold("rule", [first])
    was, state = first.detach().clone(), optimizer.state[first]["exp_avg"].clone()
    other = second.detach().clone()
    step(model, optimizer)
    assert torch.equal(first.detach(), was)
    assert torch.equal(optimizer.state[first]["exp_avg"], state)
    assert not torch.equal(second.detach(), other)
    mask.hold("rule", [])
    step(model, optimizer)
    assert not torch.equal(first.detach(), was)


def test_what_two_rules_hold_is_combined():
    _, (first, second), _ = made()
    mask = UpdateMask()
    mask.hold("a", [first])
    mask.hold("b", [first, second])
    mask.hold("a", [])
    assert not first.requires_grad
    mask.hold("b", [])
    assert first.requires_grad
    assert second.requires_grad


def test_what_the_user_froze_stays_frozen():
    _, (first, second), _ = made()
    first.requires_grad_(False)
    mask = UpdateMask()
    mask.hold("rule", [first, second])
    assert mask.release() == [second]
    assert not first.requires_grad
    assert second.requires_grad


@pytest.mark.parametrize("slices", [True, False], ids=["slices", "numbers"])
def test_parts_of_a_parameter_keep_value_and_state_under_momentum_and_decay(slices):
    model, (first, _), optimizer = made()
    mask = UpdateMask()
    mask.attach(optimizer)
    step(model, optimizer)
    held = torch.tensor([1, 0, 1], dtype=torch.uint8) if slices else torch.rand(3, 4) < 0.5
    at = held.bool().view(-1, 1).expand(3, 4) if slices else held
    mask.hold_part("rule", [(first, lambda: held)])
    was = first.detach().clone()
    states = {name: s.clone() for name, s in optimizer.state[first].items() if s.shape == first.shape}
    step(model, optimizer)
    assert torch.equal(first.detach()[at], was[at])
    assert not (first.detach()[~at] == was[~at]).any()
    for name, state in states.items():
        assert torch.equal(optimizer.state[first][name][at], state[at])
        assert not torch.equal(optimizer.state[first][name][~at], state[~at])


@pytest.mark.parametrize("slices", [True, False], ids=["slices", "numbers"])
def test_a_scaled_update_is_the_one_of_another_learning_rate_and_one_changes_no_bit(slices):
    factor = torch.tensor([1.0, 0.25, 0.0])
    model, (first, second), optimizer = made()
    twin, (other, _), twin_optimizer = made()
    mask = UpdateMask()
    mask.attach(optimizer)
    mask.scale_part(
        "rule", [(first, lambda: factor if slices else factor[:, None].expand(3, 4)), (second, lambda: None)]
    )
    for _ in range(3):
        before = first.detach().clone()
        other.data.copy_(before)
        for pair in ((model, optimizer), (twin, twin_optimizer)):
            torch.manual_seed(1)
            step(*pair)
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[2], before[2])
        torch.testing.assert_close(first[1].double(), before[1].double() + (other[1].double() - before[1].double()) / 4)
        for name, state in optimizer.state[first].items():
            assert torch.equal(state, twin_optimizer.state[other][name])
    held = torch.tensor([0, 1, 0], dtype=torch.uint8)
    mask.hold_part("another", [(first, lambda: held)])
    before = first.detach().clone()
    step(model, optimizer)
    assert torch.equal(first[1:], before[1:])
    mask.release()
    step(model, optimizer)
    assert not (first.detach() == before).any()


def test_the_gradient_of_a_held_part_is_zero_before_clipping_sees_it():
    model, (first, _), _ = made()
    mask = UpdateMask()
    mask.hold_part("rule", [(first, lambda: torch.tensor([1, 0, 0], dtype=torch.uint8))])
    model[0](torch.randn(5, 4)).square().sum().backward()
    assert not first.grad[0].any()
    assert first.grad[1:].all()


def test_a_step_that_is_never_taken_changes_nothing_and_release_ends_all_hooks():
    model, (first, _), optimizer = made()
    mask = UpdateMask()
    mask.attach(optimizer)
    mask.hold_part("rule", [(first, lambda: torch.ones(3, dtype=torch.uint8))])
    model[0](torch.randn(5, 4)).square().sum().backward()  # and a scaler skips the step
    mask.release()
    was = first.detach().clone()
    step(model, optimizer)
    assert not (first.detach() == was).any()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_an_exception_inside_a_step_is_made_good_by_release():
    model, (first, _), optimizer = made()
    mask = UpdateMask()
    mask.attach(optimizer)
    step(model, optimizer)
    held = torch.tensor([1, 0, 0], dtype=torch.uint8)
    mask.hold_part("rule", [(first, lambda: held)])
    was = first.detach().clone()

    def broken(*_):
        first.data.add_(1.0)
        raise KeyboardInterrupt

    optimizer.register_step_pre_hook(broken)
    model[0](torch.randn(5, 4)).square().sum().backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    mask.release()
    assert torch.equal(first.detach()[0], was[0])


def test_a_mask_that_changes_in_place_is_read_anew():
    model, (first, _), optimizer = made()
    mask = UpdateMask()
    mask.attach(optimizer)
    step(model, optimizer)
    held = torch.tensor([1, 0, 0], dtype=torch.uint8)
    mask.hold_part("rule", [(first, lambda: held)])
    step(model, optimizer)
    held.copy_(torch.tensor([0, 1, 0], dtype=torch.uint8))
    was = first.detach().clone()
    step(model, optimizer)
    assert torch.equal(first.detach()[1], was[1])
    assert not (first.detach()[0] == was[0]).any()


def test_eight_bit_state_is_refused_where_it_would_have_to_be_put_back():
    model, (first, _), optimizer = made()
    mask = UpdateMask()
    mask.attach(optimizer)
    step(model, optimizer)
    optimizer.state[first]["exp_avg"] = torch.zeros(3, 4, dtype=torch.uint8)
    mask.hold_part("rule", [(first, lambda: torch.ones(3, dtype=torch.uint8))])
    model[0](torch.randn(5, 4)).square().sum().backward()
    with pytest.raises(ValueError, match="8-bit state"):
        optimizer.step()
