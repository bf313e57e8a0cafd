"""A growth and a drop criterion that somebody else registers; several readers of one gradient; the order of rules."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from training_toolbox import Hook, StopAt, adapted, all_state, differences, layers_of, make_config, moves_of, run

from hf_sparse_peft import Prune, Regrow, SparseLoraConfig
from hf_sparse_peft.rules import Drop, Growth, UnitSpace
from hf_sparse_peft.rules.gradient_readers import MicroBatchReader
from hf_sparse_peft.rules.space import unit_sums
from hf_sparse_peft.utils.parts import register_part
from hf_sparse_peft.utils.tensors import TensorSpec


class RowSums(MicroBatchReader):
    """Adds up |gradient| of each row."""

    def __init__(self, sums):
        super().__init__()
        self.sums = sums

    def take_whole(self, dense):
        self.sums += dense.float().abs().sum(1)


@register_part("test_row_gradient")
@dataclass(frozen=True)
class RowGradient(Growth):
    """Random entries of the rows with the largest gradient over some steps."""

    steps: int = 3
    rows: int = 4

    needs: ClassVar[frozenset[str]] = frozenset({"entries"})

    @property
    def reads_for(self):
        return self.steps

    def state(self, space):
        return [TensorSpec("row_sums", (space.grid.rows,), role="rule")]

    def reader(self, run, space, starts, ahead):
        sums = space.state()["row_sums"]
        return RowSums(sums.zero_() if starts else sums)

    def grow(self, move):
        grid, sums = move.space.grid, move.space.state()["row_sums"]
        if not sums.any():
            return None
        free = torch.ones(grid.rows, grid.cols, dtype=torch.bool)
        free.view(-1)[move.survivors.long()] = False
        free[sums.argsort(descending=True)[self.rows :]] = False
        units = free.view(-1).nonzero().squeeze(1)
        order = torch.randperm(units.numel(), generator=move.generator("row gradient"))
        return move.completed(units[order[: move.count]].sort().values)


@register_part("test_largest")
@dataclass(frozen=True)
class Largest(Drop):
    """The largest values leave."""

    def importance(self, space: UnitSpace, measured):
        return 1.0 / (1e-6 + unit_sums(space.living_values())[space.trained()])


CONFIG = {"schedule": [Regrow(every=4, drop=Largest(), grow=RowGradient(steps=3), fraction=0.5)], "density": 0.1}


def finish(model, out, **options):
    last = {}

    def look(update, model, optimizer):
        if update == 12:
            last.update(all_state(model, optimizer))

    trainer = run(model, out, 12, after=[Hook(on_step_end=look)], batch=2, accumulation=2, **options)
    return last, trainer


def test_a_growth_of_another_package_trains_saves_and_resumes_to_the_last_bit(tmp_path):
    whole, trainer = finish(adapted(make_config(**CONFIG)), tmp_path / "whole")
    assert [move["step"] for move in moves_of(trainer)] == [4, 8]
    assert all(move["replaced"] > 10 for move in moves_of(trainer))
    assert any("rule_row_sums" in name for name in whole)
    run(adapted(make_config(**CONFIG)), tmp_path / "parts", 12, after=[StopAt(7)], batch=2, accumulation=2)
    folder = tmp_path / "parts" / "checkpoint-7"  # two of three reading steps are done
    resumed, _ = finish(adapted(make_config(**CONFIG)), tmp_path / "parts", resume=str(folder))
    assert differences(whole, resumed) == []
    assert SparseLoraConfig.from_pretrained(folder).schedule == CONFIG["schedule"]


def test_its_units_are_in_the_rows_that_it_read(tmp_path):
    model, rows, old = adapted(make_config(**CONFIG)), {}, {}

    def before(update, model, optimizer):
        if update == 4:
            for layer in layers_of(model):
                rows[layer] = set(layer.rule_state("default")["row_sums"].topk(4).indices.tolist())
                old[layer] = set(layer.units("default").tolist())

    def after(update, model, optimizer):
        if update == 4:
            for layer in layers_of(model):
                entered = set(layer.units("default").tolist()) - old[layer]
                assert entered
                assert {unit // layer.in_features for unit in entered} <= rows[layer]

    run(model, tmp_path, 6, before=[Hook(on_step_end=before)], after=[Hook(on_step_end=after)])
    assert rows


def test_what_a_growth_needs_of_the_config_is_checked():
    with pytest.raises(ValueError, match=r"RowGradient.*granularity='row'"):
        make_config(granularity="row", **CONFIG)
    with pytest.raises(ValueError, match="reads gradients for 5 steps before a move, and every=4"):
        Regrow(every=4, grow=RowGradient(steps=5))


class Dense:
    def __init__(self):
        self.seen = []

    def __call__(self, dense):
        self.seen.append(dense.clone())


class OfUnits(Dense):
    def __init__(self, units):
        super().__init__()
        self.units = units

    def wanted_units(self):
        return self.units

    def take(self, gradient):
        self.seen.append(gradient.clone())


def read_by(model, readers):
    (layer,) = layers_of(model)
    for reader in readers:
        layer.add_gradient_reader("default", reader)
    model.zero_grad()
    ids = torch.arange(18).view(2, 9)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return layer, layer.sparse_lora_values["default"].grad.clone()


@pytest.mark.filterwarnings("ignore:.*asks for")
def test_several_readers_of_one_adapter_each_see_what_they_want_and_leave_alone():
    model = adapted(make_config(target_modules=["q_proj"]))
    dense, few, more = Dense(), OfUnits(torch.tensor([3, 40, 99])), OfUnits(torch.tensor([5, 40]))
    layer, alone = read_by(model, [])
    for readers in ([dense, few, more], [few, more], [few]):
        for reader in (dense, few, more):
            reader.seen = []
        layer, values = read_by(model, readers)
        torch.testing.assert_close(values, alone)
        for reader in readers:
            (seen,) = reader.seen
            if reader is dense:
                whole = seen.flatten()
            else:
                torch.testing.assert_close(seen, whole[reader.units])
        layer.remove_gradient_reader("default", readers[0])
    layer.remove_gradient_reader("default", few)
    layer.remove_gradient_reader("default", more)
    assert not layer.sparse_lora_gradient_readers


def test_a_rule_that_acts_within_anothers_moves_acts_before_it_wherever_it_stands(tmp_path):
    rules = [Prune(final_fraction=0.5, start=0.0, end=0.9), Regrow(every=3, grow="random", fraction=0.5)]
    found = []
    for number, schedule in enumerate((rules, rules[::-1])):
        model = adapted(make_config(schedule=schedule))
        run(model, tmp_path / str(number), 10)
        found.append([layer.units("default").tolist() for layer in layers_of(model)])
    assert found[0] == found[1]
