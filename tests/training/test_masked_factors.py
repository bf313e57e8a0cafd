"""CapaBoost and MoSA: masks on factors, experts that are drawn, and the plain adapter they merge into."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from training_toolbox import Hook, StopAt, TokenData, layers_of, tiny_llama
from training_toolbox import run as run_trainer
from transformers import Trainer, TrainingArguments

from hf_sparse_peft import FactorMaskConfig, SparseLoraConfig, callbacks_for, methods
from hf_sparse_peft.hub import check_adapter, export_lora
from hf_sparse_peft.rules import ExpertDraw
from hf_sparse_peft.training.trainers import TwoPassTrainer, symmetric_divergence
from hf_sparse_peft.tuners.sparse_lora.factors import drawn_expert

TARGETS = ["q_proj", "down_proj"]
IDS = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(1))


def build(name, filled=False, base=None, **options):
    config = methods.get(name, **{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}).config
    base = tiny_llama() if base is None else base
    torch.manual_seed(5)
    model = get_peft_model(base, config)
    if filled:
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def factors(layer, adapter="default"):
    return layer.sparse_lora_A[adapter], layer.sparse_lora_B[adapter]


def draw_experts(model, *draw):
    """Let training passes use the experts of (step, micro-batch, pass)."""
    drawn = ExpertDraw(*draw, consistency=1.0)
    for layer in layers_of(model):
        layer.expert_draws["default"] = drawn


def bits(layer, factor, copies=2):
    stored = getattr(layer, f"sparse_lora_{factor}_map")["default"]
    return [(stored // 2**i % 2).double() for i in range(copies)]


# CapaBoost


def test_capaboost_has_the_papers_defaults():
    config = methods.get("capaboost").config
    assert (config.r, config.lora_alpha, config.density) == (8, 16, 0.0)
    assert config.factor_masks == FactorMaskConfig("parallel", copies=2, density=0.5)
    assert callbacks_for(config) == []


def test_one_copy_of_full_density_is_plain_low_rank_to_the_last_bit(tmp_path):
    found = []
    for masks in (FactorMaskConfig("parallel", copies=1, density=1.0), None):
        model = build("capaboost", factor_masks=masks)
        run_trainer(model, tmp_path, 5, optimizer="default")
        found.append([p.detach().clone() for layer in layers_of(model) for p in factors(layer)] + [logits(model)])
    assert all(map(torch.equal, *found))


def test_masked_copies_add_up_to_a_higher_rank_and_gradients_are_exact():
    model = build("capaboost", filled=True)
    for layer in layers_of(model):
        A, B = (f.detach().double().requires_grad_() for f in factors(layer))
        masks = list(zip(bits(layer, "B"), bits(layer, "A"), strict=True))
        assert [int(m.sum()) for pair in masks for m in pair] == [B.numel() // 2, A.numel() // 2] * 2
        delta = 16 / 4 * sum((B * mb) @ (A * ma) for mb, ma in masks)
        assert torch.linalg.matrix_rank(delta) > 4
        torch.testing.assert_close(layer.get_delta_weight("default").double(), delta.detach(), rtol=1e-5, atol=1e-6)
        x = torch.randn(5, layer.in_features)
        y = layer(x)
        direct = x.double() @ (layer.base_layer.weight.double() + delta).t()
        torch.testing.assert_close(y.double(), direct, rtol=1e-4, atol=1e-5)
        weight = torch.randn_like(y)
        (y * weight).sum().backward()
        (direct * weight.double()).sum().backward()
        for own, reference, pair in zip(factors(layer), (A, B), (1, 0), strict=True):
            torch.testing.assert_close(own.grad.double(), reference.grad, rtol=1e-3, atol=1e-4)
            covered = sum(m[pair] for m in masks) > 0
            assert torch.equal(own.grad[~covered], torch.zeros_like(own.grad[~covered]))
            assert 0.2 < (~covered).float().mean() < 0.3


def test_two_micro_batches_give_the_gradients_of_one_batch():
    model, together = build("capaboost", filled=True), None
    ids = torch.randint(48, (4, 9))
    for parts in ([ids], ids.split(2)):
        model.zero_grad()
        for part in parts:
            (model(input_ids=part, labels=part).loss / len(parts)).backward()
        gradients = [p.grad.clone() for layer in layers_of(model) for p in factors(layer)]
        if together is not None:
            torch.testing.assert_close(gradients, together, rtol=1e-4, atol=1e-6)
        together = gradients


def test_masks_follow_from_seed_and_name_and_are_saved(tmp_path):
    model = build("capaboost", filled=True)
    maps = {
        layer.module_name: (layer.sparse_lora_A_map["default"], layer.sparse_lora_B_map["default"])
        for layer in layers_of(model)
    }
    model.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    one = build("capaboost", target_modules=["down_proj"])  # another order, fewer modules, another global random state
    for layer in (*layers_of(loaded), *layers_of(one)):
        assert torch.equal(layer.sparse_lora_A_map["default"], maps[layer.module_name][0])
        assert torch.equal(layer.sparse_lora_B_map["default"], maps[layer.module_name][1])
    other = layers_of(build("capaboost", seed=1))[0]
    assert not torch.equal(other.sparse_lora_A_map["default"], maps[other.module_name][0])
    low = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low), logits(model))
    assert set(export_lora(model, tmp_path / "lora").ranks.values()) == {8}
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")), logits(model))


# MoSA


def owners(layer, factor):
    return getattr(layer, f"sparse_lora_{factor}_map")["default"]


def run_mosa(model, out, steps, hooks=(), resume=None, **arguments):
    options = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "seed": 11,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1000,
    }  # fmt: skip
    args = TrainingArguments(str(out), **{**options, **arguments})
    trainer = TwoPassTrainer(
        model=model, args=args, train_dataset=TokenData(), callbacks=[*callbacks_for(model), *hooks]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("experts", [1, 3, 4])
def test_experts_own_equal_disjoint_parts_that_cover_everything(experts):
    for layer in layers_of(build("mosa", experts=experts)):
        for factor, tensor in zip("AB", factors(layer), strict=True):
            counts = torch.bincount(owners(layer, factor).reshape(-1).long(), minlength=experts)
            assert counts.numel() == experts
            assert counts.max() - counts.min() <= 1
            assert int(counts.sum()) == tensor.numel()


@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_only_entries_of_drawn_experts_move_whatever_the_momentum_and_decay(consistency, tmp_path):
    model = build("mosa", consistency=consistency)
    before, seen = {}, []

    def begin(update, model, optimizer):
        state = getattr(optimizer, "optimizer", optimizer).state
        for layer in layers_of(model):
            for factor, p in zip("AB", factors(layer), strict=True):
                moments = [state[p][k].clone() for k in ("exp_avg", "exp_avg_sq")] if p in state else []
                before[layer.module_name, factor] = [p.detach().clone(), *moments]

    def look(update, model, optimizer):
        state = getattr(optimizer, "optimizer", optimizer).state
        for layer in layers_of(model):
            for factor, p in zip("AB", factors(layer), strict=True):
                passes = range(2 if consistency else 1)
                drawn = {drawn_expert(layer, "default", factor, (update - 1, 0, i)) for i in passes}
                seen.extend(drawn)
                idle = ~torch.isin(owners(layer, factor), torch.tensor(sorted(drawn)))
                old = before[layer.module_name, factor]
                now = [p.detach(), *(state[p][k] for k in ("exp_avg", "exp_avg_sq"))]
                for was, tensor in zip(old, now, strict=False):
                    assert torch.equal(tensor[idle], was[idle])
                if factor == "B":
                    assert not torch.equal(now[0][~idle], old[0][~idle])

    hooks = [Hook(on_step_begin=begin, on_step_end=look)]
    run_mosa(model, tmp_path, 8, hooks, gradient_accumulation_steps=1)
    assert set(seen) == {0, 1, 2, 3}


@pytest.mark.parametrize("split", ["both", "B"])
def test_a_pass_uses_one_expert_and_the_merge_is_their_mean(split):
    model = build("mosa", filled=True, split=split).train()
    for layer in layers_of(model):
        A, B = (f.detach().double() for f in factors(layer))
        start = layer.sparse_lora_A_start["default"].double() if split == "both" else A
        own_A = [torch.where(owners(layer, "A") == e, A, start) if split == "both" else A for e in range(4)]
        own_B = [B * (owners(layer, "B") == e) for e in range(4)]
        base, x = layer.base_layer.weight.double(), torch.randn(3, layer.in_features)
        for draw in ((0, 0, 0), (5, 1, 1)):
            draw_experts(model, *draw)
            e, f = (drawn_expert(layer, "default", factor, draw) for factor in "AB")
            direct = x.double() @ (base + 4 * own_B[f] @ own_A[e]).t()
            torch.testing.assert_close(layer(x).double(), direct, rtol=1e-4, atol=1e-4)
        # The merge of the up path is linear: with one A, the mean of the experts' outputs.
        mean_A, mean_B = sum(own_A) / 4, sum(own_B) / 4
        layer.eval()
        outputs = torch.stack([x.double() @ (base + 4 * own_B[f] @ mean_A).t() for f in range(4)])
        torch.testing.assert_close(layer(x).double(), outputs.mean(0), rtol=1e-4, atol=1e-4)
        delta = layer.get_delta_weight("default").double()
        torch.testing.assert_close(delta, 4 * mean_B @ mean_A, rtol=1e-4, atol=1e-5)


def test_one_expert_without_consistency_is_ordinary_training_to_the_last_bit(tmp_path):
    found = []
    for options in ({"experts": 1, "consistency": 0.0}, {"factor_masks": None, "schedule": []}):
        model = build("mosa", **options)
        run_trainer(model, tmp_path, 5, optimizer="default")
        found.append([p.detach().clone() for layer in layers_of(model) for p in factors(layer)] + [logits(model)])
    assert all(map(torch.equal, *found))


def test_the_divergence_is_symmetric_and_zero_for_equal_draws():
    one, two = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    p, q = one.double().softmax(-1), two.double().softmax(-1)
    expected = 0.5 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(symmetric_divergence(one, two).double(), expected, rtol=1e-4, atol=1e-6)
    assert not symmetric_divergence(one, one.clone()).any()


def test_two_passes_add_the_divergence_and_one_expert_adds_none(tmp_path):
    losses = {}
    for experts in (1, 4):
        model = build("mosa", filled=True, experts=experts)
        trainer = run_mosa(model, tmp_path, 1)
        model.train()
        draw_experts(model, 3, 0)
        inputs = {"input_ids": IDS, "labels": IDS}
        items = torch.tensor(IDS[:, 1:].numel())
        losses[experts] = float(trainer.compute_loss(model, inputs, num_items_in_batch=items))
        scores = []
        for number in (0, 1):
            draw_experts(model, 3, 0, number)
            scores.append(model(input_ids=IDS).logits[:, :-1].double().detach())
        plain = -scores[0].log_softmax(-1).gather(-1, IDS[:, 1:, None]).mean()
        p, q = scores[0].softmax(-1), scores[1].softmax(-1)
        divergence = 0.5 * ((p - q) * (p.log() - q.log())).sum(-1).mean()
        assert losses[experts] == pytest.approx(float(plain + divergence), rel=1e-4)
        assert (divergence == 0) == (experts == 1)


def test_recomputation_finds_the_draws_of_its_own_pass(tmp_path):
    found = []
    for kept in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        model = build("mosa", base=tiny_llama(layers=2))
        run_mosa(model, tmp_path, 4, **kept)
        found.append([p.detach().clone() for layer in layers_of(model) for p in factors(layer)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_resumed_training_draws_the_same_experts(tmp_path):
    whole = build("mosa")
    run_mosa(whole, tmp_path, 6, [StopAt(3, stop=False)], gradient_accumulation_steps=2)
    again = build("mosa")
    run_mosa(again, tmp_path, 6, resume=str(tmp_path / "checkpoint-3"), gradient_accumulation_steps=2)
    for one, two in zip(layers_of(whole), layers_of(again), strict=True):
        assert all(map(torch.equal, factors(one), factors(two)))


@pytest.mark.parametrize("merge", ["add", "joint"])
def test_the_end_is_a_plain_adapter(merge, tmp_path):
    model = build("mosa", filled=True, merge=merge)
    before = logits(model)
    model.save_pretrained(tmp_path / "split")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "split")), before)
    model.compact()
    assert model.peft_config["default"].factor_masks is None
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "plain")
    check_adapter(tmp_path / "plain")
    assert not [name for name, _ in model.named_buffers() if "_map" in name or "_start" in name]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")), logits(model))
    unmerged = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), unmerged)


def test_without_the_rule_training_uses_the_merge_and_with_it_factors_must_be_split(tmp_path):
    model = build("mosa", schedule=[])
    run_trainer(model, tmp_path, 2, optimizer="default", callbacks=callbacks_for(model))
    assert torch.equal(model.train()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    for masks in (None, FactorMaskConfig("parallel")):
        with pytest.raises(ValueError, match=r"FactorExperts draws experts of split factors.*kind='stochastic'"):
            build("mosa", factor_masks=masks)


def test_the_draw_ends_with_the_run_and_the_rule_with_compaction(tmp_path):
    model = build("mosa")
    run_mosa(model, tmp_path, 2)
    assert not any(layer.expert_draws for layer in layers_of(model))
    config = model.peft_config["default"]
    model.base_model.note_sizes(config, model, "default")  # a file that brings sizes says nothing of experts
    assert config.training_finished
    assert config.factor_masks is not None
    assert config.schedule
    model.compact()
    assert (config.schedule, config.factor_masks) == ([], None)


def test_a_trainer_of_one_pass_is_refused(tmp_path):
    model = build("mosa")
    with pytest.raises(ValueError, match=r"consistency=1.0 compares two passes.*TwoPassTrainer"):
        run_trainer(model, tmp_path, 2, optimizer="default")
    assert methods.get("mosa").trainer_class is TwoPassTrainer
    assert issubclass(TwoPassTrainer, Trainer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor_masks": {"kind": "both"}}, r"FactorMaskConfig.kind='both' is out of range"),
        ({"factor_masks": {"copies": 9}}, r"FactorMaskConfig.copies=9 is out of range"),
        ({"factor_masks": {}, "r": 0, "density": 0.1}, r"factor_masks concerns the low-rank half"),
        (
            {"factor_masks": {}, "schedule": [{"type": "allocate", "budget": {"type": "average_rank", "r": 2}}]},
            r"factor_masks cannot be combined with a gate",
        ),
    ],
)
def test_masks_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SparseLoraConfig(**options)
    assert copy.deepcopy(SparseLoraConfig(factor_masks={})).factor_masks == FactorMaskConfig()
