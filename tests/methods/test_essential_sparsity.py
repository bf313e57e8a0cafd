"""One-shot pruning that leaves no trace, and the curve it draws: the paper's protocol against plain torch."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model
from ties import priority
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig, LlamaForCausalLM

from hf_sparse_peft import Global, SparseLoraConfig, methods
from hf_sparse_peft.methods import EssentialSparsity, essential_sparsity, one_shot_pruned
from hf_sparse_peft.pruning.removal.sparsity_curve import two_segment_knee
from hf_sparse_peft.sparsity import stream_seed

IDS = torch.arange(12).view(1, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny.llama().save_pretrained(path)
    return path


def load(folder, kind):
    options = {}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = LlamaForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as the package does: no repacking in a forward
    return model


def linears(model):
    """The prunable set by definition: q, k, v, o, gate, up, down."""
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2].endswith("_proj")}


def weights(model):
    """Float64 copies of the prunable weights, dequantised where they are packed."""
    found = {}
    for name, module in linears(model).items():
        weight = module.weight
        if hasattr(weight, "quant_state"):
            import bitsandbytes as bnb

            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        found[name] = weight.detach().double().clone()
    return found


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def smallest_everywhere(found, share):
    """Which entries a global threshold removes, by sorting all of them together, ties by priority."""
    everything = torch.cat([weight.abs().flatten() for weight in found.values()])
    drawn = [priority(stream_seed(0, name), unit) for name, weight in found.items() for unit in range(weight.numel())]
    order = np.lexsort((-np.array(drawn), everything.numpy()))
    gone = torch.zeros(everything.numel(), dtype=torch.bool)
    gone[order[: round(share * everything.numel())].copy()] = True
    parts = gone.split([weight.numel() for weight in found.values()])
    return {name: part.view(found[name].shape) for name, part in zip(found, parts, strict=True)}


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_global_pruning_is_that_of_one_sorted_list_and_leaves_no_trace(kind, folder):
    model = load(folder, kind)
    before, whole, found = bits(model), logits(model), weights(model)
    for share in (0.3, 0.7):
        gone = smallest_everywhere(found, share)
        twin = load(folder, "fp32")
        for name, module in linears(twin).items():
            module.weight.data = (found[name] * ~gone[name]).float()
        with one_shot_pruned(model, share) as zero_fractions:
            total = sum(part.sum() for part in gone.values())
            assert total == round(share * sum(weight.numel() for weight in found.values()))
            if kind == "fp32":
                assert zero_fractions == pytest.approx({n: part.double().mean().item() for n, part in gone.items()})
                for name, module in linears(model).items():
                    assert torch.equal(module.weight == 0, gone[name])
            torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-5)
    assert same(before, bits(model))
    assert torch.equal(whole, logits(model))
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("scope", ["global", "layer", "random", "erdos_renyi", "n:m"])
def test_counts_nesting_identity_and_what_is_left_out(scope, folder):
    model = load(folder, "fp32")
    before = bits(model)
    zeros, shares = {}, (0.0, 0.25, 0.5, 0.75)
    total = sum(module.weight.numel() for module in linears(model).values())
    for share in shares:
        with one_shot_pruned(model, share, scope, seed=3):
            zeros[share] = {name: module.weight.detach() == 0 for name, module in linears(model).items()}
            outside = {name: tensor for name, tensor in model.state_dict().items() if "_proj" not in name}
            assert same(outside, before)
            if share == 0:
                assert same(before, bits(model))
    for share in shares:
        assert sum(int(mask.sum()) for mask in zeros[share].values()) == round(share * total)
        if scope in ("layer", "n:m"):
            assert all(mask.double().mean() == share for mask in zeros[share].values())
        if scope == "n:m":
            assert all((mask.view(-1, 4).sum(1) == 4 * share).all() for mask in zeros[share].values())
    for smaller, larger in pairwise(shares):
        assert all((zeros[larger][name] | ~zeros[smaller][name]).all() for name in zeros[larger])


def test_n_m_keeps_the_largest_of_each_group(folder):
    model = load(folder, "fp32")
    found = weights(model)
    with one_shot_pruned(model, 0.5, "n:m", group=4):
        for name, module in linears(model).items():
            groups = found[name].abs().view(-1, 4)
            keep = groups >= groups.sort(1).values[:, 2:3]
            assert torch.equal((module.weight != 0).view(-1, 4), keep)


def test_a_scaled_matrix_loses_less_under_the_global_rule_and_the_same_under_the_layer_rule(folder):
    model = load(folder, "fp32")
    name = "model.layers.0.mlp.up_proj"
    lost = {}
    for factor in (1, 10):
        with torch.no_grad():
            linears(model)[name].weight.mul_(factor)
        for scope in ("global", "layer"):
            with one_shot_pruned(model, 0.5, scope) as zeros:
                lost[scope, factor] = zeros[name]
    assert lost["global", 10] < lost["global", 1] / 2
    assert lost["layer", 10] == lost["layer", 1] == 0.5


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_an_exception_in_the_block_brings_every_bit_back(kind, folder):
    model = load(folder, kind)
    before, whole = bits(model), logits(model)
    with pytest.raises(ArithmeticError), one_shot_pruned(model, 0.5):
        raise ArithmeticError
    assert same(before, bits(model))
    assert torch.equal(whole, logits(model))


def test_bf16_and_negative_zero_come_back(folder):
    model = load(folder, "fp32").to(torch.bfloat16)
    with torch.no_grad():
        linears(model)["model.layers.0.mlp.up_proj"].weight[0, :5] = -0.0
    before = {name: tensor.view(torch.int16) for name, tensor in bits(model).items() if tensor.dtype == torch.bfloat16}
    with one_shot_pruned(model, 0.5):
        pass
    assert same(before, {n: t.view(torch.int16) for n, t in model.state_dict().items() if n in before})


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_the_method_trains_exactly_what_pruning_removes(kind, folder):
    model = load(folder, kind)
    gone = smallest_everywhere(weights(model), 0.25)
    config = methods.get("essential-sparsity", sparsity=0.25, target_modules="all-linear").config
    adapted = get_peft_model(model, config)
    supports = {layer.module_name: layer.units("default") for layer in adapted.modules() if hasattr(layer, "units")}
    for name, mask in gone.items():
        flat = torch.zeros(mask.numel(), dtype=torch.bool)
        flat[supports[name].long()] = True
        assert torch.equal(flat, mask.flatten())


def test_removed_weights_stay_zero_when_the_kept_ones_are_fine_tuned(folder):
    model = load(folder, "fp32")
    names = linears(model)
    with one_shot_pruned(model, 0.5):
        zero = {name: module.weight.detach() == 0 for name, module in names.items()}
        kept = {"criterion": "magnitude", "budget": Global(0.5), "target_modules": "all-linear"}
        adapted = get_peft_model(model, SparseLoraConfig(r=0, **kept))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for _ in range(5):
            adapted(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.merge_adapter()
        for layer in adapted.modules():
            if hasattr(layer, "sparse_lora_values"):
                merged = layer.base_layer.weight
                mask = zero[layer.module_name]
                assert not merged[mask].any()
                assert merged[~mask].count_nonzero() == (~mask).sum()
        adapted.unmerge_adapter()


def test_heads_and_pooler_are_not_pruned():
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, num_labels=3
    )
    with one_shot_pruned(BertForSequenceClassification(config), 0.5) as zeros:
        assert sorted(name.rpartition("encoder.layer.0.")[2] for name in zeros) == sorted(
            [
                "attention.output.dense", "attention.self.key", "attention.self.query", "attention.self.value",
                "intermediate.dense", "output.dense",
            ]
        )  # fmt: skip


# The curve


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_sweep_asks_the_pruned_model_and_gives_it_back(kind, folder):
    model = load(folder, kind)
    before, whole = bits(model), logits(model)
    found = essential_sparsity(
        model, lambda m: torch.cosine_similarity(logits(m).flatten(), whole.flatten(), dim=0), show_progress=False
    )
    assert found.sparsities == tuple(step / 10 for step in range(10))
    assert found.quality[0] == pytest.approx(1, abs=1e-5)
    assert all(later < earlier + 0.02 for earlier, later in pairwise(found.quality))
    assert found.quality[-1] < 0.95
    assert set(found.zero_fractions) == set(linears(model))
    assert same(before, bits(model))


def curve(quality, sparsities=None, **options):
    sparsities = sparsities or tuple(step / 10 for step in range(len(quality)))
    return EssentialSparsity("global", sparsities, tuple(quality), {"a": (0.0,) * len(quality)}, **options)


def test_drop_point_is_the_largest_share_with_99_percent_of_the_quality():
    assert curve([0.8, 0.81, 0.795, 0.78, 0.3]).drop_point == 0.2
    assert curve([0.8, 0.7, 0.795, 0.3]).drop_point == 0.2  # largest, not first
    assert curve([2.0, 2.01, 2.03, 4.0], higher_is_better=False).drop_point == 0.1  # a loss: 2 / 2.03 < 0.99
    assert curve([0.8, 0.75], tolerance=0.9).drop_point == 0.1


def test_knee_is_where_two_lines_fit_best():
    xs = [step / 10 for step in range(10)]
    for at in (3, 5, 7):
        ys = [1 - 0.01 * x if x <= xs[at] else 1 - 0.01 * xs[at] - 2 * (x - xs[at]) for x in xs]
        assert two_segment_knee(xs, ys) == xs[at]
    draw = np.random.default_rng(0)
    noisy = draw.normal(size=10).tolist()

    def error(part):
        return np.polyfit(xs[part], noisy[part], 1, full=True)[1].sum()

    errors = [error(slice(0, at + 1)) + error(slice(at, None)) for at in range(1, 9)]
    assert two_segment_knee(xs, noisy) == xs[1 + int(np.argmin(errors))]
    assert two_segment_knee(xs[:3], noisy[:3]) is None


def test_picture_and_json_are_written(tmp_path):
    main, other = curve([1, 0.995, 0.9, 0.5]), curve([1, 0.6, 0.3, 0.1])
    main.plot(tmp_path / "curve.png", other)
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    main.save(tmp_path / "curve.json")
    saved = json.loads((tmp_path / "curve.json").read_text())
    assert (saved["drop_point"], saved["scope"]) == (0.1, "global")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "structured"}, "scope='structured' is unknown"),
        ({"sparsities": [0.1, 0.5]}, "must have 0 among them"),
        ({"sparsities": [0, 1.0]}, r"sparsity=1.0 is not a fraction in \[0, 1\)"),
        ({"scope": "n:m", "sparsities": [0, 0.3]}, "sparsity=0.3 removes 1.2 of every 4"),
        ({"scope": "n:m", "group": 5}, "groups of 5 do not divide the 32 inputs"),
        ({"target_modules": ["nothing"]}, "matches no linear layer"),
        ({"evaluate": lambda model: 0.0}, "gave 0.0 at sparsity 0"),
        ({"evaluate": lambda model: float("nan")}, "gave nan"),
    ],
)
def test_bad_input_is_named(options, message, folder):
    options = {"evaluate": lambda model: 1.0, "show_progress": False, **options}
    with pytest.raises(ValueError, match=message):
        essential_sparsity(load(folder, "fp32"), **options)


def test_a_method_without_free_weights_is_refused():
    with pytest.raises(ValueError, match="sparsity=0"):
        methods.get("essential-sparsity", sparsity=0)
