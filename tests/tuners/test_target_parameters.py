"""Supports over parameters that belong to no linear layer: the fused experts of Mixtral, Qwen-MoE and gpt-oss."""

import copy
import json
import threading

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    Fraction,
    Gradient,
    Prune,
    Regrow,
    SparseLoraConfig,
    callbacks_for,
    initialize_support,
)
from hf_sparse_peft.hub import apply_patch, check_adapter, export_lora, export_patch, merge_to_dense
from hf_sparse_peft.sparsity import Global, UnitGrid, decode_support
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.utils.checksums import save_checked

SMALL = {
    "vocab_size": tiny.VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(1, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


def filled(model, dtype):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def mixtral(dtype=torch.float32, **more):
    return filled(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, **more)), dtype)


def qwen(dtype=torch.float32, **more):
    """Layer 0 is dense, layer 1 has experts and a shared one with a linear layer of the name `down_proj`."""
    more |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
    config = Qwen2MoeConfig(**SMALL, **more, num_experts_per_tok=2, mlp_only_layers=[0])
    return filled(Qwen2MoeForCausalLM(config), dtype)


def gpt_oss(dtype=torch.float32, **more):
    """Experts stored as [experts, in, out]."""
    config = GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=8, **more)
    return filled(GptOssForCausalLM(config), dtype)


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss}


def adapted(make=mixtral, dtype=torch.float32, adapter="default", **options):
    options = {"r": 0, "density": 0.05, "target_modules": [], "target_parameters": EXPERTS} | options
    return get_peft_model(make(dtype), SparseLoraConfig(**options), adapter_name=adapter)


def random_values(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sparse_lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def dense_delta(model, name, adapter="default"):
    """The update of one parameter in float64, from the tensors of the adapter's file alone."""
    held = get_peft_model_state_dict(model, adapter_name=adapter)
    prefix = f"base_model.model.{name}."
    shape = dict(plain_parameters(model))[name].shape
    config = model.peft_config[adapter]
    grid = UnitGrid(shape[0] * shape[1], shape[2], config.granularity, config.block_size)
    delta = torch.zeros(grid.rows, grid.cols, dtype=torch.float64)
    values = held[prefix + "sparse_lora_values"].double()
    units = decode_support(held[prefix + "sparse_lora_support"], grid, len(values), "support").tolist()
    size, per_line = config.block_size, grid.cols // config.block_size
    for unit, value in zip(units, values, strict=True):
        if config.granularity == "entry":
            delta[unit // grid.cols, unit % grid.cols] = value
        elif config.granularity == "row":
            delta[unit] = value
        elif config.granularity == "column":
            delta[:, unit] = value
        else:
            top, left = unit // per_line * size, unit % per_line * size
            delta[top : top + size, left : left + size] = value
    if prefix + "sparse_lora_A" in held:
        A, B = (held[prefix + f"sparse_lora_{factor}"].double() for factor in "AB")
        delta += config.lora_alpha / config.r * B @ A
    return delta.view(shape)


def plain_parameters(model):
    """Parameters of the base by their names without adapters."""
    return (
        (name.removeprefix("base_model.model.").replace(".base_layer.", "."), parameter)
        for name, parameter in model.named_parameters()
        if "sparse_lora_" not in name
    )


@tiny.crossed(
    kind=list(MODELS),
    implementation=["eager", "batched_mm", "grouped_mm"],
    half=["entry", "row", "column", "block", "entry+rank"],
)
def test_outputs_and_gradients_are_those_of_dense_deltas_in_float64(kind, implementation, half):
    granularity, _, rank = half.partition("+")
    options = {"granularity": granularity, "block_size": 8, "density": 0.2, "r": 2 if rank else 0}
    # torch's grouped product takes no float64.
    make, dtype = MODELS[kind], torch.float32 if implementation == "grouped_mm" else torch.float64
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-9}
    model = random_values(adapted(make, dtype, **options))
    model.get_base_model().config._experts_implementation = implementation
    reference = make(torch.float64)
    reference.config._experts_implementation = "eager"
    dense = {}
    for name, parameter in reference.named_parameters():
        if "experts." in name and parameter.ndim == 3:
            dense[name] = parameter
            parameter.data += dense_delta(model, name)
    assert len(dense) == (2 if kind == "qwen" else 4)

    out, expected = (one(IDS, labels=IDS) for one in (model, reference))
    torch.testing.assert_close(out.logits.double(), expected.logits, **near)
    out.loss.backward()
    expected.loss.backward()
    for layer in adapter_layers(model):
        gradient = dense[layer.module_name].grad.flatten(0, 1)
        grid = layer.sparse_lora_grid["default"]
        at = grid.gather(gradient, layer.units("default"))
        torch.testing.assert_close(layer.sparse_lora_values["default"].grad.double(), at, **near)
        if rank:
            A, B = layer.sparse_lora_A["default"], layer.sparse_lora_B["default"]
            torch.testing.assert_close(B.grad.double(), 8 * gradient @ A.detach().double().t(), **near)
            torch.testing.assert_close(A.grad.double(), 8 * B.detach().double().t() @ gradient, **near)


def test_one_budget_is_shared_by_all_experts_of_a_parameter():
    def make(dtype):
        model = mixtral(dtype)
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.data[2] *= 100
        return model

    model = adapted(make, criterion="magnitude", target_parameters=["experts.gate_up_proj"])
    for layer in adapter_layers(model):
        per_expert = torch.bincount(layer.units("default") // (64 * 16), minlength=4)
        assert per_expert.tolist() == [0, 0, int(0.05 * 4 * 64 * 16), 0]


def test_two_adapters_add_up_and_disabling_gives_the_base_back():
    model = random_values(adapted(r=2))
    model.add_adapter("more", SparseLoraConfig(r=0, density=0.1, target_modules=["o_proj"], target_parameters=EXPERTS))
    random_values(model, seed=2)
    model.base_model.set_adapter(["default", "more"])
    reference = mixtral()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "experts." in name:
                parameter += (dense_delta(model, name) + dense_delta(model, name, "more")).float()
            elif "o_proj" in name:
                layer = next(one for one in adapter_layers(model) if one.weight_name == name)
                parameter += layer.get_delta_weight("more")
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, mixtral()(IDS).logits)
    model.delete_adapter("more")
    assert all("more" not in layer.adapter_configs for layer in adapter_layers(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_outputs_are_the_adapted_ones_to_the_bit_and_unmerging_restores_every_bit(dtype):
    model = random_values(adapted(qwen, dtype)).eval()
    before = {name: parameter.clone() for name, parameter in plain_parameters(model)}
    expected = model(IDS).logits
    model.merge_adapter()
    assert torch.equal(model(IDS).logits, expected)
    name = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(dict(plain_parameters(model))[name], before[name])
    model.unmerge_adapter()
    for name, parameter in plain_parameters(model):
        assert torch.equal(parameter, before[name]), name
    dense = merge_to_dense(model)
    assert torch.equal(dense(IDS).logits, expected)
    assert dense.state_dict().keys() == qwen().state_dict().keys()
    plain = model.merge_and_unload()
    assert torch.equal(plain(IDS).logits, expected)
    assert plain.state_dict().keys() == qwen().state_dict().keys()


@pytest.mark.parametrize("kind", MODELS)
def test_files_name_the_parameter_and_load_alike_everywhere(kind, tmp_path):
    model = random_values(adapted(MODELS[kind], r=2, target_modules=["q_proj"])).eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    names = {name for name, p in MODELS[kind]().named_parameters() if "experts." in name and p.ndim == 3}
    assert {key.rpartition(".")[0] for key in keys if "experts." in key} == {f"base_model.model.{n}" for n in names}
    assert names <= {module.name for module in check_adapter(tmp_path).modules}
    assert torch.equal(PeftModel.from_pretrained(MODELS[kind](), tmp_path).eval()(IDS).logits, expected)
    assert torch.equal(
        PeftModel.from_pretrained(MODELS[kind](), tmp_path, low_cpu_mem_usage=True).eval()(IDS).logits, expected
    )
    other = MODELS[kind]()
    other.load_adapter(tmp_path)
    assert torch.equal(other.eval()(IDS).logits, expected)


def test_a_file_for_other_experts_is_refused_and_leaves_the_model_as_it_was(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3))
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"experts\.(gate_up|down)_proj"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == before
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_parameters"] = ["experts.down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has target_parameters=\['experts\.down_proj'\]"):
        PeftModel.from_pretrained(mixtral(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("down_proj.sparse_lora_support"))
    tensors[key][20] ^= 1
    save_checked(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj\.sparse_lora_support"):
        check_adapter(tmp_path)


@pytest.mark.parametrize(
    "grow",
    [AccumulatedGradient(steps=1), pytest.param(Gradient(), marks=pytest.mark.slow)],
    ids=lambda part: part.part_type,
)
def test_moving_supports_of_experts_resume_to_the_bit(grow, tmp_path):
    def run(out, steps, resume=None):
        rule = Regrow(every=2, grow=grow, fraction=0.5)
        model = adapted(r=2, schedule=[rule], target_modules=["q_proj"])
        start = {layer.module_name: layer.units("default").clone() for layer in adapter_layers(model)}
        tiny.train(
            model, out, steps, callbacks=callbacks_for(model), resume=resume, save_strategy="steps", save_steps=4,
            gradient_accumulation_steps=2, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        moved = [n for n in start if not torch.equal(start[n], dict(units(model))[n])]
        assert {n for n in start if "experts" in n} <= set(moved)
        return get_peft_model_state_dict(model)

    def units(model):
        return [(layer.module_name, layer.units("default")) for layer in adapter_layers(model)]

    whole = run(tmp_path / "whole", 8)
    resumed = run(tmp_path / "resumed", 8, resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert whole.keys() == resumed.keys()
    for key in whole:
        assert torch.equal(whole[key], resumed[key]), key


CHOICES = {
    "a budget over the model": {"budget": Global(0.02), "criterion": "magnitude"},
    "Fisher information": {"budget": Global(0.02), "criterion": "fisher"},
    "a subnet": {"granularity": "subnet", "density": 0.05},
    "thinning out": {"density": 0.05, "schedule": [Prune(final_fraction=0.5, every=1)]},
    "ranks and entries in one budget": {
        "r": 4, "density": 0.05, "schedule": [Allocate(["rank", "support"], Fraction(0.5), every=1)]
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "Fisher information" else ()) for case in CHOICES]
)
def test_what_trains_other_weights_trains_experts_and_leaves_compact(case, tmp_path):
    options = {"r": 0, "target_modules": ["q_proj"], "target_parameters": EXPERTS, **CHOICES[case]}
    model = get_peft_model(mixtral(), SparseLoraConfig(**options))
    tiny.train(model, tmp_path / "run", 5, callbacks=callbacks_for(model))
    model.save_pretrained(tmp_path / "saved")
    assert check_adapter(tmp_path / "saved").modules
    expected = model.eval()(IDS).logits
    assert torch.equal(PeftModel.from_pretrained(mixtral(), tmp_path / "saved").eval()(IDS).logits, expected)
    model.base_model.compact()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merge_to_dense(model)(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_readers_are_shown_the_dense_gradient_and_activation_criteria_are_refused():
    model = adapted(criterion="fisher", density=0.1, target_parameters=["experts.down_proj"])
    data = torch.utils.data.DataLoader(tiny.TokenData(samples=4), batch_size=4)
    reference = mixtral().eval()
    scores = {name: torch.zeros_like(p) for name, p in reference.named_parameters() if name.endswith("down_proj")}
    for sample in tiny.TokenData(samples=4):
        reference.zero_grad()
        reference(sample["input_ids"][None], labels=sample["labels"][None]).loss.backward()
        for name in scores:
            scores[name] += dict(reference.named_parameters())[name].grad.square()
    initialize_support(model, data)
    for layer in adapter_layers(model):
        count = layer.units("default").numel()
        best = scores[layer.module_name].flatten().topk(count).indices.sort().values
        assert torch.isin(layer.units("default").long(), best).float().mean() > 0.99
    waiting = adapted(criterion="activation", granularity="column", density=0.2)
    with pytest.raises(ValueError, match=r"experts\..*keeps that to itself.*target_parameters"):
        initialize_support(waiting, data)


def test_nobody_sees_other_weights_in_the_module_while_it_runs():
    model = random_values(adapted())
    experts = model.base_model.model.model.layers[0].mlp.experts.base_layer
    held, seen = experts.gate_up_proj, []

    class Watched(nn.SiLU):
        def forward(self, x):
            reader = threading.Thread(target=lambda: seen.append(experts.gate_up_proj is held))
            reader.start()
            reader.join()
            return super().forward(x)

    experts.act_fn = Watched()
    model(IDS)
    assert seen
    assert all(seen)


def test_a_forward_that_is_bound_to_the_module_sees_the_adapter():
    # As accelerate's hooks leave it.
    model = random_values(adapted()).eval()
    expected = model(IDS).logits
    experts = model.base_model.model.model.layers[0].mlp.experts.base_layer
    experts.forward = experts.forward
    assert torch.equal(model(IDS).logits, expected)


def test_patches_of_experts_are_in_the_checkpoints_names(tmp_path):
    model = random_values(adapted()).eval()
    mixtral().save_pretrained(tmp_path / "base")
    stored = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert any("w1" in name for name in stored), "transformers takes experts apart when it saves them"
    export_patch(model, tmp_path / "patch", base=tmp_path / "base")
    base = MixtralForCausalLM.from_pretrained(tmp_path / "base")
    apply_patch(base, tmp_path / "patch")
    assert torch.equal(base.eval()(IDS).logits, merge_to_dense(model)(IDS).logits)


REFUSED = {
    "a linear layer's weight": (mixtral, {"target_parameters": ["q_proj.weight"]}, r"q_proj.weight.*target_modules"),
    "an embedding": (mixtral, {"target_parameters": ["embed_tokens.weight"]}, "embed_tokens.weight.*Embedding"),
    "a vector": (mixtral, {"target_parameters": ["norm.weight"]}, r"shape \(16,\)"),
    "dropout": (mixtral, {"r": 2, "lora_dropout": 0.1}, "lora_dropout=0.1.*target_parameters"),
    "a diagonal over experts": (
        mixtral, {"granularity": "diagonal", "density": 1.0, "diagonal_blocks": 4}, "diagonal.*target_parameters"
    ),
    "blocks over two experts": (mixtral, {"granularity": "block", "block_size": 3}, "block"),
    "a pattern for a name": (mixtral, {"target_parameters": ["experts.*"]}, "target_parameters.*no module name"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_a_layer_changes(case):
    make, options, message = REFUSED[case]
    base = make()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        adapted(lambda dtype: base, **options)
    assert [name for name, _ in base.named_modules()] == before


def test_what_cannot_be_had_of_experts_says_so(tmp_path):
    model = random_values(adapted()).eval()
    with pytest.raises(ValueError, match=r"adapter_names.*experts\.gate_up_proj"):
        model(IDS, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj.*merge_to_dense"):
        export_lora(model, tmp_path / "lora", rank=2)
    base = mixtral()
    parametrize.register_parametrization(base.model.layers[0].mlp.experts, "down_proj", nn.Identity())
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj.*parametrization"):
        get_peft_model(base, SparseLoraConfig(r=0, density=0.1, target_modules=[], target_parameters=EXPERTS))


def test_names_without_a_parameter_and_experts_left_out_are_warned_of(recwarn):
    adapted(target_parameters=["experts.down_proj", "experts.up_porj"], target_modules="all-linear")
    said = [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    assert any("target_parameters has 'experts.up_porj'" in text for text in said)
    left_out = next(text for text in said if "left out" in text)
    assert "2 parameters" in left_out
    assert "target_parameters=['experts.gate_up_proj']" in left_out


def test_parameters_heed_excluded_names_and_layer_numbers():
    model = adapted(layers_to_transform=[1], exclude_modules=["experts.down_proj"])
    assert [layer.module_name for layer in adapter_layers(model)] == ["model.layers.1.mlp.experts.gate_up_proj"]


def test_a_second_adapter_on_a_linear_layer_of_an_experts_parameters_name():
    model = adapted(qwen)
    model.add_adapter("more", SparseLoraConfig(r=0, density=0.1, target_modules=["down_proj"]))
    more = [layer.module_name for layer in adapter_layers(model, adapter_name="more")]
    assert more == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_expert.down_proj"]


def test_trained_numbers_are_counted_and_copies_train_on_their_own():
    model = adapted(r=0, density=0.1)
    expected = 2 * (int(0.1 * 4 * 64 * 16) + int(0.1 * 4 * 16 * 32))
    assert model.get_nb_trainable_parameters()[0] == expected
    twin = copy.deepcopy(random_values(model)).eval()
    before = model.eval()(IDS).logits
    random_values(twin, seed=9)
    assert torch.equal(model(IDS).logits, before)
    assert not torch.equal(twin(IDS).logits, before)


def kept_bytes(model, monkeypatch, outside):
    """Bytes that autograd keeps of a forward pass, parameters aside: counted from outside, where every tensor is asked
    for, or within the hosts' own hooks, which are then the only ones that are asked."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def count(packed):
        if isinstance(packed, torch.Tensor) and packed.untyped_storage().data_ptr() not in own:
            kept[packed.untyped_storage().data_ptr()] = packed.untyped_storage().nbytes()
        return packed

    hooks = torch.autograd.graph.saved_tensors_hooks
    with monkeypatch.context() as patched:
        if outside:
            with hooks(count, lambda packed: packed):
                loss = model(IDS, labels=IDS).loss
        else:
            counting = lambda pack, unpack: hooks(lambda tensor: count(pack(tensor)), unpack)  # noqa: E731
            patched.setattr(torch.autograd.graph, "saved_tensors_hooks", counting)
            loss = model(IDS, labels=IDS).loss
    return sum(kept.values()), loss


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_adapted_copy_of_the_experts_is_kept_for_the_backward_pass(implementation, monkeypatch):
    # With 16 times the experts an activation is small beside them.
    model = adapted(lambda dtype: filled(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=64)), dtype))
    model.config._experts_implementation = implementation
    experts = sum(p.nbytes for name, p in plain_parameters(model) if "experts." in name)
    random_values(model)
    gradients = []
    for outside, fits in ((True, lambda kept: kept > 0.9 * experts), (False, lambda kept: 0 < kept < 0.3 * experts)):
        kept, loss = kept_bytes(model, monkeypatch, outside)
        assert fits(kept), (outside, kept, experts)
        model.zero_grad()
        loss.backward()
        gradients.append([layer.sparse_lora_values["default"].grad.clone() for layer in adapter_layers(model)])
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*gradients, strict=True))


def test_a_backward_pass_after_a_change_says_so():
    model = random_values(adapted())
    loss = model(IDS, labels=IDS).loss
    random_values(model, seed=2)
    with pytest.raises(RuntimeError, match=r"experts\.(gate_up|down)_proj' was changed between a forward pass"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_give_the_gradients_of_plain_ones(reentrant):
    found = []
    for checkpointing in (False, True):
        model = random_values(adapted(target_modules=["q_proj"])).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad for _, p in model.named_parameters() if p.grad is not None])
    assert found[0]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_experts_beside_layers_in_4_bits_train_and_load(tmp_path):
    from transformers import BitsAndBytesConfig

    mixtral().save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def make(dtype=None):
        return MixtralForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=nf4, device_map="cpu", dtype=torch.float32
        )

    model = adapted(make, target_modules=["q_proj"])
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    start = {key: p.clone() for key, p in model.named_parameters() if p.requires_grad}
    tiny.train(model, tmp_path / "run", 3)
    assert all(not torch.equal(value, dict(model.named_parameters())[key]) for key, value in start.items())
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(make(), tmp_path / "saved").eval()
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
