"""MPOE (Gao et al., 2022; official code RUCAIBox/MPOE) against its equations, in float64."""

import copy
import itertools
import math

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from spectral_toolbox import close, random
from torch import nn

from hf_sparse_peft import (
    BalanceLoss,
    Controller,
    Prune,
    StructuredConfig,
    SupportTelemetryCallback,
    callbacks_for,
    methods,
)
from hf_sparse_peft.rules.balance_loss import balance
from hf_sparse_peft.tuners.structured import MatrixProductExperts, ScaleShift, structured_layers
from hf_sparse_peft.tuners.structured.matrix_product import axes_of, contract, decompose, shapes_of

FREE = {"capacity": None, "capacity_in_evaluation": None}


class Gated(nn.Module):
    """A network as Llama's, with biases."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        for at, parameter in enumerate(self.parameters()):
            parameter.data = random(*parameter.shape, seed=at) / 3

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Gated()

    def forward(self, x):
        return self.mlp(x)


def adapted(fill=0.0, targets=("gate_proj", "up_proj", "down_proj"), **options):
    torch.manual_seed(1)
    form = MatrixProductExperts(**{"experts": 3, "second": "all", **FREE, **options})
    model = get_peft_model(Blocks(), StructuredConfig(form=form, target_modules=list(targets)))
    for at, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data += fill * random(*parameter.shape, seed=at + 20)
    return model, structured_layers(model)


def expert_matrix(tensors, expert, rows, cols):
    """By one einsum over all five tensors, rows and columns apart."""
    parts = [(tensors[f"mpo_{at}"] if at == 2 else tensors[f"mpo_{at}"][expert]).detach().double() for at in range(5)]
    return torch.einsum("zaAy,ybBx,xcCw,wdDv,veEu->abcdeABCDE", *parts).reshape(rows, cols)


def expected(model, x, gates):
    """The sum of whole networks, expert by expert."""
    layers, x = structured_layers(model), x.double()
    found = 0.0
    for expert in range(gates.shape[-1]):
        weights = [
            expert_matrix(one.form_tensors("default"), expert, one.out_features, one.in_features) for one in layers
        ]
        biases = [one.get_base_layer().bias.detach().double() for one in layers]
        inner = torch.nn.functional.silu(x @ weights[0].t() + biases[0]) * (x @ weights[1].t() + biases[1])
        found = found + gates[..., expert, None] * (inner @ weights[2].t() + biases[2])
    return found


def top_two(model, x):
    """Gates of the two most likely experts, token by token."""
    router = structured_layers(model)[0].form_tensors("default")["mpo_router"].detach().double()
    whole = (x.double() @ router.t()).softmax(-1)
    found = torch.zeros_like(whole)
    for place in itertools.product(*map(range, x.shape[:-1])):
        values, chosen = whole[place].topk(2)
        found[place][chosen] = values / values.sum()
    return found


def test_a_matrix_of_full_bonds_is_reproduced_and_read_in_the_published_order():
    matrix = random(24, 60).double()
    tensors = decompose(matrix)
    close(contract(tensors), matrix, 1e-12)
    whole = torch.einsum("zaAy,ybBx,xcCw,wdDv,veEu->abcdeABCDE", *tensors).reshape(24, 60)
    close(whole, matrix, 1e-12)
    assert [tuple(tensor.shape) for tensor in tensors] == shapes_of(24, 60)


def test_the_central_tensor_has_most_of_the_numbers_of_t5s_network():
    assert (axes_of(768), axes_of(3072)) == ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4))
    sizes = [math.prod(shape) for shape in shapes_of(768, 3072)]
    assert sizes[2] > 0.8 * sum(sizes)
    assert all(math.prod(axes_of(side)) == side for side in (7, 32, 4096, 11008))


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_the_output_is_the_gated_sum_of_whole_networks(shape):
    model, _ = adapted(fill=0.1)
    x = random(*shape, seed=9)
    close(model(x), expected(model, x, top_two(model, x)), 1e-4)


def test_it_starts_as_the_base_with_all_second_experts_and_one_expert_is_the_network():
    x = random(2, 5, 8, seed=9)
    for options in ({}, {"experts": 1}):
        model, _ = adapted(**options)
        close(model(x), Blocks()(x), 1e-5)


def test_the_central_tensor_is_one_whose_gradient_is_the_sum_over_experts():
    model, layers = adapted(fill=0.1, central="trained")
    central = layers[2].form_tensors("default")["mpo_2"]
    x = random(2, 5, 8, seed=9)
    (model(x) * random(2, 5, 8, seed=3)).sum().backward()
    total = central.grad.clone()
    parts = []
    for expert in range(3):
        model.zero_grad()
        form = layers[2].form("default")
        held = layers[2].form_tensors("default")
        others = {**held, "mpo_2": held["mpo_2"].detach()}
        matrices = [form.matrices(held if at == expert else others)[at] for at in range(3)]
        gates, h = top_two(model, x), []
        for at in range(3):
            weights = [
                expert_matrix(one.form_tensors("default"), at, one.out_features, one.in_features) for one in layers[:2]
            ]
            biases = [one.get_base_layer().bias.detach().double() for one in layers[:2]]
            y = x.double()
            h.append(torch.nn.functional.silu(y @ weights[0].t() + biases[0]) * (y @ weights[1].t() + biases[1]))
        out = sum(gates[..., at, None] * (h[at] @ matrices[at].double().t()) for at in range(3))
        (out * random(2, 5, 8, seed=3).double()).sum().backward()
        parts.append(central.grad.clone())
    close(total, sum(parts), 1e-4)


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"central": "frozen"}, None),
        ({"central": "trained"}, True),
        ({"central": "trained", "central_update_prob": 0.0}, False),
    ],
)
def test_who_trains(options, moves):
    model, layers = adapted(fill=0.1, **options)
    central = layers[0].tensors("default").get("structured_mpo_2", layers[0].form_tensors("default")["mpo_2"])
    before = central.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(random(2, 5, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(central, before) == (not moves)
    assert central.requires_grad == (moves is not None)
    assert all(p.grad.any() for n, p in model.named_parameters() if "mpo_0" in n or "router" in n)


def test_in_half_of_the_passes_the_central_tensor_has_no_gradient():
    model, layers = adapted(fill=0.1, central="trained", central_update_prob=0.5)
    central, seen = layers[2].form_tensors("default")["mpo_2"], []
    torch.manual_seed(0)
    for _ in range(40):
        model.zero_grad()
        model.train()(random(2, 5, 8)).square().sum().backward()
        seen.append(bool(central.grad.any()))
    assert 10 < sum(seen) < 30
    assert bool(model.eval()(random(2, 5, 8)).requires_grad)


def gates_of(model, x):
    """Gates, and the balance of first experts over all tokens."""
    (layer, *_), seen = structured_layers(model), []
    form = layer.form("default")
    with layer.read_passes(lambda _, name, tensor: seen.append(tensor)):
        model(x)
    gates = form.route(x, layer.form_tensors("default"), layer._call("default", torch.float32)).gates
    return gates.detach(), balance(seen, form.experts, "first").detach()


def test_second_experts_are_kept_by_their_gate_in_training_and_over_the_threshold_in_evaluation():
    model, _ = adapted(fill=0.1, second="random", threshold=0.3)
    x = random(4, 500, 8, seed=9)
    whole = top_two(model, x)
    second = whole.topk(2, -1).values[..., 1]
    kept = (gates_of(model.eval(), x)[0] > 0).sum(-1) == 2
    assert torch.equal(kept, second >= 0.3)
    torch.manual_seed(0)
    found = gates_of(model.train(), x)[0]
    kept = (found > 0).sum(-1) == 2
    assert abs(kept.double().mean() - (second / 0.3).clamp_max(1).mean()) < 0.03
    close(found.max(-1).values, whole.max(-1).values, 1e-5)  # the first's is not scaled up


def test_an_expert_takes_no_more_tokens_than_its_capacity_first_come_and_no_fewer_than_four():
    model, layers = adapted(second="none", capacity_in_evaluation=1.0)
    layers[0].form_tensors("default")["mpo_router"].data.zero_()[1] += 1.0
    x = random(2, 30, 8, seed=9).abs()  # all to expert 1
    gates, balance = gates_of(model.eval(), x)
    assert torch.equal((gates[..., 1] > 0).sum(-1), torch.tensor([10, 10]))
    assert bool((gates[:, :10, 1] > 0).all())
    base = Blocks()(x)
    assert not torch.allclose(model(x)[:, 10:], base[:, 10:])
    assert torch.equal(model(x)[:, 10:], torch.zeros_like(base[:, 10:]))
    few = gates_of(model, x[:, :4])[0]
    assert bool((few[..., 1] > 0).all())
    assert balance > 1.5  # 1 where all experts are alike


def test_the_balance_loss_is_one_for_even_routers():
    model, layers = adapted()
    layers[0].form_tensors("default")["mpo_router"].data.zero_()
    assert abs(gates_of(model, random(1, 6, 8))[1] - 1) < 1e-6


def test_it_is_saved_loaded_copied_and_refuses_to_merge_or_to_stand_beside_another(tmp_path):
    model, x = adapted(fill=0.1)[0].eval(), random(2, 5, 8, seed=9)
    answer = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Blocks(), tmp_path)(x), answer)
    assert torch.equal(copy.deepcopy(model)(x), answer)
    with pytest.raises(ValueError, match="no change of it"):
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), Blocks()(x))
    model.add_adapter("other", StructuredConfig(form=ScaleShift(), target_modules=["gate_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Activate it alone"):
        model(x)
    model.set_adapter("default")
    with pytest.raises(ValueError, match=r"takes the place of 'mlp\.gate_proj'"):
        model(x, adapter_names=["default", "other"])
    assert torch.equal(model(x), answer)


@pytest.mark.parametrize(("targets", "message"), [(["gate_proj", "up_proj"], r"'mlp' are \['gate_proj', 'up_proj'\]")])
def test_targets_that_are_no_network_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        adapted(targets=targets)


def test_a_linear_alone_is_a_network_of_its_own():
    model, (layer,) = adapted(fill=0.1, targets=["down_proj"])
    x = random(2, 5, 12, seed=9)
    gates = top_two(model, x)
    tensors = layer.form_tensors("default")
    parts = [x.double() @ expert_matrix(tensors, e, 8, 12).t() + layer.base_layer.bias.double() for e in range(3)]
    close(layer(x), sum(gates[..., e, None] * parts[e] for e in range(3)), 1e-4)


def test_a_capped_bond_makes_smaller_tensors_and_another_start():
    model, layers = adapted(bond=2)
    assert (
        max(max(t.shape[-1], t.shape[-4]) for n, t in layers[0].form_tensors("default").items() if n[4:].isdigit()) == 2
    )
    assert not torch.allclose(model(random(2, 5, 8)), Blocks()(random(2, 5, 8)), atol=1e-3)


def test_it_trains_with_gradient_checkpointing_as_without():
    losses = []
    for kept in (False, True):
        base = tiny.llama(layers=2)
        torch.manual_seed(1)
        model = get_peft_model(base, methods.get("mpoe", experts=2, task_type="CAUSAL_LM").config)
        if kept:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(0)
        ids = torch.arange(24).view(2, 12)
        model(input_ids=ids, labels=ids).loss.backward()
        losses.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in losses[0].items():
        assert torch.equal(grad, losses[1][name]), name


IDS = torch.randint(1, tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(4))


def language_model(base=None, **options):
    base = tiny.llama(layers=2) if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, methods.get("mpoe", experts=4, task_type="CAUSAL_LM", **options).config)


def owners(model):
    return [layer for layer in structured_layers(model) if layer.site("default").owns]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balance_of_first_experts_is_added_to_the_loss_and_reaches_the_routers(checkpointing):
    model, inputs = language_model(schedule=[BalanceLoss(0.5, of="first")]), {}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for layer in owners(model):
        layer.register_forward_pre_hook(lambda one, args: inputs.update({one: args[0].detach()}))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": mask}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    torch.manual_seed(0)
    plain = model.train()(**batch).loss.item()
    expected = 0.0
    for layer, x in inputs.items():
        p = (x[mask.bool()].double() @ layer.form_tensors("default")["mpo_router"].double().t()).softmax(-1)
        first = torch.bincount(p.argmax(-1), minlength=4) / p.shape[0]
        expected += 4**2 * (first * p.mean(0)).mean().item()
    with Controller(model, optimizer, 1) as rules:
        rules.before_step()
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
    assert len(inputs) == 2
    assert math.isclose(loss.item() - plain, 0.5 * expected, rel_tol=1e-4)


def test_hidden_tokens_take_no_capacity_and_change_nothing_of_the_others():
    model = language_model().eval()
    padding = torch.full((2, 9), 1)
    padded = {"input_ids": torch.cat([padding, IDS], 1)}
    padded["attention_mask"] = torch.cat([torch.zeros_like(padding), torch.ones_like(IDS)], 1)
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    close(model(**padded).logits[:, 9:], model(input_ids=IDS).logits, 1e-4)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_experts_of_least_load_leave_the_whole_network_and_telemetry_counts_the_others(tmp_path, base):
    prune = Prune(final_fraction=0.5, start=0.0, end=0.6, every=2, space="expert")
    model = language_model(tiny.base(base), schedule=[BalanceLoss(of="first"), prune])
    telemetry = SupportTelemetryCallback(every=1)
    tiny.train(model, tmp_path / "run", 6, callbacks=[*callbacks_for(model), telemetry])
    last, networks = telemetry.history[-1], owners(model)
    assert set(last["tokens"]) == {layer.module_name for layer in networks}
    for layer in networks:
        living = layer.form_tensors("default")["living"].bool()
        assert living.sum() == 2
        assert sum(last["tokens"][layer.module_name]) > 0
        assert not torch.tensor(last["tokens"][layer.module_name])[~living].any()
        (space,) = (one for one in layer.unit_spaces("default") if one.kind == "expert")
        assert len(space.parameters()) == 1 + 3 * 4
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.base(base), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_the_last_expert_is_the_whole_network_and_none_cannot_leave():
    model, layers = adapted(fill=0.1)
    (space,) = (one for one in layers[0].unit_spaces("default") if one.kind == "expert")
    assert [one.kind for one in layers[1].unit_spaces("default")] == ["module"]
    space.write(torch.tensor([1]))
    x = random(2, 5, 8, seed=9)
    close(model(x), expected(model, x, torch.tensor([0.0, 1.0, 0.0]).expand(2, 5, 3)), 1e-4)
    with pytest.raises(ValueError, match="Leave one at least"):
        space.write(torch.tensor([], dtype=torch.int64))


def test_the_released_code_draws_second_experts_in_evaluation():
    model, _ = adapted(fill=0.1, second="random", draws_in_evaluation=True, threshold=0.3)
    x = random(4, 500, 8, seed=9)
    second = top_two(model, x).topk(2, -1).values[..., 1]
    torch.manual_seed(0)
    kept = (gates_of(model.eval(), x)[0] > 0).sum(-1) == 2
    assert abs(kept.double().mean() - (second / 0.3).clamp_max(1).mean()) < 0.03
    assert bool((kept & (second < 0.3)).any())


def test_the_units_of_a_network_are_those_of_the_adapter_that_is_there():
    model, layers = adapted(fill=0.1)

    def numbers():
        (space,) = (one for one in layers[0].unit_spaces("default") if one.kind == "expert")
        return {id(one) for one in space.parameters()}

    def trained():
        return {id(one) for layer in layers for name, one in layer.form_tensors("default").items()
                if name == "mpo_router" or one.requires_grad}  # fmt: skip

    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    assert numbers() == trained()
    assert len(numbers()) == 13
    model.delete_adapter("default")
    model.add_adapter("default", copy.deepcopy(model.peft_config["other"]))
    model.set_adapter("default")
    assert numbers() == trained()
    assert len(numbers()) == 13
    duplicate = copy.deepcopy(model)
    own = {id(p) for p in duplicate.parameters()}
    (space,) = (one for one in structured_layers(duplicate)[0].unit_spaces("default") if one.kind == "expert")
    assert {id(one) for one in space.parameters()} <= own


def run(folder, resume=None, save_at=None, **options):
    """Eight steps of all of it on four bits; everything that is the adapter's, and what telemetry saw."""

    class Save(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == save_at

    schedule = [BalanceLoss(0.1, of="first"), Prune(0.5, 0.0, 0.9, 3, space="expert")]
    model = language_model(tiny.base("nf4"), central="trained", central_update_prob=0.5, schedule=schedule)
    telemetry, data = SupportTelemetryCallback(every=1), tiny.TokenData(32)
    callbacks = [*callbacks_for(model), telemetry, Save()]
    options = {"gradient_accumulation_steps": 2, "data": data, **options}
    tiny.train(model, folder, 8, callbacks=callbacks, resume=resume, **options)
    state = {key: t.clone() for key, t in model.state_dict().items() if "structured_" in key}
    return state, [{key: record[key] for key in ("tokens", "dropped", "expert")} for record in telemetry.history[1:]]


def test_runs_resume_to_the_bit_and_checkpointing_counts_no_token_twice(tmp_path):
    expected, seen = run(tmp_path, save_at=5)
    resumed, again = run(tmp_path, resume=str(tmp_path / "checkpoint-5"))
    assert [key for key in expected if not torch.equal(resumed[key], expected[key])] == []
    assert again == seen
    assert set(seen[-1]["expert"].values()) == {2}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert run(tmp_path / "other", **options)[1][0] == seen[0]
