"""One config object serves several models and adapters: what follows from a model goes into the adapter's copy."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from hf_sparse_peft import (
    Global,
    KernelLoraConfig,
    Numbers,
    Prune,
    Regrow,
    SparseLoraConfig,
    StructureConfig,
    callbacks_for,
    initialize_support,
)

NAMES = {"task_type": "CAUSAL_LM"}
CONFIGS = {
    "global-magnitude": lambda: SparseLoraConfig(
        r=0, budget=Global(0.05), target_modules="all-linear", criterion="magnitude", **NAMES
    ),
    "retired-room": lambda: SparseLoraConfig(
        r=0, density=0.05, target_modules=["q_proj"], schedule=[Regrow(retired=0.5)], **NAMES
    ),
    "numbers": lambda: SparseLoraConfig(r=2, budget=Numbers(400), target_modules=["q_proj", "v_proj"], **NAMES),
    "structures": lambda: SparseLoraConfig(
        r=0, density=0, structures=[StructureConfig(modules=["down_proj"], density=0.2)], target_modules=["down_proj"],
        criterion="magnitude", granularity="row", **NAMES
    ),
    "default-targets": lambda: SparseLoraConfig(r=2, density=0.05, **NAMES),
    "kernel": lambda: KernelLoraConfig(r=4, target_modules="all-linear", **NAMES),
}  # fmt: skip


def fields(config) -> dict:
    # peft notes the base's name in the user's object, as it does with LoraConfig.
    return {k: copy.deepcopy(v) for k, v in vars(config).items() if k not in ("base_model_name_or_path", "revision")}


def shapes(model) -> dict:
    return {n: p.shape for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("name", CONFIGS)
def test_injection_leaves_the_users_config_as_it_was_and_every_model_gets_its_own_sizes(name):
    config, fresh = CONFIGS[name](), CONFIGS[name]()
    before = fields(config)
    first = get_peft_model(tiny.llama(layers=1), config)
    second = get_peft_model(tiny.llama(layers=2, hidden=48), config)
    assert fields(config) == before
    torch.manual_seed(0)
    assert shapes(second) == shapes(get_peft_model(tiny.llama(layers=2, hidden=48), fresh))
    assert first.peft_config["default"] is not second.peft_config["default"]


def test_one_config_serves_two_adapters_of_one_model_which_are_grouped_apart():
    config = CONFIGS["global-magnitude"]()
    model = get_peft_model(tiny.llama(layers=1), config)
    model.add_adapter("other", config)
    assert model.peft_config["default"] is not model.peft_config["other"]
    assert tiny.units_of_sizes(model.peft_config["default"]) == tiny.units_of_sizes(model.peft_config["other"])


def test_the_copy_is_what_layers_hold_and_files_say(tmp_path):
    config = CONFIGS["global-magnitude"]()
    model = get_peft_model(tiny.llama(layers=1), config)
    written = model.peft_config["default"]
    layers = [m for m in model.modules() if hasattr(m, "adapter_configs")]
    assert layers
    assert all(layer.adapter_configs["default"] is written for layer in layers)
    assert tiny.units_of_sizes(written)
    model.save_pretrained(tmp_path)
    assert tiny.units_of_sizes(SparseLoraConfig.from_pretrained(tmp_path)) == tiny.units_of_sizes(written)
    loaded = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path)
    assert shapes(loaded) == shapes(model)


@pytest.mark.parametrize("door", ["inject_adapter_in_model", "add_adapter"])
def test_other_doors_copy_the_config_too(door):
    config = CONFIGS["global-magnitude"]()
    before = fields(config)
    for layers in (1, 2):
        model = tiny.llama(layers=layers)
        if door == "add_adapter":
            model.add_adapter(config)
        else:
            model = inject_adapter_in_model(config, model)
        assert tiny.units_of_sizes(model.peft_config["default"])
        assert len(tiny.units_of_sizes(model.peft_config["default"])) == 7 * layers
    assert fields(config) == before


def test_a_support_that_data_chose_is_written_to_the_copy_only():
    config = SparseLoraConfig(r=0, budget=Global(0.05), target_modules=["q_proj"], criterion="fisher")
    before = fields(config)
    model = get_peft_model(tiny.llama(layers=1), config)
    ids = torch.arange(1, 9)[None]
    initialize_support(model, [{"input_ids": ids, "labels": ids}], criterion="gradient", show_progress=False)
    assert model.peft_config["default"].criterion.part_type == "gradient"
    assert fields(config) == before


def test_a_finished_run_leaves_the_config_ready_for_the_next_model(tmp_path):
    config = SparseLoraConfig(
        r=0, density=0.1, target_modules=["q_proj"], schedule=[Prune(every=1, final_fraction=0.5)], **NAMES
    )
    ends = []
    for layers in (1, 2):
        model = get_peft_model(tiny.llama(layers=layers), config)
        tiny.train(model, tmp_path, 4, callbacks=callbacks_for(config))
        ends.append([layer.units("default").numel() for layer in model.modules() if hasattr(layer, "units")])
        assert model.peft_config["default"].training_finished
    assert ends == [[51], [51, 51]]
    assert not config.training_finished
