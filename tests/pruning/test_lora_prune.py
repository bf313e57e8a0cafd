"""LoRAPrune while a LoRA trains: the estimated gradient, the score, the schedule, the masks, resumed and sliced."""

import copy
import itertools
import math

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_sparse_peft import SparseLoraConfig, methods
from hf_sparse_peft.finetuning import AdapterArguments, choose_method
from hf_sparse_peft.pruning import mask_units, slice_model, structures_of, unit_masks_of
from hf_sparse_peft.pruning.units.unit_masks import components_of, masked_spaces
from hf_sparse_peft.pruning.units.unit_scores import lora_gradient
from hf_sparse_peft.pruning.while_training.lora_prune import LoRAPruneCallback, PruneUnits, merged_weight, unit_scores

STEPS = 10
LORA = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
RULE = PruneUnits(every=2, whole_first=0.0, whole_last=1)


def adapted(config=None, layers=3, **options):
    torch.manual_seed(0)
    model = tiny.llama(layers=layers)
    torch.manual_seed(1)
    return get_peft_model(model, config or LoraConfig(**{**LORA, **options}))


def train(model, out, *, rule=RULE, steps=STEPS, callbacks=(), **options):
    callback = LoRAPruneCallback(rule)
    tiny.train(model, out, steps, callbacks=[callback, *callbacks], data=tiny.TokenData(40), **options)
    return callback


def test_the_estimate_is_what_a_unit_step_of_both_factors_changes():
    generator = torch.Generator().manual_seed(0)
    A, B, gA, gB = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 5), (4, 2), (2, 5), (4, 2)))
    torch.testing.assert_close(lora_gradient(A, B, gA, gB), B @ A - (B - gB) @ (A - gA))
    one = torch.ones(1, 1)
    worked = [(3 * one, 2 * one, g * one, g * one / 2) for g in (1.0, 2.0, 1024.0)]
    assert [lora_gradient(*case).item() for case in worked] == [3.0, 5.0, -520704.0]  # not linear: unscale first


def test_gradients_of_the_factors_are_the_dense_gradient_seen_through_them():
    model = adapted(init_lora_weights=False)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    weight = layer.base_layer.weight.requires_grad_()
    model(input_ids=torch.arange(20).view(2, 10), labels=torch.arange(20).view(2, 10)).loss.backward()
    space, G = components_of(layer, "down"), weight.grad
    scale = layer.scaling["default"]
    torch.testing.assert_close(space.A.grad, scale * space.B.t() @ G, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(space.B.grad, scale * G @ space.A.t(), rtol=1e-4, atol=1e-6)
    expected = weight.detach() + layer.get_delta_weight("default")
    torch.testing.assert_close(merged_weight(space), expected.detach())


def by_hand(space, member, components, structure):
    """The paper's sum over a unit's entries, one after the other, in float64."""
    A, B, gA, gB = (t.detach().double() for t in (components.A, components.B, components.A.grad, components.B.grad))
    weight = components.layer.get_base_layer().weight.double()
    scale = components.layer.scaling["default"]
    element = ((B @ A - (B - gB) @ (A - gA)) * (weight + scale * B @ A)).abs()
    sums = []
    for unit in range(space.size):
        lines = member.lines(torch.tensor([unit]))
        sums.append((element[lines] if member.axis == 0 else element[:, lines]).sum())
    sums = torch.stack(sums)
    return sums / sums.norm()


def test_scores_are_sums_over_units_normed_added_and_averaged_over_steps(tmp_path):
    expected, seen = {}, []

    class Check(tiny.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for space in masked_spaces(model, unit_masks_of(model)):
                if space.name == "model.layers.2":
                    continue
                structure = unit_masks_of(model).structures[space.name]
                total = sum(by_hand(space, member, one, structure) for member, one in space.factors)
                key = (space.name, space.kind)
                expected[key] = 0.9 * expected.get(key, 0) + 0.1 * total
            seen.append(len(expected))

    callback = LoRAPruneCallback(PruneUnits(every=2, whole_first=0.0))
    model = adapted()
    tiny.train(model, tmp_path, 4, callbacks=[callback, Check()], data=tiny.TokenData(40))
    assert seen == [4] * 4
    for (name, kind), total in expected.items():
        torch.testing.assert_close(
            callback.runs[0].memory.scores[f"{name}.{kind}"].double(), total, rtol=1e-4, atol=1e-6
        )


def test_masks_only_grow_along_the_cubic_curve_and_end_at_the_exact_share(tmp_path):
    model, counts = adapted(), []

    class Watch(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            counts.append([mask.factors.clone() for mask in unit_masks_of(model).masks])

    callback = train(
        model, tmp_path, rule=PruneUnits(every=2, whole_first=0.0, start=0.1, end=0.8), callbacks=[Watch()]
    )
    for before, after in itertools.pairwise(counts):
        assert all(bool((new <= old).all()) for old, new in zip(before, after, strict=True))
    shares = [round(1 - step[1].mean().item(), 6) for step in counts]  # channels of block 0: 64
    for step, share in enumerate(shares):
        past = step - step % 2
        p = min(max((past / STEPS - 0.1) / 0.7, 0), 1)
        wanted = 0.5 * (1 - (1 - p) ** 3) if step < 8 else 0.5
        assert share == int(64 * wanted + 1e-9) / 64, step
    masks = unit_masks_of(model)
    left = [int(mask.factors.sum()) for mask in masks.masks]
    assert left == [1, 32, 1, 32, 2, 64]  # the last block stays whole
    assert callback.events[-1]["sparsity"] == 0.5


def test_the_last_share_is_reached_where_the_official_code_stops_below_it():
    rule, total = PruneUnits(), 380
    ratios = [rule.target(step, total) for step in range(total) if step % 10 == 0]
    below = [ratio for ratio in ratios if ratio < 0.5]
    assert int(32 * below[-1]) == 15  # what is applied last there
    assert int(11008 * below[-1]) < 5504
    assert rule.target(342, total) == 0.5
    assert rule.target(38, total) == 0.0
    assert rule.target(190, total) == pytest.approx(0.5 * (1 - (1 - (0.5 - 0.1) / 0.8) ** 3))
    assert math.isclose(rule.target(379, total), 0.5)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(**LORA), SparseLoraConfig(**{**LORA, "density": 0.0, "gate": None})],
    ids=["upstream", "sparse_lora"],
)
def test_the_trained_model_is_sliced_with_its_adapter(config, tmp_path):
    model = adapted(config)
    train(model, tmp_path)
    ids = torch.arange(24).view(2, 12)
    masked = model.eval()(input_ids=ids).logits
    if isinstance(config, SparseLoraConfig):
        with pytest.raises(ValueError, match="no plain LoRA"):
            slice_model(model)
        return
    numbers = sum(p.numel() for p in model.parameters())
    small = slice_model(model)
    torch.testing.assert_close(small(input_ids=ids).logits, masked, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.75 * numbers
    assert [len(kept.channels) for kept in small.get_base_model().kept_units.blocks.values()] == [32, 32, 64]


def test_a_run_that_stops_in_the_middle_goes_on_with_the_same_bits(tmp_path):
    straight = adapted()
    train(straight, tmp_path / "straight")
    first = adapted()
    train(first, tmp_path / "both", save_steps=5, save_strategy="steps")
    again = adapted()
    train(again, tmp_path / "both", resume=str(tmp_path / "both" / "checkpoint-5"))
    at_last = [mask.factors.count_nonzero() for mask in unit_masks_of(first).masks]
    seen = []
    held = unit_masks_of(first).masks
    look = tiny.At(on_step_begin=lambda *_: seen.append([mask.factors.count_nonzero() for mask in held]))
    # The very model of the first run, whose masks are further than the checkpoint.
    train(first, tmp_path / "both", resume=str(tmp_path / "both" / "checkpoint-5"), callbacks=[look])
    assert sum(seen[0]) > sum(at_last)
    for one in (first, again):
        for name, value in straight.state_dict().items():
            assert torch.equal(one.state_dict()[name], value), name
    masks = [[m.factors for m in unit_masks_of(one).masks] for one in (straight, again, first)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*masks, strict=True))


def test_a_loss_scale_and_a_sum_over_micro_batches_do_not_change_the_ranking():
    model = adapted(init_lora_weights=False)
    masks = mask_units(model)
    model(input_ids=torch.arange(20).view(2, 10), labels=torch.arange(20).view(2, 10)).loss.backward()
    space = masked_spaces(model, masks)[1]
    member, components = space.factors[0]
    plain = unit_scores(member, components, space.size)
    for half in (components.A, components.B):
        half.grad.mul_(1024)
    torch.testing.assert_close(unit_scores(member, components, space.size, 1024.0), plain)
    assert (unit_scores(member, components, space.size) - plain).abs().max() > 1e-3
    components.B.grad[0, 0] = torch.inf
    assert not unit_scores(member, components, space.size).isfinite().all()


def test_four_bit_bases_are_scored_by_their_dequantised_weights(tmp_path):
    model = get_peft_model(tiny.base("nf4", layers=2), LoraConfig(**LORA))
    train(model, tmp_path, steps=4)
    assert [int(m.factors.sum()) for m in unit_masks_of(model).masks] == [1, 32, 2, 64]


def test_what_is_not_scored_is_not_masked(tmp_path):
    """No label: no gradient, no evidence."""
    model = adapted(layers=2)
    callback = LoRAPruneCallback(RULE)
    with pytest.warns(UserWarning, match="no units were masked"):
        tiny.train(model, tmp_path, 4, callbacks=[callback], data=tiny.TokenData(16, masked=True))
    assert all(bool(mask.factors.all()) for mask in unit_masks_of(model).masks)


def below(model):
    mask_units(model.get_base_model())
    base = model.unload()
    return get_peft_model(base, LoraConfig(**LORA)), RULE


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda m: (m, PruneUnits(whole_last=3)), "none of 3 blocks"),
        (lambda m: (adapted(target_modules=["q_proj"]), RULE), "nothing scores them"),
        (lambda m: (adapted(SparseLoraConfig(density=0.1, target_modules="all-linear")), RULE), "not one plain LoRA"),
        (lambda m: (adapted(use_dora=True), RULE), "not one plain LoRA"),
        (below, "lies below the adapter"),
    ],
)
def test_what_cannot_be_pruned_so_is_refused(prepare, message, tmp_path):
    model, rule = prepare(adapted())
    with pytest.raises(ValueError, match=message):
        train(model, tmp_path, rule=rule)


def test_no_adapter_has_such_units():
    with pytest.raises(ValueError, match="acts on units of"):
        SparseLoraConfig(density=0.1, schedule=[PruneUnits()])
    with pytest.raises(ValueError, match="window"):
        PruneUnits(start=0.5, end=0.4)


def test_the_method_is_this_on_upstreams_lora(tmp_path):
    method = methods.get("loraprune", sparsity=0.25)
    assert (method.config.r, method.config.lora_alpha, method.config.lora_dropout) == (8, 16, 0.05)
    model = adapted(method.config)
    (callback,) = method.callbacks(model)
    assert callback.rule == PruneUnits(sparsity=0.25)
    base = copy.deepcopy(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight)
    tiny.train(model, tmp_path, 4, callbacks=[callback], data=tiny.TokenData(16))
    assert torch.equal(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight, base)
    assert len(structures_of(model.get_base_model())) == 3


@pytest.mark.parametrize("name", ["loraprune", "light-peft", "transfer-pruning"])
def test_a_run_that_saves_adapters_alone_refuses_what_leaves_another_base(name):
    with pytest.raises(ValueError, match="smaller base"):
        choose_method(AdapterArguments(method=name), {}, 0)
