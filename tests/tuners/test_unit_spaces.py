"""What telemetry, cards and summaries read of unit spaces, whichever the tuner."""

import kernel_toolbox
import pytest
import tiny
import torch
from peft import get_peft_model
from tuner_toolbox import CASES, dense_sparse_half, fill, make_config

from hf_sparse_peft.tuners import adapter_layers

ADAPTERS = {case: {} for case in CASES} | {
    "gated": {"gate": "zeros"},
    "kernel": {},
    "kernel-dense": {"sparsity": 0.0},
    "kernel-competing": {"own_counts": True, "sparsity": 0.3},
}


@pytest.fixture(params=ADAPTERS)
def layers(request):
    name, options = request.param, ADAPTERS[request.param]
    if name.startswith("kernel"):
        return adapter_layers(kernel_toolbox.adapted(tiny.base(hidden=64), **options))
    model = get_peft_model(tiny.base(hidden=64), make_config(name if name in CASES else "hybrid-entry", **options))
    fill(model)
    return adapter_layers(model)


def spaces_of(layer):
    return [space for space in layer.unit_spaces("default") if space.kind != "module"]


def test_counts_are_those_of_the_living_units_which_are_sorted_and_distinct(layers):
    for space in (space for layer in layers for space in spaces_of(layer)):
        alive = space.alive().tolist()
        assert alive == sorted(set(alive))
        assert space.count == len(alive) <= space.capacity <= space.size
        assert not alive or 0 <= alive[0] <= alive[-1] < space.size
        assert space.unit
        assert space.version() == space.version()


def test_units_that_are_parts_of_the_weight_cover_it_and_gather_what_lies_there(layers):
    for layer in layers:
        shape = (layer.out_features, layer.in_features)
        dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for space in spaces_of(layer):
            if not space.unit_entries:
                with pytest.raises(ValueError, match=f"'{space.kind}' are no parts of the weight of '{space.name}'"):
                    space.gather(dense)
                continue
            assert space.size * space.unit_entries == dense.numel()
            if space.kind == "support":
                support = dense_sparse_half(layer, "default", torch.ones_like(space.values).double()) != 0
            else:
                support = kernel_toolbox.reference_of(layer) != 0
            assert int(support.sum()) == space.count * space.unit_entries
            found = space.gather(dense)
            assert found.numel() == int(support.sum())
            assert torch.equal(found.reshape(-1).sort().values, dense[support].sort().values)


def test_a_moved_support_has_another_version():
    model = get_peft_model(tiny.base(hidden=64), make_config("sparse-row"))
    space = next(space for space in adapter_layers(model)[0].unit_spaces("default") if space.kind == "support")
    before = space.version()
    space.write(space.alive()[:-1])
    assert space.version() != before


def test_a_kernel_is_told_how_many_entries_survive():
    model = kernel_toolbox.adapted(tiny.base(hidden=64), own_counts=True, sparsity=0.3)
    layer = adapter_layers(model)[0]
    (space,) = spaces_of(layer)
    space.write(torch.arange(50))
    assert space.count == 50
    assert int((layer.get_delta_weight("default") != 0).sum()) == 50
    assert space.alive().tolist() == kernel_toolbox.reference_of(layer).reshape(-1).nonzero().squeeze(1).tolist()
