"""EVA and LoRA-GA of upstream peft start from the Trainer's own data, as upstream's functions called by hand."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model, initialize_lora_eva_weights

from hf_sparse_peft import Controller, callbacks_for, methods
from hf_sparse_peft.training import UpstreamStartCallback, initialize_upstream
from hf_sparse_peft.training.upstream_start import waits_for_start
from hf_sparse_peft.tuners.upstream import upstream_layers

TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
TOKENS = torch.arange(1, 11)[None]


def adapted(name, **options):
    torch.manual_seed(0)
    method = methods.get(name, r=4, **TARGETS, **options)
    return get_peft_model(tiny.llama(layers=1), method.config), method


def layers_of(model):
    return dict(upstream_layers(model))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


def recorder(batches):
    class Data(tiny.TokenData):
        def __getitem__(self, index):
            batches.append(index)
            return super().__getitem__(index)

    return Data(samples=16)


def test_eva_in_a_trainer_is_upstreams_by_hand_and_what_it_replaced_trains(tmp_path):
    start = {}

    def first(step, model, optimizer):
        if step == 1:
            start.update({n: layer.lora_A["default"].weight.detach().clone() for n, layer in layers_of(model).items()})
            start["ids"] = {id(p) for group in optimizer.param_groups for p in group["params"]}
            start["logits"] = logits(model)
            model.train()

    model, method = adapted("eva")
    (callback,) = method.callbacks(model)
    assert type(callback) is UpstreamStartCallback
    assert [type(one) for one in callbacks_for(model)] == [type(one) for one in callbacks_for(method.config)]
    assert waits_for_start(model) == ["default"]
    seen, plain = [], []
    look = tiny.At(on_step_begin=first)
    tiny.train(model, tmp_path, 3, callbacks=[callback, look], data=recorder(seen), learning_rate=1e-2)
    torch.testing.assert_close(start.pop("logits"), logits(tiny.llama(layers=1)), atol=1e-6, rtol=1e-6)
    other = get_peft_model(tiny.llama(layers=1), methods.get("rslora", r=4, **TARGETS).config)
    tiny.train(other, tmp_path, 3, data=recorder(plain), learning_rate=1e-2)
    assert seen[-12:] == plain[-12:]  # training sees the data in the order of a run without
    order, data = plain[-12:], tiny.TokenData(samples=16)
    by_hand, _ = adapted("eva")
    order += [index for index in range(16) if index not in order]  # the last batch of the epoch, in the sampler's order
    batches = [
        {key: torch.stack([data[i][key] for i in order[at : at + 4]]) for key in ("input_ids", "labels")}
        for at in range(0, 16, 4)
    ]
    initialize_lora_eva_weights(by_hand, batches, show_progress_bar=False)
    ids = start.pop("ids")
    ranks = {name: A.shape[0] for name, A in start.items()}
    assert ranks == {name: layer.r["default"] for name, layer in layers_of(by_hand).items()}
    assert sum(ranks.values()) == 4 * 3
    assert len(set(ranks.values())) > 1
    for name, A in start.items():
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-4, rtol=0)
        assert {id(p) for p in layers_of(model)[name].lora_A.parameters()} <= ids
        assert not torch.equal(layers_of(model)[name].lora_A["default"].weight, A)
        assert layers_of(model)[name].lora_B["default"].weight.any()
    assert len(ids) == 2 * len(start)
    assert waits_for_start(model) == []
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_a_run_of_eva_goes_on_from_its_checkpoint(tmp_path):
    ends = []
    saved = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    model, method = adapted("eva")
    tiny.train(model, tmp_path, 6, callbacks=method.callbacks(model), **saved)
    ends.append(logits(model))
    model = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path / "checkpoint-3", is_trainable=True)
    tiny.train(model, tmp_path, 6, callbacks=callbacks_for(model), resume=str(tmp_path / "checkpoint-3"), **saved)
    ends.append(logits(model))
    assert torch.equal(*ends)


def test_eva_says_that_batches_are_too_small_instead_of_searching_for_ever():
    model, _ = adapted("eva")
    batch = {"input_ids": torch.arange(1, 4)[None], "labels": torch.arange(1, 4)[None]}
    with pytest.raises(ValueError, match=r"did not stand still in 50 passes.*more tokens than rho \* r = 8"):
        initialize_upstream(model, [batch], show_progress=False)


def gradients(count):
    """Float64 mean gradients of the base weights over the first batches of 4, in order."""
    base, data = tiny.llama(layers=1).double(), tiny.TokenData()
    for at in range(count):
        batch = torch.stack([data[i]["input_ids"] for i in range(4 * at, 4 * at + 4)])
        base(input_ids=batch, labels=batch).loss.backward()
    return {name: parameter.grad / count for name, parameter in base.named_parameters() if parameter.grad is not None}


def test_lora_ga_takes_the_singular_vectors_of_the_mean_gradient_and_changes_no_output():
    model, _ = adapted("lora-ga")
    data = tiny.TokenData()
    batches = [
        {key: torch.stack([data[i][key] for i in range(at, at + 4)]) for key in ("input_ids", "labels")}
        for at in range(0, 12, 4)
    ]
    before = logits(model)
    initialize_upstream(model, batches, batches=2)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    weights, base = gradients(2), dict(tiny.llama(layers=1).named_parameters())
    for name, layer in layers_of(model).items():
        U, _, Vh = torch.linalg.svd(weights[f"{name}.weight"])
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.detach().double() for f in "AB")
        # upstream's default: A the first r right vectors, B the next r left ones
        assert torch.linalg.matrix_norm(A @ Vh[:4].T, ord="nuc") > 3.99
        directions = torch.nn.functional.normalize(B, dim=0)
        assert torch.linalg.matrix_norm(directions.T @ U[:, 4:8], ord="nuc") > 3.9
        product = layer.scaling["default"] * B @ A
        weight = layer.base_layer.weight.detach().double() + product
        torch.testing.assert_close(weight, base[f"{name}.weight"].detach().double(), atol=1e-5, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_a_run_of_lora_ga_goes_on_to_the_bit_and_leaves_as_a_plain_lora(tmp_path):
    ends, saved = [], {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model, method = adapted("lora-ga")
        tiny.train(model, tmp_path, 6, callbacks=method.callbacks(model), resume=resume, **saved)
        ends.append(logits(model))
    assert torch.equal(*ends)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial_adapter")
    )
    loaded = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path / "plain")
    torch.testing.assert_close(logits(loaded), ends[0], atol=1e-4, rtol=1e-4)
    assert loaded.peft_config["default"].r == 8
    (tmp_path / "initial_adapter" / "adapter_model.safetensors").unlink()
    model, method = adapted("lora-ga")
    with pytest.raises(ValueError, match=r"'.*initial_adapter.*' is not there"):
        tiny.train(model, tmp_path, 6, callbacks=method.callbacks(model), resume=resume, **saved)


def batches_of(count):
    data = tiny.TokenData()
    return [
        {key: torch.stack([data[i][key] for i in range(at, at + 4)]) for key in ("input_ids", "labels")}
        for at in range(0, 4 * count, 4)
    ]


@pytest.mark.parametrize("name", ["eva", "lora-ga"])
def test_a_loop_by_hand_starts_as_upstreams_function_does_and_trains_what_it_replaced(name):
    batches = batches_of(4)
    expected, _ = adapted(name)
    initialize_upstream(expected, batches, show_progress=False)
    model, _ = adapted(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=r"needs data, and was handed none.*Controller\(dataloader=\.\.\.\)"):
        Controller(model, optimizer, 2)
    with Controller(model, optimizer, 2, dataloader=batches) as rules:
        for (key, one), (_, other) in zip(layers_of(model).items(), layers_of(expected).items(), strict=True):
            for factor in ("lora_A", "lora_B"):
                assert torch.equal(*(getattr(x, factor)["default"].weight for x in (one, other))), key
            assert torch.equal(one.base_layer.weight, other.base_layer.weight)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        for batch in batches[:2]:
            rules.before_step()
            model(**batch).loss.backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
    assert not any(
        torch.equal(*pair) for pair in zip(before, (p for p in model.parameters() if p.requires_grad), strict=True)
    )
    state = rules.state_dict()
    if name == "lora-ga":
        with pytest.warns(UserWarning, match="LoRA-GA's start changed the base weights"):
            Controller(model, optimizer, 4, state=state)


def test_evas_ranks_and_directions_are_those_of_upstreams_function_by_hand():
    model, _ = adapted("eva")
    initialize_upstream(model, batches_of(4), show_progress=False)
    by_hand, _ = adapted("eva")
    initialize_lora_eva_weights(by_hand, batches_of(4), show_progress_bar=False)
    for (key, one), (_, other) in zip(layers_of(model).items(), layers_of(by_hand).items(), strict=True):
        ours, upstreams = (layer.lora_A["default"].weight.detach() for layer in (one, other))
        assert one.r == other.r, key
        cosines = torch.nn.functional.cosine_similarity(ours, upstreams)
        torch.testing.assert_close(cosines.abs(), torch.ones(one.r["default"]), rtol=0, atol=1e-4)


def test_what_needs_no_data_is_refused_by_name():
    model, _ = adapted("dora")
    with pytest.raises(ValueError, match="init_lora_weights=True; only 'eva' and 'lora_ga' need data"):
        initialize_upstream(model, [])
