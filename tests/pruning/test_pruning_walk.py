"""`prune_model`: block by block on real architectures, whole or refused, and on from where it was killed."""

import copy

import pytest
import tiny
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.pruning import NM, SparseGPT, prune_model
from hf_sparse_peft.pruning.reading.input_statistics import InputStatistics
from hf_sparse_peft.pruning.removal import walk
from hf_sparse_peft.sparsity import unpack_bits
from hf_sparse_peft.utils.checksums import save_checked
from hf_sparse_peft.utils.file_length import read_safetensors

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
KEYS = {"num_key_value_heads": 1, "head_dim": 16}


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).to(dtype)


def batches(count=3, padded=False):
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        ids = torch.randint(0, 64, (2, 12), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, : 3 + number] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids}


def prune(model, data=None, **options):
    return prune_model(model, list(batches()) if data is None else data, show_progress=False, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def by_hand(model, data, sparsity):
    """Wanda by whole forwards: for each block all inputs are collected anew, with the blocks before it pruned."""
    for block in model.model.layers:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        seen = {name: [] for name in linears}
        hooks = [m.register_forward_pre_hook(lambda _, x, at=seen[n]: at.append(x[0])) for n, m in linears.items()]
        masks = []
        for batch in data:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            masks.append(batch["attention_mask"].bool())
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            tokens = torch.cat([x[mask] for x, mask in zip(seen[name], masks, strict=True)]).double()
            score = module.weight.double().abs() * tokens.square().sum(0).sqrt()
            for row, ranked in zip(module.weight, score, strict=True):
                row[ranked.argsort()[: int(len(row) * sparsity)]] = 0


@pytest.mark.parametrize("padded", [False, True])
def test_the_walk_shows_each_block_what_the_pruned_blocks_before_it_give(padded):
    data, model = list(batches(padded=padded)), llama().eval()
    expected = copy.deepcopy(model)
    by_hand(expected, data, 0.5)
    report = prune(model, data, method="wanda", sparsity=0.5)
    for name, weight in expected.named_parameters():
        assert torch.equal(model.get_parameter(name) == 0, weight == 0), name
        assert torch.equal(model.get_parameter(name), weight), name
    assert report.sparsity == 0.5
    assert all(torch.equal(unpack_bits(bits, report.entries[n]), model.get_submodule(n).weight.view(-1) == 0)
               for n, bits in report.masks.items())  # fmt: skip
    assert "all" in str(report.table())


MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, SMALL),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, SMALL | KEYS),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, SMALL | {"sliding_window": 4, **KEYS}),
    "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, SMALL | {"sliding_window": 4, **KEYS}),
    "opt": (transformers.OPTForCausalLM, transformers.OPTConfig,
            {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "word_embed_proj_dim": 32, "max_position_embeddings": 32}),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config,
             {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, SMALL),
}  # fmt: skip


@pytest.mark.parametrize("method", ["sparsegpt", "dsnot"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_architecture_keeps_two_of_four_in_all_blocks_and_nothing_else_changes(kind, method):
    cls, config_cls, sizes = MODELS[kind]
    torch.manual_seed(0)
    model = cls(config_cls(**sizes))
    before, modes = weights(model), [m.training for m in model.modules()]
    report = prune(model, method=method, pattern=NM(2, 4))
    blocks = {name.split(".")[[part.isdigit() for part in name.split(".")].index(True)] for name in report.masks}
    assert blocks == {"0", "1"}
    for name in report.masks:
        module = model.get_submodule(name)
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        assert ((weight != 0).reshape(-1, 4).sum(1) == 2).all(), name
    pruned = {f"{name}.weight" for name in report.masks}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in pruned)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bf16_weights_are_scored_in_fp32_and_stay_bf16():
    model = llama(torch.bfloat16)
    assert prune(model, method="sparsegpt").sparsity > 0.49
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_methods_without_inputs_need_no_data():
    model = llama()
    assert prune_model(model, method="magnitude", sparsity=0.25, show_progress=False).sparsity == 0.25
    with pytest.raises(ValueError, match="method='wanda' reads the inputs of layers: pass a dataloader"):
        prune_model(model, show_progress=False)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["sparsegpt", "dsnot"])
def test_a_walk_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path, method, monkeypatch):
    whole, model = llama(), llama()
    expected = prune(whole, method=method)
    original = walk._Walk.prune

    def dies(self, block, *args):
        if block.name.endswith(".1"):
            raise Killed
        return original(self, block, *args)

    monkeypatch.setattr(walk._Walk, "prune", dies)
    with pytest.raises(Killed):
        prune(model, method=method, checkpoint=tmp_path)
    monkeypatch.undo()
    untouched = {n: p for n, p in llama().named_parameters() if ".1." in n}
    assert all(torch.equal(model.get_parameter(name), p) for name, p in untouched.items())
    seen = []

    def counted(self, block, *args):
        seen.append(block.name)
        return original(self, block, *args)

    monkeypatch.setattr(walk._Walk, "prune", counted)
    for resumed in (llama(), model):  # loaded anew, or the very model that was left half-way
        report = prune(resumed, method=method, checkpoint=tmp_path)
        assert all(torch.equal(resumed.get_parameter(name), p) for name, p in whole.named_parameters())
        assert report.zeros == expected.zeros
        assert all(torch.equal(report.masks[name], bits) for name, bits in expected.masks.items())
    assert seen == ["model.layers.1"]


def test_a_checkpoint_of_another_walk_or_a_damaged_one_is_refused_before_anything_is_touched(tmp_path):
    model = llama()
    prune(copy.deepcopy(model), checkpoint=tmp_path)
    before = weights(model)
    with pytest.raises(ValueError, match="another pruning walk, with another sparsity"):
        prune(model, checkpoint=tmp_path, sparsity=0.25)
    block = tmp_path / "block_00000.safetensors"
    block.write_bytes(block.read_bytes()[:-20])
    with pytest.raises(ValueError, match="block_00000"):
        prune(model, checkpoint=tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_a_checkpoint_whose_description_is_damaged_is_refused(tmp_path, text):
    (tmp_path / "pruning.json").write_text(text)
    with pytest.raises(ValueError, match=r"pruning\.json' .*Delete the folder"):
        prune(llama(), checkpoint=tmp_path)


def test_a_checkpoint_never_brings_another_models_weights_or_other_datas_masks(tmp_path):
    prune(llama(), checkpoint=tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    before = weights(other)
    with pytest.raises(ValueError, match=r"pruned from another weight of 'model\.layers\.0\.mlp\.up_proj'"):
        prune(other, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="other calibration data, or the same in another order"):
        prune(other, list(batches())[::-1], checkpoint=tmp_path)
    file = tmp_path / "block_00000.safetensors"
    tensors, digests = read_safetensors(file)
    del digests["crc32"]  # below the checksums
    name = next(key for key in tensors if key.endswith("weight"))
    for wrong in (tensors[name] * float("nan"), tensors[name] + 1):
        save_checked({**tensors, name: wrong}, file, digests)
        with pytest.raises(ValueError, match="does not fit"):
            prune(llama(), checkpoint=tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_an_encoder_is_walked_beside_a_decoder_that_is_left_out_or_refused():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    before = weights(model)
    with pytest.raises(ValueError, match=r"decoder\.block\.0' \(T5Block\).*Name the decoder in exclude_modules"):
        prune(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    report = prune(model, exclude_modules=r".*decoder.*")
    assert report.sparsity == 0.5
    assert all(name.startswith("encoder") for name in report.masks)


def test_layers_of_cross_attention_are_pruned_by_what_reaches_them_and_padding_there_is_refused():
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))
    data = [{**batch, "encoder_hidden_states": torch.randn(2, 12, 32)} for batch in batches(padded=True)]
    with pytest.raises(ValueError, match=r"has padding and encoder_hidden_states"):
        prune(model, data)
    data = [{**batch, "attention_mask": torch.ones(2, 12)} for batch in data]
    key = model.bert.encoder.layer[1].crossattention.self.key
    norms = torch.cat([batch["encoder_hidden_states"].flatten(0, 1) for batch in data]).square().sum(0).sqrt()
    lowest = (key.weight.abs() * norms).argsort(dim=1)[:, :16]
    prune(model, data)
    assert torch.equal((key.weight == 0).nonzero()[:, 1].view(32, 16), lowest.sort(dim=1).values)


def test_a_generator_of_batch_encodings_prunes_as_a_list_of_dicts():
    one, other = llama(), llama()
    prune(one)
    prune(other, (transformers.BatchEncoding({**batch, "use_cache": True}) for batch in batches()))
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())


def test_autocast_around_the_walk_rounds_no_hessian():
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    inside, outside = InputStatistics(16, {"hessian"}, "cpu"), InputStatistics(16, {"hessian"}, "cpu")
    outside.add(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        inside.add(x, None)
    assert torch.equal(inside.hessian(), outside.hessian())


def test_weights_that_leave_the_range_of_fp16_are_refused_before_they_are_written():
    model = llama(torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.normal_(std=20000)
    before = weights(model)
    with pytest.raises(ValueError, match=r"down_proj' weights that are not finite in torch\.float16"):
        prune(model, method=SparseGPT(damping=1e-6))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def parametrized():
    model = llama()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def on_meta():
    with torch.device("meta"):
        return llama()


def shared_block():
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    return model


def shared_with_an_embedding():
    model = llama()
    model.aside = torch.nn.Embedding(32, 32)
    model.aside.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


def fp8():
    model = llama()
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    projection.weight_scale_inv = torch.nn.Parameter(torch.ones(1, 1), requires_grad=False)
    return model


def albert():
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(embedding_size=16, **SMALL))


def shorter():
    model = llama()
    model.config.num_hidden_layers = 1
    return model


def nf4():
    return tiny.base("nf4")


def adapted():
    from peft import get_peft_model

    return get_peft_model(llama(), SparseLoraConfig(target_modules="all-linear"))


def shared():
    model = llama()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    return model


def experts():
    config = transformers.MixtralConfig(**SMALL, num_local_experts=2, num_key_value_heads=1)
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (nf4, {}, "is quantised.*Prune the dense model, then quantise"),
        (adapted, {}, "has adapters.*Prune the base first"),
        (shared, {}, "share one weight: name both in exclude_modules"),
        (shared_block, {}, "share one weight: name both in exclude_modules"),
        (shared_with_an_embedding, {"method": "magnitude"}, "share one weight: name both in exclude_modules"),
        (parametrized, {}, "up_proj' is computed at each forward .a parametrization"),
        (fp8, {"method": "magnitude"}, "up_proj' is quantised"),
        (albert, {"exclude_modules": ["embedding_hidden_mapping_in"]}, "runs more than once in a pass"),
        (shorter, {}, "'model.layers.1' does not run on this data"),
        (experts, {"method": "sparsegpt"}, "reads more than norms, and of experts in 3-D parameters"),
        (llama, {"sparsity": 1.0}, r"sparsity=1.0 is no fraction in \[0, 1\)"),
        (llama, {"sparsity": "0.5"}, "sparsity='0.5' is no fraction"),
        (llama, {"sparsity": 0.4, "pattern": NM()}, "Leave it out|leave sparsity out"),
        (llama, {"pattern": NM(1, 5)}, "groups of 5 do not divide the 32 inputs of 'model.layers.0"),
        (llama, {"method": "wander"}, "method='wander' is unknown; choose one of"),
        (llama, {"data": []}, "dataloader gave no batch"),
        (llama, {"method": SparseGPT(block=6), "pattern": NM()}, "block=6 cuts groups of 4"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_pruned_is_refused_whole(make, options, message):
    model = make()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_without_weights_or_batches_that_are_no_mappings_are_refused():
    with pytest.raises(ValueError, match="on the meta device"):
        prune(on_meta(), method="magnitude")
    for data in ([(torch.ones(1, 4),)], next(batches())):
        with pytest.raises(TypeError, match=r"dataloader gives a (tuple|str)"):
            prune(llama(), data)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
def test_data_that_is_not_finite_is_refused_by_layer(method):
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = float("nan")
    before = weights(model)
    with pytest.raises(ValueError, match=r"The inputs of 'model\.layers\.0.* are not finite"):
        prune(model, method=method)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "embed" not in n)
