"""DSEE whole: an update of low rank + entries, a base that is pruned by it, training on, and leaving with the zeros."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_sparse_peft import methods, save_masks, trainer_options
from hf_sparse_peft.pruning import (
    apply_masks,
    kept_by_update,
    mask_units,
    prune_globally,
    slice_model,
    unit_masks_of,
)
from hf_sparse_peft.sparsity import unpack_bits

QV = ["q_proj", "v_proj"]


def dsee(base, **options):
    """A `dsee` adapter that learnt something."""
    method = methods.get("dsee", num_sparse=16, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, method.config)
    return learnt(model)


def learnt(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.normal_(std=0.3, generator=generator)
    return model


def update64(layer, r=4, alpha=32):
    """(alpha / r) (U V + S2) from the tensors, float64."""
    U, V = layer.sparse_lora_B["default"].detach().double(), layer.sparse_lora_A["default"].detach().double()
    S2 = torch.zeros(layer.out_features * layer.in_features, dtype=torch.float64)
    space = next(s for s in layer.unit_spaces("default") if s.kind == "support")
    S2[space.alive().long()] = layer.sparse_lora_values["default"].detach().double().flatten()
    return alpha / r * (U @ V + S2.view(layer.out_features, layer.in_features))


def modules(model, names=QV):
    base = model.get_base_model()
    return {n: m for n, m in base.named_modules() if n.rpartition(".")[2] in names}


# The criterion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["update", "sum"])
def test_the_base_loses_the_smallest_of_the_update_of_all_matrices_together(by):
    model = dsee(tiny.llama())
    layers = modules(model)
    old = {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}
    judged = {n: (update64(m) + (old[n].double() if by == "sum" else 0)).abs() for n, m in layers.items()}
    flat = torch.cat([one.flatten() for one in judged.values()])
    count = round(0.2 * flat.numel())
    cut = flat.sort().values[count - 1]
    prune_globally(model, 0.2, by=by, target_modules=QV)
    lost = {}
    for name, layer in layers.items():
        gone = judged[name] <= cut
        assert torch.equal(layer.base_layer.weight, old[name].masked_fill(gone, 0)), name
        lost[name] = int(gone.sum())
        by_size = old[name].abs() <= old[name].abs().flatten().sort().values[lost[name] - 1]
        assert not torch.equal(by_size, gone)  # the base's own magnitudes choose others
    assert sum(lost.values()) == count
    assert len(set(lost.values())) > 1


@pytest.mark.parametrize("kind", ["lora", "dsee"])
def test_a_weight_that_is_stored_transposed_is_judged_the_right_way_round(kind):
    config = LoraConfig(r=2, target_modules=["attn.c_attn"], fan_in_fan_out=True)
    base = tiny.gpt2(layers=1)
    model = learnt(get_peft_model(base, config)) if kind == "lora" else dsee(base, target_modules=["attn.c_attn"])
    layer = modules(model, ["c_attn"])["transformer.h.0.attn.c_attn"]
    if kind == "lora":
        judged = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    else:
        judged = update64(layer)
    cut = judged.abs().flatten().sort().values[round(0.3 * judged.numel()) - 1]
    prune_globally(model, 0.3, by="update", target_modules=["attn.c_attn"])
    assert torch.equal(layer.base_layer.weight.t() == 0, judged.abs() <= cut)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_a_head_is_scored_by_the_update_of_its_rows_of_query_and_value(base):
    """Two query heads read a key and value head: 4 heads of 8 rows are 2 units."""
    model = dsee(tiny.base(base) if base == "nf4" else tiny.llama(hidden=64, num_key_value_heads=4))
    layers, groups = modules(model), 2 if base == "nf4" else 4
    kept = kept_by_update(model, 0.5)
    for name, block in kept.blocks.items():
        query, value = (update64(layers[f"{name}.self_attn.{one}"]).abs() for one in QV)
        rows, own = len(query) // groups, len(value) // groups
        scores = [float(query[u * rows : (u + 1) * rows].sum() + value[u * own : (u + 1) * own].sum())
                  for u in range(groups)]  # fmt: skip
        assert block.heads.tolist() == sorted(sorted(range(groups), key=scores.__getitem__)[groups // 2 :])
    assert len({tuple(block.heads.tolist()) for block in kept.blocks.values()}) > 1 or groups == 2


def test_channels_are_scored_where_they_are_adapted():
    model = dsee(tiny.llama(layers=1), target_modules=["up_proj", "down_proj"])
    layers = modules(model, ["up_proj", "down_proj"])
    scores = update64(layers["model.layers.0.mlp.up_proj"]).abs().sum(1)
    scores += update64(layers["model.layers.0.mlp.down_proj"]).abs().sum(0)
    kept = kept_by_update(model, 0.25, kinds=["channels"])
    assert kept.blocks["model.layers.0"].channels.tolist() == scores.argsort()[16:].sort().values.tolist()


# The three stages ----------------------------------------------------------------------------------------------------


def test_zeros_stay_while_it_trains_on_and_masks_take_out_what_a_merge_fills_in(tmp_path):
    model = get_peft_model(tiny.llama(), methods.get("dsee", num_sparse=16, task_type="CAUSAL_LM").config)
    callbacks = trainer_options(model, tiny.arguments(tmp_path, 2))["callbacks"]
    tiny.train(model, tmp_path, 2, callbacks=callbacks)
    own = prune_globally(model, 0.2, by="update", target_modules=QV)
    others = prune_globally(model, 0.3, exclude_modules=QV)
    removed = own.masks | others.masks
    before = {name: m.base_layer.weight.clone() for name, m in modules(model).items()}
    first = {name: update64(layer) for name, layer in modules(model).items()}
    tiny.train(model, tmp_path, 2, callbacks=callbacks)
    for name, layer in modules(model).items():
        assert torch.equal(layer.base_layer.weight, before[name])
        assert not torch.equal(update64(layer), first[name])
    dense = {name: before[name].double() + update64(layer) for name, layer in modules(model).items()}
    merged = model.merge_and_unload()
    filled = merged.model.layers[0].self_attn.q_proj.weight
    assert int((filled == 0).sum()) < own.zeros["model.layers.0.self_attn.q_proj"]
    save_masks(removed, tmp_path / "masks.safetensors")
    changes = apply_masks(merged, tmp_path / "masks.safetensors")
    for name, bits in removed.items():
        weight = merged.get_submodule(name).weight
        gone = unpack_bits(bits, weight.numel()).view(weight.shape)
        assert not weight[gone].any()
        assert int((weight == 0).sum()) == int(gone.sum())
        if name in dense:
            torch.testing.assert_close(weight.double(), dense[name].masked_fill(gone, 0), atol=1e-6, rtol=1e-5)
            assert changes[name] == pytest.approx(float(dense[name][gone].norm() / dense[name].norm()), rel=1e-4)
    assert {name for name, change in changes.items() if change} == dense.keys()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(1, 13).view(2, 6)).logits


def test_masked_heads_train_on_and_are_cut_from_the_merged_model(tmp_path):
    model = dsee(tiny.llama(num_key_value_heads=4))
    kept = kept_by_update(model, 0.25)
    mask_units(model, kept)
    attention = modules(model)["model.layers.0.self_attn.v_proj"]
    gone = kept.blocks["model.layers.0"].removed("heads").tolist()
    lines = torch.cat([torch.arange(8 * head, 8 * head + 8) for head in gone])
    before = attention.sparse_lora_B["default"].detach().clone()
    tiny.train(model, tmp_path, 2, callbacks=trainer_options(model, tiny.arguments(tmp_path, 2))["callbacks"])
    moved = (attention.sparse_lora_B["default"] != before).any(1)
    assert not moved[lines].any()
    assert moved.any()
    channels = next(mask for mask in unit_masks_of(model).masks if mask.kind == "channels")
    assert bool((channels.factors == 1).all())  # nothing was said about them
    expected = logits(model)
    small = slice_model(model.merge_and_unload())
    assert small.model.layers[0].self_attn.q_proj.weight.shape == (24, 32)
    torch.testing.assert_close(logits(small), expected, atol=1e-5, rtol=1e-4)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_an_update_that_says_nothing_is_refused_and_the_base_stays():
    model = get_peft_model(tiny.llama(), methods.get("dsee", num_sparse=16).config)
    before = [p.detach().clone() for p in model.parameters()]
    for act in (lambda: prune_globally(model, 0.2, by="update", target_modules=QV), lambda: kept_by_update(model, 0.5)):
        with pytest.raises(ValueError, match=r"update of '.*q_proj' is 0.*Train the adapter first"):
            act()
    learnt(model).get_base_model().model.layers[1].self_attn.v_proj.sparse_lora_B["default"].data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj' is not finite"):
        prune_globally(model, 0.2, by="sum", target_modules=QV)
    frozen = [(p, old) for p, old in zip(model.parameters(), before, strict=True) if not p.requires_grad]
    assert frozen
    assert all(torch.equal(p, old) for p, old in frozen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.2}, "takes none of 2 heads. Raise it to 0.5"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"by": "base"}, "by='base'.*prune_model"),
        ({"kinds": ["rows"]}, "kinds="),
        ({"kinds": ["channels"]}, "has an adapter"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kept_by_update(dsee(tiny.llama()), **{"sparsity": 0.5, **options})


def test_masks_of_another_model_are_refused_and_nothing_is_written():
    model = tiny.llama()
    report = prune_globally(tiny.llama(), 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    first = next(iter(report.masks))
    for masks, error, message in (
        (report.masks | {"model.layers.7.mlp.up_proj": report.masks[first]}, ValueError, "lacks one of .*layers.7"),
        (report.masks | {first: report.masks[first][:-1]}, ValueError, "entries, which takes"),
        ([report.masks[first]], TypeError, "removed is a list"),
    ):
        with pytest.raises(error, match=message):
            apply_masks(model, masks)
    with pytest.raises(ValueError, match="has adapters"):
        apply_masks(dsee(tiny.llama()), report.masks)
    with pytest.raises(ValueError, match="is quantised"):
        apply_masks(tiny.base("nf4"), report.masks)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
