"""GoRA (He et al., 2025; official code hhnqqq/MyTransformers) against its equations, by autograd in float64."""

from __future__ import annotations

import copy
import json
import math

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from training_toolbox import StopAt, all_state, differences
from transformers import MixtralConfig, MixtralForCausalLM, Trainer

from hf_sparse_peft import (
    Allocate,
    AverageRank,
    Controller,
    GradientProjection,
    SparseLoraConfig,
    calibrate,
    callbacks_for,
    hub,
    make_optimizer,
    methods,
    trainer_options,
)
from hf_sparse_peft.sparsity import Numbers
from hf_sparse_peft.training.calibration import both_halves
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.sparse_lora.gradient_projection import Projection, projected
from hf_sparse_peft.tuners.sparse_lora.starts import StartSite

STEPS, ETA = 4, 0.05


def site(rows, cols, rank=4):
    return StartSite("x", rows, cols, rank, 0, 0, torch.device("cpu"), lambda r: torch.randn(r, cols), None)


def adapted(kind="fp32", base=None, **options):
    options = {"steps": STEPS, "least": 1, "r": 4, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(1)
    return get_peft_model(tiny.base(kind) if base is None else base, methods.get("gora", **options).config)


def batches(count=STEPS, size=2, length=12):
    """Batches of unequal numbers of labels: a mean over tokens is another one than that of batches."""
    generator, found = torch.Generator().manual_seed(5), []
    for number in range(count):
        ids = torch.randint(1, tiny.VOCAB, (size, length), generator=generator)
        labels = ids.clone()
        labels[:, 3 + number % 5 :] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def dense_twin(model):
    """A plain float64 model of the weights that the adapter lies on, dequantised."""
    dense = hub.merge_to_dense(copy.deepcopy(model).eval()).double()
    for name in names_of(model):
        dense.get_submodule(name).weight.requires_grad_()
    return dense


def names_of(model):
    return [layer.module_name for layer in adapter_layers(model)]


def mean_gradients(dense, names, data):
    """Mean over batches of the gradient of each batch's mean loss, `[out, in]`."""
    total = {}
    for batch in data:
        weights = [dense.get_submodule(name).weight for name in names]
        for name, found in zip(names, torch.autograd.grad(dense(**batch).loss, weights), strict=True):
            total[name] = total.get(name, 0) + found / len(data)
    stored_across = type(dense).__name__.startswith("GPT2")
    return {name: g.t() if stored_across else g for name, g in total.items()}


def weights_of(dense, names):
    stored_across = type(dense).__name__.startswith("GPT2")
    found = {name: dense.get_submodule(name).weight.detach() for name in names}
    return {name: w.t() if stored_across else w for name, w in found.items()}


def published_ranks(weights, gradients, r, least, most, cost=lambda m, n: m + n):
    importance = {name: float((weights[name] * gradients[name]).abs().mean()) for name in weights}
    costs = {name: cost(*weights[name].shape) for name in weights}
    budget = sum(costs.values()) * r
    shares = {name: budget * importance[name] / sum(importance.values()) for name in weights}
    return {name: min(max(round(shares[name]) // costs[name], least), most) for name in weights}


def ranks_of(model):
    return {layer.module_name: layer.sparse_lora_A["default"].shape[0] for layer in adapter_layers(model)}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


def test_the_worked_ranks():
    sites = {"square": site(8, 8), "tall": site(24, 8)}
    start = GradientProjection(least=1)
    assert start.ranks(sites, {"square": 3.0, "tall": 1.0}) == {"square": 9, "tall": 1}
    assert start.ranks(sites, {"square": 0.0, "tall": 1.0}) == {"square": 1, "tall": 6}


def test_the_worked_start():
    G, A = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    for sign in (1, -1):
        start = GradientProjection(sign=sign, least=1, most=1)
        found = start.decide({"x": site(2, 2)}, {"x": Projection(1.0, A, G @ A.t())})["x"]
        torch.testing.assert_close(sign * found.B @ found.A, torch.tensor([[0.141421, 0.0], [0.0, 0.0]]))


def test_a_rank_above_the_columns_projects_on_all_of_them():
    G, A = torch.randn(5, 3), torch.randn(7, 3)
    torch.testing.assert_close(projected(G @ A.t(), A) @ A, G, rtol=1e-5, atol=1e-5)


@tiny.crossed(kind=["fp32", "bf16", "nf4", "conv1d", "biased"], alpha=[1, 64])
def test_ranks_and_start_are_the_published_ones_whatever_alpha_is(kind, alpha):
    base = tiny.llama(attention_bias=True, mlp_bias=True) if kind == "biased" else None
    model = adapted(kind, base, lora_alpha=alpha, most=8)
    names, data = names_of(model), batches()
    dense = dense_twin(model)
    gradients, weights = mean_gradients(dense, names, data), weights_of(dense, names)
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    calibrate(model, data, show_progress=False)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    if kind != "bf16":  # gradients of bf16 products are rounded: a share may fall on the other side of a whole rank
        assert ranks_of(model) == published_ranks(weights, gradients, 4, 1, 8)
    assert len(set(ranks_of(model).values())) > 2
    for layer in adapter_layers(model):
        G, A = gradients[layer.module_name], layer.sparse_lora_A["default"].detach().double()
        r, n = A.shape
        P = A.t() @ torch.linalg.pinv(A @ A.t()) @ A
        delta = layer.get_delta_weight("default").double()
        delta = delta.t() if kind == "conv1d" else delta
        expected = -ETA * math.sqrt(n / r) * G @ P
        tolerance = 0.05 if kind == "bf16" else 1e-4
        torch.testing.assert_close(delta, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
        assert (delta * G).sum() < 0
        torch.testing.assert_close(delta @ P, delta, rtol=0, atol=1e-5 * float(delta.abs().max()))


def test_experts_start_as_one_matrix_and_weights_that_are_used_twice_by_both_uses():
    config = MixtralConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base, data = MixtralForCausalLM(config).eval(), batches(2)
    dense = copy.deepcopy(base)  # its grouped products know no float64
    name = "model.layers.0.mlp.experts.down_proj"
    weight = dict(dense.named_parameters())[name]
    G = sum(torch.autograd.grad(dense(**batch).loss, weight)[0].double() for batch in data).flatten(0, 1) / 2
    options = {"target_modules": [], "target_parameters": ["experts.down_proj"], "least": 3, "most": 3, "steps": 2}
    model = get_peft_model(base, methods.get("gora", task_type="CAUSAL_LM", **options).config)
    calibrate(model, data, show_progress=False)
    (layer,) = adapter_layers(model)
    A = layer.sparse_lora_A["default"].detach().double()
    expected = -ETA * math.sqrt(A.shape[1] / 3) * G @ A.t() @ torch.linalg.pinv(A @ A.t()) @ A
    delta = layer.get_delta_weight("default").double().view_as(expected)
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(6, 6)

        def forward(self, x, labels=None):
            return {"loss": self.a(self.a(x).tanh()).square().mean()}

    base, data = Twice(), [{"x": torch.randn(3, 6)} for _ in range(2)]
    twin = copy.deepcopy(base).double()
    G = sum(torch.autograd.grad(twin(batch["x"].double())["loss"], twin.a.weight)[0] for batch in data) / 2
    start = GradientProjection(steps=2, least=6, most=6)
    model = get_peft_model(base, SparseLoraConfig(r=6, density=0, target_modules=["a"], start=start))
    calibrate(model, data, show_progress=False)
    (layer,) = adapter_layers(model)
    torch.testing.assert_close(layer.get_delta_weight("default").double(), -ETA * G, rtol=1e-3, atol=1e-6)


def test_every_weight_has_the_mean_of_all_32_batches():
    model = adapted(steps=32, least=16, most=16, base=tiny.llama(layers=1))
    names, data = names_of(model), batches(32, size=1)
    gradients = mean_gradients(dense_twin(model), names, data)
    calibrate(model, data + batches(3), show_progress=False)
    for layer in adapter_layers(model):
        G, A = gradients[layer.module_name], layer.sparse_lora_A["default"].detach().double()
        P = A.t() @ torch.linalg.pinv(A @ A.t()) @ A
        expected = -ETA * math.sqrt(A.shape[1] / 16) * G @ P
        found = layer.get_delta_weight("default").double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_start_goes_down_the_loss_of_its_batch_and_the_codes_sign_goes_up(sign):
    model, data = adapted(steps=1, step_size=1e-3, sign=sign), batches(1)
    with torch.no_grad():
        before = model.eval()(**data[0]).loss
        calibrate(model, data, show_progress=False)
        assert torch.sign(model(**data[0]).loss - before) == sign


def test_what_the_bounds_cut_off_is_spent_elsewhere_only_where_it_is_asked_for():
    sites = {"a": site(8, 8, 8), "b": site(24, 8, 8), "c": site(8, 8, 8)}
    importances = {"a": 50.0, "b": 3.0, "c": 2.0}
    budget = 8 * (16 + 32 + 16)
    plain = GradientProjection(least=1, most=12).ranks(sites, importances)
    assert plain == {"a": 12, "b": 1, "c": 1}  # 512 * 50 / 55 // 16 = 29
    respent = GradientProjection(least=1, most=12, respend=True).ranks(sites, importances)
    spent = sum(rank * sites[name].sides for name, rank in respent.items())
    assert respent["a"] == 12
    assert budget - 32 < spent <= budget
    # The others get 320 in the proportion 3 to 2: 192 // 32 and 128 // 16.
    assert (respent["b"], respent["c"]) == (6, 8)
    assert GradientProjection(most=32).ranks({"a": site(8, 8, 64), "b": site(8, 8, 1)}, {"a": 1.0, "b": 0.1})["a"] == 32


def test_importance_and_cost_by_the_other_names():
    W, G = torch.randn(6, 10), torch.randn(6, 10)
    product = (W * G).double()
    expected = {
        "mean": product.abs().mean(),
        "frobenius": product.square().sum().sqrt(),
        "nuclear": torch.linalg.svdvals(product).sum(),
        "gradient": G.double().abs().mean(),
    }
    for name, value in expected.items():
        found = GradientProjection(importance=name).summary(site(6, 10)._replace(weight=lambda: W), {"mean": G.clone()})
        assert found.importance == pytest.approx(float(value), rel=1e-5)
    sites = {"square": site(8, 8), "tall": site(24, 8)}
    by_root = GradientProjection(least=1, cost="sqrt").ranks(sites, {"square": 3.0, "tall": 1.0})
    total = 4 * (4 + math.sqrt(32))
    assert by_root == {"square": round(total * 0.75) // 4, "tall": int(round(total * 0.25) // math.sqrt(32))}


def test_layers_read_one_at_a_time_start_as_layers_read_together():
    found = []
    for limit in (1, 1 << 30):
        model = adapted()
        calibrate(model, batches(), accumulator_bytes=limit, show_progress=False)
        found.append(state_of(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def trainer_run(folder, stop=None, resume=None, kind="fp32", **options):
    model = adapted(kind, **options)
    after = [StopAt(stop)] if stop else []
    trainer = tiny.train(
        model, folder, 6, callbacks=[*callbacks_for(model), *after], resume=resume,
        optimizer=lambda model, args: make_optimizer(model, args), lr_scheduler_type="constant",
    )  # fmt: skip
    return model, all_state(model, trainer.optimizer)


@pytest.mark.parametrize("kind", ["fp32", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_trainer_starts_the_adapter_and_a_resumed_run_goes_on_to_the_bit(kind, tmp_path, monkeypatch):
    model, whole = trainer_run(tmp_path / "whole", kind=kind)
    assert len(set(ranks_of(model).values())) > 2
    trainer_run(tmp_path / "stopped", stop=3, kind=kind)
    monkeypatch.setattr(both_halves, "read_statistics", lambda *args, **kwargs: pytest.fail("read again"))
    resumed, state = trainer_run(tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-3"), kind=kind)
    assert not differences(whole, state)
    assert resumed.peft_config["default"].to_dict() == model.peft_config["default"].to_dict()


def test_the_runner_reads_the_batches_of_training_and_training_sees_them_all(tmp_path):
    seen = []

    class Tape(tiny.At):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].clone()), with_kwargs=True)

    for lr in (0.0, 1e-2):
        model = adapted()
        tiny.train(model, tmp_path, STEPS, callbacks=[*callbacks_for(model), Tape()], learning_rate=lr)
        if not lr:
            start = state_of(model)
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in seen[:STEPS]]
    assert all(torch.equal(one, two) for one, two in zip(seen[:STEPS], seen[STEPS:], strict=True))
    by_hand = adapted()
    calibrate(by_hand, data, show_progress=False)
    assert all(torch.equal(start[name], tensor) for name, tensor in state_of(by_hand).items())


def test_accumulated_micro_batches_are_one_step_of_the_mean(tmp_path):
    found = []
    for size, per_step in ((4, 1), (2, 2)):
        model = adapted()
        data = [
            {key: tensor[at : at + size] for key, tensor in batch.items()}
            for batch in batches(size=4)
            for at in range(0, 4, size)
        ]
        calibrate(model, data, batches_per_step=per_step, show_progress=False)
        found.append((ranks_of(model), {n: t for n, t in state_of(model).items() if "lora_B" in n}))
    assert found[0][0] == found[1][0]
    for name, B in found[0][1].items():
        torch.testing.assert_close(B, found[1][1][name], rtol=1e-3, atol=1e-5)


def test_a_loop_of_ones_own_starts_it_and_goes_on_to_the_bit(tmp_path):
    data = batches(8)

    def loop(model, steps, optimizer_state=None, state=None):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
        model.train()
        with Controller(model, optimizer, len(data), dataloader=data, state=state) as rules:
            for batch in data[rules.step : steps]:
                rules.before_step()
                model(**batch).loss.backward()
                optimizer.step()
                rules.after_step()
                optimizer.zero_grad()
            return optimizer, rules.state_dict()

    whole, half = adapted(), adapted()
    loop(whole, 8)
    optimizer, saved = loop(half, 5)
    half.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.base(), tmp_path, is_trainable=True)
    loop(again, 8, copy.deepcopy(optimizer.state_dict()), saved)
    assert not differences(state_of(whole), state_of(again))
    by_hand = adapted()
    calibrate(by_hand, data, show_progress=False)
    assert ranks_of(by_hand) == ranks_of(whole)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_saved_adapter_is_the_same_elsewhere_and_leaves_as_a_lora_exactly(kind, tmp_path):
    model = adapted(kind)
    calibrate(model, batches(), show_progress=False)
    ids = batches(1)[0]["input_ids"]
    logits = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.base(kind), tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, logits)
    done = hub.export_lora(model, tmp_path / "lora")
    assert done.ranks == ranks_of(model)
    assert set(done.errors.values()) == {0.0}
    plain = PeftModel.from_pretrained(tiny.base(), tmp_path / "lora").eval()
    for layer in adapter_layers(model):
        found = plain.base_model.model.get_submodule(layer.module_name).get_delta_weight("default")
        torch.testing.assert_close(found, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-7)
    options = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert options["sizes"] == {name: [0, 0, rank] for name, rank in ranks_of(model).items()}


def test_until_data_decides_the_layers_compute_as_the_base_and_neither_train_nor_save(tmp_path):
    model, data = adapted(init_weights=False), batches()
    with torch.no_grad():
        assert torch.equal(model.eval()(**data[0]).logits, tiny.base()(**data[0]).logits)
    with pytest.raises(ValueError, match=r"Adapter 'default' starts from data.*calibrate\(model, dataloader\)"):
        model.train()(**data[0])
    with pytest.raises(ValueError, match="Nothing to save"):
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Nothing to compact"):
        model.base_model.compact()


class Breaks(list):
    """Batches of which the third cannot be had."""

    def __iter__(self):
        yield from self[:2]
        raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["reading", "writing"])
def test_an_interrupted_start_leaves_the_model_as_it_was(when, monkeypatch):
    model = adapted(schedule=[Allocate(budget=AverageRank(2))], gate="ones")
    before, parameters = state_of(model), dict(model.named_parameters())
    sizes = [layer.sizes["default"] for layer in adapter_layers(model)]
    if when == "writing":
        last = adapter_layers(model)[-1]
        monkeypatch.setattr(last, "take_start", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Breaks(batches()) if when == "reading" else batches(), show_progress=False)
    assert not differences(before, state_of(model))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert [layer.sizes["default"] for layer in adapter_layers(model)] == sizes
    assert not model.peft_config["default"].sizes
    assert all(layer.awaits_calibration("default") for layer in adapter_layers(model))
    assert not any(module._forward_hooks for module in model.modules() if module in adapter_layers(model))
    monkeypatch.undo()
    calibrate(model, batches(), show_progress=False)
    fresh = adapted(schedule=[Allocate(budget=AverageRank(2))], gate="ones")
    calibrate(fresh, batches(), show_progress=False)
    assert not differences(state_of(fresh), state_of(model))


def test_a_run_that_was_interrupted_at_its_start_starts_at_the_second_call(tmp_path, monkeypatch):
    model, whole = adapted(), adapted()
    trainers = [
        Trainer(
            model=one, train_dataset=tiny.TokenData(),
            **trainer_options(one, tiny.arguments(tmp_path, 3, lr_scheduler_type="constant")),
        )
        for one in (model, whole)
    ]  # fmt: skip
    monkeypatch.setattr(GradientProjection, "decide", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainers[0].train()
    monkeypatch.undo()
    for trainer in trainers:
        trainer.train()
    assert not differences(state_of(model), state_of(whole))


def test_a_layer_without_a_gradient_gets_the_least_and_starts_at_the_base_and_is_named():
    class Blind(torch.nn.Module):
        """Two branches of which the loss reaches one."""

        def __init__(self):
            super().__init__()
            self.seen, self.unseen = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

        def forward(self, x, labels=None):
            self.unseen(x)
            return {"loss": self.seen(x).square().mean()}

    torch.manual_seed(0)
    model = get_peft_model(Blind(), methods.get("gora", least=2, steps=2, target_modules=["seen", "unseen"]).config)
    data = [{"x": torch.randn(3, 6)} for _ in range(2)]
    with pytest.warns(UserWarning, match=r"no gradient of 1 of 2 modules .* unseen\."):
        calibrate(model, data, show_progress=False)
    assert ranks_of(model) == {"seen": 16, "unseen": 2}
    seen, unseen = adapter_layers(model)
    assert not unseen.sparse_lora_B["default"].any()
    assert seen.sparse_lora_B["default"].any()
    assert not unseen.awaits_calibration("default")


def test_data_without_labels_is_refused_before_anything_changes():
    model = adapted()
    data = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches()]
    with pytest.raises(ValueError, match=r"start='gradient_projection' .* no gradient to go by.*all 14 modules"):
        calibrate(model, data, show_progress=False)
    assert set(ranks_of(model).values()) == {4}
    assert all(layer.awaits_calibration("default") for layer in adapter_layers(model))


def test_a_head_and_a_second_adapter_stay_as_they_are():
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", SparseLoraConfig(r=2, density=0.05, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"inactive, disabled or merged.*model.set_adapter\('default'\)"):
        calibrate(model, batches(), show_progress=False)
    model.set_adapter("default")
    kept = {n: t.clone() for n, t in model.state_dict().items() if ".other" in n or "lm_head" in n}
    calibrate(model, batches(), show_progress=False)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    plain = adapted()
    calibrate(plain, batches(), show_progress=False)
    assert ranks_of(plain) == ranks_of(model)


def test_one_config_starts_two_models_each_by_its_own_data():
    config = methods.get("gora", steps=2, least=1, task_type="CAUSAL_LM").config
    models = [get_peft_model(tiny.llama(seed=seed), config) for seed in (0, 1)]
    for model, data in zip(models, (batches(4), batches(4)[2:]), strict=True):
        calibrate(model, data, show_progress=False)
    assert not config.sizes
    assert ranks_of(models[0]) != ranks_of(models[1])


def test_a_config_whose_start_is_over_says_so_where_it_is_used_again(tmp_path):
    model = adapted()
    calibrate(model, batches(), show_progress=False)
    model.save_pretrained(tmp_path)
    config = SparseLoraConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    with pytest.warns(UserWarning, match=r"start=.* has been taken already.*Set sizes=\{\}"):
        again = get_peft_model(tiny.base(), config)
    assert ranks_of(again) == ranks_of(model)


def test_rules_move_ranks_that_the_start_has_found(tmp_path):
    rules = [Allocate(budget=AverageRank(2), every=2, initial_warmup=0.0, final_warmup=0.3)]
    model = adapted(schedule=rules, gate="ones")
    tiny.train(model, tmp_path, 8, callbacks=callbacks_for(model))
    layers = adapter_layers(model)
    found = {layer.module_name: len(layer.sparse_lora_A["default"]) for layer in layers}
    alive = sum(layer.alive_components("default") for layer in layers)
    assert alive == 2 * len(layers) < sum(found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1}, r"finds the ranks of low-rank halves that are alone.*start=GradientSplit"),
        ({"budget": Numbers(100)}, r"halves that are alone"),
        ({"r": 0}, r"r=0.*Set ranks >= 1"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern=\{'q_proj': 0\}"),
        ({"gate": "zeros"}, r"a gate that starts at 'zeros'.*gate='ones'"),
        ({"schedule": [Allocate()]}, r"a gate that starts at 'zeros'"),
        ({"factor_masks": {"kind": "parallel"}}, r"factor_masks cuts"),
        ({"least": 9, "most": 8}, r"GradientProjection.least=9 .* from 1 to most=8"),
    ],
)
def test_what_cannot_start_so_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        methods.get("gora", **options)


def test_a_file_that_lies_about_its_ranks_is_refused_and_the_model_stays(tmp_path):
    model = adapted()
    calibrate(model, batches(), show_progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    options = json.loads(file.read_text())
    name = next(iter(options["sizes"]))
    for sizes in ({**options["sizes"], name: [0, 0, 31]}, {}):
        file.write_text(json.dumps({**options, "sizes": sizes}))
        base = tiny.base()
        with pytest.raises(ValueError, match="lora_A"):
            PeftModel.from_pretrained(base, tmp_path)
        assert not adapter_layers(base)


def test_a_dataloader_is_read_as_a_list_is():
    data = tiny.TokenData(16)
    found = []
    for loader in (DataLoader(data, batch_size=4), list(DataLoader(data, batch_size=4))):
        model = adapted()
        calibrate(model, loader, show_progress=False)
        found.append(state_of(model))
    assert not differences(*found)
