"""LT-SFT with several iterations against a dense float64 model that follows the released code's loop: warm up, rank
|theta - theta_0| among what is not chosen yet, go back to where the iteration began, train sparsely, begin there."""

import math

import pytest
import tiny
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy

from hf_sparse_peft import initialize_support, methods
from hf_sparse_peft.tuners import adapter_layers

TARGETS, HEAD = ("v_proj", "down_proj"), "lm_head"
DENSITY, WARM, SPARSE, LAST = 0.06, 3, 2, 3
LR, RUN_LR, CLIP, BETAS, EPS = 1e-2, 5e-3, 1.0, (0.9, 0.999), 1e-8


class Reference:
    """A Llama in float64 whose targeted weights and head train; AdamW, clipping and masks are written out."""

    def __init__(self) -> None:
        self.model = tiny.llama(layers=1).double()
        parameters = dict(self.model.named_parameters())
        self.numbers = sum(p.numel() for p in parameters.values())
        self.maskable = {n.removesuffix(".weight"): p for n, p in parameters.items() if n.split(".")[-2] in TARGETS}
        self.trained = {**self.maskable, HEAD: parameters[f"{HEAD}.weight"]}
        self.start = self.copy()
        self.mask = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in self.maskable.items()}

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.trained.items()}

    def go_to(self, values: dict[str, torch.Tensor]) -> None:
        for name, p in self.trained.items():
            p.data.copy_(values[name])

    def phase(self, batches, lr: float, masked: bool, l1: float, clipped_l1: bool = True) -> None:
        m, v = ({n: torch.zeros_like(p) for n, p in self.trained.items()} for _ in range(2))
        for step, ids in enumerate(batches, 1):
            logits = self.model(input_ids=ids).logits[:, :-1]
            loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
            g = dict(zip(self.trained, torch.autograd.grad(loss, list(self.trained.values())), strict=True))
            pull = {n: l1 / self.numbers * (p.detach() - self.start[n]).sign() for n, p in self.trained.items()}
            if clipped_l1:
                g = {n: g[n] + pull[n] for n in g}
            if masked:
                g = {n: g[n] * self.mask[n] if n in self.mask else g[n] for n in g}
            norm = math.sqrt(sum(float((one**2).sum()) for one in g.values()))
            now = lr * (1 - (step - 1) / len(batches))
            for n, p in self.trained.items():
                d = g[n] * min(1.0, CLIP / (norm + 1e-6))
                if not clipped_l1:
                    d = d + (pull[n] * self.mask[n] if n in self.mask else pull[n])
                m[n] = BETAS[0] * m[n] + (1 - BETAS[0]) * d
                v[n] = BETAS[1] * v[n] + (1 - BETAS[1]) * d**2
                p.data -= now * (m[n] / (1 - BETAS[0] ** step)) / ((v[n] / (1 - BETAS[1] ** step)).sqrt() + EPS)

    def select(self, count: int) -> None:
        moved = {n: (p.detach() - self.start[n]).abs() for n, p in self.maskable.items()}
        free = torch.cat([moved[n].masked_fill(self.mask[n], -1).reshape(-1) for n in moved])
        chosen = torch.zeros_like(free, dtype=torch.bool)
        chosen[free.topk(count).indices] = True
        for name, part in zip(moved, chosen.split([x.numel() for x in moved.values()]), strict=True):
            self.mask[name] |= part.view_as(self.mask[name])


def lt_sft(iterations: int, **options):
    return methods.get(
        "lt-sft", density=DENSITY, warmup_steps=WARM, warmup_lr=LR, sparse_steps=SPARSE, n_iterations=iterations,
        target_modules=list(TARGETS), modules_to_save=[HEAD], task_type="CAUSAL_LM", **options,
    )  # fmt: skip


def batches(count: int):
    return [{"input_ids": ids, "labels": ids.clone()} for ids in tiny.TokenData(4 * count).ids.split(4)]


def prepared(iterations: int, **options):
    model = get_peft_model(tiny.llama(layers=1), lt_sft(iterations, **options).config)
    initialize_support(model, batches(iterations * (WARM + SPARSE)), show_progress=False)
    return model


def head_of(model):
    return model.get_submodule(f"base_model.model.{HEAD}").modules_to_save["default"].weight


@pytest.mark.parametrize(("iterations", "l1"), [(2, 0.0), (3, 40.0)], ids=["two", "three-penalised"])
def test_iterations_take_the_support_values_and_head_of_the_released_loop(iterations, l1, tmp_path):
    model = prepared(iterations, warmup_l1=l1, l1=l1)
    ids = [batch["input_ids"] for batch in batches(iterations * (WARM + SPARSE))]
    reference, at = Reference(), 0
    budget = int(DENSITY * sum(p.numel() for p in reference.maskable.values()))
    for iteration in range(iterations):
        before = reference.copy()
        reference.phase(ids[at : at + WARM], LR, masked=False, l1=l1)
        at += WARM
        reference.select((iteration + 1) * budget // iterations - iteration * budget // iterations)
        reference.go_to(before)
        if iteration + 1 < iterations:
            reference.phase(ids[at : at + SPARSE], LR, masked=True, l1=l1)
            at += SPARSE
    compare(model, reference)

    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].clone()), with_kwargs=True)
    callbacks = lt_sft(iterations, l1=l1).callbacks(model)
    tiny.train(model, tmp_path, LAST, callbacks=callbacks, learning_rate=RUN_LR, weight_decay=0.0, max_grad_norm=CLIP)
    reference.phase(seen, RUN_LR, masked=True, l1=l1, clipped_l1=False)  # the run's pull comes after clipping
    compare(model, reference)


def compare(model, reference):
    for layer in adapter_layers(model):
        name = layer.module_name
        chosen = reference.mask[name].reshape(-1).nonzero().squeeze(1)
        assert layer.units("default").tolist() == chosen.tolist(), name
        expected = (reference.trained[name] - reference.start[name]).detach().reshape(-1)[chosen]
        assert expected.abs().max() > 5e-3
        ours = layer.sparse_lora_values["default"].detach().double()
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    moved = (reference.trained[HEAD] - reference.start[HEAD]).abs().max()
    assert moved > 5e-3
    torch.testing.assert_close(head_of(model).detach().double(), reference.trained[HEAD].detach(), rtol=0, atol=1e-5)


def test_one_iteration_starts_at_nothing_and_several_at_what_was_learned():
    for iterations in (1, 2):
        model = prepared(iterations)
        values = torch.cat([layer.sparse_lora_values["default"].detach() for layer in adapter_layers(model)])
        share = float((values != 0).float().mean())
        # The units of the last warm-up have not trained yet.
        assert share == pytest.approx(1 - 1 / iterations, abs=0.01)
        assert torch.equal(head_of(model), tiny.llama(layers=1).lm_head.weight) is (iterations == 1)


def test_the_adapters_output_is_that_of_the_last_sparse_phase():
    # scale_support multiplies the values in the forward pass: what was learned must not be scaled twice.
    model = get_peft_model(tiny.llama(layers=1), lt_sft(2, r=2, lora_alpha=8, scale_support=True).config)
    data = batches(2 * (WARM + SPARSE))
    initialize_support(model, data, show_progress=False)
    plain = prepared(2, r=2, lora_alpha=8)
    for one, other in zip(adapter_layers(model), adapter_layers(plain), strict=True):
        torch.testing.assert_close(one.get_delta_weight("default"), other.get_delta_weight("default"))


def test_a_warm_up_that_fails_puts_everything_back():
    model = get_peft_model(tiny.llama(layers=1), lt_sft(2).config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calls = []

    def loss(model, batch):
        calls.append(1)
        return model(**batch).loss * (float("nan") if len(calls) >= WARM + SPARSE + 2 else 1.0)

    with pytest.raises(ValueError, match="Dense warm-up: the gradient is not finite in"):
        initialize_support(model, batches(2 * (WARM + SPARSE)), compute_loss=loss, show_progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(layer.sparse_lora_dense_delta for layer in adapter_layers(model))


@pytest.mark.parametrize(("option", "value"), [("sparse_steps", 0), ("sparse_lr", 0.0)])
def test_a_sparse_phase_of_nothing_is_refused(option, value):
    with pytest.raises(ValueError, match=option):
        lt_sft(2, criterion={"type": "delta_magnitude", "n_iterations": 2, option: value})
