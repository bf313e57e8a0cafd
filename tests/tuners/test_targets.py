"""Targets that no adapter can work on are refused before a layer changes; what is left out is named."""

import re
import warnings

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
CONFIGS = {
    "sparse": lambda **options: SparseLoraConfig(r=2, density=0.1, **options),
    "kernel": lambda **options: KernelLoraConfig(r=4, **options),
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def qwen():
    """Layer 0 is dense, layer 1 has experts and a shared one."""
    more = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **more, num_experts_per_tok=2, mlp_only_layers=[0]))


def said(make_model, config):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(make_model(), config)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "w1"],
        "all-linear",
        ["q_proj", "gate_up_proj"],
        r".*\.(q_proj|gate_proj|down_proj)",
        ["q_proj", "up_proj"],
    ],
    ids=str,
)
@pytest.mark.parametrize("make_model", [mixtral, qwen])
def test_experts_that_targets_ask_for_are_named_with_their_share_of_the_weights(make_model, targets, kind):
    model = make_model()
    layers = {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim > 1}
    experts = {n: p for n, p in layers.items() if p.ndim == 3}
    found = [text for text in said(make_model, CONFIGS[kind](target_modules=targets)) if "experts" in text]
    assert len(found) == 1
    assert next(iter(experts)) in found[0]
    assert f"{len(experts)} parameters" in found[0]
    share = 100 * sum(p.numel() for p in experts.values()) / sum(p.numel() for p in layers.values())
    assert abs(int(re.search(r"(\d+)%", found[0]).group(1)) - share) < 2  # the router, 2-D, is no linear layer


def test_experts_below_each_other_in_one_matrix_are_named():
    class ExpertMatrices(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(4 * 32, 16))

    def make_model():
        return nn.ModuleDict({"proj": nn.Linear(16, 16), "mlp": ExpertMatrices(), "conv": nn.Conv1d(4, 4, 3)})

    found = said(make_model, SparseLoraConfig(r=2, density=0.1, target_modules="all-linear"))
    assert len(found) == 1
    assert "'mlp.w1' (128, 16)" in found[0]
    assert "89%" in found[0]


def test_all_linear_names_the_attention_weights_that_are_no_linear_layers():
    config = SparseLoraConfig(r=2, density=0.1, target_modules="all-linear", exclude_modules=["out_proj"])
    found = said(Transformer, config)
    assert len(found) == 1
    assert "'block.self_attn', 'cross'" in found[0]


@pytest.mark.parametrize("make_model", [mixtral, tiny.llama])
def test_targets_without_experts_say_nothing(make_model):
    assert said(make_model, SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj", "v_proj"])) == []


def test_a_convolution_in_parts_is_no_expert():
    class Speech(nn.Module):  # wav2vec 2, HuBERT and WavLM keep the norm of their positional convolution apart
        def __init__(self):
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 4, groups=2), dim=2)
            self.layer = nn.Linear(8, 8)

    assert said(Speech, SparseLoraConfig(r=2, density=0.1, target_modules="all-linear")) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["q_proj", "query"]}, "'query'"),
        ({"target_modules": ["q_proj", "v_porj"]}, "'v_proj'"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj", "layers.7.q_proj"]},
            "layers.7.q_proj",
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 5]}, "[5]"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 4}}, "'k_proj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"layers.9": 4}}, "'layers.9'"),
        ({"target_modules": ["q_proj"], "granularity_pattern": {"o_proj": "row"}}, "'o_proj'"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_a_part_of_an_option_that_matches_nothing_is_named(options, named):
    found = said(tiny.llama, SparseLoraConfig(r=2, density=0.1, **options))
    assert len(found) == 1
    assert named in found[0]
    assert next(reversed(options)) in found[0]


def test_options_that_all_match_and_adapters_that_are_loaded_say_nothing(tmp_path):
    config = SparseLoraConfig(
        r=2, density=0.1, target_modules=["q_proj", "layers.1.mlp.down_proj"], layers_to_transform=[1],
        exclude_modules=["layers.0.self_attn.q_proj"], rank_pattern={r"layers\.1\..*": 3},
        granularity_pattern={"down_proj": "row"},
    )  # fmt: skip
    assert said(tiny.llama, config) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(mixtral(), SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj", "w1"])).save_pretrained(
            tmp_path
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(mixtral(), str(tmp_path))
    assert not [w for w in caught if "w1" in str(w.message) or "experts" in str(w.message)]


# Weights that are read without a call


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.block(x)
        return self.head(self.cross(x, x, x, need_weights=False)[0])


def mamba(cls, config_cls, **more):
    return cls(config_cls(vocab_size=64, hidden_size=16, num_hidden_layers=1, **more))


STATE_SPACE = {
    "mamba": lambda: mamba(MambaForCausalLM, MambaConfig, state_size=4, time_step_rank=4),
    "mamba2": lambda: mamba(Mamba2ForCausalLM, Mamba2Config, state_size=4, num_heads=4, head_dim=8, n_groups=1),
    "bamba": lambda: mamba(
        BambaForCausalLM, BambaConfig, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, attn_layer_indices=[],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("make_model", "targets"),
    [
        (Transformer, ["out_proj", "linear1"]),
        (Transformer, r".*(cross.out_proj|head)"),
        (STATE_SPACE["mamba"], ["in_proj", "dt_proj"]),
        *[(make, ["in_proj", "out_proj"]) for make in STATE_SPACE.values()],
    ],
    ids=["attention", "cross", "mamba-dt", *STATE_SPACE],
)
def test_layers_that_are_only_read_are_refused_before_anything_changes(make_model, targets, kind):
    model = make_model()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"(out|dt)_proj.*exclude_modules"):
        get_peft_model(model, CONFIGS[kind](target_modules=targets))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not getattr(model, "peft_config", None)


def test_the_mend_of_the_refusal_works():
    config = SparseLoraConfig(r=2, density=0.1, target_modules="all-linear", exclude_modules=["out_proj"])
    model = get_peft_model(Transformer(), config)
    assert [layer.module_name for layer in adapter_layers(model)] == ["block.linear1", "block.linear2", "head"]


def test_evaluation_of_a_torch_transformer_layer_has_the_adapter_in_it():
    """Its fused path for evaluation reads the weights of `linear1` and `linear2`."""
    config = SparseLoraConfig(r=0, density=0.5, target_modules=["linear1", "linear2"], init_weights=False)
    model, x = get_peft_model(Transformer(), config), torch.randn(2, 4, 16)
    trained = model.train()(x)
    with torch.no_grad():
        evaluated = model.eval()(x)
        with model.disable_adapter():
            base = model(x)
    torch.testing.assert_close(evaluated, trained)
    assert not torch.allclose(evaluated, base, atol=1e-3)


class Reader(nn.Module):
    """Reads the weight of `read` and calls `called`; `tower` is for inputs that never come."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.tower = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, other=None):
        x = nn.functional.linear(self.called(x), self.read.weight)
        return x if other is None else x + self.tower(other)


@pytest.mark.parametrize("door", ["second forward", "optimizer step"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_that_did_not_run_in_the_first_step_are_named_once(kind, door):
    model = get_peft_model(Reader(), CONFIGS[kind](target_modules=["called", "read", "tower"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train()
        for _ in range(3):
            model(torch.randn(2, 8)).sum().backward()
            if door == "optimizer step":
                optimizer.step()
                break
    found = [str(w.message) for w in caught if "did not run" in str(w.message)]
    assert len(found) == 1
    assert "'read', 'tower'" in found[0]
    assert "'called'" not in found[0]
    assert "2 of 3" in found[0]


def test_layers_injected_without_a_peft_model_are_named_after_the_first_optimizer_step():
    model = inject_adapter_in_model(SparseLoraConfig(r=2, density=0.1, target_modules=["called", "read"]), Reader())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(torch.randn(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match="1 of 2 layers .* did not run .* 'read'"):
        optimizer.step()


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_are_not_named_whatever_runs_them(reentrant, tmp_path):
    config = SparseLoraConfig(r=2, density=0.1, target_modules="all-linear")
    model = get_peft_model(tiny.llama(layers=1), config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.train(
            model, tmp_path, 2, gradient_checkpointing=True, gradient_accumulation_steps=2,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert not [w for w in caught if "did not run" in str(w.message)]


# Offload


def offloaded(door, folder):
    model = tiny.llama(layers=2)
    if door == "cpu_offload":
        cpu_offload(model)
    elif door == "disk_offload":
        disk_offload(model, str(folder))
    else:
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
        dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("door", ["cpu_offload", "disk_offload", "device_map"])
def test_an_offloaded_base_is_refused_by_name_before_anything_changes(door, kind, tmp_path):
    model = offloaded(door, tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj.*offload.*device_map"):
        get_peft_model(model, CONFIGS[kind](target_modules=["q_proj"]))
    assert not adapter_layers(model)


def test_a_model_offloaded_after_its_adapter_says_so():
    model = get_peft_model(tiny.llama(layers=1), SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"]))
    cpu_offload(model)
    with pytest.raises(ValueError, match="offload"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_layers_in_compiled_parts_are_not_called_idle():
    config = SparseLoraConfig(r=2, density=0.1, target_modules=["0", "1"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)
    model.base_model.model[0].compile(backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.train()(torch.randn(2, 8)).sum().backward()
    assert not [w for w in caught if "did not run" in str(w.message)]
