"""ShortGPT: block influence by the equation, and models without whole blocks."""

import copy

import pytest
import tiny
import torch
import transformers
from tiny import llama

from hf_sparse_peft.pruning import block_angles, block_influence, drop_blocks
from hf_sparse_peft.pruning.criteria.block_influence import Cosines, _count

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2, "num_hidden_layers": 4}  # fmt: skip


def data(padded=False):
    generator = torch.Generator().manual_seed(3)
    for size in (2, 3):
        mask = torch.ones(size, 9, dtype=torch.long)
        if padded:
            mask[0, :4] = 0
        yield {"input_ids": torch.randint(1, 64, (size, 9), generator=generator), "attention_mask": mask}


def one_of(x, y):
    found = Cosines()
    _count(found, "block", torch.tensor([x]), torch.tensor([y]), None)
    return found


def test_influence_is_one_minus_the_cosine_and_no_angle_or_distance():
    found = one_of([[1.0, 0.0]], [[1.0, 1.0]])
    assert 1 - found.cosine == pytest.approx(0.29289, abs=1e-5)
    assert found.angle == pytest.approx(0.25)
    assert 1 - one_of([[1.0, 2.0]], [[3.0, 6.0]]).cosine == pytest.approx(0, abs=1e-6)  # blind to scale


def test_a_cosine_a_hair_above_one_gives_no_nan():
    torch.manual_seed(0)
    x = torch.randn(1, 4000, 7)
    found = Cosines()
    _count(found, "block", x, x * 1.1, None)
    assert found.angle == found.angle
    assert 0 <= found.angle < 1


@pytest.mark.parametrize("padded", [False, True])
def test_influence_equals_the_equation_over_the_tokens_that_count(padded):
    model = llama(layers=3).eval()
    expected = torch.zeros(3, dtype=torch.float64)
    tokens = 0
    reference = copy.deepcopy(model).double()
    for batch in data(padded):
        with torch.no_grad():
            states = reference(**batch, output_hidden_states=True).hidden_states
            after = []
            hook = reference.model.layers[-1].register_forward_hook(lambda _, __, out, at=after: at.append(out))
            reference(**batch)  # the last of hidden_states is behind the final norm
            hook.remove()
        states = [*states[:-1], after[0]]
        keep = batch["attention_mask"].bool()
        for at in range(3):
            x, y = states[at][keep], states[at + 1][keep]
            expected[at] += ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).sum()
        tokens += int(keep.sum())
    found = block_influence(model, data(padded), show_progress=False)
    assert list(found) == [f"model.layers.{n}" for n in range(3)]
    assert torch.allclose(torch.tensor(list(found.values()), dtype=torch.float64), 1 - expected / tokens, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_angles_are_those_of_each_sequences_last_token(masked):
    model, batches = llama(layers=3).eval(), list(data())
    angles, last = torch.zeros(2, dtype=torch.float64), torch.tensor([8, 8])
    for batch in batches:
        batch["attention_mask"][0, 5:] = 0  # padded on the right
        if not masked:
            del batch["attention_mask"]
        last = [4 if masked and row == 0 else 8 for row in range(len(batch["input_ids"]))]
        with torch.no_grad():
            states = copy.deepcopy(model).double()(**batch, output_hidden_states=True).hidden_states
        for at in range(2):
            x, y = (states[n][range(len(last)), last] for n in (at, at + 1))
            angles[at] += torch.acos((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).sum() / torch.pi
    found = block_angles(model, batches, show_progress=False)
    assert list(found) == [f"model.layers.{n}" for n in range(3)]
    assert torch.allclose(torch.tensor(list(found.values())[:2], dtype=torch.float64), angles / 5, atol=1e-5)
    everywhere = block_angles(model, batches, last_token=False, show_progress=False)
    assert all(abs(everywhere[name] - found[name]) > 1e-4 for name in found)


def test_a_block_that_does_nothing_has_no_influence_goes_first_and_is_not_missed():
    model = llama(layers=4).eval()
    with torch.no_grad():
        for layer in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            layer.weight.zero_()
    ids = next(data())["input_ids"]
    expected = model(ids).logits
    influence = block_influence(model, data(), show_progress=False)
    assert influence["model.layers.2"] == pytest.approx(0, abs=1e-6)
    assert drop_blocks(model, 1, influence) == [0, 1, 3]
    assert torch.equal(model(ids).logits, expected)


def test_the_lowest_of_the_dense_model_go_at_once_and_a_cache_works(tmp_path):
    model = llama(layers=4).eval()
    influence = block_influence(model, data(), show_progress=False)
    left = sorted(sorted(range(4), key=lambda n: influence[f"model.layers.{n}"])[2:])
    states = [copy.deepcopy(model.model.layers[n].state_dict()) for n in left]
    assert drop_blocks(model, 2, influence) == left
    assert model.config.num_hidden_layers == 2
    for number, state in enumerate(states):
        assert model.model.layers[number].self_attn.layer_idx == number
        assert all(torch.equal(value, state[key]) for key, value in model.model.layers[number].state_dict().items())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (model, again):
        ids = torch.tensor([[5, 6, 7]])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert torch.equal(one.generate(ids, **options), one.generate(ids, use_cache=False, **options))
    assert torch.equal(model(ids).logits, again(ids).logits)


def gemma3():
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=4, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    ))  # fmt: skip


def qwen_moe(dense=(0,)):
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
        mlp_only_layers=list(dense),
    ))  # fmt: skip


@pytest.mark.parametrize("make", [gemma3, qwen_moe, tiny.gpt2], ids=lambda value: value.__name__)
def test_lists_of_the_config_with_an_entry_a_block_follow(make, tmp_path):
    torch.manual_seed(0)
    model = (make(layers=4) if make is tiny.gpt2 else make()).eval()
    prefix = "transformer.h" if make is tiny.gpt2 else "model.layers"
    assert drop_blocks(model, [f"{prefix}.1"]) == [0, 2, 3]
    if make is gemma3:
        assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    ids = torch.randint(3, 64, (1, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, again(ids).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_dense_blocks_of_a_model_with_experts_are_renumbered():
    model = qwen_moe(dense=(0, 3))
    drop_blocks(model, ["model.layers.1"])
    assert model.config.mlp_only_layers == [0, 2]


def by_number():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1,
                                     eos_token_id=2, scale_attn_by_inverse_layer_idx=True)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def adapted():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))


def t5():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


@pytest.mark.parametrize(
    ("make", "count", "message"),
    [
        (llama, 1, "needs the influence of each of the 2 blocks"),
        (llama, ["model.layers.7"], "neither a number nor names of blocks such as 'model.layers.0'"),
        (llama, "model.layers.1", "neither a number nor names"),
        (llama, True, "neither a number nor names"),
        (llama, ["model.layers.0", "model.layers.1"], "leaves none of 2 blocks"),
        (adapted, ["model.layers.0"], "has adapters.*Drop blocks first"),
        (t5, ["decoder.block.0"], r"blocks lie in \['decoder.block', 'encoder.block'\]"),
        (by_number, ["transformer.h.0"], "makes that one with another 'attn.scaling'"),
    ],
)
def test_what_cannot_be_dropped_is_refused_and_the_model_stays(make, count, message):
    model = make()
    before, config = {name: p.clone() for name, p in model.named_parameters()}, model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        drop_blocks(model, count)
    assert {name for name, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.to_dict() == config


def test_the_last_blocks_of_a_model_that_counts_them_may_go():
    assert drop_blocks(by_number(), ["transformer.h.3"]) == [0, 1, 2]


def test_data_that_says_nothing_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="dataloader gave no batch"):
        block_influence(model, [], show_progress=False)
    with pytest.raises(TypeError, match="dataloader gives a Tensor"):
        block_influence(model, [torch.ones(1, 2)], show_progress=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"Hidden states of 'model\.layers\.0' are not finite"):
        block_influence(model, [{"input_ids": torch.tensor([[5, 6]])}], show_progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
