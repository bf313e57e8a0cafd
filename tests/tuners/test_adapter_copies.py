"""Copies of an adapter inside one model are that adapter: supports, masks and heads come along."""

import copy
import warnings

import pytest
import tiny
import torch
from peft import get_peft_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaForSequenceClassification

from hf_sparse_peft import Allocate, AverageRank, KernelLoraConfig, SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers

pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'twin' was added with the config object")

IDS = torch.arange(1, 9).view(2, 4)
GATED = {"r": 4, "schedule": [Allocate(budget=AverageRank(2))]}
CONFIGS = {
    "entry": lambda: SparseLoraConfig(r=0, density=0.1, target_modules="all-linear"),
    "row": lambda: SparseLoraConfig(r=0, density=0.2, granularity="row", target_modules="all-linear"),
    "block": lambda: SparseLoraConfig(r=0, density=0.2, granularity="block", block_size=4, target_modules="all-linear"),
    "gated": lambda: SparseLoraConfig(density=0.1, target_modules="all-linear", **GATED),
    "kernel": lambda: KernelLoraConfig(r=4, target_modules="all-linear", schedule=[tiny.kernel_allocation()]),
}


def fill(model, adapter="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model):
            for kind in layer.adapter_layer_names:
                if adapter in (held := getattr(layer, kind)):
                    held[adapter].copy_(torch.randn(held[adapter].shape, generator=generator))


def move(model, adapter="default", seed=0):
    """Another support, rank mask or count of survivors, as a schedule writes them."""
    for number, layer in enumerate(adapter_layers(model)):
        generator = torch.Generator().manual_seed(100 * seed + number)
        if hasattr(layer, "sparse_lora_values"):
            if adapter in layer.sparse_lora_values:
                count = len(layer.sparse_lora_values[adapter])
                units = torch.randperm(layer.sparse_lora_grid[adapter].num_units, generator=generator)[:count]
                layer.write_support(adapter, units.sort().values)
            if adapter in layer.sparse_lora_rank_mask:
                layer.sparse_lora_rank_mask[adapter][(number + seed) % 4] = 0
        else:
            layer.write_survivors(adapter, 40 + 10 * seed + number)


def copy_by_name(model, source="default", target="twin", share=1.0):
    """What code that knows parameters only does: named_parameters, the name replaced."""
    by_name = dict(model.named_parameters())
    for name, parameter in by_name.items():
        if name.endswith(f".{source}"):
            twin = by_name[name.removesuffix(source) + target]
            twin.data.mul_(1 - share).add_(parameter.data, alpha=share)


def output(model, adapter):
    model.set_adapter(adapter)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]()
    config.target_modules = {"q_proj", "down_proj"}
    model = get_peft_model(tiny.llama(layers=1), config)
    fill(model)
    move(model, seed=1)
    return model


def test_an_adapter_added_with_anothers_own_config_is_its_copy_from_then_on_independent(model):
    model.add_adapter("twin", model.peft_config["default"])
    policy, base = output(model, "default"), base_output(model)
    assert torch.equal(output(model, "twin"), policy)
    assert not torch.allclose(policy, base)
    fill(model, seed=9)
    move(model, seed=2)
    assert torch.equal(output(model, "twin"), policy)
    assert not torch.allclose(output(model, "default"), policy)


def base_output(model):
    with model.disable_adapter(), torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_copy_of_the_config_gives_a_fresh_adapter(model):
    model.add_adapter("twin", copy.deepcopy(model.peft_config["default"]))
    for layer in adapter_layers(model):
        if "twin" in getattr(layer, "sparse_lora_values", {}):
            assert not layer.sparse_lora_values["twin"].any()
            assert layer.units("twin").tolist() != layer.units("default").tolist()


@pytest.mark.parametrize("own_config", [True, False], ids=["copy", "equal config"])
def test_values_copied_by_name_after_a_move_take_supports_and_masks_along(model, own_config):
    config = model.peft_config["default"]
    model.add_adapter("twin", config if own_config else copy.deepcopy(config))
    fill(model, seed=3)
    move(model, seed=2)
    policy = output(model, "default")
    copy_by_name(model)
    assert torch.equal(output(model, "twin"), policy)
    assert torch.equal(output(model, "default"), policy)
    copy_by_name(model, share=0.5)  # the mean of two equal adapters
    assert torch.equal(output(model, "twin"), policy)


def test_an_average_by_name_over_supports_that_went_apart_is_refused(model):
    model.add_adapter("twin", model.peft_config["default"])
    output(model, "twin")
    output(model, "default")
    fill(model, seed=3)
    copy_by_name(model, share=0.5)
    averaged = output(model, "twin")  # on one support: an average like any other
    output(model, "default")
    move(model, seed=2)
    assert torch.equal(output(model, "twin"), averaged)
    output(model, "default")
    fill(model, seed=4)
    copy_by_name(model, share=0.5)
    with pytest.raises(ValueError, match=r"'twin'.*'default'.*add_weighted_adapter"):
        model.set_adapter("twin")


def test_an_average_in_an_adapter_of_another_support_is_told_once(model):
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("twin", config)
    move(model, "twin", seed=3)
    copy_by_name(model, share=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("twin", "default", "twin"):
            model.set_adapter(name)
    said = [str(w.message) for w in caught if "written while it was inactive" in str(w.message)]
    assert len(said) == 1
    assert "'default'" in said[0]


@pytest.mark.filterwarnings("ignore:Parameters of adapter 'twin' were written")
def test_values_that_a_user_writes_into_an_inactive_adapter_are_his(model):
    model.add_adapter("twin", copy.deepcopy(model.peft_config["default"]))
    before = [layer.state_dict() for layer in adapter_layers(model)]
    before = [{k: v.clone() for k, v in state.items() if k.endswith("support.twin")} for state in before]
    fill(model, "twin", seed=7)
    output(model, "twin")
    for layer, state in zip(adapter_layers(model), before, strict=True):
        assert all(torch.equal(layer.state_dict()[k], v) for k, v in state.items())


def test_heads_are_copied_too():
    config = SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"], task_type="SEQ_CLS")
    base = tiny.llama(LlamaForSequenceClassification, layers=1, num_labels=3)
    model = get_peft_model(base, config)
    fill(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter.normal_()
    policy = output(model, "default")
    model.add_adapter("twin", model.peft_config["default"])
    assert torch.equal(output(model, "twin"), policy)


def averaged(model, moves, use_buffers=False, decay=0.5):
    """An exponential average of `model` over three updates, its support moved before the second and third."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
    values = []
    for step in range(3):
        fill(model, seed=step)
        if moves and step:
            move(model, seed=step)
        values.append([layer.get_delta_weight("default").double() for layer in adapter_layers(model)])
        average.update_parameters(model)
    return average, values


def test_an_average_by_torch_on_a_support_that_stays_is_the_average():
    config = SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj"])
    average, values = averaged(get_peft_model(tiny.llama(layers=1), config), moves=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = adapter_layers(average)[0].get_delta_weight("default")
    expected = 0.5 * (0.5 * values[0][0] + 0.5 * values[1][0]) + 0.5 * values[2][0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_average_by_torch_over_supports_that_moved_is_told_once():
    config = SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj", "o_proj"])
    model = get_peft_model(tiny.llama(layers=1), config)
    output(model, "default")
    average, _ = averaged(model, moves=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            average.module.eval()(input_ids=IDS)
    assert len([w for w in caught if "was overwritten from outside" in str(w.message)]) == 1


def test_averaged_support_codes_are_refused():
    config = SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj"])
    average, _ = averaged(get_peft_model(tiny.llama(layers=1), config), moves=False, use_buffers=True, decay=0.9)
    with pytest.raises(ValueError, match="sparse_lora_support"):
        average.module(input_ids=IDS)


@pytest.mark.filterwarnings("ignore:The values of adapter")
def test_a_cast_of_the_whole_model_is_no_overwriting(model):
    """trl's GRPO casts the model for its generation, between a step and the reference's forward."""
    model.add_adapter("twin", model.peft_config["default"])
    output(model, "twin")
    output(model, "default")
    fill(model, seed=3)
    move(model, seed=2)
    twin = [layer.get_delta_weight("twin") for layer in adapter_layers(model)]
    model.to(torch.bfloat16)
    output(model, "twin")
    output(model, "default")
    model.train()
    output(model, "twin")
    assert all(
        torch.equal(layer.get_delta_weight("twin"), delta)
        for layer, delta in zip(adapter_layers(model), twin, strict=True)
    )
