"""MoLoRA and MoV (Zadouri et al., 2024) and SiRA (Zhu et al., 2023) against their equations, in float64."""

import copy
import math

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from spectral_toolbox import close, random
from structured_toolbox import grads, held, on
from torch import nn

from hf_sparse_peft import BalanceLoss, Controller, Prune, StructuredConfig, SupportTelemetryCallback, callbacks_for
from hf_sparse_peft.hub import merge_to_dense
from hf_sparse_peft.rules.balance_loss import balance
from hf_sparse_peft.tuners.structured import LowRankExperts, ScaleExperts, structured_layers
from hf_sparse_peft.tuners.structured.form import Call, Site

W = random(6, 8)
X = random(5, 8, seed=3)


def softmax(logits):
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def mixture(x, tensors, gates, scale):
    """Token by token and expert by expert."""
    A, B = tensors["experts_a"], tensors["experts_b"]
    pairs = zip(x, gates, strict=True)
    return torch.stack([sum(g[e] * scale * B[:, e] @ (A[e] @ token) for e in range(len(A))) for token, g in pairs])


def routed(p, top_k, training=True, mask=None, **options):
    """Gates of tokens whose probabilities are p `[n, E]`."""
    p = torch.tensor(p)
    form = LowRankExperts(p.shape[-1], top_k, **options)
    tensors = {"router": p.log().t().contiguous(), "living": torch.ones(p.shape[-1], dtype=torch.uint8)}
    seen = []
    call = Call(Site("m", 1, len(p)), torch.float32, training, note=lambda _, t: seen.append(t), mask=mask)
    x = torch.eye(len(p))
    return form.route(x if mask is None else x[None], tensors, call), seen[0]


# MoLoRA, MoV


def test_molora_is_the_sum_over_experts_of_gate_times_lora_and_starts_as_the_base():
    _, (layer,) = on("molora", W, experts=3)
    assert torch.equal(layer(X), layer.base_layer(X))
    model, (layer,) = on("molora", W, fill=0.5, experts=3, r=2)
    tensors, x = held(layer), X.double()
    p = softmax(x @ tensors["router"].t())
    close(layer(X), x @ W.double().t() + mixture(x, tensors, p, 16 / 2))
    close(p.sum(-1), torch.ones(5).double(), 1e-12)
    assert (p[0] - p[1]).abs().max() > 1e-2
    merged = torch.einsum("ne,oer->nor", p, tensors["experts_b"]) @ torch.einsum("ne,erc->nrc", p, tensors["experts_a"])
    wrong = x @ W.double().t() + 8 * (merged @ x[..., None])[..., 0]
    assert (layer(X) - wrong).abs().max() > 0.1
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 2 * (6 + 8) + 3 * 8


def test_gradients_of_experts_and_router_are_those_of_the_equation_and_the_routers_is_0_at_first():
    model, (layer,) = on("molora", W, experts=3, r=2)
    layer(X).square().sum().backward()
    assert not grads(model)["router"].any()
    assert grads(model)["experts_b"].any()
    model, (layer,) = on("molora", W, fill=0.5, experts=3, r=2)
    dy = random(5, 6, seed=7)
    (layer(X) * dy).sum().backward()
    tensors = {name: t.requires_grad_() for name, t in held(layer).items()}
    p = softmax(X.double() @ tensors["router"].t())
    (mixture(X.double(), tensors, p, 8) * dy.double()).sum().backward()
    for name, grad in grads(model).items():
        close(grad, tensors[name].grad)


def test_one_expert_is_a_lora_and_order_of_experts_is_no_matter():
    _, (layer,) = on("molora", W, fill=0.5, experts=1, r=2)
    tensors = held(layer)
    close(layer(X), X.double() @ (W.double() + 8 * tensors["experts_b"][:, 0] @ tensors["experts_a"][0]).t())
    _, (layer,) = on("molora", W, fill=0.5, experts=3)
    before, order = layer(X), torch.tensor([2, 0, 1])
    for name, tensor in layer.form_tensors("default").items():
        if name in ("experts_a", "router"):
            tensor.data = tensor.data[order]
        elif name == "experts_b":
            tensor.data = tensor.data[:, order]
    close(layer(X), before.double())


@pytest.mark.parametrize("inputs", [False, True], ids=["output", "input"])
def test_mov_scales_by_the_mixed_vectors_what_its_router_reads(inputs):
    form = {"form": ScaleExperts(3, input_modules=["0"] if inputs else [])}
    _, (layer,) = on("mov", W, **form)
    assert torch.equal(layer(X), layer.base_layer(X))
    _, (layer,) = on("mov", W, fill=0.5, **form)
    tensors, a = held(layer), X.double() if inputs else X.double() @ W.double().t()
    a = softmax(a @ tensors["router"].t()) @ tensors["layernorm_vectors"] * a
    close(layer(X), a @ W.double().t() if inputs else a)


def test_mov_by_heads_has_one_router_for_all_of_them_and_vectors_of_each():
    _, (layer,) = on("mov", W, fill=0.5, form=ScaleExperts(3, head_size=2))
    tensors, y = held(layer), X.double() @ W.double().t()
    assert tensors["router"].shape == (3, 2)
    expected = torch.cat([
        softmax(y[:, h : h + 2] @ tensors["router"].t()) @ tensors["layernorm_vectors"][:, h : h + 2] * y[:, h : h + 2]
        for h in (0, 2, 4)
    ], -1)  # fmt: skip
    close(layer(X), expected)
    with pytest.raises(ValueError, match=r"head_size=4 does not divide the 6 outputs of 'lin\.0'"):
        on("mov", W, form=ScaleExperts(3, head_size=4))


def test_mov_of_equal_gates_and_top_k_scales_by_k_over_e_and_by_1_when_renormalised():
    for renormalise, factor in ((False, 0.5), (True, 1.0)):
        _, (layer,) = on("mov", W, form=ScaleExperts(4, 2, renormalise))
        layer.form_tensors("default")["router"].data.zero_()
        close(layer(X), factor * layer.base_layer(X).double())


# SiRA


def test_the_gates_of_the_worked_example():
    p = [[0.5, 0.3, 0.15, 0.05]]
    close(routed(p, 2)[0].gates, torch.tensor([[0.5, 0.3, 0, 0]]).double())
    close(routed(p, 2, renormalise=True)[0].gates, torch.tensor([[0.625, 0.375, 0, 0]]).double())


def test_the_second_token_of_a_full_expert_keeps_its_other_one_and_with_all_full_the_base_to_the_bit():
    p = [[0.6, 0.3, 0.05, 0.05], [0.6, 0.05, 0.3, 0.05]]
    found, noted = routed(p, 2, capacity=1.0)  # ceil(1 x 2 x 2 / 4) = 1
    close(found.gates, torch.tensor([[0.6, 0.3, 0, 0], [0, 0, 0.3, 0]]).double())
    assert noted[1].sum(0).tolist() == [2, 1, 1, 0]
    assert noted[2].sum(0).tolist() == [1, 1, 1, 0]
    found, _ = routed(p, 2, capacity=1.0, training=False)
    assert (found.gates > 0).sum(-1).tolist() == [2, 2]
    _, (layer,) = on("sira", W, fill=0.5, experts=4, top_k=1, capacity=0.5, expert_dropout=0.0)
    same = X[:1].expand(5, 8)
    got, base = layer(same), layer.base_layer(same)
    assert not torch.equal(got[0], base[0])
    assert torch.equal(got[1:], base[1:])


def test_padding_takes_no_room_and_enters_no_balance():
    p = [[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.9, 0.05, 0.05]]
    found, noted = routed(p, 1, capacity=1.0, mask=torch.tensor([[0, 1, 1]]))  # ceil(1 x 1 x 2 / 3) = 1
    close(found.gates[0], torch.tensor([[0, 0, 0], [0.9, 0, 0], [0, 0, 0]]).double())
    assert noted.shape == (3, 2, 3)


def test_experts_are_dropped_at_the_rate_set_in_training_alone():
    p = [[0.4, 0.3, 0.2, 0.1]] * 4000
    torch.manual_seed(0)
    x, form = torch.ones(4000, 1), LowRankExperts(4, 1, expert_dropout=0.25)
    tensors = {"router": torch.tensor(p[0]).log()[:, None], "living": torch.ones(4, dtype=torch.uint8)}
    for training, rate in ((True, 0.25), (False, 0.0)):
        found = form.route(x, tensors, Call(Site("m", 1, 1), torch.float32, training))
        assert abs(1 - found.chosen[:, 0].float().mean().item() - rate) < 0.03
        assert found.chosen.sum(-1).max() == 1


def test_balance_is_1_for_uniform_routing_and_the_number_of_experts_for_one_of_all_tokens():
    uniform = torch.stack([torch.full((4, 4), 0.25), torch.eye(4), torch.eye(4)])
    one = torch.zeros(4, 4).index_fill_(1, torch.tensor(2), 1.0)
    assert balance([uniform], 4) == 1
    assert balance([torch.stack([one, one, one])], 4) == 4
    assert balance([uniform[:, :1], uniform[:, 1:]], 4) == 1  # a layer that ran twice


# In models


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return self.lin(self.lin(x))


def language_model(base="fp32", **options):
    torch.manual_seed(1)
    form = options.pop("form", LowRankExperts(4, 2, r=2, std=0.3, router_std=1.0))
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(tiny.base(base), StructuredConfig(form=form, **targets))
    for layer in structured_layers(model):
        if "experts_b" in layer.form_tensors("default"):
            layer.form_tensors("default")["experts_b"].data.normal_(0, 0.3)
    return model


IDS = torch.randint(0, tiny.VOCAB, (2, 10), generator=torch.Generator().manual_seed(4))


def added(model, mask):
    """The balance that the rule adds to a loss, by the equation and by the difference of losses."""
    seen, hooks = {}, []
    for layer in structured_layers(model):
        hooks.append(layer.register_forward_pre_hook(lambda m, a: seen.setdefault(m, []).append(a[0].detach())))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": mask}
    plain = model(**batch).loss.item()
    expected = 0.0
    for layer, (x,) in ((layer, xs[-1:]) for layer, xs in seen.items()):
        p = softmax(x[mask.bool()].double() @ held(layer)["router"].t())
        chosen = torch.zeros_like(p).scatter_(-1, p.topk(2, -1).indices, 1.0)
        expected += 4 * (chosen.sum(0) / chosen.sum() * p.mean(0)).sum().item()
    for hook in hooks:
        hook.remove()
    with Controller(model, optimizer, 1) as rules:
        rules.before_step()
        loss = model(**batch).loss
        loss.backward()
    return expected, loss.item() - plain


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_rule_adds_the_balance_of_all_layers_without_padding_once(checkpointing):
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    model = language_model(schedule=[BalanceLoss(0.5)])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    expected, difference = added(model, mask)
    assert math.isclose(difference, 0.5 * expected, rel_tol=1e-4)
    gradients = [layer.form_tensors("default")["router"].grad.clone() for layer in structured_layers(model)]
    other = language_model(schedule=[BalanceLoss(0.5)])
    added(other, mask)
    for mine, layer in zip(gradients, structured_layers(other), strict=True):
        close(mine, layer.form_tensors("default")["router"].grad.double())


def test_a_layer_that_runs_twice_notes_both_and_checkpointing_notes_none_again():
    model = get_peft_model(Twice(), StructuredConfig(form=LowRankExperts(3, 1), target_modules=["lin"]))
    (layer,), seen = structured_layers(model), []
    (space,) = (one for one in layer.unit_spaces("default") if one.kind == "expert")
    with space.reading(seen.append):
        model(X)
        assert [tuple(one.shape) for one in seen] == [(3, 5, 3)] * 2
        torch.utils.checkpoint.checkpoint(model, X.requires_grad_(), use_reentrant=False).sum().backward()
    assert len(seen) == 4


def test_experts_of_least_load_leave_and_no_token_goes_to_them_also_from_a_file(tmp_path):
    prune = Prune(final_fraction=0.5, start=0.0, end=0.6, every=2, space="expert")
    model = language_model(schedule=[BalanceLoss(), prune])
    telemetry = SupportTelemetryCallback(every=1)
    tiny.train(model, tmp_path / "run", 8, callbacks=[*callbacks_for(model), telemetry])
    for layer in structured_layers(model):
        assert layer.form_tensors("default")["living"].sum() == 2
    first, last = telemetry.history[1], telemetry.history[-1]
    assert set(last["expert"].values()) == {2}
    for key, tokens in last["tokens"].items():
        layer = next(one for one in structured_layers(model) if one.module_name == key)
        living = layer.form_tensors("default")["living"].bool()
        assert sum(tokens) == 2 * sum(first["tokens"][key]) / 2
        assert not torch.tensor(tokens)[~living].any()
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.base("fp32"), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_model_of_experts_refuses_to_merge_by_name_and_unloads_to_the_base():
    model = language_model()
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: merge_to_dense(model)):
        with pytest.raises(ValueError, match="LowRankExperts"):
            merge()
    base = model.unload()
    assert not base._forward_pre_hooks
    assert torch.equal(base(input_ids=IDS).logits, tiny.base("fp32")(input_ids=IDS).logits)


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match=r"top_k=5"):
        LowRankExperts(4, 5)
    with pytest.raises(ValueError, match=r"capacity=1\.0"):
        LowRankExperts(4, capacity=1.0)
    with pytest.raises(ValueError, match="BalanceLoss is 1 where all experts"):
        StructuredConfig(form=LowRankExperts(4), schedule=[BalanceLoss()])
    with pytest.raises(ValueError, match="Prune"):
        StructuredConfig(form=LowRankExperts(4), schedule=[Prune()])


def test_a_named_adapter_on_four_bits_beside_another_adds_what_it_adds_alone():
    model = language_model("nf4").eval()
    other = StructuredConfig(form=ScaleExperts(3), target_modules=["q_proj"])
    model.add_adapter("scales", other)
    layer = structured_layers(model)[0]
    layer.form_tensors("scales")["layernorm_vectors"].data.normal_(1, 0.3)
    x = random(2, 3, layer.in_features)
    base, alone = layer.base_layer(x), []
    for name in ("default", "scales"):
        model.set_adapter(name)
        alone.append(layer(x) - base)
        assert alone[-1].abs().max() > 1e-3
    model.base_model.set_adapter(["default", "scales"])
    torch.testing.assert_close(layer(x), base + sum(alone), rtol=1e-4, atol=1e-4)


def test_one_config_serves_two_models_and_copies_route_by_their_own_masks():
    model = language_model(form=LowRankExperts(4, 1, capacity=0.5, std=0.3))
    other = copy.deepcopy(model)
    mask = torch.ones_like(IDS)
    mask[:, :5] = 0
    model(input_ids=IDS, attention_mask=mask)
    assert all(torch.equal(layer.token_mask, mask) for layer in structured_layers(model))
    assert all(layer.token_mask is None for layer in structured_layers(other))
    other(input_ids=IDS)
    assert all(layer.token_mask is None for layer in structured_layers(other))


def run(folder, checkpointing=False, resume=None, save_at=None, base="nf4"):
    """Eight steps of all of SiRA; everything that trains, and what telemetry saw."""

    class Save(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == save_at

    form = LowRankExperts(4, 2, capacity=1.0, expert_dropout=0.2, r=2)
    model = language_model(base, form=form, schedule=[BalanceLoss(0.1), Prune(0.75, 0.0, 0.9, 3, space="expert")])
    telemetry = SupportTelemetryCallback(every=1)
    options = {"gradient_accumulation_steps": 2, "data": tiny.TokenData(32)}
    if checkpointing:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    callbacks = [*callbacks_for(model), telemetry, Save()]
    tiny.train(model, folder, 8, callbacks=callbacks, resume=resume, **options)
    state = {key: t.clone() for key, t in model.state_dict().items() if "structured_" in key}
    return state, [{key: record[key] for key in ("tokens", "dropped", "expert")} for record in telemetry.history[1:]]


def test_runs_resume_to_the_bit_and_checkpointing_neither_draws_nor_counts_anew(tmp_path):
    expected, seen = run(tmp_path, save_at=5)
    assert any(part > 0 for record in seen for part in record["dropped"].values())
    others = [run(tmp_path, resume=str(tmp_path / "checkpoint-5")), run(tmp_path / "other", checkpointing=True)]
    assert all(history == seen for _, history in others)
    assert [key for key in expected if not torch.equal(others[0][0][key], expected[key])] == []
    for key, tensor in others[1][0].items():
        torch.testing.assert_close(tensor.float(), expected[key].float(), rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_is_refused_where_the_balance_would_have_no_gradient():
    model = language_model(schedule=[BalanceLoss()])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        added(model, torch.ones_like(IDS))
