"""Adapters of which single entries of B are trained, on every kind of base, in files, beside others, through runs that
stop and go on."""

import functools
import json
import tempfile
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from spectral_forms import TARGETS, deltas, fill, logits
from test_spectral_files import KEY, tampered
from transformers import LlamaForSequenceClassification

from hf_sparse_peft import Controller, callbacks_for, hub, methods
from hf_sparse_peft.sparsity import UnitGrid, encode_support
from hf_sparse_peft.tuners.spectral_lora import spectral_layers


@functools.cache
def first_run(kind: str = "fp32", seed: int = 0) -> Path:
    """Folder of an adapter of the first kind as after training; in it the last q_proj is far below all others."""
    targets = ["c_attn", "c_proj"] if kind == "conv1d" else TARGETS
    method = methods.get("lori", r=3, lora_alpha=6, target_modules=targets, seed=seed, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.base("conv1d" if kind == "conv1d" else "fp32"), method.config)
    fill(model, seed=seed)
    for layer in spectral_layers(model):
        if layer.module_name == "model.layers.1.self_attn.q_proj":
            layer.spectral_lora_B["default"].data.mul_(1e-3)
    folder = Path(tempfile.mkdtemp(prefix="first-run-"))
    model.save_pretrained(folder)
    return folder


EMPTY = "model.layers.1.self_attn.q_proj"
"""The module that the mask leaves without an entry."""


def config_of(kind: str = "fp32", seed: int = 0, **options):
    return methods.get("lori", mask_from=first_run(kind, seed), sparsity=0.7, **options).config


def masked(kind: str = "fp32", name: str = "default", base=None, seed: int = 0, **options):
    """A fresh base with a filled adapter, in evaluation mode."""
    model = get_peft_model(tiny.base(kind) if base is None else base, config_of(kind, seed, **options), name)
    fill(model, name, seed=30)
    return model.eval()


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "conv1d"])
def test_layers_answer_with_base_plus_update_merge_and_come_back_to_the_bit(kind):
    model = masked(kind)
    found, dtype = deltas(model), torch.bfloat16 if kind == "bf16" else torch.float32
    for layer in spectral_layers(model)[:4]:
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = layer.base_layer(x).double() + x.double() @ found[layer.module_name].double().t()
        tolerance = 5e-2 if kind == "bf16" else 1e-4
        torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
        assert layer(x).dtype == layer.base_layer(x).dtype
    if kind != "conv1d":
        assert [name for name, delta in found.items() if not delta.any()] == [EMPTY]
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # re-rounding to 4 bits
        model.merge_adapter()
    assert not torch.equal(logits(model), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_named_adapter_loads_to_the_same_bits_under_another_name_and_leaves_as_a_lora(low_memory, tmp_path):
    model = masked(name="mine")
    model.save_pretrained(tmp_path)
    options = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert "mask_from" not in options["bases"]
    assert sum(options["bases"]["entries"].values()) == model.get_nb_trainable_parameters()[0]
    assert options["bases"]["entries"][EMPTY] == 0
    loaded = PeftModel.from_pretrained(
        tiny.base(), tmp_path / "mine", adapter_name="theirs", low_cpu_mem_usage=low_memory
    )
    assert torch.equal(logits(loaded), logits(model))
    assert hub.check_adapter(tmp_path / "mine").parameters == model.get_nb_trainable_parameters()[0]
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("mine", "again/theirs"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    done = hub.export_lora(model, tmp_path / "lora", adapter_name="mine")
    assert set(done.errors.values()) == {0.0}
    plain = PeftModel.from_pretrained(tiny.base(), tmp_path / "lora")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


def test_two_active_adapters_add_up_and_one_leaves_without_a_trace():
    model = masked()
    alone = logits(model)
    model.add_adapter("other", config_of(seed=5))
    fill(model, "other", seed=50)
    assert torch.equal(logits(model), alone)
    model.base_model.set_adapter(["default", "other"])
    first, second = deltas(model), deltas(model, "other")
    for layer in spectral_layers(model):
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
        update = (first[layer.module_name] + second[layer.module_name]).double()
        expected = layer.base_layer(x).double() + x.double() @ update.t()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), alone)
    assert not any("other" in key for key in model.state_dict())
    assert all(
        "other" not in held
        for layer in spectral_layers(model)
        for held in vars(layer).values()
        if isinstance(held, dict)
    )


def test_a_copy_has_the_mask_and_values_written_into_it_take_their_mask_along():
    model = masked()
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that it is a copy
        model.add_adapter("twin", model.peft_config["default"])
    model.set_adapter("twin")
    assert torch.equal(logits(model), before)
    fill(model, "twin", seed=70)
    assert not torch.equal(logits(model), before)


def test_a_config_without_its_weights_trains_and_saves_nothing(tmp_path):
    model = get_peft_model(tiny.base(), masked().peft_config["default"])
    assert torch.equal(logits(model), logits(tiny.base()))
    for act in (
        lambda: tiny.train(model, tmp_path, 1, callbacks=callbacks_for(model)),
        lambda: model.train()(input_ids=torch.ones(1, 4, dtype=torch.long)),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"has the sizes of a mask of B, and no mask.*is_trainable=True"):
            act()


@pytest.mark.parametrize(
    ("tensors", "bases", "message"),
    [
        ({"B_values": None}, {}, r"spectral_lora_B_values' is missing"),
        ({"B_values": torch.zeros(3)}, {}, r"B_values' in .* has shape \(3,\)"),
        ({"B_entries": None}, {}, r"spectral_lora_B_entries' is missing"),
        ({"B_entries": torch.zeros(30, dtype=torch.uint8)}, {}, r"B_entries' in .* has shape \(30,\)"),
        ({"B_entries": "flipped"}, {}, "does not match its checksum"),
        ({"B_entries": "blank"}, {}, "was not yet written"),
        ({}, {"more": "model.layers.7.self_attn.q_proj"}, "The file is incomplete"),
        ({}, {"entries": {}}, r"has no place in the layer|spectral_lora_B_values"),
    ],
)
def test_a_file_that_lies_is_refused_by_name(tensors, bases, message, tmp_path):
    masked().save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    own = json.loads((tmp_path / "adapter_config.json").read_text())["bases"]
    codes = held[KEY + "B_entries"]
    changed = {"flipped": torch.cat([codes[:-1], codes[-1:] ^ 1]), "blank": torch.zeros_like(codes)}
    tensors = {KEY + name: changed[one] if isinstance(one, str) else one for name, one in tensors.items()}
    if "more" in bases:
        bases = {"entries": {**own["entries"], bases["more"]: 4}}
    tampered(tmp_path, tensors, {"bases": {**own, **bases}})
    base = tiny.base()
    keys, before = list(base.state_dict()), logits(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == keys
    assert torch.equal(logits(base), before)


def test_heads_are_saved_with_it(tmp_path):
    def base():
        return tiny.llama(LlamaForSequenceClassification, num_labels=3)

    model = masked(base=base(), task_type="SEQ_CLS", modules_to_save=["score"])
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))


def test_gradients_of_a_layer_that_runs_twice_are_the_sum_of_its_uses():
    layer = spectral_layers(masked())[0]
    xs = [torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(at)) for at in range(2)]
    sums = []
    for uses in ((xs[0],), (xs[1],), xs):
        layer.zero_grad()
        sum((layer(x) ** 2).sum() for x in uses).backward()
        sums.append(layer.spectral_lora_B_values["default"].grad.clone())
    torch.testing.assert_close(sums[0] + sums[1], sums[2], rtol=1e-4, atol=1e-5)


# Training


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "spectral_lora_" in name}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(kind, tmp_path):
    def run(resume=None, **options):
        model = get_peft_model(tiny.base(kind), config_of())
        options = {"gradient_accumulation_steps": 2, "weight_decay": 0.1, **options}
        tiny.train(model, tmp_path, 8, callbacks=callbacks_for(model), resume=resume, **options)
        return model

    whole = run(save_strategy="steps", save_steps=4)
    resumed = run(str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(tensor, state(resumed)[name]) for name, tensor in state(whole).items())
    fresh = state(get_peft_model(tiny.base(kind), config_of()))
    values = [name for name in fresh if "B_values" in name]
    assert values
    assert all(state(whole)[name].ne(0).all() for name in values)
    assert all(torch.equal(state(whole)[name], fresh[name]) for name in fresh if name not in values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(tiny.base(kind), tmp_path / "checkpoint-4", is_trainable=True)
    again = again.train()
    tiny.train(
        again, tmp_path, 8, callbacks=callbacks_for(again), resume=str(tmp_path / "checkpoint-4"),
        gradient_accumulation_steps=2, weight_decay=0.1,
    )  # fmt: skip
    assert all(torch.equal(tensor, state(again)[name]) for name, tensor in state(whole).items())


def test_a_loop_with_the_controller_trains_it_and_a_second_run_goes_on(tmp_path):
    model = get_peft_model(tiny.base(), config_of()).train()
    ids = tiny.TokenData(4).ids
    losses = []
    for _ in range(2):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        with Controller(model, optimizer, 6) as rules:
            for _ in range(6):
                rules.before_step()
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                rules.after_step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert losses[6] < losses[0]
    assert losses[-1] < losses[6]


def test_a_compiled_layer_answers_as_an_eager_one_before_and_after_another_mask_is_loaded():
    layer, other = (spectral_layers(masked())[0] for _ in range(2))
    places = other.places("default").long().add(1).remainder(other.out_features * 3).sort().values
    codes = encode_support(places, UnitGrid(other.out_features, 3, "entry"), places.numel())
    other.spectral_lora_B_entries["default"].copy_(codes)
    compiled, x = torch.compile(layer, backend="eager"), torch.randn(4, layer.in_features)
    before = layer(x)
    torch.testing.assert_close(compiled(x), before)
    layer.load_state_dict(other.state_dict())
    assert not torch.allclose(layer(x), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(layer(x), other(x))
    torch.testing.assert_close(compiled(x), other(x))
