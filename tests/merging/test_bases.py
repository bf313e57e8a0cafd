"""Merges into dense models of other kinds: transposed weights, tied heads, experts; adapters in bf16; memory."""

import tiny
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from hf_sparse_peft import SparseLoraConfig, hub
from hf_sparse_peft.merging import deltas as deltas_module
from hf_sparse_peft.merging import merge_adapters


def trained(base, folder, seed, **options):
    config = SparseLoraConfig(r=0, density=0.1, criterion="random", seed=seed, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return hub.save_adapter(model, folder)


def logits(model):
    return model.eval()(torch.arange(1, 17)[None]).logits.detach()


def check_dense_is_the_adapter(base, tmp_path, **options):
    folders = [trained(base, tmp_path / str(seed), seed, **options) for seed in (0, 1)]
    merge_adapters(folders, tmp_path / "adapter", "ties", density=0.7, show_progress=False)
    merge_adapters(folders, tmp_path / "dense", "ties", density=0.7, form="dense", show_progress=False)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(adapted), logits(dense), atol=1e-4, rtol=1e-3)
    with adapted.disable_adapter():
        assert not torch.allclose(logits(adapted), logits(dense), atol=1e-2)
    return dense


def test_weights_that_are_stored_transposed(tmp_path):
    tiny.gpt2().save_pretrained(tmp_path / "base")
    dense = check_dense_is_the_adapter(tmp_path / "base", tmp_path, target_modules=["c_attn", "c_fc"])
    assert isinstance(dense, GPT2LMHeadModel)


def test_a_head_that_shares_its_weight_with_the_embedding_is_one_of_its_own_then(tmp_path):
    tiny.llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    dense = check_dense_is_the_adapter(tmp_path / "base", tmp_path, target_modules=["lm_head", "q_proj"])
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "base").get_input_embeddings().weight
    assert torch.equal(dense.get_input_embeddings().weight, own)
    assert not torch.equal(dense.lm_head.weight, own)


def test_a_bf16_base_and_bf16_values_are_merged_in_fp32_and_rounded_once(tmp_path):
    tiny.llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "values_dtype": "bfloat16"}
    folders = [trained(tmp_path / "base", tmp_path / str(seed), seed, **options) for seed in (0, 1)]
    merge_adapters(folders, tmp_path / "dense", "sum", form="dense", show_progress=False)
    merge_adapters(folders, tmp_path / "adapter", "sum", show_progress=False)
    base, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / one, dtype="auto") for one in ("base", "dense"))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    for name, layer in model.base_model.model.named_modules():
        if name.endswith("q_proj"):
            weight = base.get_submodule(name).weight.float() + layer.get_delta_weight("default").detach().float()
            assert torch.equal(dense.get_submodule(name).weight, weight.to(torch.bfloat16))


def test_nothing_of_a_weights_size_is_built_where_all_adapters_have_supports(tmp_path, monkeypatch):
    tiny.llama().save_pretrained(tmp_path / "base")
    folders = [trained(tmp_path / "base", tmp_path / str(s), s, target_modules=["q_proj", "up_proj"]) for s in (0, 1)]
    sizes = []
    stack = deltas_module.stack_deltas

    def noted(*args, **kwargs):
        found = stack(*args, **kwargs)
        sizes.append((found.values.shape[1], found.shape[0] * found.shape[1]))
        return found

    monkeypatch.setattr("hf_sparse_peft.merging.combine.stack_deltas", noted)
    for method in ("ties", "dare", "della", "breadcrumbs", "pcb"):
        merge_adapters(folders, tmp_path / method, method, show_progress=False)
    assert sizes
    assert all(entries <= 0.2 * size for entries, size in sizes)
