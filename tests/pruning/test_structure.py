"""Heads and channels of transformer blocks: which rows and columns they own, what is left of them, what is refused."""

import dataclasses

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from hf_sparse_peft.pruning import KeptUnits, structures_of

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
KEYS = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, KEYS | {"mlp_bias": True}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, SMALL | {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, KEYS),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, KEYS),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, KEYS),
    "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, KEYS),
    "phi3": (transformers.Phi3ForCausalLM, transformers.Phi3Config, SMALL | {"num_key_value_heads": 2}),
    "opt": (transformers.OPTForCausalLM, transformers.OPTConfig,
            {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "word_embed_proj_dim": 32, "max_position_embeddings": 32}),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config,
             {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1,
              "eos_token_id": 2, "n_inner": 48}),
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, SMALL),
    "distilbert": (transformers.DistilBertForMaskedLM, transformers.DistilBertConfig,
                   {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
                    "max_position_embeddings": 32}),
}  # fmt: skip


def build(kind):
    torch.manual_seed(0)
    cls, config_cls, sizes = MODELS[kind]
    model = cls(config_cls(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3) if parameter.ndim == 2 or name.endswith("bias") else None
    return model


def what_reaches(model, layer, ids):
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_unit_owns_exactly_what_reaches_its_part_of_the_output(kind):
    """By gradients: the columns of o and down that a unit owns see only its own rows of the projections before."""
    model = build(kind)
    structures = structures_of(model)
    assert len(structures) == 2
    one = structures[1]
    assert (one.heads, one.width) == (4, 48)
    assert one.kv_heads == (2 if "num_key_value_heads" in MODELS[kind][2] else 4)
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    for which, target in (("heads", one.output), ("channels", one.down)):
        *before, last = one.members(which)
        assert (last.axis, last.module) == (1, target)
        seen = what_reaches(model, target, ids)
        for unit in (0, one.units(which) - 1):
            columns = last.lines(torch.tensor([unit]))
            assert len(columns) == (one.heads // one.kv_heads * one.head_dim if which == "heads" else 1)
            wanted = list({member.module for member in before})
            read = torch.autograd.grad(
                seen[..., columns].square().sum(), [model.get_submodule(n).weight for n in wanted], retain_graph=True
            )
            for name, gradient in zip(wanted, read, strict=True):
                gradient = gradient.t() if isinstance(model.get_submodule(name), Conv1D) else gradient
                own = torch.cat([m.lines(torch.tensor([unit])) for m in before if m.module == name])
                touched = gradient.abs().sum(1).nonzero().flatten()
                assert set(touched.tolist()) <= set(own.tolist()), (name, unit)
                # a ReLU may silence a channel, and a key only shifts logits: most rows do see something
                assert which == "channels" or len(touched) == len(own)


def test_query_heads_of_a_group_are_neighbours():
    one = structures_of(build("llama"))[0]
    assert one.query_heads(torch.tensor([1])).tolist() == [2, 3]
    assert one.members("heads")[0].lines(torch.tensor([1])).tolist() == list(range(32, 64))
    assert one.members("heads")[1].lines(torch.tensor([1])).tolist() == list(range(16, 32))


def cross():
    return transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**KEYS, num_local_experts=2))


def neox():
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL))


def olmo2():
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SMALL))


def t5():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cross, "has 2 attentions of linear layers"),
        (mixtral, r"model\.layers\.0' \(MixtralDecoderLayer\) has no feed-forward part"),
        (neox, "has no attention of linear layers"),
        (olmo2, r"q_norm\.weight' \(32,\) stands beside the projections"),
        (t5, "has no attention"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_not_understood_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        structures_of(make())


def test_the_heads_of_a_model_with_experts_are_understood():
    one = structures_of(mixtral(), ["heads"])[1]
    assert (one.heads, one.kv_heads, one.width, one.members("channels")) == (4, 2, 0, ())


def test_an_adapters_base_layers_count():
    from peft import LoraConfig, get_peft_model

    plain = structures_of(build("llama"))
    adapted = structures_of(get_peft_model(build("llama"), LoraConfig(target_modules="all-linear")))
    prefix = "base_model.model."
    assert [dataclasses.replace(one, **{f.name: prefix + getattr(one, f.name) for f in dataclasses.fields(one)
                                        if f.type == "str"}) for one in plain] == adapted  # fmt: skip


def kept_of_llama():
    kept = KeptUnits.all_of(structures_of(build("llama")))
    kept.keep("model.layers.1", "heads", torch.tensor([1]))
    kept.keep("model.layers.0", "channels", torch.tensor([40, 3, 7]))
    return kept


def test_kept_units_come_back_from_json_and_from_a_file(tmp_path):
    kept = kept_of_llama()
    kept.save(tmp_path / "kept.safetensors")
    for again in (KeptUnits.from_dict(kept.to_dict()), KeptUnits.load(tmp_path / "kept.safetensors")):
        assert again.to_dict() == kept.to_dict()
        assert again.blocks["model.layers.0"].channels.tolist() == [3, 7, 40]
        assert again.blocks["model.layers.0"].channels.dtype == torch.int64
        assert again.blocks["model.layers.1"].removed("heads").tolist() == [0]
    kept.check(structures_of(build("llama")))


def test_kept_units_of_another_model_and_damaged_ones_are_refused(tmp_path):
    kept, data = kept_of_llama(), kept_of_llama().to_dict()
    with pytest.raises(ValueError, match="with 2 heads, and the model's has 4"):
        kept.check(structures_of(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))))
    with pytest.raises(ValueError, match=r"names? a block 'model\.layers\.0'"):
        kept.check(structures_of(build("gpt2")))
    for wrong in ([0, 0], [1, 0], [2], [-1], ["1"], [True], "1", None):
        with pytest.raises(ValueError, match="Kept units of"):
            KeptUnits.from_dict({**data, "model.layers.1": {**data["model.layers.1"], "heads": wrong}})
    for wrong in ([], {"a": 1}, {"a": {"heads": [], "channels": []}}):
        with pytest.raises(ValueError, match="not understood"):
            KeptUnits.from_dict(wrong)
    with pytest.raises(ValueError, match="heads are not sorted numbers below 2"):
        kept.keep("model.layers.1", "heads", torch.tensor([2]))
    file = tmp_path / "kept.safetensors"
    kept.save(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"kept\.safetensors"):
        KeptUnits.load(file)
