"""Kernel adapters under peft's contract: on every base, with files, merging, several adapters, and training."""

import json

import pytest
import tiny
import torch
from kernel_toolbox import KERNELS, MODES, adapted, make_config, reference_of, reference_update, trained
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM
from tuner_toolbox import BASES, logits, token_ids

from hf_sparse_peft import KernelLoraConfig
from hf_sparse_peft.hub import merge_to_dense
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.utils.checksums import save_checked

TOLERANCE = {"bf16": {"rtol": 0.05, "atol": 0.05}, "nf4": {"rtol": 1e-3, "atol": 1e-3}}


def bits(model) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if "kernel_lora_" not in name
    }


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", BASES)
def test_layers_answer_with_base_plus_the_equations_update_on_every_base(kind, base_of):
    model = adapted(base_of(kind), kind, mode="code", kernel="mixed").eval()
    for layer in adapter_layers(model):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        with torch.no_grad():
            expected = layer.base_layer(x).double() + x.double() @ reference_of(layer).t()
            found = layer(x)
        assert found.dtype == layer.base_layer(x).dtype
        rtol, atol = (2e-2, 2e-2) if kind in ("bf16", "int8") else (1e-4, 1e-4)
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)
        delta = layer.get_delta_weight("default")
        delta = delta.t() if kind == "conv1d" else delta
        torch.testing.assert_close(delta.double(), reference_of(layer), rtol=1e-4, atol=1e-6)
        assert reference_of(layer).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_through_a_model_are_those_of_a_dense_update(kernel, mode, kind, base_of):
    model = adapted(base_of(kind), kind, kernel=kernel, mode=mode, target_modules=["v_proj"], sparsity=0.4)
    layers = adapter_layers(model)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    dense = merge_to_dense(model)
    for layer in layers:
        dense.get_submodule(layer.module_name).weight.requires_grad_()
    dense(input_ids=ids, labels=ids).loss.backward()
    for layer in layers:
        leaves = {n: p.detach().double().requires_grad_() for n, p in _held(layer).items()}
        numel = layer.in_features * layer.out_features
        survivors = numel - round(0.4 * numel)
        update = reference_update(leaves["P"], leaves["Q"], leaves.get("mix"), mode, survivors)
        gradient = dense.get_submodule(layer.module_name).weight.grad.double()
        expected = torch.autograd.grad((update * gradient).sum(), list(leaves.values()))
        for name, wanted in zip(leaves, expected, strict=True):
            scale = wanted.abs().max()
            assert scale > 0
            found = _held(layer)[name].grad.double()
            torch.testing.assert_close(found / scale, wanted / scale, rtol=1e-2, atol=2e-3)


def _held(layer):
    found = {name: getattr(layer, f"kernel_lora_{name}") for name in ("P", "Q", "mix")}
    return {name: held["default"] for name, held in found.items() if "default" in held}


@pytest.mark.parametrize("kernel", KERNELS)
def test_trained_numbers_are_q_times_rows_plus_columns(kernel, base_of):
    model = adapted(base_of(), kernel=kernel)
    expected = sum(8 * (layer.in_features + layer.out_features) for layer in adapter_layers(model))
    expected += 3 * len(adapter_layers(model)) if kernel == "mixed" else 0
    assert model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_points_start_in_the_papers_range_and_change_the_output_from_the_first_step(kernel, base_of):
    base = base_of()
    before = logits(base)
    model = adapted(base, init_weights=True, kernel=kernel)
    for layer in adapter_layers(model):
        for held, count in ((layer.kernel_lora_P, layer.in_features), (layer.kernel_lora_Q, layer.out_features)):
            bound = (count * 4) ** -0.5
            assert 0.9 * bound < held["default"].abs().max() <= bound
            assert held["default"].min() < 0 < held["default"].max()
    assert not torch.equal(logits(model), before)


def test_masters_are_fp32_over_bf16_unless_the_user_asks_otherwise(base_of):
    assert {p.dtype for p in trained(adapted(base_of("bf16"), "bf16")).values()} == {torch.float32}
    lean = get_peft_model(base_of("bf16"), make_config("bf16"), autocast_adapter_dtype=False)
    assert {p.dtype for p in trained(lean).values()} == {torch.bfloat16}
    ids = token_ids()
    lean(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained(lean).values())


# Merging


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.filterwarnings("ignore:Merging into")
def test_merging_is_one_rounding_of_base_plus_update_and_unmerging_restores_every_bit(kind, base_of):
    model = adapted(base_of(kind), kind, kernel="mixed", tile_entries=512)
    before, plain = bits(model), logits(model)
    layer = adapter_layers(model)[0]
    weight = layer.get_base_weight().detach().clone()
    model.merge_adapter()
    if kind in ("fp32", "bf16", "conv1d"):
        update = reference_of(layer)
        expected = (weight.double() + (update.t() if kind == "conv1d" else update)).float()
        rtol = 8e-3 if kind == "bf16" else 1e-5
        torch.testing.assert_close(layer.get_base_weight().float(), expected, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(logits(model), plain, **TOLERANCE.get(kind, {"rtol": 1e-4, "atol": 1e-4}))
    else:
        assert model.base_model.merge_errors()
    model.unmerge_adapter()
    assert same(bits(model), before)
    assert torch.equal(logits(model), plain)


def test_merge_and_unload_gives_the_model_without_wrappers(base_of):
    model = adapted(base_of(), mode="code")
    before = logits(model)
    merged = model.merge_and_unload()
    assert adapter_layers(merged) == []
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("value", "sparsity"), [("inf", 0.0), ("nan", 0.5)])
def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_base(base_of, value, sparsity):
    model = adapted(base_of(), sparsity=sparsity)
    before = bits(model)
    adapter_layers(model)[0].kernel_lora_Q["default"].data[0, 0, 0] = float(value)
    with pytest.raises(ValueError, match=r"^NaNs detected .* The adapter default seems to be broken$"):
        model.merge_adapter(safe_merge=True)
    assert same(bits(model), before)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_dense_model_of_the_merged_sum_answers_alike(kind, base_of, tmp_path):
    model = adapted(base_of(kind), kind)
    merge_to_dense(model, tmp_path / "dense")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-3, atol=1e-3)


# Several adapters


def test_adapters_add_up_switch_and_leave(base_of):
    model = adapted(base_of(), name="one", seed=1)
    plain_one = logits(model)
    model.add_adapter("two", make_config(kernel="mixed", mode="code", target_modules=["q_proj", "o_proj"]))
    assert torch.equal(logits(model), plain_one)
    model.set_adapter("two")
    plain_two = logits(model)
    assert not torch.equal(plain_two, plain_one)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    layer = adapter_layers(model)[0]
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (
            layer.base_layer(x).double() + x.double() @ (reference_of(layer, "one") + reference_of(layer, "two")).t()
        )
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base_of()), rtol=0, atol=0)
    assert torch.equal(logits(model), both)
    model.set_adapter("one")
    model.delete_adapter("two")
    assert torch.equal(logits(model), plain_one)
    assert not any("two" in name for name in model.state_dict())


def test_a_mixed_batch_gives_every_sample_its_adapter(base_of):
    model = adapted(base_of(), name="one", seed=1)
    model.add_adapter("two", make_config())
    ids = token_ids(3)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = logits(model, ids)
    mixed = logits(model, ids, adapter_names=["two", "__base__", "one"])
    torch.testing.assert_close(mixed[0], alone["two"][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[2], alone["one"][2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], logits(base_of(), ids)[1], rtol=1e-4, atol=1e-4)


# Files


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_saved_adapter_loads_to_the_same_bits(kind, low_memory, base_of, tmp_path):
    budget = tiny.kernel_allocation()
    model = adapted(base_of(kind), kind, kernel="mixed", sparsity=0.2, schedule=[budget])
    for number, layer in enumerate(adapter_layers(model)):
        layer.write_survivors("default", 100 + number)
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert all("kernel_lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(base_of(kind), tmp_path, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(loaded), before)
    assert loaded.peft_config["default"].schedule == [budget]
    assert not any("sensitivity" in name for name in loaded.state_dict())


def test_the_folder_loads_with_auto_classes_and_transformers(base_of, tmp_path):
    base_of().save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    plain.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda key, t: None if key.endswith("kernel_lora_Q") else t, "kernel_lora_Q.*is missing"),
        (lambda key, t: t[:, :-1].contiguous() if key.endswith("kernel_lora_P") else t, "has shape"),
        (lambda key, t: t * float("nan") if key.endswith("kernel_lora_P") else t, "not finite"),
        (lambda key, t: t * 0 - 1 if key.endswith("survivors") else t, "no count of the"),
    ],
    ids=["missing", "cut", "nan", "count"],
)
def test_a_damaged_file_is_refused_by_the_tensors_name(damage, message, base_of, tmp_path):
    adapted(base_of(), own_counts=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: damage(key, t) for key, t in load_file(file).items()}
    save_checked({key: t for key, t in tensors.items() if t is not None}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base_of(), tmp_path)


# Training


def steps(model, count: int, lr: float = 1e-2, accumulation: int = 1) -> list[float]:
    ids = token_ids(4, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    losses = []
    for _ in range(count):
        for part in ids.chunk(accumulation):
            loss = model(input_ids=part, labels=part).loss / accumulation
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@tiny.crossed(kernel=KERNELS, mode=MODES, kind=["fp32", "bf16", "nf4"])
@pytest.mark.filterwarnings("ignore:.*asks for")
def test_a_fixed_batch_is_learned_from_the_papers_start(kernel, mode, kind, base_of):
    model = adapted(base_of(kind), kind, kernel=kernel, mode=mode, init_weights=True, target_modules="all-linear")
    losses = steps(model, 30)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.isfinite(p).all() for p in trained(model).values())


def test_accumulated_gradients_are_those_of_the_whole_batch(base_of):
    found = []
    for accumulation in (1, 4):
        model = adapted(base_of(), kernel="mixed", mode="code")
        ids = token_ids(4, 12)
        for part in ids.chunk(accumulation):
            (model(input_ids=part, labels=part).loss / accumulation).backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_no_bit(base_of):
    found = []
    for checkpointing in (False, True):
        model = adapted(base_of(), kernel="mixed").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        ids = token_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_a_model_keeps_for_the_backward_does_not_grow_with_the_weights(base_of):
    kept = {}
    for targets in ("none", "all"):
        model = adapted(base_of(), target_modules=["o_proj"] if targets == "none" else "all-linear", r=2).train()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen = {}

        def keep(t, seen=seen, parameters=parameters):
            if t.untyped_storage().data_ptr() not in parameters:
                seen[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
            return t

        ids = token_ids(1, 4)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(input_ids=ids, labels=ids)
        kept[targets] = sum(seen.values())
    # 12 more adapted layers may keep their inputs (4 tokens x 64 to 128 numbers), never their 64x128 updates.
    assert kept["all"] - kept["none"] < 12 * 4 * 128 * 4 < 64 * 128 * 4


def test_drop_path_leaves_out_whole_samples_in_training_only(base_of):
    model = adapted(base_of(), drop_path=0.5)
    layer = adapter_layers(model)[0]
    x = torch.randn(400, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = (layer.eval()(x) - layer.base_layer(x)).norm(dim=(1, 2))
        torch.manual_seed(0)
        dropped = (layer.train()(x) - layer.base_layer(x)).norm(dim=(1, 2))
    gone = dropped < 1e-6
    assert 140 < int(gone.sum()) < 260
    torch.testing.assert_close(dropped[~gone], 2 * full[~gone], rtol=1e-3, atol=1e-4)


# Configs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"KernelLoraConfig.sparsity=1.0 is out of range: it takes a number in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"r": 7}, "r=7 cannot be split.*even"),
        ({"r": 0}, "r=0 is out of range: it takes an integer >= 2"),
        ({"mode": "soft"}, "mode='soft' is out of range: it takes 'paper' or 'code'"),
        ({"kernel": "rbf"}, "kernel='rbf' is out of range: it takes 'distance' or 'mixed'"),
        ({"scale": 0}, "scale=0"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"tile_entries": 0}, "tile_entries=0"),
        ({"bias": "some"}, "bias='some'"),
        ({"target_modules": "q_proj", "layers_to_transform": [0]}, "layers_to_transform cannot be used"),
        ({"own_counts": 3}, "own_counts=3"),
        (
            {"schedule": [{"type": "allocate"}]},
            r"Allocate acts on units of \['rank'\].*KernelLoraConfig have \['kernel', 'module'\]",
        ),
        (
            {"schedule": [{"type": "allocate", "budget": {"type": "density", "fraction": 0.0}}]},
            "fraction=0.0 is out of",
        ),
        (
            {"schedule": [{"type": "allocate", "score": {"type": "smoothed", "beta1": 1.0}}]},
            "beta1=1.0 is out of range",
        ),
        ({"schedule": [{"type": "allocate", "every": 0}]}, "every=0 is out of range"),
        ({"schedule": [{"type": "allocate", "initial_warmup": 0.5, "final_warmup": 0.5}]}, "leave no step"),
    ],
)
def test_options_out_of_range_name_what_they_take(options, message):
    with pytest.raises(ValueError, match=message):
        KernelLoraConfig(**options)


def test_a_config_survives_json(tmp_path):
    config = make_config(kernel="mixed", mode="code", schedule=[tiny.kernel_allocation(every=3)])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "KERNEL_LORA"
    assert KernelLoraConfig.from_pretrained(tmp_path) == config


def test_a_sparsity_that_leaves_no_entry_names_the_module():
    model = nn.ModuleDict({"narrow": nn.Linear(1, 3)})
    with pytest.raises(ValueError, match=r"sparsity=0.9 leaves no entry in 'narrow' \(3x1\)"):
        get_peft_model(model, KernelLoraConfig(r=2, sparsity=0.9, target_modules=["narrow"]))


def test_modules_that_are_not_linear_are_refused():
    model = nn.ModuleDict({"table": nn.Embedding(3, 4)})
    with pytest.raises(TypeError, match="'table' of type Embedding is not supported"):
        get_peft_model(model, KernelLoraConfig(target_modules=["table"]))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (5, 3)])
def test_odd_shapes_run_and_merge(shape):
    model = nn.Sequential(nn.Linear(*shape))
    adapter = adapted(model, r=2, target_modules=["0"], task_type=None, sparsity=0.5)
    x = torch.randn(4, shape[0], generator=torch.Generator().manual_seed(0))
    before = adapter(x)
    before.sum().backward()
    adapter.merge_adapter()
    torch.testing.assert_close(adapter(x), before, rtol=1e-4, atol=1e-5)
