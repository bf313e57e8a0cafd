"""Upstream's AdaLoRA model under Trainer: the runner gives it the masks that its own allocator gives when called by
hand, leaves the regulariser out of evaluation, resumes to the bit, and lets it save what upstream saves."""

import pytest
import tiny
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model

from hf_sparse_peft import Controller, Orthogonality, ProximalGate, callbacks_for
from hf_sparse_peft.training import RuleRunner
from hf_sparse_peft.tuners.upstream import upstream_layers

STEPS = 12


def adapted(**options):
    torch.manual_seed(0)
    fields = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 99, **options}
    fields = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(tiny.llama(layers=1), AdaLoraConfig(**fields))


def layers_of(model):
    return [layer for _, layer in upstream_layers(model)]


def by_hand(model, total):
    """A callback that calls upstream's own allocator as its documentation says, on a model of its own: that gets the
    weights and gradients of the one that trains."""
    own = adapted(total_step=total, orth_reg_weight=0.0)
    seen = {}

    def step(step, trained, optimizer):
        parameters = dict(trained.named_parameters())
        for name, parameter in own.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(parameters[name].detach())
                parameter.grad = parameters[name].grad.clone()
        own.base_model.update_and_allocate(step - 1)
        seen[step] = [layer.lora_E["default"].detach().clone() for layer in layers_of(own)]

    return tiny.At(on_optimizer_step=step), seen, own


@pytest.mark.parametrize("options", [{}, {"tinit": 0, "deltaT": 1}, {"tfinal": 5, "deltaT": 3}])
def test_gates_are_those_of_upstreams_allocator_called_by_hand(options, tmp_path):
    model, gates = adapted(**options), {}
    hand, theirs, own = by_hand(model, STEPS)
    own.peft_config["default"].__dict__.update(options)

    def look(step, model, optimizer):
        gates[step] = [layer.lora_E["default"].detach().clone() for layer in layers_of(model)]

    runner, last = RuleRunner(), tiny.At(on_step_end=look)
    tiny.train(model, tmp_path, STEPS, callbacks=[hand, runner, last], learning_rate=3e-2)
    assert sorted(gates) == list(range(1, STEPS + 1))
    for step in gates:
        assert all(map(torch.equal, gates[step], theirs[step])), step
    assert sum(int((gate != 0).sum()) for gate in gates[STEPS]) == 2 * 3
    found, expected = (one.peft_config["default"].rank_pattern for one in (model, own))
    assert found == expected
    assert model.peft_config["default"].total_step == STEPS


def state_of(model, optimizer):
    found = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name or "rule_" in name}
    for number, state in enumerate(optimizer.state.values()):
        found |= {f"{number}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def test_a_resumed_run_has_every_bit_of_the_uninterrupted_one(tmp_path):
    ends = []

    def end(step, model, optimizer):
        if step == STEPS:
            ends.append(state_of(model, getattr(optimizer, "optimizer", optimizer)))

    saved = {"save_strategy": "steps", "save_steps": 6, "learning_rate": 3e-2}
    tiny.train(adapted(), tmp_path, STEPS, callbacks=[RuleRunner(), tiny.At(on_step_end=end)], **saved)
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)  # nothing of the checkpoint may be missing from it
    tiny.train(
        model, tmp_path, STEPS, callbacks=[RuleRunner(), tiny.At(on_step_end=end)],
        resume=str(tmp_path / "checkpoint-6"), **saved,
    )  # fmt: skip
    first, second = ends
    assert first.keys() == second.keys()
    assert any("rule_sensitivity_A" in key for key in first)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_the_adapter_is_saved_with_its_ranks_and_peft_alone_reads_it(tmp_path):
    model = adapted()
    (runner,) = callbacks_for(model)
    tiny.train(model, tmp_path, STEPS, callbacks=[runner], learning_rate=3e-2)
    assert runner.events[-1]["alive"] == {"rank": 6}
    assert not any("rule_" in name for name in model.state_dict())
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path / "adapter").eval()
    assert sum(layer.lora_A["default"].shape[0] for layer in layers_of(loaded)) == 6
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-6, rtol=1e-6)


def test_the_divisor_does_not_train_as_peft_has_it(tmp_path):
    model = adapted()
    tiny.train(model, tmp_path, STEPS, callbacks=callbacks_for(model), learning_rate=3e-2)
    assert [float(layer.ranknum["default"]) for layer in layers_of(model)] == [4.0] * 3


def penalty(model, weight):
    """Upstream's regulariser, in float64."""
    norms = []
    for layer in layers_of(model):
        A, B = layer.lora_A["default"].double(), layer.lora_B["default"].double()
        norms += [(A @ A.T - torch.eye(len(A))).norm(), (B.T @ B - torch.eye(len(A))).norm()]
    return weight * sum(norms) / len(norms)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_regulariser_is_added_once_a_step_and_to_no_loss(accumulation, tmp_path):
    weight, found, losses = 0.5, {}, {}
    batch = {"input_ids": torch.arange(1, 9)[None], "labels": torch.arange(1, 9)[None]}

    def before(step, model, optimizer):
        found["without"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        own = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
        grads = torch.autograd.grad(penalty(model, weight), list(own.values()))
        found["penalty"] = dict(zip(own, grads, strict=True))

    def after(step, model, optimizer):
        found["with"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.eval()
        with torch.no_grad():
            losses["here"] = model(**batch).loss
            logits = model(input_ids=batch["input_ids"]).logits
        losses["plain"] = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
        model.train()

    model = adapted(orth_reg_weight=weight)
    callbacks = [tiny.At(on_pre_optimizer_step=before), RuleRunner(), tiny.At(on_pre_optimizer_step=after)]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.0}
    tiny.train(model, tmp_path, 8, callbacks=callbacks, learning_rate=3e-2, **options)
    for name, gradient in found["with"].items():
        expected = found["without"][name].double() + found["penalty"].get(name, 0.0)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["here"], losses["plain"])
    with torch.no_grad():  # after the run it is upstream's model again
        logits, loss = (model(input_ids=batch["input_ids"]).logits, model(**batch).loss)
    plain = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
    torch.testing.assert_close(loss - plain, penalty(model, weight).float(), rtol=1e-4, atol=1e-4)


def test_what_upstream_breaks_on_trains(tmp_path):
    with pytest.warns(UserWarning, match="0 units ever leave"):
        tiny.train(adapted(init_r=2), tmp_path, 6, callbacks=[RuleRunner()])  # kthvalue of 0
    model = adapted(tfinal=0, deltaT=4)
    tiny.train(model, tmp_path, STEPS, callbacks=[RuleRunner()], learning_rate=3e-2)
    assert sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers_of(model)) == 6
    with pytest.raises(ValueError, match=r"tinit=2, tfinal=3\) leaves none of this run's 5 steps"):
        tiny.train(adapted(), tmp_path, 5, callbacks=[RuleRunner()])


def test_a_loop_with_a_controller_takes_the_same_steps(tmp_path):
    gates = []
    for kind in ("trainer", "loop"):
        model, data = adapted(), tiny.TokenData(samples=4)
        batch = {key: torch.stack([data[i][key] for i in range(4)]) for key in ("input_ids", "labels")}
        if kind == "trainer":
            tiny.train(
                model, tmp_path, STEPS, callbacks=[RuleRunner()], data=data, max_grad_norm=0.0,
                lr_scheduler_type="constant", optimizer=lambda model, args: adamw(model),
            )  # fmt: skip
        else:
            model.train()
            optimizer = adamw(model)
            with Controller(model, optimizer, total_steps=STEPS) as rules:
                for _ in range(STEPS):
                    rules.before_step()
                    model(**batch).loss.backward()
                    optimizer.step()
                    rules.after_step()
                    optimizer.zero_grad()
        gates.append([layer.lora_E["default"] != 0 for layer in layers_of(model)])
        assert "forward" not in vars(model.base_model)
    assert all(map(torch.equal, *gates))


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)


def lora(**options):
    torch.manual_seed(0)
    return get_peft_model(tiny.llama(layers=1), LoraConfig(r=3, target_modules=["q_proj", "down_proj"], **options))


def test_a_penalty_acts_on_upstream_lora(tmp_path):
    with pytest.raises(ValueError, match="no gate, so that none can be switched off"):
        tiny.train(lora(), tmp_path, 2, callbacks=[RuleRunner(ProximalGate())])
    with pytest.raises(ValueError, match="gates that start with normal"):
        tiny.train(adapted(), tmp_path, 6, callbacks=[RuleRunner(ProximalGate())])
    gaps = []
    for callbacks in ([], [RuleRunner(Orthogonality(2.0))]):
        model = lora()
        tiny.train(model, tmp_path, 30, callbacks=callbacks, learning_rate=3e-2)
        A = [layer.lora_A["default"].weight for layer in layers_of(model)]
        gaps.append(sum(float((a @ a.T - torch.eye(3)).norm()) for a in A))
    assert gaps[1] < 0.5 * gaps[0]


def test_two_runners_of_one_rule_are_refused_on_upstreams_adapters_too(tmp_path):
    with pytest.raises(ValueError, match="is run by two callbacks"):
        tiny.train(lora(), tmp_path, 2, callbacks=[RuleRunner(Orthogonality()), RuleRunner(Orthogonality())])
