"""A patch is the merged model to the bit: in checkpoint coordinates, in place, and back."""

import copy

import pytest
import tiny
import torch
from hub_toolbox import adapted, fill, logits, tiny_base
from patch_toolbox import PackedServer, bits, load_as_vllm, merged_state, patched_state, saved_state
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_sparse_peft import SparseLoraConfig, hub
from hf_sparse_peft.hub.patches.checkpoint_names import CheckpointNames
from hf_sparse_peft.tuners import adapter_layers

GRANULARITIES = ["entry", "block", "row", "column", "diagonal", "subnet"]


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if bits(one[name]) != bits(other[name])]
    assert not different, different


def adapt(kind, granularity, **options):
    targets = ["c_attn", "c_proj"] if kind == "conv1d" else ["q_proj", "k_proj", "up_proj", "down_proj"]
    density = 0.05 if granularity == "entry" else 0.2
    config = SparseLoraConfig(
        r=0, density=density if granularity != "diagonal" else 1.0, granularity=granularity, block_size=8,
        diagonal_blocks=3, target_modules=targets, task_type="CAUSAL_LM", **options,
    )  # fmt: skip
    model = get_peft_model(tiny.base(kind), config)
    fill(model)
    return model.eval()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "conv1d"])
def test_base_plus_patch_is_the_merged_checkpoint_to_the_bit(tmp_path, kind, granularity):
    model = adapt(kind, granularity)
    base = saved_state(tiny.base(kind), tmp_path / "base")
    patch = hub.make_patch(model)
    assert patch.entries
    merged = merged_state(model, tmp_path / "merged")
    assert_same(patched_state(base, patch), merged)
    assert any(bits(base[name]) != bits(merged[name]) for name in base)
    hub.write_patch(patch, tmp_path / "one.safetensors")
    assert_same(patched_state(base, hub.read_patch(tmp_path / "one.safetensors")), merged)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_patch_of_a_4bit_adapter_has_the_dense_checkpoints_values(tmp_path, granularity):
    model = adapt("nf4", granularity)
    with pytest.raises(ValueError, match=r"q_proj.weight' is quantised.*Pass base="):
        hub.make_patch(model)
    dense = tiny.base("bf16")
    base = saved_state(dense, tmp_path / "base")
    patch = hub.make_patch(model, base=tmp_path / "base")
    expected = {name: tensor.clone() for name, tensor in base.items()}
    for layer in adapter_layers(model):
        name = f"{layer.module_name}.weight"
        expected[name] = (base[name].float() + layer.get_delta_weight("default")).bfloat16()
    assert_same(patched_state(base, patch), expected)
    assert hub.make_patch(model, base=dense).base_digests == patch.base_digests


def test_an_fp32_model_of_a_bf16_checkpoint_is_patched_in_the_servers_dtype(tmp_path):
    server = tiny.base("bf16")
    model = get_peft_model(copy.deepcopy(server).float(), SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj"]))
    fill(model)
    patch = hub.make_patch(model, dtype=torch.bfloat16)
    merged = merged_state(model, tmp_path / "merged", dtype=torch.bfloat16)
    assert_same(patched_state(saved_state(server, tmp_path / "base"), patch), merged)
    hub.apply_patch(server, patch)
    assert_same(saved_state(server, tmp_path / "served"), merged)


def test_two_adapters_are_recomputed_as_merging_adds_them(tmp_path):
    model = adapt("bf16", "entry")
    model.add_adapter("rows", SparseLoraConfig(r=0, density=0.2, granularity="row", target_modules=["q_proj"]))
    fill(model, "rows")
    both = {"adapter_names": ["default", "rows"], "weights": [0.5, -2.0]}
    base = saved_state(tiny.base("bf16"), tmp_path / "base")
    merged = merged_state(model, tmp_path / "merged", **both)
    assert_same(patched_state(base, hub.make_patch(model, **both)), merged)
    server = tiny.base("bf16")
    hub.apply_patch(server, hub.make_patch(model, adapter_names=["default"]))
    with pytest.raises(ValueError, match=r"make_patch\(adapter_names"):
        hub.apply_patch(server, hub.make_patch(model, adapter_names=["rows"]))


def test_entries_that_rounding_leaves_alone_are_dropped_and_counted():
    model = get_peft_model(tiny.base("bf16"), SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj"]))
    (layer, *_) = adapter_layers(model)
    positions = layer.pieces("default")[0].entries()[0]
    weight = layer.get_base_layer().weight.data
    weight.view(-1)[positions[:2]] = 0.3  # .30078125 in bf16
    with torch.no_grad():
        layer.sparse_lora_values["default"][:2] = torch.tensor([5e-4, 1e-3])
    patch = hub.make_patch(model)
    assert patch.weights[0].indices.tolist() == [int(positions[1])]
    assert patch.weights[0].values.tolist() == [0.302734375]
    entries = sum(one.pieces("default")[0].units.numel() for one in adapter_layers(model))
    assert patch.unchanged == entries - 1
    kept = hub.make_patch(model, keep_unchanged=True)
    assert (kept.entries, kept.unchanged) == (entries, 0)
    assert patch.weights[0].indices.dtype == torch.int32


def packed_server(tmp_path):
    base = tiny_base(tie=True).bfloat16()
    return base, PackedServer(saved_state(base, tmp_path / "base"))


def test_a_packed_tied_biased_server_gets_the_merged_weights_through_nan_copies(tmp_path):
    base, server = packed_server(tmp_path)
    assert any(name.endswith("q_proj.bias") for name in server.names)
    assert "lm_head.weight" not in server.names
    model = adapted(base, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    before = server.state()
    patch = hub.make_patch(model)
    chunks = list(hub.to_vllm_patches(patch, chunk_bytes=30_000))
    assert len(chunks) > 1
    assert sum(len(chunk) for chunk in chunks) == len(patch.weights)
    for chunk in chunks:
        for item in chunk:
            assert item.values.is_contiguous()
            assert item.indices.is_contiguous()
            assert item._fields == ("name", "shape", "dtype", "values", "indices")
        load_as_vllm(server, chunk)
    assert_same(server.state(), merged_state(model, tmp_path / "merged"))
    for chunk in hub.to_vllm_patches(hub.patch_between(patch, None, tmp_path / "base")):
        load_as_vllm(server, chunk)
    assert_same(server.state(), before)


def test_a_difference_instead_of_a_value_and_columns_first_would_be_seen(tmp_path):
    base, server = packed_server(tmp_path)
    model = adapted(base, target_modules=["up_proj"])
    merged = merged_state(model, tmp_path / "merged")
    (item, *_) = hub.make_patch(model).weights
    rows, cols = item.shape
    assert rows != cols
    before = server.state()[item.name].view(-1)[item.indices.long()]
    load_as_vllm(server, [item._replace(values=item.values - before)])
    assert bits(server.state()[item.name]) != bits(merged[item.name])
    at = item.indices.long()
    flipped, order = (at % cols * rows + at // cols).sort()
    _, server = packed_server(tmp_path)
    load_as_vllm(server, [item._replace(indices=flipped, values=item.values[order])])
    assert bits(server.state()[item.name]) != bits(merged[item.name])


def item(indices, values, name="w", shape=(5,)):
    return hub.WeightPatch(name, shape, torch.float32, torch.tensor(values), torch.tensor(indices, dtype=torch.int32))


BASE = [0.1, 0.2, 0.3, 0.4, 0.5]


def test_swapping_sends_the_bases_values_where_only_the_old_patch_had_entries():
    base = torch.nn.Module()
    base.w = torch.nn.Parameter(torch.tensor(BASE))
    a, b = hub.Patch((item([1, 3], [0.9, 0.8]),)), hub.Patch((item([3, 4], [0.7, 0.6]),))
    (sent,) = hub.patch_between(a, b, base).weights
    assert sent.indices.tolist() == [1, 3, 4]
    assert sent.values.tolist() == pytest.approx([0.2, 0.7, 0.6])
    server = copy.deepcopy(base)
    hub.apply_patch(server, a)
    hub.swap_patch(server, b)
    assert server.w.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.7, 0.6])
    only_b = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.5])
    only_b[[3, 4]] = torch.tensor([0.7, 0.6])
    assert only_b.tolist() != server.w.tolist()  # entry 1 of the old one would stay
    hub.revert_patch(server)
    assert bits(server.w) == bits(base.w)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((item([1], [float("nan")]),), "NaN"),
        ((item([1, 1], [0.0, 0.0]),), "strictly increasing"),
        ((item([2, 1], [0.0, 0.0]),), "strictly increasing"),
        ((item([5], [0.0]),), "out of range"),
        ((item([-1], [0.0]),), "out of range"),
        ((item([1, 2], [0.0]),), "one for each value"),
        ((item([1], [0.0], name=""),), "no tensor name"),
        ((item([1], [0.0]), item([2], [0.0])), "comes twice"),
        ((hub.WeightPatch("w", (5,), torch.bfloat16, torch.zeros(1), torch.tensor([1])),), "must be .n. of"),
        ((hub.WeightPatch("w", (5,), torch.float32, torch.zeros(4), None),), "replaces it by 4"),
    ],
)
def test_a_damaged_patch_is_refused_by_the_name_of_its_tensor(weights, message):
    with pytest.raises(ValueError, match=message):
        hub.Patch(weights)


def test_one_call_has_sparse_or_dense_items_only():
    dense = hub.WeightPatch("head", (2, 2), torch.float32, torch.zeros(4), None)
    chunks = list(hub.to_vllm_patches(hub.Patch((item([1], [0.0]), dense, item([2], [0.0], name="v")))))
    assert [[one.name for one in chunk] for chunk in chunks] == [["w", "v"], ["head"]]
    whole = hub.WeightPatch("i", (3,), torch.int8, torch.zeros(1, dtype=torch.int8), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"'i' is torch.int8.*floating-point"):
        list(hub.to_vllm_patches(hub.Patch((whole,))))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "conv1d"])
def test_apply_swap_and_revert_in_place_are_exact(tmp_path, kind):
    server, pristine = tiny.base(kind), tiny.base(kind).state_dict()
    one, two = adapt(kind, "entry"), adapt(kind, "row", seed=5)
    pointers = [p.data_ptr() for p in server.parameters()]
    assert hub.apply_patch(server, hub.make_patch(one)) == hub.make_patch(one).entries
    assert_same(server.state_dict(), hub.merge_to_dense(one).state_dict())
    hub.swap_patch(server, hub.make_patch(two))
    assert_same(server.state_dict(), hub.merge_to_dense(two).state_dict())
    hub.swap_patch(copy.deepcopy(server), hub.make_patch(one))
    assert_same(server.state_dict(), hub.merge_to_dense(two).state_dict())
    hub.revert_patch(server)
    assert_same(server.state_dict(), pristine)
    assert pointers == [p.data_ptr() for p in server.parameters()]
    with pytest.raises(ValueError, match="No patch is applied"):
        hub.revert_patch(server)


def test_nothing_is_written_when_the_last_tensor_does_not_fit():
    server = tiny.base("bf16")
    patch = hub.make_patch(adapt("bf16", "entry"))
    last = patch.weights[-1]
    other = tiny.llama(seed=7, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"made against: it is another\s+checkpoint"):
        hub.apply_patch(other, patch)
    for broken, message in (
        (last._replace(name="model.nowhere"), "no tensor 'model.nowhere'"),
        (last._replace(shape=(last.shape[1], last.shape[0])), "in the patch"),
        (last._replace(dtype=torch.float32, values=last.values.float()), "Load the model in torch.float32"),
    ):
        wrong = hub.Patch((*patch.weights[:-1], broken))
        for target, held in ((server, {}), (tiny.base("nf4"), None)):
            before = {n: bits(p) for n, p in target.named_parameters()}
            with pytest.raises(ValueError, match=message if held is not None else "."):
                hub.apply_patch(target, wrong)
            assert before == {n: bits(p) for n, p in target.named_parameters()}
    with pytest.raises(ValueError, match="has adapters of peft"):
        hub.apply_patch(adapt("bf16", "entry"), patch)


def test_hybrids_are_refused_with_the_choices_and_leave_in_two_halves(tmp_path):
    model = adapted(r=2)
    with pytest.raises(ValueError, match=r"only='support'.*export_lora\(only='low_rank'\).*merge_to_dense"):
        hub.export_patch(model, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()
    hub.export_patch(model, tmp_path / "patch", only="support")
    hub.export_lora(model, tmp_path / "lora", only="low_rank")
    server = tiny_base()
    hub.apply_patch(server, tmp_path / "patch")
    served = PeftModel.from_pretrained(server, tmp_path / "lora")
    torch.testing.assert_close(logits(served), logits(model), atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="merge_to_dense"):
        hub.make_patch(adapted(r=2, density=0.0))
    with pytest.raises(ValueError, match="only='factors' is no part"):
        hub.make_patch(model, only="factors")


def test_heads_and_biases_go_into_a_second_file_as_whole_tensors(tmp_path):
    model = adapted(modules_to_save=["lm_head"], bias="sparse_lora_only")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("bias" in name or "lm_head" in name):
                parameter.add_(0.25)
    hub.export_patch(model, tmp_path / "patch")
    assert {p.name for p in (tmp_path / "patch").iterdir()} == {"patch.safetensors", "modules.safetensors"}
    merged = merged_state(model, tmp_path / "merged")
    base = saved_state(tiny_base(), tmp_path / "base")
    assert_same(patched_state(base, hub.read_patch(tmp_path / "patch")), merged)
    dense = hub.read_patch(tmp_path / "patch" / "modules.safetensors")
    assert "lm_head.weight" in {one.name for one in dense.weights}
    assert all(one.indices is None for one in dense.weights)
    assert [one.name for one in hub.make_patch(model, only="modules").weights] == [one.name for one in dense.weights]
    server = tiny_base()
    hub.apply_patch(server, tmp_path / "patch")
    assert torch.equal(logits(server), logits(hub.merge_to_dense(model)))
    hub.revert_patch(server)
    assert_same(server.state_dict(), tiny_base().state_dict())


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_tied_head_is_not_patched_through_the_embedding(options):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(tiny_base(tie=True), **options)
    with pytest.raises(ValueError, match=r"lm_head.*merge_to_dense"):
        hub.make_patch(model)


def test_a_tied_embedding_is_patched_once_under_either_name():
    server = tiny_base(tie=True)
    shape = tuple(server.lm_head.weight.shape)
    patch = hub.Patch((item([3], [9.0], name="lm_head.weight", shape=shape),))
    hub.apply_patch(server, patch)
    assert server.model.embed_tokens.weight.view(-1)[3] == 9.0
    twice = hub.Patch((*patch.weights, item([3], [9.0], name="model.embed_tokens.weight", shape=shape)))
    with pytest.raises(ValueError, match="two names of one tied weight"):
        hub.apply_patch(tiny_base(tie=True), twice)


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, vocab_size=16)
    )


def test_fused_experts_lie_in_the_checkpoint_one_by_one(tmp_path):
    model = mixtral()
    state = saved_state(model, tmp_path / "base")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    fused = dict(model.named_parameters())[name]
    assert name not in state
    generator = torch.Generator().manual_seed(1)
    positions = torch.randperm(fused.numel(), generator=generator)[:50].sort().values
    new, expected = torch.randn(50, generator=generator), mixtral()
    names = CheckpointNames(model)
    items = [
        hub.WeightPatch(place.name, place.shape, torch.float32, new[place.order], place.positions)
        for place in names.to_checkpoint(name, positions)
    ]
    assert {one.name.rsplit(".", 2)[1] for one in items} == {"w1", "w3"}
    dict(expected.named_parameters())[name].data.view(-1)[positions] = new
    assert_same(patched_state(state, hub.Patch(tuple(items))), saved_state(expected, tmp_path / "expected"))
    server = mixtral()
    hub.apply_patch(server, hub.Patch(tuple(items)))
    assert_same(server.state_dict(), expected.state_dict())
    hub.revert_patch(server)
    assert_same(server.state_dict(), model.state_dict())
    for stored, tensor in state.items():
        assert bits(names.tensor(stored)) == bits(tensor)


def test_flat_index_23_of_two_experts_is_entry_5_of_the_second_ones_up_projection():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 3, "moe_intermediate_size": 2, "num_experts": 2, "num_experts_per_tok": 1}
    config = Qwen3MoeConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2, vocab_size=8,
        intermediate_size=2, decoder_sparse_step=1,
    )  # fmt: skip
    names = CheckpointNames(Qwen3MoeForCausalLM(config))
    (place,) = names.to_checkpoint("model.layers.0.mlp.experts.gate_up_proj", torch.tensor([23]))
    assert (place.name, place.positions.tolist()) == ("model.layers.0.mlp.experts.1.up_proj.weight", [5])


def test_adapted_attention_of_a_model_with_fused_experts_round_trips(tmp_path):
    model = get_peft_model(mixtral(), SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj", "o_proj"]))
    fill(model)
    base = saved_state(mixtral(), tmp_path / "base")
    merged = merged_state(model, tmp_path / "merged")
    assert_same(patched_state(base, hub.make_patch(model)), merged)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    hub.apply_patch(reloaded, hub.make_patch(model, base=tmp_path / "base"))
    assert_same(saved_state(reloaded, tmp_path / "served"), merged)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "conv1d"])
@pytest.mark.parametrize("granularity", ["entry", "row"])
def test_a_patch_and_its_base_give_back_the_adapter(kind, granularity):
    model = adapt(kind, granularity)
    patch = hub.make_patch(model, keep_unchanged=True)
    back = hub.import_patch(patch, tiny.base(kind))
    names = {layer.module_name: layer for layer in adapter_layers(back)}
    step = 2.0**-8 if kind == "bf16" else 2.0**-23
    for layer in adapter_layers(model):
        indices, values = layer.pieces("default")[0].entries()
        found, deltas = names[layer.module_name].pieces("default")[0].entries()
        assert torch.equal(indices, found)
        weight = layer.get_base_layer().weight.data
        weight = (weight.t() if kind == "conv1d" else weight).reshape(-1)[indices].float()
        assert ((deltas - values).abs() <= step * (weight.abs() + values.abs())).all()
    again = hub.make_patch(back, keep_unchanged=True)
    assert [one.name for one in again.weights] == [one.name for one in patch.weights]
    for one, other in zip(again.weights, patch.weights, strict=True):
        assert bits(one.values) == bits(other.values)
        assert torch.equal(one.indices, other.indices)
    with pytest.raises(ValueError, match="not what this patch was made against"):
        hub.import_patch(patch, tiny.gpt2(seed=3) if kind == "conv1d" else tiny.llama(seed=3, dtype=weight_dtype(kind)))


def weight_dtype(kind):
    return torch.bfloat16 if kind == "bf16" else torch.float32


def test_projections_that_the_checkpoint_holds_as_one_tensor_share_one_item(tmp_path):
    from transformers.core_model_loading import Chunk, WeightConverter

    def fused_on_disk(model):
        parts = [f"self_attn.{name}_proj.weight" for name in "qkv"]
        model._weight_conversions = [WeightConverter(["self_attn.qkv.weight"], parts, [Chunk(0)])]
        return model

    def build():
        return fused_on_disk(tiny.llama(num_key_value_heads=4))

    base = saved_state(build(), tmp_path / "base")
    assert base["model.layers.0.self_attn.qkv.weight"].shape == (96, 32)
    model = get_peft_model(build(), SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj", "v_proj", "up_proj"]))
    fill(model)
    patch = hub.make_patch(model, base=tmp_path / "base")
    assert [one.name for one in patch.weights if "attn" in one.name] == [
        f"model.layers.{layer}.self_attn.qkv.weight" for layer in (0, 1)
    ]
    merged = merged_state(model, tmp_path / "merged")
    assert_same(patched_state(base, patch), merged)
    server = build()
    hub.apply_patch(server, patch)
    assert_same(server.state_dict(), hub.merge_to_dense(model).state_dict())
    hub.revert_patch(server)
    assert_same(server.state_dict(), build().state_dict())
    assert len(adapter_layers(hub.import_patch(patch, build()))) == 6


def test_a_compiled_policy_and_a_deep_copy_make_the_same_patch():
    model = adapt("bf16", "entry")
    expected = hub.make_patch(model)
    for other in (torch.compile(model), copy.deepcopy(model), torch.nn.DataParallel(model)):
        found = hub.make_patch(other)
        assert [one.name for one in found.weights] == [one.name for one in expected.weights]
        assert found.base_digests == expected.base_digests


def test_no_patch_lands_on_weights_that_were_cast_or_are_packed():
    patch = hub.make_patch(adapt("bf16", "entry"))
    server = tiny.base("bf16")
    hub.apply_patch(server, patch)
    server.float()
    with pytest.raises(ValueError, match=r"was cast from torch\.bfloat16 to torch\.float32"):
        hub.revert_patch(server)
    with pytest.raises(ValueError, match="quantised"):
        hub.import_patch(patch, tiny.base("nf4"))


class Twice(torch.nn.Module):
    """Runs one layer twice in a pass; with `names=2` under two names, of which peft adapts the first."""

    def __init__(self, names: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
        if names == 2:
            self.second = self.first

    def forward(self, x):
        return self.last(getattr(self, "second", self.first)(self.first(x)))


def test_a_layer_that_runs_twice_is_patched_and_one_with_a_name_of_its_own_is_refused():
    config = {"r": 0, "density": 0.3, "target_modules": ["first", "last"]}
    model = get_peft_model(Twice(), SparseLoraConfig(**config))
    fill(model)
    server, x = Twice(), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    hub.apply_patch(server, hub.make_patch(model))
    assert torch.equal(server(x), hub.merge_to_dense(model)(x))
    with pytest.raises(ValueError, match=r"first.*second|second.*first"):
        hub.make_patch(get_peft_model(Twice(names=2), SparseLoraConfig(**config)))


def test_folder_of_an_adapter_is_exported_over_the_checkpoint_its_config_names(tmp_path):
    tiny_base().bfloat16().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    hub.save_adapter(model, tmp_path / "adapter")
    done = hub.export_patch(tmp_path / "adapter", tmp_path / "patch")
    assert {one.dtype for one in done.patch.weights} == {torch.bfloat16}
    assert done.file_bytes == (tmp_path / "patch" / "patch.safetensors").stat().st_size
    server = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    hub.apply_patch(server, tmp_path / "patch")
    assert torch.equal(logits(server), logits(hub.merge_to_dense(model)))
    with pytest.raises(ValueError, match="not empty"):
        hub.export_patch(model, tmp_path / "patch")
    with pytest.raises(ValueError, match="format='npz' is unknown"):
        hub.export_patch(model, tmp_path / "other", "npz")
