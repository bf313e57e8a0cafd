"""State dicts with the names that torch.compile, DDP and FSDP give: the whole adapter is saved, or nothing."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from hf_sparse_peft import Global, KernelLoraConfig, Numbers, SparseLoraConfig
from hf_sparse_peft.tuners.shared.wrapped_names import plain_name

IDS = torch.arange(1, 11)[None]
PREFIXES = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod.", "_orig_mod.module.")


def base():
    return tiny.llama(LlamaForSequenceClassification, layers=1, num_labels=3)


def adapted(kind="sparse", model=None):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["score"]}
    config = KernelLoraConfig(r=4, **options) if kind == "kernel" else SparseLoraConfig(r=2, density=0.1, **options)
    model = get_peft_model(base() if model is None else model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["sparse", "kernel"])
def test_a_prefixed_state_dict_is_saved_as_the_plain_one(kind, prefix, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path / "plain")
    # Other numbers than the model's, so that saving the model's own would be seen.
    given = {f"{prefix}{k}": v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    before = dict(given)
    model.save_pretrained(tmp_path / "prefixed", state_dict=given)
    assert given.keys() == before.keys()  # the user's dict is not renamed
    expected = {k: v * 2 if v.is_floating_point() else v for k, v in saved(tmp_path / "plain").items()}
    assert same(saved(tmp_path / "prefixed"), expected)
    assert any("score" in key for key in expected)


def test_names_of_wrappers_inside_the_model_are_left_out(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "plain")
    inner = {k.replace(".layers.0.", ".layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."): v
             for k, v in model.state_dict().items()}  # fmt: skip
    model.save_pretrained(tmp_path / "inner", state_dict=inner)
    assert same(saved(tmp_path / "inner"), saved(tmp_path / "plain"))


@pytest.mark.parametrize("where", ["whole", "base", "layer"])
def test_a_compiled_model_is_saved_and_loaded_under_plain_names(where, tmp_path):
    plain = adapted()
    plain.save_pretrained(tmp_path / "plain")
    model = base()
    if where == "base":
        model = torch.compile(model)
    if where == "layer":
        model.model.layers[0] = torch.compile(model.model.layers[0])
    model = adapted(model=model)
    with torch.no_grad():
        for (name, to), (_, value) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
            assert plain_name(name) in plain.state_dict()
            to.copy_(value)
    (torch.compile(model) if where == "whole" else model).save_pretrained(tmp_path / "compiled")
    assert same(saved(tmp_path / "compiled"), saved(tmp_path / "plain"))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "compiled").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    found = get_peft_model_state_dict(torch.compile(plain))
    assert same(found, {key: found[key] for key in saved(tmp_path / "plain")})


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (lambda model: {}, "sparse_lora"),
        (lambda model: model.get_base_model().state_dict(), "sparse_lora"),
        (lambda model: dict(model.named_parameters()), "sparse_lora_support"),  # supports are buffers
        (lambda model: {k: v for k, v in model.state_dict().items() if "score" not in k}, "score"),
    ],
)
def test_a_state_dict_without_all_of_the_adapter_is_refused_and_writes_nothing(state, named, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=named):
        model.save_pretrained(tmp_path, state_dict=state(model))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@torch._dynamo.config.patch(disable=True)  # the wrapping is what matters, and compiling is slow
def test_a_trainer_with_torch_compile_saves_the_adapter_it_trained(tmp_path):
    config = SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"])
    model = get_peft_model(tiny.llama(layers=1), config)
    trainer = tiny.train(
        model, tmp_path, 2, torch_compile=True, torch_compile_backend="eager", save_strategy="steps", save_steps=1
    )
    trainer.save_model(tmp_path / "end")
    expected = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "sparse_lora_" in k}
    for folder in ("end", "checkpoint-2"):
        assert same(saved(tmp_path / folder), expected)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    model.save_pretrained(tmp_path / "gathered", state_dict=state)
    assert same(saved(tmp_path / "gathered"), expected)


def test_sizes_in_the_config_of_a_compiled_base_are_under_plain_names(tmp_path):
    options = {"budget": Global(Numbers(300)), "criterion": "magnitude"}
    config = SparseLoraConfig(r=0, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(torch.compile(base()), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert sum(tiny.units_of_sizes(loaded.peft_config["default"]).values()) == 300
    pairs = zip(loaded.named_parameters(), model.named_parameters(), strict=True)
    assert all(plain_name(b) == a and torch.equal(one, two) for (a, one), (b, two) in pairs)
