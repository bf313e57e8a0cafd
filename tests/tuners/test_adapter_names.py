"""A name that breaks saving or loading half-way is refused at the start, on every path, and nothing is touched."""

import pytest
import tiny
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig

BAD = ["v1.0", ".", " ", " x", "a/b", "a\\b", "x\n", "__base__", "base_layer", "values", "mlp", "0", "weight"]


def config(cls=SparseLoraConfig):
    return cls(r=2, target_modules=["q_proj"])


def state(model):
    return {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_untouched(model, before):
    after = state(model)
    assert list(after) == list(before)
    assert all(after[name][0].equal(tensor) and after[name][1] == flag for name, (tensor, flag) in before.items())


@pytest.mark.parametrize("name", [*BAD, "sparse_lora_A"])
def test_bad_name_is_refused_on_every_path_and_nothing_is_touched(tmp_path, name):
    get_peft_model(tiny.llama(layers=1), config()).save_pretrained(tmp_path)
    paths = {
        "get_peft_model": lambda base: get_peft_model(base, config(), adapter_name=name),
        "from_pretrained": lambda base: PeftModel.from_pretrained(base, tmp_path, adapter_name=name),
        "transformers add_adapter": lambda base: base.add_adapter(config(), name),
        "transformers load_adapter": lambda base: base.load_adapter(str(tmp_path), name),
        "inject_adapter_in_model": lambda base: inject_adapter_in_model(config(), base, name),
    }
    for refused in paths.values():
        base = tiny.llama(layers=1)
        before = state(base)
        with pytest.raises(ValueError, match="adapter_name="):
            refused(base)
        assert_untouched(base, before)
        assert not hasattr(base, "peft_config")
        base.add_adapter(config())  # a second try with a good name works
    model = get_peft_model(tiny.llama(layers=1), config())
    model.add_adapter("other", config())
    before = state(model)
    for refused in (
        lambda: model.add_adapter(name, config()),
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.add_weighted_adapter(["default", "other"], [1.0, 1.0], name, "linear"),
    ):
        with pytest.raises(ValueError, match="adapter_name="):
            refused()
        assert list(model.peft_config) == ["default", "other"]
        assert_untouched(model, before)


@pytest.mark.parametrize("name", ["v1_0", "my-adapter", "mit Leerzeichen", "lora", "A", "größer"])
def test_good_names_are_saved_and_loaded(tmp_path, name):
    model = get_peft_model(tiny.llama(layers=1), config(), adapter_name=name)
    model.save_pretrained(tmp_path)
    place = tmp_path / name
    loaded = PeftModel.from_pretrained(tiny.llama(layers=1), place, adapter_name=name)
    mine, theirs = state(model), state(loaded)
    assert all(theirs[key][0].equal(tensor) for key, (tensor, _) in mine.items())


def test_kernel_adapters_refuse_their_own_prefix():
    with pytest.raises(ValueError, match="adapter_name='kernel_lora_x'"):
        get_peft_model(tiny.llama(layers=1), config(KernelLoraConfig), adapter_name="kernel_lora_x")
