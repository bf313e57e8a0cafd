"""Masked LoRAs: the update by its equation, zeros that stay zeros through training, merging and files."""

import copy
import io

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from hf_sparse_peft import MaskedLoraConfig, set_masks
from hf_sparse_peft.hub import check_adapter, merge_to_dense
from hf_sparse_peft.pruning import NM, prune_model
from hf_sparse_peft.sparsity import pack_bits
from hf_sparse_peft.tuners import MaskedLoraLayer, adapter_layers
from hf_sparse_peft.utils.checksums import save_checked

TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(12)[None]


def pruned(dtype=torch.float32, pattern=None):
    model = tiny.llama(hidden=64, layers=2).to(dtype)
    report = prune_model(model, method="magnitude", pattern=pattern, show_progress=False)
    return model, report


def nf4(folder, pattern=None):
    model, report = pruned(torch.bfloat16, pattern)
    model.save_pretrained(folder)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized), report


def adapted(model, name="default", **options):
    torch.manual_seed(1)
    return get_peft_model(model, MaskedLoraConfig(**{"r": 4, "init_weights": False, **TARGETS, **options}), name)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def zeros(model):
    return {name: p == 0 for name, p in model.named_parameters() if "proj" in name and p.ndim == 2}


def test_outputs_and_gradients_are_the_equations():
    linear = torch.nn.Linear(12, 10, dtype=torch.float64)
    with torch.no_grad():
        linear.weight[torch.rand(10, 12, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    W, M = linear.weight.detach().clone(), linear.weight.detach() != 0
    model = adapted(torch.nn.Sequential(linear), target_modules=["0"], task_type=None)
    layer = adapter_layers(model)[0].double()
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, 10, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    A, B = layer.masked_lora_A["default"], layer.masked_lora_B["default"]
    a, b = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
    z = x.detach().requires_grad_()
    expected = z @ (M * (W + 32 / 4 * b @ a)).T + linear.bias.detach()
    expected.backward(dy)
    assert torch.allclose(y, expected, atol=1e-12)
    for got, due in ((A.grad, a.grad), (B.grad, b.grad), (x.grad, z.grad)):
        assert torch.allclose(got.double(), due, atol=1e-6)
    unmasked = z @ (W + 32 / 4 * b @ a).T + linear.bias.detach()
    assert not torch.allclose(y, unmasked, atol=1e-2)


def test_with_nothing_removed_it_is_a_lora_with_its_gradients():
    base = tiny.llama(hidden=64, layers=1)
    model, lora = adapted(copy.deepcopy(base), mask="given"), None
    numels = {layer.module_name: layer.out_features * layer.in_features for layer in adapter_layers(model)}
    set_masks(model, {name: pack_bits(torch.zeros(numel, dtype=torch.bool)) for name, numel in numels.items()})
    lora = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, **TARGETS))
    with torch.no_grad():
        for layer in adapter_layers(model):
            other = lora.get_submodule(f"base_model.model.{layer.module_name}")
            other.lora_A["default"].weight.copy_(layer.masked_lora_A["default"])
            other.lora_B["default"].weight.copy_(layer.masked_lora_B["default"])
    for one in (model, lora):
        one(input_ids=IDS, labels=IDS).loss.backward()
    for layer in adapter_layers(model):
        other = lora.get_submodule(f"base_model.model.{layer.module_name}")
        assert torch.allclose(layer.masked_lora_A["default"].grad, other.lora_A["default"].weight.grad, atol=1e-5)
        assert torch.allclose(layer.masked_lora_B["default"].grad, other.lora_B["default"].weight.grad, atol=1e-5)


def test_a_new_adapter_is_the_pruned_base_bit_for_bit():
    model, _ = pruned()
    before = logits(model)
    assert torch.equal(logits(adapted(model, init_weights=True)), before)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_merging_and_files_keep_every_zero(tmp_path, dtype, pattern):
    model, report = pruned(dtype, pattern)
    base = copy.deepcopy(model)
    model = adapted(model)
    tiny.train(model, tmp_path / "run", 4, bf16=dtype == torch.bfloat16)
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    check_adapter(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), trained)
    sums = {
        layer.module_name: layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
        for layer in adapter_layers(again)
    }
    again.merge_adapter()
    for layer in adapter_layers(again):
        one_rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
        assert torch.allclose(layer.get_base_layer().weight.float(), sums[layer.module_name], **one_rounding)
    if dtype == torch.float32:
        assert torch.allclose(logits(again), trained, atol=1e-4)
    again.unmerge_adapter()
    assert torch.equal(logits(again), trained)
    dense = merge_to_dense(again, tmp_path / "dense")
    was, now = zeros(base), zeros(dense)
    assert all((now[name] & was[name]).sum() == was[name].sum() for name in was)  # all of them
    assert sum(map(torch.sum, now.values())) <= report.sparsity * sum(map(torch.numel, now.values())) + 8
    changed = [name for name, p in dense.named_parameters() if not torch.equal(p, base.get_parameter(name))]
    assert len(changed) == 14


def test_zeros_survive_in_nf4_and_a_merge_requantises_none_away(tmp_path):
    base, report = nf4(tmp_path / "base", NM(2, 4))
    model = adapted(base, mask="given")
    model.train()
    with pytest.raises(ValueError, match=r"mask='given'.*set_masks\(model, report.masks\)"):
        model(input_ids=IDS, labels=IDS)
    set_masks(model, report.masks)
    tiny.train(model, tmp_path / "run", 3, bf16=True)
    removed = {layer: ~layer.kept("default") for layer in adapter_layers(model, MaskedLoraLayer)}
    assert all(int(gone.sum()) * 2 == gone.numel() for gone in removed.values())
    model.merge_adapter()
    for layer, gone in removed.items():
        assert not layer.dense_base_weight()[gone].any(), layer.module_name


def test_a_run_goes_on_from_its_checkpoint_to_the_bit(tmp_path):
    def run(out, **options):
        model = adapted(pruned()[0], init_weights=True)
        tiny.train(model, out, 6, save_strategy="steps", save_steps=3, **options)
        return {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(p, resumed[name]) for name, p in whole.items())


def test_named_adapters_add_up_and_keep_their_own_masks():
    model = adapted(pruned()[0], name="one")
    torch.manual_seed(2)
    model.add_adapter("two", MaskedLoraConfig(r=2, init_weights=False, **TARGETS))
    layer = adapter_layers(model)[0]
    model.base_model.set_adapter(["one", "two"])
    x = torch.randn(5, layer.in_features)
    both = layer(x) - layer.base_layer(x)
    assert torch.allclose(both, x @ (layer.get_delta_weight("one") + layer.get_delta_weight("two")).T, atol=1e-4)
    model.delete_adapter("one")
    assert torch.allclose(layer(x) - layer.base_layer(x), x @ layer.get_delta_weight("two").T, atol=1e-4)


def test_a_mask_of_another_base_or_layer_is_refused_whole():
    model = adapted(pruned()[0], mask="given")
    _, report = pruned(pattern=NM(1, 4))
    name = next(iter(report.masks))
    cases = {
        "this base is not the one that was pruned": report.masks,
        f"removed has nothing for '{name}'": {},
        "bytes of torch.uint8 for": {**report.masks, name: report.masks[name][:-1]},
    }
    for message, removed in cases.items():
        with pytest.raises(ValueError, match=message):
            set_masks(model, removed)
    assert not any(layer.knows_mask("default") for layer in adapter_layers(model))
    with pytest.raises(ValueError, match="other"):
        set_masks(model, report.masks, "other")


def test_a_base_without_zeros_and_a_quantised_one_are_refused_before_anything_is_touched():
    model = tiny.llama(hidden=64, layers=1)
    with pytest.raises(ValueError, match=r"no target of this base has a zero.*prune_model"):
        adapted(model)
    assert not any(isinstance(module, MaskedLoraLayer) for module in model.modules())
    with pytest.raises(ValueError, match=r"is quantised.*Set mask='given'"):
        adapted(tiny.base("nf4"))


def test_a_file_whose_mask_was_cut_is_refused(tmp_path):
    from safetensors.torch import load_file

    base, _ = pruned()
    adapted(copy.deepcopy(base)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(key for key in tensors if key.endswith("_mask"))
    save_checked(
        {**tensors, name: tensors[name][:-1].clone()}, tmp_path / "adapter_model.safetensors", {"format": "pt"}
    )
    for read in (lambda: check_adapter(tmp_path), lambda: PeftModel.from_pretrained(base, str(tmp_path))):
        with pytest.raises(ValueError, match="masked_lora_mask"):
            read()


def test_a_pickled_copy_acts_alike():
    model = adapted(pruned()[0])
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = adapted(pruned()[0], init_weights=True)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(logits(other), logits(model))


def test_a_layer_that_was_pruned_whole_trains_nothing_and_stops_no_run():
    model, _ = pruned()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model = adapted(model).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    layer = next(layer for layer in adapter_layers(model) if "0.mlp.up_proj" in layer.module_name)
    assert not layer.masked_lora_B["default"].grad.any()
    assert not layer.get_delta_weight("default").any()


def test_zeros_are_not_read_off_a_base_that_adapters_are_merged_into():
    model = adapted(pruned()[0], mask="given")
    entries = {layer.module_name: layer.out_features * layer.in_features for layer in adapter_layers(model)}
    set_masks(model, {name: pack_bits(torch.arange(n) % 4 == 0) for name, n in entries.items()} | pruned()[1].masks)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged.*unmerge_adapter\(\) first"):
        model.add_adapter("two", MaskedLoraConfig(r=2, **TARGETS))
    model.unmerge_adapter()
    model.add_adapter("two", MaskedLoraConfig(r=2, **TARGETS))
    assert all(layer.kept("two").float().mean() == 0.5 for layer in adapter_layers(model))


def test_an_adapter_is_refused_on_a_base_that_is_not_0_where_its_mask_is(tmp_path):
    base, _ = pruned()
    adapted(copy.deepcopy(base)).save_pretrained(tmp_path)
    for other in (tiny.llama(hidden=64, layers=2), pruned(pattern=NM())[0], tiny.base("nf4", hidden=64)):
        with pytest.raises(ValueError, match="of this base is not 0 where the adapter's mask has it pruned"):
            PeftModel.from_pretrained(other, str(tmp_path))
        assert not any(isinstance(module, MaskedLoraLayer) for module in other.modules())
    PeftModel.from_pretrained(base, str(tmp_path))


def test_a_gradient_that_overflows_where_nothing_trains_spoils_none_that_trains():
    linear = torch.nn.Linear(4, 2, bias=False, dtype=torch.float16)
    model = adapted(torch.nn.Sequential(linear), r=1, lora_alpha=1, mask="given", target_modules=["0"], task_type=None)
    layer, kept = adapter_layers(model)[0], torch.tensor([[False, True, True, True], [False, True, True, True]])
    layer.keep("default", pack_bits(kept))
    A, B = layer.masked_lora_A["default"], layer.masked_lora_B["default"]
    A.data.fill_(1.0)
    B.data.fill_(1.0)
    x, dy = torch.tensor([[6e4, 1.0, 1.0, 1.0]]).half(), torch.tensor([[6e4, 1.0]]).half()
    layer(x).backward(dy)
    assert torch.equal(B.grad[:, 0], 3 * dy[0].float())
    assert A.grad[0, 0] == 0
    assert torch.equal(A.grad[0, 1:], torch.full((3,), dy.float().sum().item()))


def test_masks_that_are_no_bits_by_name_are_refused():
    model, report = pruned()
    model = adapted(model, mask="given")
    with pytest.raises(TypeError, match="removed is a list"):
        set_masks(model, list(report.masks))
    with pytest.raises(ValueError, match="removed has a list for"):
        set_masks(model, {name: bits.tolist() for name, bits in report.masks.items()})
