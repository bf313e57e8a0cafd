"""Options that choose what is adapted and what else trains."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from tuner_toolbox import (
    CASES,
    base_bits,
    dense_delta,
    fill,
    logits,
    make_config,
    same_bits,
    tiny_llama,
    token_ids,
    trained,
)

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers


def names(model):
    return {layer.module_name for layer in adapter_layers(model)}


def step(model, lr=1e-2):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()


@tiny.crossed(base=["fp32", "bf16", "nf4"], case=CASES)
def test_modules_to_save_train_save_and_load(base_of, tmp_path, base, case):
    model = get_peft_model(base_of(base), make_config(case, base, modules_to_save=["lm_head"]))
    fill(model)
    before = model.base_model.model.lm_head.weight.clone()
    step(model, lr=1.0)
    head = model.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    assert torch.equal(head.original_module.weight, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(base), tmp_path)), logits(model))


@pytest.mark.parametrize("bias", ["none", "all", "sparse_lora_only"])
@pytest.mark.parametrize("case", ["sparse-entry", "hybrid-column"])
@pytest.mark.parametrize("kind", ["llama", "conv1d"])
def test_biases_train_and_are_saved_as_asked(base_of, tmp_path, kind, case, bias):
    def fresh():
        return base_of("conv1d") if kind == "conv1d" else tiny_llama(attention_bias=True)

    targets = ["c_attn"] if kind == "conv1d" else ["q_proj"]
    model = get_peft_model(fresh(), make_config(case, kind, bias=bias, target_modules=targets))
    fill(model)
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    adapted = {name for name in biases if targets[0] in name}
    training = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")}
    assert training == {"none": set(), "all": biases, "sparse_lora_only": adapted}[bias]
    before = {name: p.clone() for name, p in model.named_parameters() if name in biases}
    step(model, lr=1.0)
    changed = {name for name, p in model.named_parameters() if name in biases and not torch.equal(p, before[name])}
    assert (changed == set()) == (bias == "none")
    assert changed <= training
    assert adapted <= changed or bias == "none"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), tmp_path)), logits(model))


@pytest.mark.parametrize("base", ["fp32", "nf4", "int8", "conv1d"])
def test_dropout_touches_the_low_rank_half_in_training_only(base_of, base):
    model = get_peft_model(base_of(base), make_config("hybrid-entry", base, lora_dropout=0.5))
    fill(model)
    reference = get_peft_model(base_of(base), make_config("hybrid-entry", base))
    fill(reference)
    assert torch.equal(logits(model), logits(reference))
    layer = adapter_layers(model)[0].train()
    x = torch.randn(400, layer.in_features)
    base_and_sparse = x @ layer.dense_base_weight().float().t()
    layer.sparse_lora_values["default"].data.zero_()
    layer.sparse_lora_B["default"].data.zero_()
    first = layer(x)
    torch.testing.assert_close(layer(x), first)  # nothing random where the low-rank half is zero
    fill(model)
    torch.manual_seed(0)
    one, two = layer(x), layer(x)
    assert not torch.equal(one, two)
    mean = torch.stack([layer(x) for _ in range(200)]).mean(0)
    if base != "int8":
        expected = base_and_sparse + x @ dense_delta(layer, "default").float().t()
        if layer.get_base_layer().bias is not None:
            expected = expected + layer.get_base_layer().bias
        error = (mean - expected).norm() / (one - expected).norm()
        assert error < 0.15  # the mean of 200 draws: 1 / sqrt(200) = 0.07


def test_dropout_gradients_belong_to_the_dropped_input(base_of):
    model = get_peft_model(base_of(), make_config("hybrid-entry", lora_dropout=0.5))
    fill(model)
    layer = adapter_layers(model)[0].train()
    x = torch.randn(6, layer.in_features)
    torch.manual_seed(3)
    layer(x).sum().backward()
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    ones = torch.ones(6, layer.out_features)
    expected = layer.sparse_lora_scaling["default"] * (ones @ layer.sparse_lora_B["default"]).t() @ dropped
    torch.testing.assert_close(layer.sparse_lora_A["default"].grad, expected, rtol=1e-4, atol=1e-5)
    assert layer.sparse_lora_values["default"].grad is not None


def test_rank_and_alpha_patterns_and_rslora_set_rank_and_scaling(base_of):
    config = make_config(
        rank_pattern={"q_proj": 6, r"layers\.1\.mlp\.down_proj": 0}, alpha_pattern={"v_proj": 5}, lora_alpha=12
    )
    model = get_peft_model(base_of(), config)
    for layer in adapter_layers(model):
        rank = layer.sizes["default"].rank
        if "q_proj" in layer.module_name:
            assert (rank, layer.sparse_lora_scaling["default"]) == (6, 2)
        elif "v_proj" in layer.module_name:
            assert (rank, layer.sparse_lora_scaling["default"]) == (4, 1.25)
        else:
            assert rank == (0 if "layers.1" in layer.module_name else 4)
            assert ("default" in layer.sparse_lora_A) == (rank > 0)
    rooted = get_peft_model(base_of(), make_config(use_rslora=True, lora_alpha=12, rank_pattern={"q_proj": 9}))
    assert {layer.sparse_lora_scaling["default"] for layer in adapter_layers(rooted)} == {6.0, 4.0}


def test_a_pattern_may_give_ranks_to_some_modules_alone(base_of, tmp_path):
    model = get_peft_model(base_of(), make_config(r=0, density=0.0, rank_pattern={"q_proj": 3}))
    fill(model)
    assert {bool(layer.holds("default")) for layer in adapter_layers(model)} == {True, False}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(), tmp_path)), logits(model))


ALL = {f"model.layers.{i}.{part}" for i in (0, 1) for part in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)}  # fmt: skip


@pytest.mark.parametrize("base", ["fp32", "nf4", "int8"])
def test_all_linear_means_all_but_the_head(base_of, base):
    assert names(get_peft_model(base_of(base), make_config(target_modules="all-linear"))) == ALL


def test_all_linear_finds_layers_that_are_already_wrapped(base_of):
    model = get_peft_model(base_of(), make_config(target_modules=["q_proj"]))
    model.add_adapter("other", make_config(target_modules="all-linear"))
    assert {layer.module_name for layer in adapter_layers(model) if "other" in layer.sparse_lora_values} == ALL


def test_targets_by_regex_list_layers_and_exclusion(base_of):
    def chosen(**options):
        return names(get_peft_model(base_of(), make_config(**options)))

    assert chosen(target_modules=r".*\.1\.self_attn\.(q|v)_proj") == {
        n for n in ALL if "1.self_attn.q" in n or "1.self_attn.v" in n
    }
    assert chosen(target_modules=["q_proj"], layers_to_transform=[1]) == {"model.layers.1.self_attn.q_proj"}
    assert chosen(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers") == {
        "model.layers.1.self_attn.q_proj"
    }
    assert chosen(target_modules="all-linear", exclude_modules=["down_proj"]) == {n for n in ALL if "down" not in n}
    assert chosen(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.0\..*") == {
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    }  # fmt: skip
    assert chosen(target_modules=None) == {n for n in ALL if "q_proj" in n or "v_proj" in n}


def test_long_target_lists_keep_every_module_and_its_support(base_of, tmp_path):
    model = get_peft_model(tiny_llama(num_hidden_layers=4), make_config(
        target_modules=[n.replace("layers.0", f"layers.{i}") for n in ALL if "layers.0" in n for i in range(4)]
    ))  # fmt: skip
    assert len(adapter_layers(model)) == 28
    assert all("default" in layer.sparse_lora_values for layer in adapter_layers(model))


def test_target_modules_of_conv1d_by_default(base_of):
    model = get_peft_model(base_of("conv1d"), SparseLoraConfig(density=0.05))
    assert {name.rsplit(".")[-1] for name in names(model)} == {"c_attn"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_whole_model_keeps_supports(base_of, dtype):
    model = get_peft_model(base_of(), make_config())
    units = [layer.units("default").clone() for layer in adapter_layers(model)]
    model.to(dtype)
    for layer, before in zip(adapter_layers(model), units, strict=True):
        assert layer.sparse_lora_support["default"].dtype == torch.uint8
        assert torch.equal(layer.units("default"), before)
    assert logits(model).dtype == dtype


def test_a_deep_copy_is_a_model_of_its_own(base_of):
    import copy

    model = get_peft_model(base_of(), make_config())
    fill(model)
    before, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    for layer in adapter_layers(twin):
        layer.write_support("default", layer.units("default")[:2])
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_writing_a_support_in_inference_mode_is_noticed(base_of):
    model = get_peft_model(base_of(), make_config("sparse-entry"))
    layer = adapter_layers(model)[0]
    with torch.inference_mode():
        layer.sparse_lora_support["default"] = layer.sparse_lora_support["default"].clone()
        units = layer.units("default")
        layer.write_support("default", units[:3])
        assert torch.equal(layer.units("default"), units[:3])


def test_steps_of_one_adapter_leave_the_other_alone(base_of):
    model = get_peft_model(base_of(), make_config())
    model.add_adapter("other", make_config("hybrid-row", seed=4))
    fill(model)
    fill(model, "other")
    before, bits = {n: p.clone() for n, p in trained(model, "other").items()}, base_bits(model)
    step(model, lr=1.0)
    assert all(torch.equal(p, before[name]) for name, p in trained(model, "other").items())
    assert same_bits(base_bits(model), bits)
