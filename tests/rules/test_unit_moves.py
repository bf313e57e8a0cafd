"""`move_units`: values, optimizer state and rule state follow their units along any axis, whole or not at all."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_sparse_peft.rules import Follower, UnitSpace, move_units

SIZE, CAPACITY = 9, 5


class Store:
    """A layer with one parameter along axis 0, one along axis 1, and a rule's state."""

    module_name = "store"

    def __init__(self, units):
        generator = torch.Generator().manual_seed(len(units))
        self.units = torch.tensor(sorted(units))
        self.rows = nn.Parameter(torch.randn(CAPACITY, 3, generator=generator))
        self.columns = nn.Parameter(torch.randn(4, CAPACITY, generator=generator))
        self.age = torch.arange(1, CAPACITY + 1)

    def rule_followers(self, adapter, kind):
        return [Follower(self.age)]

    def rule_state(self, adapter):
        return {"age": self.age}


@dataclass(frozen=True)
class Shelf(UnitSpace):
    kind: ClassVar[str] = "shelf"
    fails: bool = False

    size, capacity, unit_numel = SIZE, CAPACITY, 7

    def alive(self):
        return self.layer.units

    def parameters(self):
        return [self.layer.rows, self.layer.columns]

    def parameter_axes(self):
        return [(self.layer.rows, 0), (self.layer.columns, 1)]

    def write(self, units):
        if self.fails and not torch.equal(units, self.layer.units):
            raise KeyboardInterrupt
        self.layer.units = units


def trained(units, kind=torch.optim.AdamW, fails=False):
    store = Store(units)
    optimizer = kind([store.rows, store.columns], lr=0.1)
    for _ in range(3):
        store.rows.grad, store.columns.grad = torch.randn_like(store.rows), torch.randn_like(store.columns)
        optimizer.step()
    return Shelf(store, "default", fails), store, optimizer


def by_unit(store, optimizer):
    """unit -> everything that belongs to it, as plain numbers."""
    found = {}
    for place, unit in enumerate(store.units.tolist()):
        tensors = [store.rows[place], store.columns[:, place], store.age[place : place + 1].float()]
        for parameter, axis in ((store.rows, 0), (store.columns, 1)):
            for state in optimizer.state[parameter].values():
                if torch.is_tensor(state) and state.shape == parameter.shape:
                    tensors.append(state.select(axis, place))
        found[unit] = torch.cat([t.detach().reshape(-1) for t in tensors]).clone()
    return found


subsets = st.sets(st.integers(0, SIZE - 1), min_size=1, max_size=CAPACITY)


@settings(max_examples=40, deadline=None)
@given(subsets, subsets)
def test_what_stays_keeps_every_number_and_what_enters_starts_from_nothing(old, new):
    space, store, optimizer = trained(old)
    before = by_unit(store, optimizer)
    result = move_units(space, torch.tensor(sorted(new)), optimizer)
    assert (result.entered, result.left) == (len(new - old), len(old - new))
    after = by_unit(store, optimizer)
    assert sorted(after) == sorted(new)
    for unit in new:
        expected = before[unit] if unit in old else torch.zeros_like(after[unit])
        assert torch.equal(after[unit], expected)
    empty = len(new)
    assert not store.rows[empty:].any()
    assert not store.columns[:, empty:].any()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.AdamW])
def test_every_optimizer_kind_moves_the_halves_of_its_state_that_follow_units(kind):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    space, store, optimizer = trained({1, 4, 7}, lambda p, lr: kind(p, lr=lr, **options))
    states = {
        (axis, name): state.clone()
        for parameter, axis in ((store.rows, 0), (store.columns, 1))
        for name, state in optimizer.state[parameter].items()
        if torch.is_tensor(state) and state.numel() > 1
    }
    move_units(space, torch.tensor([4, 8]), optimizer)
    moved = 0
    for (axis, name), was in states.items():
        parameter = store.rows if axis == 0 else store.columns
        now = optimizer.state[parameter][name]
        if now.shape[axis] == CAPACITY:
            assert torch.equal(now.select(axis, 0), was.select(axis, 1))  # unit 4: from place 1 to place 0
            assert not now.select(axis, 1).any()  # unit 8 is new
            moved += 1
        else:
            assert torch.equal(now, was)
    assert moved >= 2


def test_a_broken_off_move_leaves_values_and_units_as_they_were():
    space, store, optimizer = trained({0, 2, 5}, fails=True)
    before = (store.rows.detach().clone(), store.columns.detach().clone(), store.age.clone(), store.units.clone())
    with pytest.raises(KeyboardInterrupt):
        move_units(space, torch.tensor([2, 3]), optimizer)
    for was, now in zip(before, (store.rows, store.columns, store.age, store.units), strict=True):
        assert torch.equal(was, now.detach())


def test_restarted_units_keep_their_value_and_lose_their_state():
    space, store, optimizer = trained({1, 4, 7})
    value, column = store.rows[1].detach().clone(), store.columns[:, 1].detach().clone()
    move_units(space, torch.tensor([1, 4, 7]), optimizer, restarted=torch.tensor([4]))
    assert torch.equal(store.rows[1].detach(), value)
    assert torch.equal(store.columns[:, 1].detach(), column)
    for parameter, axis in ((store.rows, 0), (store.columns, 1)):
        assert not optimizer.state[parameter]["exp_avg"].select(axis, 1).any()
        assert optimizer.state[parameter]["exp_avg"].select(axis, 0).any()
