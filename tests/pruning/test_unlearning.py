"""Sparse unlearning: the L1 norm's schedule and gradient against their equations, and pruned bases that stay so."""

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_sparse_peft import L1Norm, MaskedLoraConfig, SparseLoraConfig, methods
from hf_sparse_peft.pruning import prune_globally
from hf_sparse_peft.rules import Training
from hf_sparse_peft.sparsity import Linear, Staircase, make_curve
from hf_sparse_peft.training import RuleRunner
from hf_sparse_peft.tuners import adapter_layers

ALPHA = 5e-4


def weights_by_epoch(epochs=10, **options):
    config = methods.get("unlearn-sparse", kind="l1", alpha=ALPHA, epochs=epochs, **options).config
    weight = config.schedule[0].weight
    steps = 7  # an epoch
    found = [[weight((epoch * steps + step) / (epochs * steps)) for step in range(steps)] for epoch in range(epochs)]
    assert all(len(set(of_epoch)) == 1 for of_epoch in found)  # set once an epoch, read at every step
    return [of_epoch[0] for of_epoch in found]


def test_the_penalty_decays_by_epochs_as_in_the_worked_numbers():
    found = weights_by_epoch()
    assert found == pytest.approx([ALPHA * (1 - epoch / 10) for epoch in range(10)])
    assert (found[0], found[9]) == (pytest.approx(5e-4), pytest.approx(5e-5))
    found = weights_by_epoch(penalty_free_epochs=2)
    assert found[7] == pytest.approx(6.25e-5)
    assert found[8:] == [0.0, 0.0]
    for free in range(10):
        found = weights_by_epoch(penalty_free_epochs=free)
        assert found == sorted(found, reverse=True)
        assert found.count(0.0) == free
    assert weights_by_epoch(constant=True) == [ALPHA] * 10
    with pytest.raises(ValueError, match=r"penalty_free_epochs=10 .*constant=True"):
        methods.get("unlearn-sparse", kind="l1", penalty_free_epochs=10)


def test_a_staircase_holds_what_its_curve_has_at_each_stage():
    curve = Staircase(Linear(1.0, 0.0), 29)
    assert [curve(step / 290) for step in range(290)] == pytest.approx([1 - step // 10 / 29 for step in range(290)])
    assert curve(1.0) == 0.0
    with pytest.raises(ValueError, match="schedule='staircase'"):
        make_curve("staircase", 1.0, 0.0)


def added_gradients(model, step=0, total=10):
    """What the rule adds to gradients of 0, by parameter name."""
    runner = RuleRunner()
    training = Training(model=model, total_steps=total)
    runner.begin(training, {})
    training.step = step
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    runner.gradients()
    runner.leave()
    return {name: p.grad.clone() for name, p in trained.items()}


@pytest.mark.parametrize("of", ["weights", "update"])
@pytest.mark.parametrize("update", ["dense", "low_rank"])
def test_every_trained_number_is_pulled_by_its_sign_and_nothing_that_is_masked(update, of):
    base = tiny.gpt2(layers=1)
    prune_globally(base, 0.4)
    options = {"kind": "l1", "mask": "zeros", "update": update, "of": of, "r": 3, "lora_alpha": 6, "alpha": 0.1}
    model = get_peft_model(base, methods.get("unlearn-sparse", init_weights=False, **options).config)
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    added = added_gradients(model, step=3)
    points = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    total = sum(p.abs().sum() for n, p in points.items() if "masked_lora" not in n) if of == "weights" else 0.0
    for layer in adapter_layers(model):
        tensors = {n.split("masked_lora_")[1].split(".")[0]: p for n, p in points.items() if layer.module_name in n
                   and "masked_lora" in n}  # fmt: skip
        weight = layer.base_layer.weight.detach().double().t()
        change = tensors["delta"] if update == "dense" else 2.0 * tensors["B"] @ tensors["A"]
        total = total + ((weight if of == "weights" else 0) + change)[weight != 0].abs().sum()
    (0.1 * (1 - 3 / 10) * total).backward()
    kinds = {"bias": 0, "modules_to_save": 0, "masked_lora": 0}
    for name, point in points.items():
        expected = torch.zeros_like(point) if point.grad is None else point.grad
        torch.testing.assert_close(added[name].double(), expected, rtol=1e-4, atol=1e-6, msg=name)
        for kind in kinds:
            kinds[kind] += kind in name and bool(added[name].any())
    assert kinds["masked_lora"]
    assert bool(kinds["bias"]) == bool(kinds["modules_to_save"]) == (of == "weights")
    assert not any(gradient.any() for gradient in added_gradients(model, step=10).values())


@pytest.mark.parametrize("direction", ["retain", "forget"])
def test_what_was_pruned_stays_0_through_unlearning_with_momentum_and_decay(direction, tmp_path):
    base = tiny.llama(layers=1)
    report = prune_globally(base, 0.95)
    removed = {name: base.get_submodule(name).weight == 0 for name in report.masks}
    model = get_peft_model(base, methods.get("unlearn-sparse", task_type="CAUSAL_LM").config)
    data = tiny.TokenData()
    batch = torch.stack([data[at]["input_ids"] for at in range(16)])

    def loss():
        with torch.no_grad():
            return float(model.eval()(input_ids=batch, labels=batch).loss)

    def ascent(outputs, labels, num_items_in_batch=None):
        return -ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch)

    before = loss()
    options = {"compute_loss_func": ascent} if direction == "forget" else {}
    args = tiny.arguments(tmp_path, 12, weight_decay=0.1)
    Trainer(model=model, args=args, train_dataset=data, **options).train()
    assert (loss() > before + 0.01) if direction == "forget" else (loss() < before - 0.01)
    merged = model.merge_and_unload()
    for name, gone in removed.items():
        weight = merged.get_submodule(name).weight
        assert not weight[gone].any()
        assert weight[~gone].all()


def test_what_the_norm_cannot_mean_is_refused():
    with pytest.raises(ValueError, match="kind='fisher'"):
        methods.get("unlearn-sparse", kind="fisher")
    with pytest.raises(ValueError, match="below 0"):
        L1Norm(Linear(1.0, -1.0))
    with pytest.raises(ValueError, match=r"of='weights'.*of='update'"):
        SparseLoraConfig(r=0, density=0.1, schedule=[L1Norm()])
    with pytest.raises(ValueError, match="nothing to pull"):
        MaskedLoraConfig(update="none", schedule=[L1Norm(of="update")])
    with pytest.raises(ValueError, match="support_init='uniform'"):
        SparseLoraConfig(r=0, density=0.1, support_init="uniform", schedule=[L1Norm(of="update")])
