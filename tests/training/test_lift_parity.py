"""Ours against LIFT on dense float64 matrices, written here from the paper's rules alone.

The reference holds whole weights `W`, a mask, and dense moments; it shares no code with the package.
"""

import math

import pytest
import torch
from training_toolbox import Hook, TokenData, adapted, layers_of, run, support_of, tiny_llama
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_sparse_peft import methods

STEPS, INTERVAL, RANK, BUDGET = 50, 10, 4, 2
BETAS, EPS = (0.9, 0.95), 1e-8


def best_of_low_rank(weight: torch.Tensor, rank: int, count: int) -> list[int]:
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    approximation = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return sorted(approximation.abs().reshape(-1).topk(count).indices.tolist())


class DenseLift:
    """LIFT (Liu et al., 2025): Adam on the masked entries of `W`, the mask chosen anew from the current `W`."""

    def __init__(self, names: list[str], seed: int, clip: float, per_entry_age: bool):
        self.model = tiny_llama(seed).double().requires_grad_(False)
        self.clip, self.per_entry_age, self.update = clip, per_entry_age, 0
        self.weights = {name: self.model.get_submodule(name).weight.requires_grad_() for name in names}
        self.start = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.count = {n: min(BUDGET * sum(w.shape), w.numel()) for n, w in self.weights.items()}
        self.mask = {n: best_of_low_rank(w.detach(), RANK, self.count[n]) for n, w in self.weights.items()}
        zeros = {name: torch.zeros(weight.numel(), dtype=torch.float64) for name, weight in self.weights.items()}
        self.m, self.v, self.age = ({n: t.clone() for n, t in zeros.items()} for _ in range(3))
        self.refreshed: dict[int, dict[str, list[int]]] = {}

    def step(self, micro_batches, lr: float) -> None:
        self.update += 1
        for weight in self.weights.values():
            weight.grad = None
        for ids, labels, items in micro_batches:
            scores = self.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            (-scores.gather(-1, labels[:, 1:, None]).sum() / items).backward()
        grads = {name: weight.grad.reshape(-1)[self.mask[name]] for name, weight in self.weights.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        for name, g in grads.items():
            at, g = self.mask[name], g * factor
            m, v, age = self.m[name], self.v[name], self.age[name]
            age[at] += 1
            m[at] = BETAS[0] * m[at] + (1 - BETAS[0]) * g
            v[at] = BETAS[1] * v[at] + (1 - BETAS[1]) * g**2
            t = age[at] if self.per_entry_age else torch.full_like(g, self.update)
            change = lr * (m[at] / (1 - BETAS[0] ** t)) / ((v[at] / (1 - BETAS[1] ** t)).sqrt() + EPS)
            self.weights[name].data.view(-1)[at] -= change
        if self.update % INTERVAL == 0 and self.update < STEPS:
            for name, weight in self.weights.items():
                new = best_of_low_rank(weight.detach(), RANK, self.count[name])
                changed = sorted(set(new) ^ set(self.mask[name]))
                for table in (self.m, self.v, self.age):
                    table[name][changed] = 0
                self.mask[name] = new
            self.refreshed[self.update] = dict(self.mask)


CASES = {
    "one-batch": {"accumulation": 1, "max_grad_norm": 0.0},
    "accumulated-clipped": {"accumulation": 2, "batch": 2, "max_grad_norm": 0.5},
    "ages": {"accumulation": 1, "max_grad_norm": 1.0, "per_unit_age": True},
}


def trained_of(layer) -> list[int]:
    frozen = layer.sparse_lora_rule_frozen["default"].tolist()
    return [unit for unit, mark in zip(support_of(layer), frozen, strict=False) if not mark]


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_take_the_supports_and_values_of_a_dense_lift(case, tmp_path):
    options = dict(CASES[case])
    ages = options.pop("per_unit_age", False)
    method = methods.get(
        "lift", budget_rank=BUDGET, filter_rank=RANK, every=INTERVAL, exact=True, per_unit_age=ages,
        target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = adapted(method.config, seed=5)
    steps, lrs, pending, ours = [], [], [], {}

    def see(module, args, kwargs):
        pending.append((kwargs["input_ids"].clone(), kwargs["labels"].clone(), int(kwargs["num_items_in_batch"])))

    def close(update, model, optimizer):
        steps.append(list(pending))
        lrs.append(optimizer.param_groups[0]["lr"])
        pending.clear()

    def record(update, model, optimizer):
        if update % INTERVAL == 0 and update < STEPS:
            ours[update] = {layer.module_name: trained_of(layer) for layer in layers_of(model)}

    model.register_forward_pre_hook(see, with_kwargs=True)
    trainer = run(
        model, tmp_path, STEPS, train=False, lr=1e-2, decay=0.0, data=TokenData(), warmup_steps=4,
        before=[Hook(on_pre_optimizer_step=close)], after=[Hook(on_step_end=record)], **options,
    )  # fmt: skip
    trainer.optimizer = method.optimizer(model, trainer.args)
    start = {layer.module_name: support_of(layer) for layer in layers_of(model)}
    trainer.train()

    reference = DenseLift(list(start), 5, options["max_grad_norm"], ages)
    assert start == reference.mask
    for batches, lr in zip(steps, lrs, strict=True):
        reference.step(batches, lr)
    assert sorted(ours) == sorted(reference.refreshed) == [10, 20, 30, 40]
    for update, supports in ours.items():
        assert supports == reference.refreshed[update], f"supports differ after update {update}"
    moves = trainer.schedule_callbacks[0].events
    assert all(move["replaced"] > 0 and move["lost"] == 0 for move in moves)
    assert moves[-1]["retired"] > 0
    for layer in layers_of(model):
        name = layer.module_name
        # Everything ever changed, retired entries included, and nothing else.
        delta = (reference.weights[name].data - reference.start[name]).double()
        retired = sorted(set(support_of(layer)) - set(reference.mask[name]))
        assert retired
        assert delta.reshape(-1)[retired].abs().min() > 0
        dense = layer.get_delta_weight("default").double()
        torch.testing.assert_close(dense, delta, rtol=0, atol=1e-6)
        assert len(reference.mask[name]) == reference.count[name]


def test_the_whole_rank_selects_by_magnitude_and_a_rank_one_weight_by_its_factors():
    from hf_sparse_peft.sparsity import UnitGrid, select_units

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator)
    grid = UnitGrid(12, 20)
    full = select_units("low_rank_magnitude", weight, grid, 30, rank=12, exact=True)
    assert full.tolist() == sorted(weight.abs().view(-1).topk(30).indices.tolist())
    u, v = torch.randn(12, generator=generator), torch.randn(20, generator=generator)
    for options in ({"exact": True}, {"oversampling": 4}):
        one = select_units(
            "low_rank_magnitude", torch.outer(u, v), grid, 30, rank=1, generator=generator.manual_seed(1), **options
        )
        assert one.tolist() == sorted(torch.outer(u, v).abs().view(-1).topk(30).indices.tolist())


def test_a_refresh_at_an_unchanged_weight_keeps_support_and_moments_bitwise(tmp_path):
    method = methods.get("lift", density=0.1, filter_rank=RANK, every=3, target_modules=["q_proj"], exact=True)
    model = adapted(method.config)
    seen = {}

    def look(name):
        def take(update, model, optimizer):
            if update == 3:
                layer = layers_of(model)[0]
                state = getattr(optimizer, "optimizer", optimizer).state[layer.sparse_lora_values["default"]]
                seen[name] = (support_of(layer), {k: v.clone() for k, v in state.items() if k != "step"})

        return Hook(on_step_end=take)

    trainer = run(model, tmp_path, 5, train=False, lr=0.0, before=[look("old")], after=[look("new")])
    trainer.optimizer = method.optimizer(model, trainer.args)
    trainer.train()
    (old, before), (new, after) = seen["old"], seen["new"]
    assert old == new
    assert set(before) == {"exp_avg", "exp_avg_sq"}
    assert all(torch.equal(before[key], after[key]) and after[key].any() for key in before)


def test_on_an_nf4_base_the_current_weight_is_the_dequantised_base_plus_the_delta(tmp_path):
    import bitsandbytes as bnb

    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    method = methods.get(
        "lift", budget_rank=BUDGET, filter_rank=RANK, every=3, exact=True, target_modules=["q_proj", "down_proj"]
    )
    model = adapted(method.config, base=base)
    plain = {
        layer.module_name: bnb.functional.dequantize_4bit(
            layer.base_layer.weight.data, layer.base_layer.weight.quant_state
        ).double()
        for layer in layers_of(model)
    }
    chosen = {layer.module_name: support_of(layer) for layer in layers_of(model)}
    for name, weight in plain.items():
        assert chosen[name] == best_of_low_rank(weight, RANK, BUDGET * sum(weight.shape))
    seen = {}

    def before(update, model, optimizer):
        if update == 3:
            for layer in layers_of(model):
                dense = plain[layer.module_name].reshape(-1).clone()
                units = support_of(layer)
                dense[units] += layer.sparse_lora_values["default"].detach()[: len(units)].double()
                seen[layer.module_name] = dense.view_as(plain[layer.module_name])

    def after(update, model, optimizer):
        if update == 3:
            for layer in layers_of(model):
                weight = seen[layer.module_name]
                assert trained_of(layer) == best_of_low_rank(weight, RANK, BUDGET * sum(weight.shape))

    trainer = run(
        model, tmp_path, 5, train=False, lr=3e-2, decay=0.0, before=[Hook(on_step_end=before)],
        after=[Hook(on_step_end=after)],
    )  # fmt: skip
    trainer.optimizer = method.optimizer(model, trainer.args)
    trainer.train()
    assert len(seen) == 2
    assert trainer.schedule_callbacks[0].events[0]["replaced"] > 0
