"""Light-PEFT: factors at 1 change nothing; what is measured, by hand; quantiles as numpy has them; the second stage."""

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_sparse_peft import SparseLoraConfig, methods
from hf_sparse_peft.pruning import (
    EstimateImportance,
    Importance,
    LightPEFTCallback,
    mask_units,
    slice_model,
    structures_of,
    unit_masks_of,
)
from hf_sparse_peft.pruning.units.unit_masks import components_of
from hf_sparse_peft.pruning.while_training.light_peft import component_scores

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(20).view(2, 10) + 3


def adapted(**options):
    torch.manual_seed(0)
    model = tiny.llama()
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{**LORA, **options}))


def importance(units=None, modules=None, ranks=None):
    structures = structures_of(tiny.llama(num_attention_heads=16, num_key_value_heads=16, hidden=64))
    plain = {s.name: {"heads": torch.rand(16), "channels": torch.rand(128)} for s in structures}
    modules = modules or {"a": 0.3, "b": 0.1, "c": 0.4, "d": 0.2}
    ranks = ranks or {name: torch.rand(4) for name in modules}
    return Importance(structures, units or plain, modules, ranks)


@pytest.mark.parametrize(("ratio", "kept"), [(1 / 3, 10), (0.3333, 11), (0.33, 11), (0.5, 8), (0, 16)])
def test_heads_above_numpys_quantile_stay(ratio, kept):
    """The sheet's numbers: 16 distinct values; at 1/3 the threshold is the sixth value itself."""
    values = torch.randperm(16).float() + 1
    found = importance({f"model.layers.{n}": {"heads": values, "channels": torch.rand(128)} for n in range(2)})
    heads = found.second_stage(heads=ratio).kept.blocks["model.layers.0"].heads
    assert len(heads) == kept
    if ratio:
        wanted = np.flatnonzero(values.double().numpy() > np.quantile(values.double().numpy(), ratio))
        assert heads.tolist() == wanted.tolist()


def test_a_block_of_equal_heads_keeps_one_and_channels_compete_over_the_model():
    same = {"heads": torch.ones(16), "channels": torch.linspace(1, 2, 128)}
    low = {"heads": torch.rand(16), "channels": torch.linspace(0, 0.5, 128)}
    kept = importance({"model.layers.0": same, "model.layers.1": low}).second_stage(channels=0.5).kept.blocks
    assert len(kept["model.layers.0"].heads) == 1
    assert len(kept["model.layers.0"].channels) == 128
    assert kept["model.layers.1"].channels.tolist() == [127]
    by_block = importance({"model.layers.0": same, "model.layers.1": low}).second_stage(
        channels=0.5, channels_by="block"
    )
    assert [len(one.channels) for one in by_block.kept.blocks.values()] == [64, 64]


def test_ranks_compete_in_the_modules_that_stay():
    ranks = {
        "a": torch.tensor([9.0, 8, 1, 1]),
        "b": torch.ones(4) * 99,
        "c": torch.tensor([2.0, 2, 2, 2]),
        "d": torch.ones(4),
    }
    found = importance(modules={"a": 0.3, "b": 0.1, "c": 0.4, "d": 0.2}, ranks=ranks)
    assert found.second_stage(modules=0.5, ranks=0.5).ranks == {"a": 2}
    assert found.second_stage(modules=0.5, ranks=0).ranks == {"a": 4, "c": 4}
    assert importance(modules={"a": 0.0, "b": 0.0}, ranks=ranks).second_stage().ranks == {"a": 2}
    with pytest.raises(ValueError, match="modules=1"):
        found.second_stage(modules=1)


def test_the_second_stage_has_these_ranks_at_the_scaling_that_was_estimated(tmp_path):
    names = {"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 4, "model.layers.1.self_attn.o_proj": 1}
    found = importance(modules=dict.fromkeys(names, 1.0), ranks={n: torch.ones(4) for n in names})
    stage = found.second_stage()
    config = type(stage)(stage.kept, names).config(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny.llama(), config)
    held = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {name: layer.lora_A["default"].weight.shape[0] for name, layer in held.items()} == names
    assert {layer.scaling["default"] for layer in held.values()} == {2.0}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), str(tmp_path))
    assert torch.equal(again.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_factors_at_one_change_no_bit():
    model = adapted(init_lora_weights=False).eval()
    before = model(input_ids=IDS).logits
    masks = mask_units(model, trained=True)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert sum(mask.factors.numel() for mask in masks.masks) == 2 * (2 + 64)


def test_components_are_scored_by_the_means_of_number_times_gradient():
    model = adapted(init_lora_weights=False)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    space = components_of(layer, "up")
    assert component_scores(space).tolist() == [0] * 4
    model(input_ids=IDS, labels=IDS).loss.backward()
    A, B = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    gA, gB = (half["default"].weight.grad.double() for half in (layer.lora_A, layer.lora_B))
    expected = [abs((A[k] * gA[k]).mean()) + abs((B[:, k] * gB[:, k]).mean()) for k in range(4)]
    torch.testing.assert_close(component_scores(space).double(), torch.stack(expected), rtol=1e-4, atol=1e-9)
    for half in (space.A, space.B):
        half.grad.mul_(64)
    torch.testing.assert_close(component_scores(space, 64.0).double(), torch.stack(expected), rtol=1e-4, atol=1e-9)
    space.A.grad[0, 0] = torch.nan
    assert component_scores(space).isfinite().all()


class Padded(tiny.TokenData):
    def __getitem__(self, index):
        found = super().__getitem__(index)
        mask = torch.ones(10, dtype=torch.long)
        mask[: index % 4] = 0
        return {**found, "attention_mask": mask}


def test_a_module_matters_by_what_its_update_adds_to_its_output_over_the_second_half(tmp_path):
    """Against products by hand, on the tokens that the attention mask shows."""
    model, expected = adapted(init_lora_weights=False), {}
    method_masks = mask_units(model, trained=True)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    open_steps, masks = [], []

    def look(name, layer, x):
        if not (open_steps and open_steps[-1]):
            return
        x = x.detach()
        update = layer.get_delta_weight("default").detach()
        base = torch.nn.functional.linear(x, layer.base_layer.weight)
        ratio = torch.nn.functional.linear(x, update).norm(dim=-1) / base.norm(dim=-1)
        expected.setdefault(name, []).append(ratio[masks[-1].bool()].mean().item())

    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, n=name, m=layer: look(n, m, args[0]))
    model.register_forward_pre_hook(lambda _, a, k: masks.append(k["attention_mask"]), with_kwargs=True)
    callback = LightPEFTCallback()
    watch = tiny.At(on_step_begin=lambda step, *_: open_steps.append(step > 2))
    tiny.train(model, tmp_path, 4, callbacks=[callback, watch], data=Padded(32), gradient_accumulation_steps=2)
    found = callback.importance
    assert set(found.modules) == set(layers)
    for name, ratios in expected.items():
        assert len(ratios) == 4
        assert found.modules[name] == pytest.approx(sum(ratios) / 4, rel=1e-4)
    for mask in method_masks.masks:
        assert torch.equal(found.units[mask.block][mask.kind], mask.factors.detach().abs())


def test_factors_train_at_multiples_of_the_rate_and_are_pulled_to_zero(tmp_path):
    """One Adam step moves every number by its learning rate."""
    moved = {}
    for l1 in (1e-4, 1e3):
        model = adapted()
        masks = mask_units(model, trained=True)
        callback = LightPEFTCallback(EstimateImportance(l1=l1))
        options = {"learning_rate": 1e-4, "lr_scheduler_type": "constant"}
        tiny.train(model, tmp_path, 1, callbacks=[callback], data=tiny.TokenData(8), **options)
        moved[l1] = {mask.kind: mask.factors.detach() - 1 for mask in masks.masks}
    for kind, factor in (("heads", 100), ("channels", 50)):
        torch.testing.assert_close(
            moved[1e-4][kind].abs(), torch.full_like(moved[1e-4][kind], factor * 1e-4), rtol=1e-2, atol=0
        )
        assert bool((moved[1e3][kind] < 0).all())
    assert bool((moved[1e-4]["channels"] > 0).any())


def test_an_update_of_zero_matters_nothing_whatever_its_gradient(tmp_path):
    model = adapted()
    mask_units(model, trained=True)
    callback = LightPEFTCallback()
    gradients = []
    look = tiny.At(on_pre_optimizer_step=lambda _, m, o: gradients.extend(
        float(p.grad.norm()) for n, p in m.named_parameters() if "lora_B" in n))  # fmt: skip
    tiny.train(model, tmp_path, 2, callbacks=[callback, look], data=tiny.TokenData(8), learning_rate=0.0)
    assert set(callback.importance.modules.values()) == {0.0}
    assert min(gradients) > 0


def test_both_stages_by_name(tmp_path):
    method = methods.get("light-peft", task_type="CAUSAL_LM")
    base = tiny.llama()
    model = get_peft_model(base, method.config)
    method.prepare(model)
    (callback,) = method.callbacks(model)
    tiny.train(model, tmp_path, 4, callbacks=[callback], data=tiny.TokenData(16))
    stage = callback.importance.second_stage()
    small = slice_model(tiny.llama(), stage.kept)
    second = get_peft_model(small, stage.config(task_type="CAUSAL_LM"))
    tiny.train(second, tmp_path, 2, data=tiny.TokenData(16))
    trained, before = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (second, model))
    assert trained < 0.5 * before
    assert sum(len(one.channels) for one in stage.kept.blocks.values()) == 85  # above a third of 128
    assert not unit_masks_of(small)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda m: m, "has none"),
        (lambda m: (mask_units(m), m)[1], "has none"),
        (lambda m: (m := get_peft_model(tiny.llama(), SparseLoraConfig(r=2, density=0, target_modules="all-linear")),
                    mask_units(m, trained=True))[0], "no plain LoRA"),
    ],
    ids=["no masks", "masks that do not train", "another adapter"],
)  # fmt: skip
def test_what_cannot_be_estimated_is_refused(prepare, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny.train(prepare(adapted()), tmp_path, 2, callbacks=[LightPEFTCallback()], data=tiny.TokenData(8))
    with pytest.raises(ValueError, match="nothing is known"):
        LightPEFTCallback().importance
