"""peft's status of a model, on wrapped, injected and plain ones."""

import pytest
from peft import get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from torch import nn

from hf_sparse_peft import (
    FactoredConfig,
    KernelLoraConfig,
    MaskedLoraConfig,
    SparseLoraConfig,
    SpectralLoraConfig,
    StructuredConfig,
)

CONFIGS = [
    SparseLoraConfig(r=2, density=0.1, target_modules=["0"]), KernelLoraConfig(r=4, target_modules=["0"]),
    SpectralLoraConfig(r=2, target_modules=["0"]), MaskedLoraConfig(r=2, mask="all", target_modules=["0"]),
    FactoredConfig(keep_base=True, target_modules=["0"]),
    StructuredConfig(form="scale_shift", target_modules=["0"]),
]  # fmt: skip


def model():
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.tuner)
def test_status_of_wrapped_and_of_injected_layers_is_the_same(config):
    wrapped, injected = get_peft_model(model(), config), inject_adapter_in_model(config, model())
    one, other = get_model_status(wrapped), get_model_status(injected)
    assert (one.trainable_params, one.total_params) == (other.trainable_params, other.total_params)
    assert one.num_adapter_layers == other.num_adapter_layers == 1
    assert one.active_adapters == other.active_adapters == ["default"]
    assert [layer.requires_grad for layer in get_layer_status(injected)] == [{"default": True}]


def test_plain_module_has_none_and_peft_says_so():
    for status in (get_layer_status, get_model_status):
        with pytest.raises(ValueError, match="No adapter layers found in the model"):
            status(nn.Linear(2, 2))
