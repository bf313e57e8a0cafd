"""Readers of a layer's dense gradient: one sum a micro-batch however often the layer ran, and nobody owns it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_sparse_peft import AccumulatedGradient, Regrow, SparseLoraConfig, initialize_support
from hf_sparse_peft.rules.choosing_readers import CandidateReader, StepReader
from hf_sparse_peft.training.support_tracker import GradientShare
from hf_sparse_peft.tuners import adapter_layers

SIDE = 8


class Recurrent(nn.Module):
    """One linear layer that runs `uses` times; the last `unused` of its outputs do not reach the loss."""

    def __init__(self, uses: int, unused: int = 0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.uses, self.unused = uses, unused
        self.lin = nn.Linear(SIDE, SIDE)

    def forward(self, x, labels=None):
        y = self.lin(x)
        for _ in range(self.uses - 1):
            y = self.lin(torch.tanh(y))
        for _ in range(self.unused):
            self.lin(y)
        return {"loss": ((y - labels) ** 2).mean()}


class Checkpointed(Recurrent):
    reentrant = False

    def forward(self, x, labels=None):
        y = self.lin(x.requires_grad_())
        for _ in range(self.uses - 1):
            y = torch.utils.checkpoint.checkpoint(
                lambda z: self.lin(torch.tanh(z)), y, use_reentrant=self.reentrant, preserve_rng_state=False
            )
        return {"loss": ((y - labels) ** 2).mean()}


class Reentrant(Checkpointed):
    reentrant = True


def batches(count: int):
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(2, 3, SIDE, generator=generator) for _ in range(count)]
    return [{"x": 2 * pair[0], "labels": pair[1]} for pair in drawn]


def dense_gradient(layer, batch, uses: int) -> torch.Tensor:
    """d loss / dW of one micro-batch, by autograd on a weight of its own in float64."""
    weight = layer.base_layer.weight.detach().double()
    for name in layer.active_adapters:
        weight = weight + layer.get_delta_weight(name).double()
    weight, bias = weight.requires_grad_(), layer.base_layer.bias.detach().double()
    y = batch["x"].detach().double() @ weight.t() + bias
    for _ in range(uses - 1):
        y = torch.tanh(y) @ weight.t() + bias
    ((y - batch["labels"].double()) ** 2).mean().backward()
    return weight.grad


def built(net, granularities=("entry",), **options):
    model = None
    for number, granularity in enumerate(granularities):
        config = SparseLoraConfig(
            r=0, density=0.25, target_modules=["lin"], granularity=granularity, block_size=4, seed=number, **options
        )
        name = "default" if number == 0 else f"other{number}"
        if model is None:
            model = get_peft_model(net, config)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(["default", *[f"other{n}" for n in range(1, len(granularities))]])
    model.train()
    (layer,) = adapter_layers(model)
    with torch.no_grad():
        for name in layer.active_adapters:
            layer.sparse_lora_values[name].normal_(std=0.1)
    return model, layer, [layer.unit_spaces(name)[0] for name in layer.active_adapters]


def run_step(model, layer, readers, data):
    for name, reader in readers.items():
        layer.add_gradient_reader(name, reader)
    for batch in data:
        model(**{key: value.clone() for key, value in batch.items()})["loss"].backward()
        for reader in readers.values():
            reader.finish_micro_batch()
    for name, reader in readers.items():
        layer.remove_gradient_reader(name, reader)


NETS = {
    "once": (lambda: Recurrent(1), 1),
    "twice": (lambda: Recurrent(2), 2),
    "three-times": (lambda: Recurrent(3), 3),
    "an-unused-run": (lambda: Recurrent(2, unused=1), 2),
    "checkpointed": (lambda: Checkpointed(2), 2),
    "reentrant": (lambda: Reentrant(2), 2),
}


@pytest.mark.parametrize("factor", [None, 2.0], ids=["exact-sum", "followed-candidates"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("net", NETS)
def test_rigl_ranks_by_the_sum_over_the_uses_of_a_layer(net, micro_batches, factor):
    make, uses = NETS[net]
    model, layer, (part,) = built(make())
    data = batches(micro_batches)
    each = [dense_gradient(layer, batch, uses) for batch in data]
    reading = StepReader(part, 4, micro_batches, factor)
    run_step(model, layer, {"default": reading}, data)
    reading.finish_step()
    total = sum(each).flatten()
    ranked = (total if factor is None else each[0].flatten()).abs()
    ranked[part.alive().long()] = -1
    best = ranked.topk(4 if factor is None else 8).indices
    assert set(reading.units.tolist()) == set(part.alive().tolist()) | set(best.tolist())
    torch.testing.assert_close(reading.gradients.double(), total[reading.units.long()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_spiel_chooses_from_the_first_micro_batch_as_a_sum_and_sums_whole_steps(net):
    make, uses = NETS[net]
    model, layer, (part,) = built(make(), schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))])
    data = batches(4)
    each = [dense_gradient(layer, batch, uses).flatten() for batch in data]
    for first, pair in ((True, data[:2]), (False, data[2:])):
        collector = CandidateReader(part, starts=first)
        run_step(model, layer, {"default": collector}, pair)
        collector.finish_step()
    best = each[0].abs().topk(part.count).indices.sort().values
    assert collector.units.tolist() == best.tolist()
    steps = [each[0] + each[1], each[2] + each[3]]
    torch.testing.assert_close(collector.sums[0].double(), (steps[0] + steps[1])[best], rtol=1e-4, atol=1e-6)
    squares = (steps[0].square() + steps[1].square())[best]
    torch.testing.assert_close(collector.sums[1].double(), squares, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("granularities", [("entry", "entry"), ("block", "entry"), ("row", "column"), ("row", "row")])
@pytest.mark.parametrize("factors", [(None, None), (2.0, 2.0), (None, 2.0)])
def test_two_adapters_read_one_gradient_and_neither_changes_what_the_other_or_training_sees(granularities, factors):
    model, layer, parts = built(Recurrent(2), granularities)
    data = batches(2)
    each = [dense_gradient(layer, batch, 2) for batch in data]
    readings = {part.adapter: StepReader(part, 1, 2, factor) for part, factor in zip(parts, factors, strict=True)}
    run_step(model, layer, readings, data)
    for part in parts:
        reading, grid = readings[part.adapter], layer.sparse_lora_grid[part.adapter]
        reading.finish_step()
        total = grid.gather(sum(each), reading.units)
        torch.testing.assert_close(reading.gradients.double(), total, rtol=1e-4, atol=1e-6)
        own = grid.gather(sum(each), part.alive())
        torch.testing.assert_close(part.values.grad.double(), own, rtol=1e-4, atol=1e-6)


def test_a_reader_on_one_adapter_reads_its_own_units_beside_an_adapter_of_another_kind():
    model, layer, parts = built(Recurrent(1), ("block", "entry"))
    data = batches(2)
    total = sum(dense_gradient(layer, batch, 1) for batch in data)
    reading = StepReader(parts[0], 1, 2, 1.0)
    run_step(model, layer, {"default": reading}, data)
    reading.finish_step()
    expected = layer.sparse_lora_grid["default"].gather(total, reading.units)
    torch.testing.assert_close(reading.gradients.double(), expected, rtol=1e-4, atol=1e-6)


class Sometimes(Recurrent):
    """The layer runs where the first input is positive."""

    def __init__(self) -> None:
        super().__init__(2)
        self.other = nn.Linear(SIDE, SIDE)

    def forward(self, x, labels=None):
        reached = x[0, 0] > 0
        return super().forward(x, labels) if reached else {"loss": self.other(x.requires_grad_()).square().mean()}


@pytest.mark.parametrize("reader", ["rigl", "rigl-candidates", "spiel"])
@pytest.mark.parametrize("reached", [(False, True), (True, False)])
def test_a_micro_batch_that_does_not_reach_the_layer_adds_nothing(reader, reached):
    model, layer, (part,) = built(Sometimes(), schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))])
    data = batches(2)
    for batch, runs in zip(data, reached, strict=True):
        batch["x"][0, 0] = 1.0 if runs else -1.0
    expected = dense_gradient(layer, data[reached.index(True)], 2).flatten()
    reading = {
        "rigl": lambda: StepReader(part, 4, 2, None),
        "rigl-candidates": lambda: StepReader(part, 4, 2, 1.0),
        "spiel": lambda: CandidateReader(part, starts=True),
    }[reader]()
    run_step(model, layer, {"default": reading}, data)
    if reader == "spiel":
        reading.finish_step()
        units, found = reading.units, reading.sums[0]
        assert set(units.tolist()) == set(expected.abs().topk(units.numel()).indices.tolist())
    else:
        reading.finish_step()
        units, found = reading.units, reading.gradients
    torch.testing.assert_close(found.double(), expected[units.long()], rtol=1e-4, atol=1e-6)


def test_a_reader_that_ruins_what_it_was_lent_does_not_reach_the_gradient_of_the_values():
    model, layer, (part,) = built(Recurrent(1))
    (batch,) = batches(1)
    expected = dense_gradient(layer, batch, 1).flatten()[part.alive().long()]
    layer.add_gradient_reader("default", lambda dense: dense.zero_())
    model(**batch)["loss"].backward()
    torch.testing.assert_close(part.values.grad.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("uses", [1, 2])
def test_the_gradient_share_is_that_of_the_sum_over_uses(uses):
    model, layer, (part,) = built(Recurrent(uses))
    data = batches(2)
    each = [dense_gradient(layer, batch, uses) for batch in data]
    spaces = [space for space in layer.unit_spaces("default") if space.kind == "support"]
    layer.passive_gradient_reader = share = GradientShare(spaces)
    for batch in data:
        model(**batch)["loss"].backward()
        share.finish_micro_batch()
    expected = sum(g.square().sum() for g in each), sum(g.flatten()[part.alive().long()].square().sum() for g in each)
    assert share.squares() == pytest.approx([float(one) for one in expected], rel=1e-4)


@pytest.mark.parametrize("uses", [1, 2])
def test_fisher_squares_the_sum_over_the_uses_of_a_layer(uses):
    config = SparseLoraConfig(r=0, density=0.2, target_modules=["lin"], criterion="fisher")
    model = get_peft_model(Recurrent(uses), config)
    (layer,) = adapter_layers(model)
    (batch,) = batches(1)
    examples = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    fisher = sum(dense_gradient(layer, one, uses).square() for one in examples).flatten()
    initialize_support(model, [batch], show_progress=False)
    units = layer.units("default").long()
    assert set(units.tolist()) == set(fisher.topk(units.numel()).indices.tolist())
