"""FISH, LT-SFT and RL subnetworks against dense models in float64, written here from the papers' rules."""

import math
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from training_toolbox import StopAt, TokenData, adapted, layers_of, make_config, run, support_of, tiny_llama
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback

from hf_sparse_peft import initialize_support, measure_update_sparsity, methods, support_from_checkpoints
from hf_sparse_peft.rules.calibration_data import CalibrationData
from hf_sparse_peft.training.calibration.warmup import DenseWarmup

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS, LR, BETAS, EPS = 50, 2e-3, (0.9, 0.999), 1e-8


class Tape(TrainerCallback):
    """The micro-batches and learning rate of every training step; forward passes before training are left out."""

    def __init__(self):
        self.steps, self.lrs, self.pending = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs):
        self.pending.append(kwargs["input_ids"].clone())

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.steps.append(self.pending)
        self.lrs.append(optimizer.param_groups[0]["lr"])
        self.pending = []


class Dense:
    """A plain Llama in float64 whose targeted weights are `W0 + D` with dense `D`, and AdamW written out."""

    def __init__(self, names, seed):
        self.model = tiny_llama(seed).double().requires_grad_(False)
        self.P = sum(p.numel() for p in self.model.parameters())
        self.weights = {name: self.model.get_submodule(name).weight.requires_grad_() for name in names}
        self.base = {name: w.detach().clone() for name, w in self.weights.items()}
        self.restart()

    def restart(self):
        self.D, self.m, self.v = ({n: torch.zeros_like(w) for n, w in self.base.items()} for _ in range(3))
        self.t = 0

    def gradients(self, ids) -> tuple[dict[str, torch.Tensor], int]:
        """Gradients of the summed token loss, and the number of tokens."""
        for name, weight in self.weights.items():
            weight.data, weight.grad = self.base[name] + self.D[name], None
        scores = self.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        (-scores.gather(-1, ids[:, 1:, None]).sum()).backward()
        return {name: w.grad.clone() for name, w in self.weights.items()}, ids[:, 1:].numel()

    def step(self, micro_batches, lr, masks=None, clip=0.0, l1=0.0, pull=0.0):
        parts = [self.gradients(ids) for ids in micro_batches]
        tokens = sum(count for _, count in parts)
        total = {name: sum(g[name] for g, _ in parts) / tokens for name in self.weights}
        if masks is not None:
            total = {name: g * masks[name] for name, g in total.items()}
        total = {name: g + l1 / self.P * self.D[name].sign() for name, g in total.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in total.values()))
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        self.t += 1
        for name, g in total.items():
            g = g * factor + pull / self.P * self.D[name].sign()  # the pull of phase 2 is not clipped
            self.m[name] = BETAS[0] * self.m[name] + (1 - BETAS[0]) * g
            self.v[name] = BETAS[1] * self.v[name] + (1 - BETAS[1]) * g**2
            m_hat, v_hat = self.m[name] / (1 - BETAS[0] ** self.t), self.v[name] / (1 - BETAS[1] ** self.t)
            self.D[name] = self.D[name] - lr * m_hat / (v_hat.sqrt() + EPS)


def top_masks(scores: dict[str, torch.Tensor], density: float) -> dict[str, torch.Tensor]:
    """One ranking of all entries of all weights."""
    everything = torch.cat([s.reshape(-1) for s in scores.values()])
    chosen = torch.zeros_like(everything, dtype=torch.bool)
    chosen[everything.topk(int(density * everything.numel())).indices] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return {name: part.view_as(s) for part, (name, s) in zip(parts, scores.items(), strict=True)}


def train(method, seed, out, steps=STEPS, batch=4, accumulation=1, **options):
    model, tape = adapted(method.config, seed), Tape()
    callbacks = [*method.callbacks(model), tape]
    run(
        model, out, steps, callbacks=callbacks, optimizer="trainer", lr=LR, decay=0.0, batch=batch,
        accumulation=accumulation, lr_scheduler_type="linear", **options,
    )  # fmt: skip
    return model, tape


def compare(model, masks, reference, atol=1e-6):
    for layer in layers_of(model):
        at = masks[layer.module_name].reshape(-1).nonzero().squeeze(1)
        assert support_of(layer) == at.tolist(), layer.module_name
        expected = reference.D[layer.module_name].reshape(-1)[at]
        assert expected.abs().max() > 1e-2
        ours = layer.sparse_lora_values["default"].detach().double()
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("batch", "accumulation", "clip"), [(4, 1, 0.0), (2, 2, 0.5)])
def test_fifty_steps_of_fish_take_the_mask_and_values_of_a_dense_fish(batch, accumulation, clip, tmp_path):
    method = methods.get(
        "fish", density=0.2, examples=10, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model, tape = train(method, 5, tmp_path, batch=batch, accumulation=accumulation, max_grad_norm=clip)
    reference = Dense([layer.module_name for layer in layers_of(model)], 5)
    examples = torch.cat([ids for step in tape.steps for ids in step])[:10]
    fisher = {name: torch.zeros_like(w) for name, w in reference.base.items()}
    for example in examples.split(1):
        for name, gradient in reference.gradients(example)[0].items():
            fisher[name] += gradient**2
    masks = top_masks(fisher, 0.2)
    assert len({int(mask.sum()) for mask in masks.values()}) > 1
    for micro_batches, lr in zip(tape.steps, tape.lrs, strict=True):
        reference.step(micro_batches, lr, masks, clip)
    compare(model, masks, reference)


def test_unmasked_entries_of_fish_do_not_move_a_bit(tmp_path):
    method = methods.get("fish", density=0.05, examples=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = adapted(method.config)
    run(model, tmp_path, 10, callbacks=method.callbacks(model), optimizer="trainer", decay=0.1)
    masks = {layer.module_name: support_of(layer) for layer in layers_of(model)}
    merged, before = model.merge_and_unload(), dict(tiny_llama().named_parameters())
    for name, parameter in merged.named_parameters():
        moved = (parameter != before[name]).reshape(-1).nonzero().squeeze(1).tolist()
        assert set(moved) <= set(masks.get(name.removesuffix(".weight"), [])), name
        assert bool(moved) is (name.removesuffix(".weight") in masks)


# LT-SFT


@pytest.mark.parametrize(
    ("batch", "accumulation", "l1", "pull"),
    [(4, 1, 0.0, 0.0), (2, 2, 50.0, 5.0)],
    ids=["plain", "accumulated-penalised"],
)
def test_fifty_steps_of_lt_sft_take_the_support_and_values_of_two_dense_phases(batch, accumulation, l1, pull, tmp_path):
    warmup = 30  # more than an epoch of 24 steps
    method = methods.get(
        "lt-sft",
        density=0.05,
        warmup_steps=warmup,
        warmup_lr=1e-3,
        warmup_l1=l1,
        l1=pull,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model, tape = train(method, 5, tmp_path, batch=batch, accumulation=accumulation, max_grad_norm=1.0)
    reference = Dense([layer.module_name for layer in layers_of(model)], 5)
    for step, micro_batches in enumerate(tape.steps[:warmup]):
        reference.step(micro_batches, 1e-3 * (1 - step / warmup), clip=1.0, l1=l1)
    moved = {name: delta.abs() for name, delta in reference.D.items()}
    masks = top_masks(moved, 0.05)
    reference.restart()
    for micro_batches, lr in zip(tape.steps, tape.lrs, strict=True):
        reference.step(micro_batches, lr, masks, clip=1.0, pull=pull)
    compare(model, masks, reference)


def lt_sft(**options):
    return methods.get(
        "lt-sft",
        **{"warmup_steps": 4, "warmup_lr": 1e-2, "density": 0.05, "target_modules": TARGETS,
           "task_type": "CAUSAL_LM", **options},
    )  # fmt: skip


def batches(count=4, seed=3):
    ids = TokenData(4 * count, seed=seed).ids
    return [{"input_ids": part, "labels": part.clone()} for part in ids.split(4)]


@pytest.mark.parametrize("way", ["call", "callback"])
def test_the_second_phase_starts_at_the_first_values_bit_for_bit(way, tmp_path):
    model = adapted(lt_sft(modules_to_save=["lm_head"], r=2).config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "sparse_lora_values" not in name}
    if way == "call":
        initialize_support(model, batches(), show_progress=False)
    else:
        run(model, tmp_path, 1, optimizer="trainer", lr=0.0, decay=0.0)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    for layer in layers_of(model):
        assert not layer.sparse_lora_dense_delta
        assert not layer.sparse_lora_values["default"].any()


def test_the_warm_up_trains_the_head_too():
    model = adapted(lt_sft(modules_to_save=["lm_head"]).config)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    config = model.peft_config["default"]
    warmup = DenseWarmup(model, layers_of(model), "default", config.criterion)
    before = head.detach().clone()
    warmup.train(iter(batches(8)), show_progress=False)
    assert not torch.equal(head, before)
    assert all(delta.any() for delta in warmup.deltas)
    warmup.rewind()
    assert torch.equal(head, before)


def test_no_more_than_k_entries_differ_after_the_second_phase(tmp_path):
    method = lt_sft()
    model = adapted(method.config)
    run(model, tmp_path, 10, callbacks=method.callbacks(model), optimizer="trainer", decay=0.0)
    merged, before = model.merge_and_unload(), dict(tiny_llama().named_parameters())
    targeted = sum(p.numel() for n, p in before.items() if any(t in n for t in TARGETS))
    differ = {n: int((p != before[n]).sum()) for n, p in merged.named_parameters()}
    assert 0 < sum(differ.values()) <= int(0.05 * targeted)
    assert all(any(t in name for t in TARGETS) for name, count in differ.items() if count)


def test_adapters_of_two_tasks_add_up_overlaps_included():
    model = adapted(lt_sft(density=0.3).config)
    initialize_support(model, batches(seed=3), show_progress=False)
    model.add_adapter("language", lt_sft(density=0.3).config)
    model.set_adapter("language")
    initialize_support(model, batches(seed=9), adapter_name="language", show_progress=False)
    for layer in layers_of(model):
        for name in ("default", "language"):
            layer.sparse_lora_values[name].data.normal_()
        assert set(support_of(layer)) & set(support_of(layer, "language"))
    deltas = [
        layer.get_delta_weight("default").double() + layer.get_delta_weight("language").double()
        for layer in layers_of(model)
    ]
    bits = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.base_model.add_weighted_adapter(["default", "language"], [1.0, 1.0], "both", "linear")
    for layer, expected in zip(layers_of(model), deltas, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("both").double(), expected, rtol=0, atol=1e-6)
    ids = TokenData(2).ids
    model.eval()
    with torch.no_grad():
        model.set_adapter("both")
        one = model(input_ids=ids).logits
        model.base_model.set_adapter(["default", "language"])
        torch.testing.assert_close(model(input_ids=ids).logits, one, rtol=0, atol=1e-5)
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters() if n in bits)


def test_an_adapter_warms_up_on_top_of_another_one():
    model = adapted(make_config(density=0.3))
    for layer in layers_of(model):
        layer.sparse_lora_values["default"].data.normal_(std=0.3)
    model.add_adapter("task", lt_sft(target_modules=["q_proj", "v_proj"]).config)
    model.base_model.set_adapter(["default", "task"])
    for name, parameter in model.named_parameters():
        if ".default" in name:
            parameter.requires_grad_(False)
    config = model.peft_config["task"]
    layers = [layer for layer in layers_of(model) if "task" in layer.sparse_lora_values]
    warmup = DenseWarmup(model, layers, "task", config.criterion)
    ids = TokenData(4).ids
    model.base_model.set_adapter("default")
    with torch.no_grad():
        below = model.eval()(input_ids=ids).logits
    model.base_model.set_adapter(["default", "task"])
    warmup._open()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, below, rtol=0, atol=1e-5)


def test_a_heavy_penalty_keeps_the_warm_up_where_it_started():
    reach = {}
    for l1 in (0.0, 1e9):
        model = adapted(lt_sft(warmup_l1=l1, warmup_steps=40, warmup_lr=1e-3).config)
        config = model.peft_config["default"]
        warmup = DenseWarmup(model, layers_of(model), "default", config.criterion)
        warmup.train(iter(batches(40)), show_progress=False)
        reach[l1] = max(float(delta.detach().abs().mean()) for delta in warmup.deltas)
    assert reach[1e9] < 0.15 * reach[0.0]


def test_the_penaltys_gradient_does_not_depend_on_accumulation():
    found = []
    for parts in (1, 2, 4):
        model = adapted(lt_sft(warmup_l1=7.0).config)
        config = model.peft_config["default"]
        criterion = replace(config.criterion, max_grad_norm=0.0)
        warmup = DenseWarmup(model, layers_of(model), "default", criterion)
        warmup._open()
        for delta in warmup.deltas:
            delta.data.copy_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)))
        ids = TokenData(8).ids
        micro = [{"input_ids": part, "labels": part.clone()} for part in ids.chunk(parts)]
        warmup._gradients(micro, lambda model, batch: model(**batch).loss * 0)
        found.append([delta.grad for delta in warmup.deltas])
        numbers = sum(p.numel() for p in tiny_llama().parameters())
        for delta in warmup.deltas:
            torch.testing.assert_close(delta.grad, 7.0 / numbers * delta.detach().sign())
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.fixture
def nf4_llama(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=nf4, device_map="cpu", dtype=torch.float32
    )


def test_lt_sft_warms_up_on_an_nf4_base(nf4_llama):
    model = get_peft_model(nf4_llama, lt_sft().config)
    bits = {name: p.detach().clone() for name, p in model.named_parameters() if "sparse_lora" not in name}
    initialize_support(model, batches(), show_progress=False)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters() if n in bits)
    model.train()
    model(**batches()[0]).loss.backward()
    assert all(layer.sparse_lora_values["default"].grad.any() for layer in layers_of(model))


# RL subnetworks


def rl_checkpoints(change=0.1, seed=1):
    before = {name: p.detach().clone() for name, p in tiny_llama().named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    after = {}
    for name, tensor in before.items():
        mask = torch.rand(tensor.shape, generator=generator) < change
        after[name] = tensor + mask * torch.randn(tensor.shape, generator=generator)
    return before, after


def test_sparsity_counts_exactly_what_changed():
    before = {"a": torch.randn(30, 20), "b": torch.randn(50), "steps": torch.tensor(3)}
    same = measure_update_sparsity(before, {k: v.clone() for k, v in before.items()})
    assert (same.sparsity, same.sparsity_within, same.mean_sparsity) == (1.0, 1.0, 1.0)
    after = {k: v.clone() for k, v in before.items()}
    after["a"].view(-1)[:7] += 1.0
    after["b"][:5] += 1.0
    found = measure_update_sparsity(before, after)
    assert found.sparsity == found.sparsity_within == pytest.approx(1 - 12 / 650, abs=1e-12)
    assert found.mean_sparsity == pytest.approx(1 - (7 / 600 + 5 / 50) / 2, abs=1e-12)
    assert {name: update.changed for name, update in found.tensors.items()} == {"a": 7, "b": 5}


def test_a_small_update_shows_in_fp32_and_not_in_bf16():
    before, after = {"w": torch.ones(4, 4)}, {"w": torch.ones(4, 4) + 1e-6}
    assert measure_update_sparsity(before, after).sparsity == 0.0
    assert measure_update_sparsity(before, after).sparsity_within == 1.0
    assert measure_update_sparsity(before, after, atol=0.0).sparsity_within == 0.0
    assert measure_update_sparsity(before, after, dtype=torch.bfloat16).sparsity == 1.0
    with pytest.raises(ValueError, match=r"'w' is torch\.float32 before and torch\.bfloat16 after.*dtype="):
        measure_update_sparsity(before, {"w": after["w"].bfloat16()})


def test_a_random_sparse_update_has_full_rank():
    before, after = rl_checkpoints(0.2)
    assert measure_update_sparsity(before, after, ranks=True).mean_rank > 0.99
    low = {
        k: v + (torch.ones(v.shape[0], 1) @ torch.ones(1, v.shape[1]) if v.ndim == 2 else 0) for k, v in before.items()
    }
    assert measure_update_sparsity(before, low, ranks=True).mean_rank < 0.2


def test_tied_weights_count_once_and_odd_checkpoints_are_refused(tmp_path):
    shared = torch.randn(6, 4)
    before, after = {"e": shared, "head": shared, "w": torch.randn(3)}, {}
    changed = shared + 1
    after = {"e": changed, "head": changed, "w": before["w"]}
    assert measure_update_sparsity(before, after).numel == 27
    save_file({"e": changed, "w": before["w"]}, tmp_path / "model.safetensors")  # as transformers saves tied weights
    assert measure_update_sparsity(before, tmp_path).sparsity == pytest.approx(1 - 24 / 27)
    with pytest.raises(ValueError, match=r"Only the checkpoint before has \['w'\]"):
        measure_update_sparsity(before, {"e": changed})
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\) before and \(4,\) after"):
        measure_update_sparsity(before, {"e": changed, "w": torch.ones(4)})
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        measure_update_sparsity(tmp_path / "none", before)


def rl_model(before, after, **options):
    config = methods.get("rl-subnetwork", target_modules=TARGETS, task_type="CAUSAL_LM", **options).config
    model = adapted(config)
    support_from_checkpoints(model, before, after)
    return model


def test_the_subnetwork_is_exactly_what_changed_and_nothing_else_moves(tmp_path):
    before, after = rl_checkpoints()
    untouched = "model.layers.0.self_attn.v_proj"
    after[f"{untouched}.weight"] = before[f"{untouched}.weight"]
    save_file(before, tmp_path / "before.safetensors")
    save_file(after, tmp_path / "after.safetensors")
    model = rl_model(tmp_path / "before.safetensors", tmp_path / "after.safetensors")
    changed = {n: (after[n] != before[n]).reshape(-1).nonzero().squeeze(1).tolist() for n in before}
    for layer in layers_of(model):
        held = "default" in layer.sparse_lora_values
        assert held is (layer.module_name != untouched)
        if held:
            assert support_of(layer) == changed[f"{layer.module_name}.weight"]
    run(model, tmp_path / "run", 10, optimizer="trainer", decay=0.1)
    for name, parameter in model.merge_and_unload().named_parameters():
        moved = (parameter != before[name]).reshape(-1).nonzero().squeeze(1).tolist()
        targeted = any(t in name for t in TARGETS)
        assert set(moved) <= set(changed[name] if targeted else [])


def test_a_subnetwork_run_resumes_to_the_last_bit(tmp_path):
    before, after = rl_checkpoints()
    whole = rl_model(before, after)
    run(whole, tmp_path / "whole", 8)
    run(rl_model(before, after), tmp_path / "parts", 8, after=[StopAt(4)])
    resumed = adapted(methods.get("rl-subnetwork", target_modules=TARGETS, task_type="CAUSAL_LM").config)
    run(resumed, tmp_path / "parts", 8, callbacks=[], resume=str(tmp_path / "parts" / "checkpoint-4"))
    for one, two in zip(layers_of(whole), layers_of(resumed), strict=True):
        assert support_of(one) == support_of(two)
        assert torch.equal(one.sparse_lora_values["default"], two.sparse_lora_values["default"])


def test_the_whole_network_as_subnetwork_trains_like_full_fine_tuning(tmp_path):
    before = {name: p.detach().clone() for name, p in tiny_llama().named_parameters()}
    model, tape = rl_model(before, {name: t + 1 for name, t in before.items()}), Tape()
    run(model, tmp_path, 10, callbacks=[tape], optimizer="trainer", lr=LR, decay=0.0, max_grad_norm=0.0)
    reference = Dense([layer.module_name for layer in layers_of(model)], 0)
    for micro_batches, lr in zip(tape.steps, tape.lrs, strict=True):
        reference.step(micro_batches, lr)
    for layer in layers_of(model):
        ours = layer.sparse_lora_values["default"].detach().double()
        expected = reference.D[layer.module_name].reshape(-1)
        assert (ours - expected).abs().max() < 1e-3 * LR * 10  # Adam amplifies rounding where gradients vanish
        assert (ours - expected).abs().median() < 1e-7


def test_subnetworks_that_do_not_fit_are_refused_by_name():
    before, after = rl_checkpoints()
    with pytest.raises(ValueError, match="No module has a unit"):
        rl_model(before, before)
    with pytest.raises(ValueError, match=r"'model\.layers\.0.*weight' is not in the checkpoint"):
        rl_model({f"x.{k}": v for k, v in before.items()}, {f"x.{k}": v for k, v in after.items()})
    with pytest.raises(ValueError, match="Sizes can change only before training"):
        support_from_checkpoints(adapted(make_config()), before, after)
    unchosen = adapted(methods.get("rl-subnetwork", target_modules=TARGETS, task_type="CAUSAL_LM").config)
    with pytest.raises(ValueError, match="support_from_checkpoints"):
        initialize_support(unchosen, batches())
    unchosen.train()
    with pytest.raises(ValueError, match=r"load_support.*support_from_checkpoints"):
        unchosen(**batches()[0])
    assert CalibrationData(batches(), torch.device("cpu"))
