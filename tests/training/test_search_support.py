"""Random search over supports: which draw is kept, and that nothing else of the run notices."""

import pytest
import torch
from peft import get_peft_model
from training_toolbox import (
    Hook,
    StopAt,
    TokenData,
    adapted,
    all_state,
    differences,
    layers_of,
    make_config,
    run,
    support_of,
    tiny_llama,
)
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback

from hf_sparse_peft import Regrow, SearchSupport, SparseLoraConfig, callbacks_for, methods
from hf_sparse_peft.rules.search_support import trial_units
from hf_sparse_peft.training import RuleRunner

SEARCH = SearchSupport(trials=5, steps=3, batches=2, lr=2e-2)


def searching(**overrides):
    return make_config(**{"schedule": [SEARCH], **overrides})


class Looks(TrainerCallback):
    """What training starts from, and the batches it sees."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.supports = [support_of(layer) for layer in layers_of(model)]
        self.values = [layer.sparse_lora_values["default"].detach().clone() for layer in layers_of(model)]
        self.random = torch.get_rng_state()
        self.gradients = [p.grad for p in model.parameters()]
        self.training = model.training


def batches_seen(model):
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module.training, kwargs["input_ids"].clone())), with_kwargs=True
    )
    return seen


def dense_trial(supports, batches, steps=3, lr=2e-2):
    """A trial by its definition, in float64 on a plain Llama: Adam written out on the values, loss afterwards."""
    model = tiny_llama().double().requires_grad_(False)
    base = {name: model.get_submodule(name).weight.detach().clone() for name in supports}
    values = {name: torch.zeros(len(units), dtype=torch.float64) for name, units in supports.items()}
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}

    def loss(ids):
        scores = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return -scores.gather(-1, ids[:, 1:, None]).mean()

    def put(name, trained):
        dense = base[name].flatten().clone()
        dense[supports[name]] += values[name]
        model.get_submodule(name).weight = torch.nn.Parameter(dense.view_as(base[name]), requires_grad=trained)

    for step in range(1, steps + 1):
        for name in supports:
            put(name, True)
        loss(batches[(step - 1) % len(batches)]).backward()
        for name, units in supports.items():
            g = model.get_submodule(name).weight.grad.flatten()[units]
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            change = first[name] / (1 - 0.9**step)
            values[name] = values[name] - lr * change / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
    for name in supports:
        put(name, False)
    with torch.no_grad():
        return sum(float(loss(ids)) for ids in batches) / len(batches)


def test_the_kept_support_is_the_trial_with_the_smallest_loss_by_definition(tmp_path):
    model, look = adapted(searching()), Looks()
    own = {layer.module_name: support_of(layer) for layer in layers_of(model)}
    spaces = [space for layer in layers_of(model) for space in layer.unit_spaces("default") if space.kind == "support"]
    candidates = [own] + [{s.name: trial_units(s, trial).tolist() for s in spaces} for trial in range(1, 5)]
    seen = batches_seen(model)
    trainer = run(model, tmp_path, 3, after=[look])
    (search,) = trainer.schedule_callbacks[0].events
    batches = [ids for _, ids in seen[:2]]
    expected = [dense_trial(supports, batches) for supports in candidates]
    assert search["losses"] == pytest.approx(expected, abs=1e-5)
    best = min(range(5), key=expected.__getitem__)
    assert search["kept"] == best
    assert look.supports == list(candidates[best].values())
    sizes = {tuple(len(units) for units in supports.values()) for supports in candidates}
    assert len(sizes) == 1
    assert all(candidates[0][name] != candidates[1][name] for name in own)


def test_training_starts_as_without_a_search_but_for_the_support(tmp_path):
    looks, orders = [], []
    for config in (make_config(r=4), searching(r=4)):
        model, look = adapted(config), Looks()
        seen = batches_seen(model)
        run(model, tmp_path, 4, after=[look])
        looks.append(look)
        orders.append([ids for training, ids in seen if training])
    assert all(not value.any() for value in looks[1].values)
    assert torch.equal(looks[0].random, looks[1].random)
    assert looks[1].gradients == [None] * len(looks[1].gradients)
    assert looks[0].training == looks[1].training
    assert len(orders[0]) == len(orders[1]) == 4
    assert all(torch.equal(*pair) for pair in zip(*orders, strict=True))


@pytest.mark.parametrize("granularity", ["entry", "block", "row"])
def test_search_is_deterministic_and_follows_the_seed(granularity, tmp_path):
    found = []
    for seed in (0, 0, 1):
        model = adapted(searching(granularity=granularity, density=0.3, seed=seed))
        torch.manual_seed(len(found))  # the global state has no say
        trainer = run(model, tmp_path, 1)
        found.append((trainer.schedule_callbacks[0].events, [support_of(layer) for layer in layers_of(model)]))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_search_on_a_4_bit_base_leaves_the_base_alone(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    model = get_peft_model(base, searching())
    before = {n: t.clone() for n, t in model.state_dict().items() if "sparse_lora" not in n}
    (search,) = run(model, tmp_path, 2).schedule_callbacks[0].events
    assert len(set(search["losses"])) == 5
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_resumed_run_keeps_its_support_and_does_not_search(tmp_path):
    def finish(out, **options):
        last = {}
        hook = Hook(on_step_end=lambda update, model, optimizer: last.update(all_state(model, optimizer)))
        trainer = run(adapted(searching()), out, 6, after=[hook, *options.pop("stop", ())], **options)
        return last, trainer.schedule_callbacks[0]

    whole, _ = finish(tmp_path / "whole")
    finish(tmp_path / "parts", stop=[StopAt(3)])
    resumed, search = finish(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert differences(whole, resumed) == []
    assert search.events == []


def test_config_survives_json_and_brings_its_callback(tmp_path):
    config = methods.get("random-search", trials=3, search_lr=1e-3, target_modules=["q_proj"]).config
    config.save_pretrained(tmp_path)
    loaded = SparseLoraConfig.from_pretrained(tmp_path)
    assert loaded.schedule == [SearchSupport(trials=3, lr=1e-3)]
    assert [type(callback) for callback in callbacks_for(loaded)] == [RuleRunner]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "magnitude"}, "criterion='magnitude'.*Set criterion='random'"),
        ({"density": 0.0, "r": 2}, "density=0.0"),
        ({"schedule": [{"type": "search_support", "trials": 1}]}, "trials=1"),
        ({"schedule": [{"type": "search_support", "lr": 0.0}]}, "lr=0.0"),
        ({"schedule": [{"type": "search_support", "trials": "3"}]}, "trials='3'"),
        ({"schedule": [SEARCH, Regrow(replace_all_first=True)]}, "replace_all_first=False"),
    ],
)
def test_bad_searches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        searching(**options)


def test_trained_values_are_not_put_on_another_support(tmp_path):
    model = adapted(searching())
    layers_of(model)[0].sparse_lora_values["default"].data.fill_(1.0)
    with pytest.raises(ValueError, match=r"trained values.*Leave it out"):
        run(model, tmp_path, 2)


def test_a_trainer_without_data_in_callbacks_is_told_what_to_do(tmp_path):
    class Silent(RuleRunner):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)

    with pytest.raises(ValueError, match="no dataloader"):
        run(adapted(searching()), tmp_path, 2, callbacks=[Silent()], data=TokenData())
