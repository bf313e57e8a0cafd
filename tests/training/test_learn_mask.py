"""Masks by trained scores: movement pruning and SMP against float64 by hand, their schedules' worked numbers, low-rank
scores, what is shipped, and runs that go on."""

import copy

import pytest
import torch
from mask_toolbox import LAYERS, Net, gradients_by_hand, loss_of, masked_net, run, spaces_of, start_of
from peft import PeftModel
from safetensors.torch import load_file

from hf_sparse_peft import AdamWSpec, LearnMask, make_optimizer
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.masked_lora import DenseUpdate, NoUpdate, ScoredMask

SMP = {"update": NoUpdate(), "masking": ScoredMask()}
MOVEMENT = {"update": DenseUpdate(), "masking": ScoredMask()}


def top(scores, count):
    """The best `count` of a matrix; no two of these are equal."""
    flat = scores.flatten().tolist()
    best = sorted(range(len(flat)), key=lambda at: -flat[at])[:count]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[best] = True
    return mask.view_as(scores)


def by_hand(model, rule, steps, lr, trains_weights=True, soft=None):
    """Weights, scores and masks after SGD, from the equations."""
    W = start_of(model)
    S = {name: torch.zeros_like(w) for name, w in W.items()}
    for step in range(steps):
        v = rule.density(step, steps)
        M = {
            name: top(s, int(v * s.numel())) if v < 1 else torch.ones_like(s, dtype=torch.bool) for name, s in S.items()
        }
        if soft is not None:
            M = {name: s.sigmoid() > soft for name, s in S.items()}
        masked = {name: W[name] * M[name] for name in W}
        G = gradients_by_hand(W, masked, masked, step)
        weight = rule.penalty_weight(step, steps)
        for name in W:
            share = S[name].sigmoid()
            S[name] = S[name] - lr * (G[name] * W[name] + weight * share * (1 - share) / (len(S) * share.numel()))
            if trains_weights:
                W[name] = W[name] - lr * G[name] * M[name]
    return W, S


def test_both_gradients_of_an_entry_that_is_kept_and_of_one_that_is_not():
    """w = -2 with upstream gradient 3: dS = -6 in both; dW = 3 and 0."""
    masking = ScoredMask()
    model = masked_net(LearnMask(), **{**MOVEMENT, "target_modules": ["second"]})
    (layer,) = adapter_layers(model)
    with torch.no_grad():
        layer.get_base_layer().weight.fill_(-2.0)
    of = layer.masked_weight("default")
    kept = torch.zeros(4, 12, dtype=torch.bool)
    kept[:, ::2] = True
    gradient = torch.full((4, 12), 3.0)
    assert (masking.gradients(of, gradient, kept)["scores"] == -6).all()
    dW = masking.weight_gradient(of, gradient, kept)
    assert (dW[kept] == 3).all()
    assert (dW[~kept] == 0).all()


@pytest.mark.parametrize("penalty", [0.0, 5.0])
def test_movement_pruning_follows_the_equations_over_several_steps(penalty):
    rule = LearnMask(0.3, start=0.1, end=0.8, penalty=penalty)
    model = masked_net(rule, **MOVEMENT)
    W, S = by_hand(model, rule, 10, 0.2)
    scores = {}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    optimizer.register_step_post_hook(
        lambda *_: scores.update({name: space.scores().double().clone() for name, space in spaces_of(model).items()})
    )
    run(model, 10, optimizer)
    for name, space in spaces_of(model).items():
        assert torch.allclose(scores[name], S[name], atol=2e-6)
        assert torch.allclose(space.current_weight().double(), W[name], atol=2e-6)
        assert torch.equal(space.layer.kept("default"), top(S[name], int(0.3 * S[name].numel())))
        assert space.scores() is None  # dropped


def test_the_first_choice_is_of_weights_that_move_away_from_0():
    rule = LearnMask(0.25, end=0.5)
    model = masked_net(rule, **{**SMP, "target_modules": ["first"]})
    G = {}

    def look(step, model):
        net = model.get_base_model()
        W = {"first": net.first.dense_base_weight().double(), "second": net.second.weight.detach().double()}
        G.update(gradients_by_hand(W, W, W, step))
        G["weight"] = W["first"]

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run(model, 2, optimizer, at_step=look, stop=1)
    (space,) = spaces_of(model).values()
    count = space.count
    assert count == 24
    kept, g, w = space.layer.kept("default"), G["first"], G["weight"]
    assert torch.equal(kept, top(-g * w, count))
    for other in (w.abs(), g.abs(), (g * w).abs()):
        assert not torch.equal(kept, top(other, count))


def test_soft_movement_keeps_what_is_above_the_threshold():
    rule = LearnMask(threshold=0.4985, penalty=2.0, penalty_curve="constant")
    model, seen = masked_net(rule, **MOVEMENT), []
    _, S = by_hand(model, rule, 5, 0.3, soft=0.4985)

    def look(step, model):
        seen.append({name: space.count for name, space in spaces_of(model).items()})

    run(model, 6, lr=0.3, stop=5, at_step=look)
    assert seen[0] == {"first": 96, "second": 48}
    for name, space in spaces_of(model).items():
        assert torch.allclose(space.scores().double(), S[name], atol=2e-6)
        assert torch.equal(space.layer.kept("default"), S[name].sigmoid() > 0.4985)
        assert 1 < space.count < seen[0][name]
    strict = LearnMask(threshold=0.99)
    model = masked_net(strict, **MOVEMENT)
    run(model, 3, stop=2)
    assert [space.count for space in spaces_of(model).values()] == [1, 1]  # int(.005 * 96) + 1


def test_schedules_have_the_worked_numbers_of_smp():
    """MNLI: T = 73,632, v_f = .1, no initial phase, 30,000 final steps."""
    total = 73_632
    rule = LearnMask(0.1, start=0.0, end=1 - 30_000 / total, penalty=400.0)
    assert rule.density(0, total) == 1
    assert rule.penalty_weight(0, total) == 0
    assert rule.density(10_000, total) == pytest.approx(0.51218, abs=1e-5)
    assert rule.penalty_weight(10_000, total) == pytest.approx(141.841, abs=1e-3)
    assert rule.density(43_631, total) > 0.1
    assert rule.density(43_632, total) == pytest.approx(0.1, abs=1e-12)
    assert rule.penalty_weight(43_632, total) == pytest.approx(372.95, abs=1e-2)
    assert rule.penalty_weight(total - 1, total) == pytest.approx(400.0, abs=1e-3)


def test_smp_s_shares_entries_as_scores_lie():
    class Space:
        def __init__(self, name, mean):
            self.name, self.mean, self.size = name, mean, 100

        def scores(self):
            return torch.full((10, 10), self.mean).logit()

    spaces = [Space(f"layers.{at}.q_proj", mean) for at, mean in enumerate((0.5, 0.3, 0.2))]
    rule = LearnMask(competition="type")
    assert list(rule._shares(spaces, 0.5).values()) == pytest.approx([0.75, 0.45, 0.30], abs=1e-6)
    assert list(rule._shares(spaces, 0.8).values()) == pytest.approx([1.2, 0.72, 0.48], abs=1e-6)
    other = [*spaces, Space("layers.0.v_proj", 0.9)]
    assert list(rule._shares(other, 0.5).values()) == pytest.approx([0.75, 0.45, 0.30, 0.5], abs=1e-6)
    flat = LearnMask(competition="type", temperature=1e6)._shares(spaces, 0.5)
    assert list(flat.values()) == pytest.approx([0.5] * 3, abs=1e-4)


def test_one_threshold_for_all_matrices_keeps_the_best_of_all():
    model = masked_net(LearnMask(0.3, end=0.5, competition="global"), **SMP)
    run(model, 4, stop=3)
    spaces = spaces_of(model)
    together = torch.cat([space.scores().flatten() for space in spaces.values()])
    bound = together.sort(descending=True).values[int(0.3 * together.numel()) - 1]
    for space in spaces.values():
        assert torch.equal(space.layer.kept("default"), space.scores() >= bound)


def test_only_scores_train_and_only_the_mask_is_shipped(tmp_path):
    model = masked_net(LearnMask(0.3, end=0.5), **SMP)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"masked_lora_scores"}
    start, kept_at_chance = loss_of(model, 20), []
    with model.disable_adapter():
        assert torch.equal(loss_of(model, 20), start)  # v = 1
    run(model, 8, lr=0.5)
    for space in spaces_of(model).values():
        magnitude = top(space.base_weight().abs(), space.count)
        kept_at_chance.append(float((magnitude & space.layer.kept("default")).sum()) / space.count)
    assert max(kept_at_chance) < 0.75
    model.save_pretrained(tmp_path)
    assert not any("score" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(Net(0), str(tmp_path))
    assert torch.equal(loss_of(loaded, 20), loss_of(model, 20))
    merged = copy.deepcopy(loaded).merge_and_unload()
    for name in LAYERS:
        weight = getattr(merged, name).weight
        assert (weight != 0).sum() == int(0.3 * weight.numel())
    assert torch.allclose(loss_of(merged, 20), loss_of(model, 20), atol=1e-7)
    again = PeftModel.from_pretrained(Net(0), str(tmp_path), is_trainable=True)
    with pytest.raises(ValueError, match="The scores of 'first' were dropped when its training ended"):
        run(again.train(), 2, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))


def test_low_rank_scores_have_the_chain_rules_gradients():
    masking = ScoredMask(rank=2)
    model = masked_net(LearnMask(0.3, end=0.5, penalty=3.0), **{**SMP, "masking": masking})
    layer = adapter_layers(model)[0]
    P, Q = layer.masked_lora_scores["default"], layer.masked_lora_score_factors["default"]
    assert not P.any()
    P.data.normal_(generator=torch.Generator().manual_seed(3))
    dense, of = torch.randn(12, 8), layer.masked_weight("default")
    found = masking.gradients(of, dense, None)
    p, q = (one.detach().double().requires_grad_() for one in (P, Q))
    ((p @ q) * (dense.double() * of.dense.double())).sum().backward()
    assert torch.allclose(found["scores"].double(), p.grad, atol=1e-5)
    assert torch.allclose(found["score_factors"].double(), q.grad, atol=1e-5)
    P.data.zero_()
    run(model, 6)
    assert [space.count for space in spaces_of(model).values()] == [28, 14]


@pytest.mark.parametrize("options", [MOVEMENT, {**SMP, "masking": ScoredMask(rank=2)}], ids=["movement", "smp-rank"])
def test_a_run_that_goes_on_in_the_middle_ends_with_the_same_bits(options):
    rule = LearnMask(0.3, end=0.7, penalty=2.0, competition="type")
    whole, first, second = (masked_net(rule, **options) for _ in range(3))

    def adam(model):
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)

    run(whole, 10, adam(whole))
    optimizer, state = run(first, 10, adam(first), stop=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other = adam(second)
    other.load_state_dict(optimizer.state_dict())
    run(second, 10, other, state=state)
    ours, theirs = whole.state_dict(), second.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_scores_have_a_rate_of_their_own_and_no_decay():
    model = masked_net(LearnMask(), **MOVEMENT, optimizer=AdamWSpec(scores_ratio=300.0))
    groups = make_optimizer(model, lr=1e-4, weight_decay=0.1).param_groups
    found = {(round(group["lr"], 6), group["weight_decay"]): len(group["params"]) for group in groups}
    assert found == {(0.03, 0.0): 2, (1e-4, 0.1): 2}
    with pytest.raises(ValueError, match=r"scores_ratio=2\.0 is for trained scores"):
        make_optimizer(masked_net(optimizer=AdamWSpec(scores_ratio=2.0)), lr=1e-4)


def test_a_mask_without_scores_is_refused():
    with pytest.raises(ValueError, match=r"LearnMask makes the mask of trained scores, and masking=HardMask\(\)"):
        masked_net(LearnMask(), update=DenseUpdate())
