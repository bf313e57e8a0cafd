"""The one inventory: what follows from `tensor_specs`, for the tuners here and for one that declares nothing else."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from safetensors.torch import load_file
from torch import nn

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig
from hf_sparse_peft.hub import check_adapter
from hf_sparse_peft.tuners import FactorMaskConfig, adapter_layers
from hf_sparse_peft.tuners.shared import (
    AdapterConfig,
    AdapterLayer,
    AdapterModel,
    AdditiveLinear,
    LowRank,
    register_tuner,
)
from hf_sparse_peft.utils.checksums import save_checked
from hf_sparse_peft.utils.tensors import TensorSpec

WEIGHTS = "adapter_model.safetensors"


@dataclass
class ScaledConfig(AdapterConfig):
    """Two factors and a sign for each component, which is a number from -1 to 1."""

    tuner: ClassVar[str] = "scaled_test"
    r: int = 2


class ScaledLayer(AdapterLayer):
    prefix = "scaled_test_"
    scaled_test_A: nn.ParameterDict
    scaled_test_B: nn.ParameterDict
    scaled_test_signs: BufferDict

    @classmethod
    def tensor_specs(cls, config, module_name, rows, cols, sizes):
        def check(tensor, key):
            if tensor.abs().max() > 1:
                raise ValueError(f"'{key}' holds {int(tensor.abs().max())}, which is no sign.")

        def ones(generator):
            return torch.ones(config.r)

        return [
            TensorSpec("scaled_test_A", (config.r, cols), space="pair"),
            TensorSpec("scaled_test_B", (rows, config.r), space="pair", axis=1),
            TensorSpec("scaled_test_signs", (config.r,), torch.int8, "saved", "pair", start=ones, check=check),
        ]

    def pieces(self, adapter_name):
        A, B, signs = (self.tensors(adapter_name)[f"scaled_test_{name}"] for name in ("A", "B", "signs"))
        return [LowRank(B * signs.to(B.dtype), A)]


class ScaledLinear(AdditiveLinear, ScaledLayer):
    pass


class ScaledModel(AdapterModel):
    tuner_layer_cls, linear_cls = ScaledLayer, ScaledLinear


register_tuner(ScaledConfig, ScaledModel)


def base():
    return tiny.llama(layers=1).eval()


def adapted(config, seed=1):
    model = get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


TARGETS = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "hybrid": lambda: SparseLoraConfig(r=3, density=0.05, **TARGETS),
    "rows": lambda: SparseLoraConfig(r=0, density=0.1, granularity="row", **TARGETS),
    "gated": lambda: SparseLoraConfig(r=3, density=0.0, gate="zeros", **TARGETS),
    "masked": lambda: SparseLoraConfig(r=2, density=0.0, factor_masks=FactorMaskConfig(), **TARGETS),
    "experts": lambda: SparseLoraConfig(r=2, density=0.1, factor_masks=FactorMaskConfig(kind="stochastic"), **TARGETS),
    "kernel": lambda: KernelLoraConfig(r=2, kernel="mixed", own_counts=True, **TARGETS),
    "scaled": lambda: ScaledConfig(**TARGETS),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


@every_config
def test_layers_hold_what_the_specs_say_in_the_containers_that_peft_knows(name):
    for layer in adapter_layers(adapted(CONFIGS[name]())):
        specs, held = layer.specs("default"), layer.tensors("default")
        assert specs
        assert {one: (tuple(t.shape), t.dtype) for one, t in held.items()} == {
            one: (spec.shape, spec.dtype) for one, spec in specs.items()
        }
        for one, spec in specs.items():
            assert isinstance(held[one], nn.Parameter) == (spec.role == "trained")
            assert one in (layer.adapter_layer_names if spec.role == "trained" else layer.other_param_names)


@every_config
def test_specs_and_sizes_of_a_file_are_those_of_the_layers_it_was_saved_from(name, tmp_path):
    model = adapted(CONFIGS[name]())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert check_adapter(tmp_path).modules
    for layer in adapter_layers(model):
        start = f"base_model.model.{layer.module_name}."
        held = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        held = {one: t for one, t in held.items() if one in layer.saved_names}
        rows, cols, sizes = layer.read_sizes(layer.adapter_configs["default"], layer.module_name, held)
        assert (rows, cols) == (layer.out_features, layer.in_features)
        found = layer.tensor_specs(layer.adapter_configs["default"], layer.module_name, rows, cols, sizes)
        assert {spec.name: (spec.shape, spec.dtype) for spec in found} == {
            one: (spec.shape, spec.dtype) for one, spec in layer.specs("default").items()
        }


@every_config
@pytest.mark.parametrize("damage", ["missing", "surplus", "short", "not finite", "integers"])
def test_every_tensor_of_a_damaged_file_is_refused_by_name_with_and_without_the_base(name, damage, tmp_path):
    adapted(CONFIGS[name]()).save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / WEIGHTS)
    keys = [key for key in tensors if "q_proj" in key]
    prefix = keys[0].rpartition(".")[0]
    layer = next(layer for layer in adapter_layers(adapted(CONFIGS[name]())) if "q_proj" in layer.module_name)
    for kind in layer.specs("default"):
        key, changed = f"{prefix}.{kind}", dict(tensors)
        floats = changed[key].is_floating_point()
        if damage == "missing":
            del changed[key]
        elif damage == "surplus":
            changed[f"{key}_more"] = torch.zeros(1)
        elif damage == "short":
            changed[key] = changed[key][:-1].clone()
        elif damage == "not finite" and floats:
            changed[key] = torch.full_like(changed[key], float("nan"))
        elif damage == "integers" and floats:
            changed[key] = changed[key].long()
        else:
            continue
        place = tmp_path / kind
        shutil.copytree(tmp_path / "whole", place)
        save_checked(changed, place / WEIGHTS, {"format": "pt"})
        pattern = prefix.replace(".", r"\.")
        with pytest.raises(ValueError, match=pattern):
            PeftModel.from_pretrained(base(), place)
        if damage != "short":  # a factor of a smaller weight, as far as the file alone can tell
            with pytest.raises(ValueError, match=pattern):
                check_adapter(place)


def test_own_check_of_a_tensor_is_asked_and_named(tmp_path):
    adapted(ScaledConfig(**TARGETS)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    next(t for key, t in tensors.items() if key.endswith("signs"))[0] = 3
    save_checked(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    for load in (lambda: check_adapter(tmp_path), lambda: PeftModel.from_pretrained(base(), tmp_path)):
        with pytest.raises(ValueError, match=r"scaled_test_signs' holds 3, which is no sign"):
            load()


@every_config
def test_file_gives_the_same_logits_and_deleting_leaves_nothing(name, tmp_path):
    model = adapted(CONFIGS[name]())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded.add_adapter("twin", loaded.peft_config["default"])
    loaded.set_adapter("twin")
    assert torch.equal(logits(loaded), logits(model))
    loaded.delete_adapter("default")
    for layer in adapter_layers(loaded):
        containers = (*layer.adapter_layer_names, *layer.other_param_names)
        assert all("default" not in getattr(layer, one) for one in containers)
    assert torch.equal(logits(loaded), logits(model))


def test_a_copied_model_has_specs_of_its_own():
    model = adapted(ScaledConfig(**TARGETS))
    twin = copy.deepcopy(model)
    for one, other in zip(adapter_layers(model), adapter_layers(twin), strict=True):
        assert list(one.specs("default")) == list(other.specs("default"))
        one.tensors("default")["scaled_test_A"].data.zero_()
        assert other.tensors("default")["scaled_test_A"].any()


def test_resizing_keeps_slices_along_each_tensors_axis_in_the_same_parameters():
    layer = adapter_layers(adapted(ScaledConfig(r=3, **TARGETS)))[0]
    before = {name: t.clone() for name, t in layer.tensors("default").items()}
    parameter = layer.scaled_test_B["default"]
    layer.adapter_configs["default"].r = 2
    layer.resize("default", None, {"pair": torch.tensor([2, 0])})
    after = layer.tensors("default")
    assert after["scaled_test_B"] is parameter
    assert torch.equal(after["scaled_test_A"], before["scaled_test_A"][[2, 0]])
    assert torch.equal(after["scaled_test_B"], before["scaled_test_B"][:, [2, 0]])
    assert torch.equal(after["scaled_test_signs"], before["scaled_test_signs"][[2, 0]])


def test_compacting_ends_training_of_a_tuner_whose_units_do_not_die():
    model = adapted(ScaledConfig(**TARGETS))
    before = logits(model)
    model.base_model.compact()
    assert model.peft_config["default"].training_finished
    assert torch.equal(logits(model), before)
    assert (model.base_model.dead_parameters(), model.base_model.frozen_parameters()) == (0, 0)


def test_a_spec_without_a_container_of_its_role_is_named(monkeypatch):
    def specs(cls, config, module_name, rows, cols, sizes):
        return [TensorSpec("scaled_test_signs", (config.r,))]

    monkeypatch.setattr(ScaledLayer, "tensor_specs", classmethod(specs))
    with pytest.raises(TypeError, match=r"'scaled_test_signs' of role 'trained'.*ParameterDict"):
        get_peft_model(base(), ScaledConfig(**TARGETS))
