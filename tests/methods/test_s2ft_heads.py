"""S2FT's `o` and `v` choose whole heads, as many as the ratio says of those of all layers."""

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import methods
from hf_sparse_peft.tuners import adapter_layers

LAYERS, HEADS, HIDDEN = 4, 4, 32
SIZE = HIDDEN // HEADS


def heads_of(model, ending: str) -> list[set[int]]:
    """Chosen heads of that matrix in every block; fails where one is chosen in part."""
    found = []
    for layer in adapter_layers(model):
        if not layer.module_name.endswith(ending):
            continue
        units = layer.units("default").tolist() if layer.holds("default") else []
        heads = {unit // SIZE for unit in units}
        assert sorted(units) == [head * SIZE + i for head in sorted(heads) for i in range(SIZE)]
        found.append(heads)
    return found


def adapted(groups: int, **options):
    base = tiny.llama(layers=LAYERS, hidden=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=groups)
    return get_peft_model(base, methods.get("s2ft", down=0.0, **options).config)


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_o_and_v_train_whole_heads_in_the_published_number(groups, criterion):
    model = adapted(groups, o=0.3, v=0.25, criterion=criterion)
    outputs, values = heads_of(model, "o_proj"), heads_of(model, "v_proj")
    assert sum(map(len, outputs)) == int(0.3 * HEADS * LAYERS) == 4  # query heads, also where they share keys
    assert sum(map(len, values)) == int(0.25 * groups * LAYERS) == groups
    assert {layer.module_name.rpartition(".")[2] for layer in adapter_layers(model)} == {"o_proj", "v_proj"}


def test_the_largest_heads_are_those_of_the_largest_columns():
    model = adapted(2, o=0.5, criterion="magnitude", scope="block")
    for layer, heads in zip(adapter_layers(model), heads_of(model, "o_proj"), strict=True):
        columns = layer.base_layer.weight.detach().double().abs().sum(0).reshape(HEADS, SIZE).sum(1)
        assert heads == set(columns.topk(2).indices.tolist())


def test_heads_are_drawn_over_all_layers_and_by_seed():
    counts = {tuple(map(len, heads_of(adapted(2, o=0.4, seed=seed), "o_proj"))) for seed in range(6)}
    assert len(counts) > 1
    assert {sum(count) for count in counts} == {6}


def test_a_head_of_o_is_the_part_of_the_input_that_one_attention_head_makes():
    model = adapted(2, o=1 / 16)
    with torch.no_grad():
        for layer in adapter_layers(model):
            if layer.holds("default"):
                layer.sparse_lora_values["default"].normal_()
    changed = [heads for heads in heads_of(model, "o_proj") if heads]
    assert len(changed) == 1
    layer = next(layer for layer in adapter_layers(model) if layer.holds("default"))
    (head,) = changed[0]
    x = torch.randn(5, HIDDEN)
    x[:, head * SIZE : (head + 1) * SIZE] = 0
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))


def test_a_layer_without_a_chosen_head_has_no_units():
    model = adapted(2, o=1 / 16)
    sizes = [layer.units("default").numel() for layer in adapter_layers(model)]
    assert sorted(sizes) == [0, 0, 0, SIZE]
    with pytest.raises(KeyError):
        next(layer for layer in adapter_layers(model)).units("other")
