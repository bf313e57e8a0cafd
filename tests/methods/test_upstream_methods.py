"""Methods that upstream peft ships, by name: the config they are, how many numbers train, and our rules on them."""

import math

import peft
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from hf_sparse_peft import AdaptiveRowScale, AlternateModules, Controller, GradientNoise, Regrow, SampleLayers, methods
from hf_sparse_peft.methods import upstream
from hf_sparse_peft.training import RuleRunner, UpstreamStartCallback
from hf_sparse_peft.tuners.upstream import upstream_layers, upstream_spaces

R, K, BANK, PIECE = 4, 2, 16, 8
OPTIONS = {
    "adalora-peft": {"init_r": R, "target_r": 2, "every": 1},
    "gralora": {"k": K},
    "vb-lora": {"num_vectors": BANK, "vector_length": PIECE},
    "ln-tuning": {},
    "randlora": {"save_projection": True},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
SHAPES = [(32, 32), (16, 32), (32, 64)]  # rows, columns
LAYERS = 4

COUNTS = {
    **dict.fromkeys(("rslora", "pissa", "eva", "lora-ga", "gralora", "hira", "hut-like"), lambda m, n: R * (m + n)),
    "dora": lambda m, n: R * (m + n) + m,
    "adalora-peft": lambda m, n: R * (m + n + 1),
    "loha": lambda m, n: 2 * R * (m + n),
    "miss": lambda m, n: R * m,
    "randlora": lambda m, n: math.ceil(min(m, n) / R) * (R + min(m, n)),
    "vb-lora": lambda m, n: R * (m + n) // PIECE * BANK,
}
"""Trained numbers of one module, from each method's equations; a bank is counted once, below."""
SHARED = {"vb-lora": BANK * PIECE}
CHANGES_THE_OUTPUT = {"vb-lora": "the bank and its mixture are drawn, and B is not 0 (as published)"}
WRITES_THE_BASE = {"lora-ga"}
"""Trained on a base that upstream changed, which the file does not tell."""
CHANGES_THE_BASE = {"loraprune", "light-peft", "transfer-pruning"}
"""A LoRA beside masks on the base: in tests/pruning."""
ALL = [name for name in methods.names(upstream=True) if name not in CHANGES_THE_BASE]


def built(name, **options):
    own = {"r": R} if name not in ("adalora-peft", "ln-tuning") else {}
    targets = {} if name == "ln-tuning" else {"target_modules": TARGETS}
    return methods.get(name, task_type="CAUSAL_LM", **{**own, **targets, **OPTIONS.get(name, {}), **options})


def adapted(name, **options):
    torch.manual_seed(0)
    method = built(name, **options)
    return get_peft_model(tiny.llama(layers=LAYERS), method.config), method


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(1, 11)[None]).logits


@pytest.mark.parametrize("name", ALL)
def test_a_row_is_upstreams_config_and_starts_at_the_base(name):
    model, method = adapted(name)
    assert type(method.config) is getattr(peft, method.info.upstream)
    same = torch.allclose(logits(model), logits(tiny.llama(layers=LAYERS)), atol=1e-5)
    assert same == (name not in CHANGES_THE_OUTPUT)
    assert [type(one) for one in method.callbacks(model)] == {
        "eva": [UpstreamStartCallback], "lora-ga": [UpstreamStartCallback], "adalora-peft": [RuleRunner],
    }.get(name, [])  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_numbers_train_as_the_equations_say(name):
    model, _ = adapted(name)
    expected = LAYERS * sum(COUNTS[name](m, n) for m, n in SHAPES) + SHARED.get(name, 0)
    assert model.get_nb_trainable_parameters()[0] == expected
    assert sum(space.unit_numel for space in module_spaces(model)) == expected - SHARED.get(name, 0)


def module_spaces(model):
    return [space for space in upstream_spaces(model)["default"] if space.kind == "module"]


def factor(layer, which):
    whole = getattr(layer, which)
    if "default" in whole:
        return whole["default"]
    return getattr(layer, f"{which}_a")["default"] @ getattr(layer, f"{which}_b")["default"]


def test_lokr_is_a_kronecker_product_of_the_smaller_factor_and_a_low_rank_one():
    model, _ = adapted("lokr", init_weights=False)
    for _, layer in upstream_layers(model):
        w1, w2 = (factor(layer, which) for which in ("lokr_w1", "lokr_w2"))
        expected = torch.kron(w1.double(), w2.double()) * layer.scaling["default"]
        torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, rtol=1e-5, atol=1e-6)


ALTERNATE = AlternateModules(
    period_steps=2, level="model", categories={"all": [*TARGETS, "norm", "input_layernorm", "post_attention_layernorm"]}
)


@pytest.mark.parametrize("name", ALL)
def test_alternating_modules_hold_half_of_them_still_and_the_adapter_is_saved(name, tmp_path):
    model, method = adapted(name, schedule=[ALTERNATE])
    seen = {}

    def begin(step, model, optimizer):
        seen["before"] = {space.name: copies(space) for space in module_spaces(model)}
        seen["shared"] = [p.detach().clone() for p in shared(model)]

    def end(step, model, optimizer):
        names = {space.name for space in module_spaces(model) if not equal(copies(space), seen["before"][space.name])}
        (runner,) = (one for one in callbacks if getattr(one, "rule", None) is not None)
        assert names == set(runner.events[-1]["trains"])
        assert 0 < len(names) < len(seen["before"])
        assert not any(torch.equal(p, old) for p, old in zip(shared(model), seen["shared"], strict=True))

    callbacks = method.callbacks(model)
    look = tiny.At(on_pre_optimizer_step=begin, on_optimizer_step=end)
    # AdaLoRA's masks act after the step, on modules held still too.
    data = {"per_device_train_batch_size": 8} if name == "eva" else {}
    tiny.train(model, tmp_path, 4, callbacks=[*callbacks, look], learning_rate=1e-2, weight_decay=0.1, **data)
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.llama(layers=LAYERS), tmp_path / "adapter")
    assert torch.allclose(logits(loaded), trained, rtol=0, atol=1e-5) == (name not in WRITES_THE_BASE)


def shared(model):
    own = {id(p) for space in module_spaces(model) for p in space.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in own]


def copies(space):
    return [p.detach().clone() for p in space.parameters()]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


SCALED = ("dora", "rslora", "pissa", "adalora-peft", "loha", "lokr", "gralora", "randlora")


@pytest.mark.parametrize("name", ALL)
def test_layer_sampling_acts_where_an_update_has_a_scale_and_is_refused_by_name_elsewhere(name, tmp_path):
    if name in ("eva", "lora-ga"):
        return  # LoRA, as dora
    model, method = adapted(name, schedule=[SampleLayers(0.5, 0.5, every=2)])
    callbacks = method.callbacks(model)
    if name not in SCALED:
        with pytest.raises(ValueError, match="no scaling that could be suppressed"):
            tiny.train(model, tmp_path, 2, callbacks=callbacks)
        return
    before = logits(model)
    tiny.train(model, tmp_path, 4, callbacks=callbacks, learning_rate=1e-2)
    assert any("losses" in event for event in callbacks[-1].events)
    assert not torch.equal(logits(model), before)


def test_a_rule_acts_on_upstreams_modules_in_a_loop_by_hand():
    model, _ = adapted("miss")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = tiny.TokenData()[0]["input_ids"][None]
    with Controller(model, optimizer, total_steps=4, rule=ALTERNATE) as rules:
        for _ in range(4):
            rules.before_step()
            model(input_ids=batch, labels=batch).loss.backward()
            assert sum(any(p.grad is not None for p in s.parameters()) for s in module_spaces(model)) == 6
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
        assert [len(event["trains"]) for event in rules.events] == [6, 6]


@pytest.mark.parametrize("rule", [AdaptiveRowScale(), GradientNoise()], ids=lambda rule: rule.part_type)
def test_rules_that_read_or_scale_the_update_of_our_layers_are_refused_on_upstreams(rule, tmp_path):
    model, method = adapted("rslora", schedule=[rule])
    with pytest.raises(ValueError, match="layer of upstream peft, which has no scaling"):
        tiny.train(model, tmp_path, 2, callbacks=method.callbacks(model))


def test_hut_like_multiplies_the_weight_and_its_gradients_are_those_of_the_hadamard_form(tmp_path):
    model, _ = adapted("hut-like")
    (layer,) = [m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.v_proj")]
    W, x = layer.get_base_layer().weight.data, torch.randn(7, 32)
    W[:, ::3] = 0.0
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x))
    A, B = layer.hira_A["default"], layer.hira_B["default"]
    A.data.normal_()
    B.data.normal_()
    a, b, w = A.detach().double(), B.detach().double(), W.double()
    torch.testing.assert_close(layer(x).double(), x.double() @ (w * (1 + b @ a)).t(), rtol=1e-4, atol=1e-4)
    dy = torch.randn(7, 16)
    layer(x).backward(dy)
    G = dy.double().t() @ x.double()
    torch.testing.assert_close(B.grad.double(), (G * w) @ a.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A.grad.double(), b.t() @ (G * w), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(B.grad.double(), G @ a.t(), rtol=1e-2)
    assert torch.linalg.matrix_rank(w * (b @ a)) > R
    before, expected = W.clone(), layer(x)
    model.merge_adapter()
    merged = layer.get_base_layer().weight
    assert not merged[:, ::3].any()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.data, before, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused_by_name(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="names no norm"):
        methods.get("ln-tuning", target_modules="all-linear")
    with pytest.raises(ValueError, match="AlternateModules twice"):
        methods.get("miss", schedule=[ALTERNATE, ALTERNATE])
    model, method = adapted("dora", schedule=[Regrow(every=20)])
    with pytest.raises(ValueError, match=r"acts on units of \['support'\], and no trained layer has any"):
        tiny.train(model, tmp_path, 4, callbacks=method.callbacks(model))
    monkeypatch.delattr(peft, "HiraConfig")
    with pytest.raises(ValueError, match=r"has no HiraConfig\. peft 0\.21\.2 has it"):
        upstream.upstream_config("HiraConfig")
