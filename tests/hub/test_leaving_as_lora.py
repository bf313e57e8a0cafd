"""Methods whose ranks move leave as plain LoRA that peft alone loads: ranks compacted, gate, masks and scale folded."""

from __future__ import annotations

import json

import processes
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file, save_file

from hf_sparse_peft import Allocate, AverageRank, Fraction, SparseLoraConfig, hub, methods
from hf_sparse_peft.rules import GrowRank, Orthogonality, SampleRank, StableRank
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.upstream import upstream_layers

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 8
TOKENS = torch.randint(1, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))

METHODS = {
    "adalora": {"r": 2, "schedule": [Allocate(budget=AverageRank(1), initial_warmup=0.1, final_warmup=0.2, every=2)]},
    "sora": {"r": 4, "weight": 10.0},
    "dylora": {"r": 4, "schedule": [SampleRank(final_rank=3)]},
    "increlora": {"r": 4, "schedule": [GrowRank(AverageRank(2), modules=2, every=1, warmup=1), Orthogonality(0.1)]},
    "adalora-peft": {"init_r": 3, "target_r": 1, "every": 2, "tfinal": 2},
    "eva": {"r": 2, "lora_alpha": 3},
    "cuttlefish": {"r": 4, "schedule": [StableRank(1, window=2, last=2, threshold=10.0, first=1)]},
    "maestro": {"r": 4, "weight": 2.0, "every": 2},
    "joint-budget": {"r": 4, "density": 0.05, "fraction": 0.4},
    "gora": {"r": 3, "steps": 3, "least": 1},
    "capaboost": {"r": 2},
    "mosa": {"r": 2, "experts": 2},
}
TINY_CORES = {
    "lora-xs": {}, "lora-sb": {"step_size": 1e-3, "examples": 8}, "svfit": {}, "nola": {"k": 8}, "loldu": {},
    "lora-mini": {"inner": 6}, "edora": {}, "lamda": {}, "sharelora": {}, "mos": {"shards": 2},
    "lori": {},
    "s2-lora": {"weight": 0.4},
}  # fmt: skip
METHODS |= {name: {"r": 3, **options} for name, options in TINY_CORES.items()}
RANKS = {"dylora": {3}, "capaboost": {4}, "mosa": {2}, **{name: {3} for name in TINY_CORES if name != "s2-lora"}}
"""Ranks of all modules, where the method's options say them."""

LOAD_WITH_PEFT_ALONE = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
root, names = sys.argv[1], sys.argv[2:]
tokens, found = load_file(f"{root}/tokens.safetensors")["tokens"], {}
for name in names:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{root}/base"), f"{root}/{name}").eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    expected = load_file(f"{root}/{name}.logits.safetensors")["logits"]
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    ranks = {n: m.lora_A["default"].out_features for n, m in layers.items()}
    found[name] = [(logits - expected).abs().max().item(), ranks]
assert not any(name.startswith("hf_sparse_peft") for name in sys.modules)
print(json.dumps(found))
"""


def base():
    return tiny.llama(attention_bias=True)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


def trained(name, out):
    """A model that the method trained for some steps, so that its ranks moved."""
    torch.manual_seed(0)
    method = methods.get(name, target_modules=TARGETS, **METHODS[name])
    model = get_peft_model(base(), method.config)
    args = tiny.arguments(out, STEPS, learning_rate=3e-2)
    trainer = method.trainer_class(
        model=model, args=args, train_dataset=tiny.TokenData(), callbacks=method.callbacks(model),
        optimizers=(method.optimizer(model, args), None),
    )  # fmt: skip
    trainer.train()
    return model


def names_of(model):
    return [layer.module_name for layer in adapter_layers(model)]


def gated_ranks(model):
    """Components whose gate is not 0, or of an adapter without gates all, where there are any."""
    gates = {}
    for layer in adapter_layers(model):
        held = getattr(layer, "sparse_lora_gate", getattr(layer, "spectral_lora_core", None))
        gates[layer.module_name] = (
            held["default"] if "default" in held else torch.ones(len(layer.sparse_lora_A["default"]))
        )
    for name, layer in upstream_layers(model):
        gates[name] = layer.lora_E["default"] if hasattr(layer, "lora_E") else torch.ones(layer.r["default"])
    counts = {name: int((gate != 0).sum()) for name, gate in gates.items()}
    return {name: count for name, count in counts.items() if count}


@torch.no_grad()
def without_support(model):
    """The low-rank half alone."""
    for layer in adapter_layers(model):
        if "default" in getattr(layer, "sparse_lora_values", ()):
            layer.sparse_lora_values["default"].zero_()
    return model


def heads_and_biases():
    """An adapter with another name, rsLoRA's scale, a head and biases; one module is dead."""
    torch.manual_seed(1)
    config = SparseLoraConfig(
        r=3, lora_alpha=5, density=0.0, use_rslora=True, bias="all", modules_to_save=["lm_head"],
        target_modules=TARGETS, task_type="CAUSAL_LM", schedule=[Allocate(budget=AverageRank(2))],
    )  # fmt: skip
    model = get_peft_model(base(), config, adapter_name="mine")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        adapter_layers(model)[0].sparse_lora_gate["mine"].zero_()
        adapter_layers(model)[1].sparse_lora_gate["mine"][0] = 0
    return model


def write_expected(root, name, model):
    save_file({"logits": logits(model)}, root / f"{name}.logits.safetensors")


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in METHODS if name not in TINY_CORES or name in ("lora-xs", "mos")], id="ranks"),
        pytest.param(list(TINY_CORES), id="small cores", marks=pytest.mark.slow),
    ],
)
def test_every_method_leaves_as_a_lora_that_peft_alone_loads(names, tmp_path):
    base().save_pretrained(tmp_path / "base")
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    ranks = {}
    for name in names:
        model = trained(name, tmp_path / "run")
        ranks[name] = gated_ranks(model) if name not in RANKS else dict.fromkeys(names_of(model), *RANKS[name])
        hub.export_lora(model, tmp_path / name, only="low_rank" if name == "joint-budget" else None)
        write_expected(tmp_path, name, without_support(model))
        # Updates of S2-LoRA are coefficients times two factors of N(0, 0.02^2).
        assert not torch.allclose(logits(model), logits(base()), atol=1e-4 if name == "s2-lora" else 1e-2)
    model = heads_and_biases()
    ranks["mine"] = {n: 2 if number == 0 else 3 for number, n in enumerate(names_of(model)[1:])}
    ranks["uniform"] = dict.fromkeys(ranks["mine"], 3)
    for name, options in (("mine", {}), ("uniform", {"uniform_rank": True})):
        hub.export_lora(model, tmp_path / name, "mine", **options)
        write_expected(tmp_path, name, model)
    rows = filled(r=3, density=0.1, granularity="row")
    ranks["rows"] = hub.export_lora(rows, tmp_path / "rows").ranks
    write_expected(tmp_path, "rows", rows)
    done = processes.python("-c", LOAD_WITH_PEFT_ALONE, tmp_path, *ranks, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: one[1] for name, one in found.items()} == ranks
    assert max(one[0] for one in found.values()) < 1e-5, found
    # Ranks moved: modules differ, some of them left.
    assert any(len(ranks[name]) < 6 for name in names) or set(names) <= set(TINY_CORES)
    moving = ("adalora", "adalora-peft", "eva", "gora", "sora", "increlora", "cuttlefish", "maestro", "joint-budget")
    for name in set(moving) & set(names):
        assert len(set(ranks[name].values())) > 1, name


def deltas(model):
    return {layer.module_name: layer.get_delta_weight("default") for layer in adapter_layers(model)}


def products(folder):
    """B A of each module of an exported LoRA, whose scale is 1."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


def filled(**options):
    torch.manual_seed(1)
    model = get_peft_model(base(), SparseLoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def test_the_halves_of_a_joint_budget_leave_as_lora_and_shira_and_add_up(tmp_path):
    model = filled(r=3, density=0.02, schedule=[Allocate(("rank", "support"), Fraction(0.5), unit_score="mean")])
    with pytest.raises(ValueError, match=r"only='low_rank' exports the factors alone"):
        hub.export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"only='support' here and only='low_rank' in export_lora"):
        hub.export_shira(model, tmp_path / "shira")
    with pytest.raises(ValueError, match=r"only='entries' is no half"):
        hub.export_lora(model, tmp_path / "lora", only="entries")
    done = hub.export_lora(model, tmp_path / "lora", only="low_rank")
    assert set(done.errors.values()) == {0.0}
    hub.export_shira(model, tmp_path / "shira", only="support")
    shira = PeftModel.from_pretrained(base(), tmp_path / "shira")
    low_rank = products(tmp_path / "lora")
    for name, delta in deltas(model).items():
        entries = shira.get_submodule(f"base_model.model.{name}").get_delta_weight("default").to_dense()
        torch.testing.assert_close(low_rank[name] + entries, delta, atol=1e-6, rtol=1e-6)


def test_rank_cuts_one_half_without_the_other(tmp_path):
    model = filled(r=3, density=0.02)
    with pytest.warns(UserWarning, match="cut updates to rank 2"):
        hub.export_lora(model, tmp_path, only="low_rank", rank=2)
    for layer in adapter_layers(model):
        factors = layer.pieces("default")[0]
        exact = factors.scale * factors.B.double() @ factors.A.double()
        left = (products(tmp_path)[layer.module_name].double() - exact).norm()
        torch.testing.assert_close(left, torch.linalg.svdvals(exact)[2:].norm(), rtol=1e-4, atol=1e-6)


def test_a_uniform_rank_below_1_is_refused(tmp_path):
    with pytest.raises(ValueError, match="uniform_rank=-1 is no rank"):
        hub.export_lora(filled(r=3, density=0.0), tmp_path, uniform_rank=-1)


FORMS = {
    "gated": {"r": 3, "density": 0.0, "schedule": [Allocate(budget=AverageRank(2))]},
    "rslora": {"r": 3, "density": 0.0, "use_rslora": True, "rank_pattern": {"q_proj": 1}},
    "columns": {"r": 2, "density": 0.1, "granularity": "column"},
    "head": {"r": 2, "density": 0.0, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [8, 0.9999999])
def test_upstreams_own_conversion_takes_our_adapters(form, rank, tmp_path):
    model = filled(**FORMS[form])
    if form == "gated":
        with torch.no_grad():
            adapter_layers(model)[0].sparse_lora_gate["default"].zero_()
    assert model.supports_lora_conversion()
    config, tensors = convert_to_lora(model, rank=rank)
    assert type(config) is LoraConfig
    save_as_lora(tmp_path, model, rank=rank)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    for name, delta in deltas(model).items():
        torch.testing.assert_close(products(tmp_path)[name], delta, atol=1e-4, rtol=1e-4)
    assert len([key for key in tensors if "lora_A" in key]) == len(deltas(model))


def upstream_model(adapter_name="default", **options):
    torch.manual_seed(1)
    model = get_peft_model(base(), LoraConfig(r=3, target_modules=TARGETS, **options), adapter_name=adapter_name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def test_an_upstream_lora_of_several_ranks_leaves_with_one_rank_and_its_head(tmp_path):
    model = upstream_model("mine", rank_pattern={"q_proj": 1}, use_rslora=True, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["mine"].weight.mul_(1.5)
    done = hub.export_lora(model, tmp_path, "mine", uniform_rank=True)
    assert set(done.ranks.values()) == {3}
    assert not any(
        "mine" in key or "lora_A.weight.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["use_rslora"]) == (3, {}, False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "is more than B A"),
        ({"init_lora_weights": "pissa"}, "'pissa' has changed the base weights"),
    ],
)
def test_upstream_adapters_that_are_no_plain_lora_are_refused_by_name(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        hub.export_lora(upstream_model(**options), tmp_path / "lora")
