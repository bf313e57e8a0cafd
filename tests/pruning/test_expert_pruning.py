"""Experts in 3-D parameters: each matrix is pruned by itself, by what the router sends to it."""

import copy

import pytest
import torch
import transformers

from hf_sparse_peft.pruning import NM, Heads, Wanda, prune_model
from hf_sparse_peft.pruning.removal import walk
from hf_sparse_peft.sparsity import unpack_bits

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def qwen2_moe():
    torch.manual_seed(0)
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24,
    )).eval()  # fmt: skip


def gpt_oss():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(
        **SMALL, head_dim=8, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope,
    )).eval()  # fmt: skip


def dbrx():
    return transformers.DbrxForCausalLM(transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=64, attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    ))  # fmt: skip


def batches(padded=False):
    generator = torch.Generator().manual_seed(1)
    for size in (4, 3):
        mask = torch.ones(size, 20, dtype=torch.long)
        if padded:
            mask[0, :9] = 0
        yield {"input_ids": torch.randint(3, 64, (size, 20), generator=generator), "attention_mask": mask}


def prune(model, data=None, **options):
    return prune_model(model, list(batches()) if data is None else data, show_progress=False, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [mixtral, qwen2_moe])
def test_norms_are_of_the_tokens_that_the_router_sends_to_each_expert(make):
    """Routing by hand in float64: the router's two largest logits, tokens that padding hides left out."""
    model, data = make(), list(batches(padded=True))
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # grouped products take no float64
    moe = wide.model.layers[0].mlp
    seen = []
    hook = moe.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            wide(**batch)
    hook.remove()
    states = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, data, strict=True)])
    chosen = (states @ moe.gate.weight.t()).softmax(1).topk(2).indices
    report = prune(model, data, method="wanda", sparsity=0.5)
    experts, pruned = moe.experts, model.model.layers[0].mlp.experts
    for expert in range(4):
        x = states[(chosen == expert).any(1)]
        gate, up = (x @ experts.gate_up_proj[expert].t()).chunk(2, 1)
        inner = torch.nn.functional.silu(gate) * up
        for name, inputs in (("gate_up_proj", x), ("down_proj", inner)):
            weight = getattr(experts, name)[expert].detach()
            scores = weight.abs() * inputs.square().sum(0).sqrt()
            gone = torch.zeros_like(weight, dtype=torch.bool)
            gone.scatter_(1, scores.argsort(1)[:, : weight.shape[1] // 2], True)
            assert torch.equal(getattr(pruned, name)[expert] == 0, gone), (name, expert)
            full = f"model.layers.0.mlp.experts.{name}.{expert}"
            assert torch.equal(unpack_bits(report.masks[full], report.entries[full]).view(gone.shape), gone)
    assert report.sparsity == 0.5


def test_transposed_experts_keep_two_of_four_inputs_and_magnitude_counts_each_matrix():
    model = gpt_oss()
    assert prune(model, pattern=NM(2, 4)).sparsity == 0.5
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):  # [experts, inputs, outputs]
            assert ((weight != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()
    model = gpt_oss()
    biases = {name: value for name, value in weights(model).items() if "bias" in name}
    prune_model(model, method="magnitude", sparsity=0.25, show_progress=False)
    for layer in model.model.layers:
        assert ((layer.mlp.experts.down_proj == 0).sum((1, 2)) == 32 * 48 // 4).all()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in biases.items())


class Killed(BaseException):
    pass


def test_a_killed_walk_over_experts_goes_on(tmp_path, monkeypatch):
    whole, model = mixtral(), mixtral()
    expected = prune(whole)
    original = walk._Walk.prune

    def dies(self, block, *args):
        if block.name.endswith(".1"):
            raise Killed
        return original(self, block, *args)

    monkeypatch.setattr(walk._Walk, "prune", dies)
    with pytest.raises(Killed):
        prune(model, checkpoint=tmp_path)
    monkeypatch.undo()
    for resumed in (mixtral(), model):
        assert prune(resumed, checkpoint=tmp_path).zeros == expected.zeros
        assert all(torch.equal(resumed.get_parameter(name), p) for name, p in whole.named_parameters())


def test_experts_that_are_excluded_stay_and_heads_go_without_them():
    model = mixtral()
    before = weights(model)
    report = prune(model, exclude_modules=r".*experts.*", method="sparsegpt")
    assert not any("experts" in name for name in report.masks)
    heads = prune(model, method="magnitude", pattern=Heads())
    assert [len(one.heads) for one in heads.kept.blocks.values()] == [1, 1]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "experts" in name)
    report = prune(model, target_modules=["down_proj"])
    assert {name.split(".")[-2] for name in report.masks} == {"down_proj"}


ONE = [{"input_ids": torch.tensor([[5]])}]  # two experts of four


def otherwise():
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda _, __, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mixtral, {"method": "sparsegpt"}, "reads more than norms"),
        (mixtral, {"method": "dsnot"}, "reads more than norms"),
        (mixtral, {"pattern": NM(1, 5)}, "groups of 5 do not divide"),
        (mixtral, {"data": ONE}, r"No token of the data reaches 'model\.layers\.0\.mlp\.experts\.\w+\.\d'"),
        (otherwise, {}, "does not compute what its parameters say"),
        (dbrx, {"method": "magnitude"}, "are not laid out as transformers 5 does"),
    ],
)
def test_experts_that_cannot_be_pruned_are_refused_whole(make, options, message):
    model = make()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        prune(model, **{"method": Wanda(), **options})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
