"""Moves of a support in a real Trainer loop, against a brute-force reading of the rule on float64 dense gradients."""

import warnings

import pytest
import torch
from training_toolbox import (
    DenseTwin,
    Hook,
    TokenData,
    adapted,
    layers_of,
    make_config,
    positions_of,
    run,
    snapshot,
    support_of,
)

from hf_sparse_peft import AccumulatedGradient, Linear, Prune, Regrow

BETAS = (0.9, 0.999)


class Watch:
    """Every step's dense gradients, and the adapter just before and just after each move."""

    def __init__(self, model, seed: int, interval: int, collect: int, **model_options) -> None:
        self.twin, self.interval, self.collect = DenseTwin(model, seed, **model_options), interval, collect
        self.gradients: dict[int, dict[str, list[torch.Tensor]]] = {}
        self.old, self.new, self.sums = {}, {}, {}
        self.before = [Hook(on_pre_optimizer_step=self.see_gradients, on_step_end=self.see_old)]
        self.after = [Hook(on_step_end=self.see_new)]

    def see_gradients(self, update, model, optimizer):
        self.gradients[update] = self.twin.step_gradients()

    def due(self, update) -> bool:
        return update % self.interval == self.collect % self.interval and update >= self.collect

    def see_old(self, update, model, optimizer):
        if self.due(update):
            self.old[update] = snapshot(model, optimizer)
            self.sums[update] = [
                (
                    layer.sparse_lora_rule_candidates["default"].clone(),
                    layer.sparse_lora_rule_candidate_sums["default"].clone(),
                )
                for layer in layers_of(model)
            ]

    def see_new(self, update, model, optimizer):
        if self.due(update):
            self.new[update] = snapshot(model, optimizer)


def unit_scores(flat: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return flat[at].abs().sum(1)


CASES = {
    "entry": {"config": {"granularity": "entry", "density": 0.05}},
    "entry-accumulated": {"config": {"granularity": "entry", "density": 0.05}, "accumulation": 3, "batch": 2},
    "entry-default-optimizer": {"config": {"granularity": "entry", "density": 0.05}, "optimizer": "default"},
    "block": {"config": {"granularity": "block", "density": 0.25}},
    "block-accumulated": {"config": {"granularity": "block", "density": 0.25}, "accumulation": 2, "batch": 2},
    "row": {"config": {"granularity": "row", "density": 0.25}},
    "column": {"config": {"granularity": "column", "density": 0.25}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*has one scalar step")
def test_every_move_follows_spiel_ag(case, tmp_path):
    options = dict(CASES[case])
    interval, collect, steps, fraction = 5, 2, 18, 0.5
    regrowth = Regrow(every=interval, grow=AccumulatedGradient(steps=collect), fraction=Linear(fraction, 0.0))
    model = adapted(make_config(schedule=[regrowth], **options.pop("config")), seed=2)
    watch = Watch(model, 2, interval, collect)
    run(model, tmp_path, steps, before=watch.before, after=watch.after, lr=5e-3, max_grad_norm=0.05, **options)
    assert sorted(watch.new) == [2, 7, 12, 17]
    cancelled = grown_ever = 0
    for update in watch.new:
        phase = range(update - collect + 1, update + 1)
        for number, layer in enumerate(layers_of(model)):
            old, new, name = watch.old[update][number], watch.new[update][number], layer.module_name
            all_units = list(range(layer.sparse_lora_grid["default"].num_units))
            at = positions_of(layer, all_units)
            count = len(old["units"])

            # Candidates: the best units of the phase's first micro-batch; sums over steps, not over micro-batches.
            score = unit_scores(watch.gradients[phase[0]][name][0], at)
            candidates = sorted(score.topk(count).indices.tolist())
            step_gradients = [torch.stack(watch.gradients[step][name]).sum(0) for step in phase]
            assert len(watch.gradients[phase[0]][name]) == options.get("accumulation", 1)
            sums = torch.stack(step_gradients).sum(0)
            squares = torch.stack(step_gradients).square().sum(0)
            stored, stored_sums = watch.sums[update][number]
            assert (stored - 1).tolist() == candidates
            scale = sums[at[candidates]].abs().max()
            for held, expected in zip(stored_sums, (sums, squares), strict=True):
                expected = expected[at[candidates]].view_as(held)
                torch.testing.assert_close(held.double(), expected, rtol=1e-4, atol=float(scale) * 1e-5)

            # Drop and grow, from the equation.
            share = 1.0 if update == collect else fraction * (1 - update / steps)
            k = int(share * count)
            magnitude = old["values"].abs().reshape(count, -1).sum(1).tolist()
            order = sorted(range(count), key=lambda i: (magnitude[i], i))
            survivors = {old["units"][i] for i in order[k:]}
            rivals = [u for u in candidates if u not in survivors]
            strength = {u: float(unit_scores(sums, at[u : u + 1])) for u in rivals}
            grown = set(sorted(rivals, key=lambda u: -strength[u])[:k])
            back = sorted(set(old["units"]) - survivors - grown, key=lambda u: -magnitude[old["units"].index(u)])
            expected = sorted(survivors | grown | set(back[: k - len(grown)]))
            assert new["units"] == expected, (update, name)
            assert len(new["units"]) == count == len(set(new["units"]))

            entered = sorted(set(new["units"]) - set(old["units"]))
            assert len(entered) <= k
            cancelled += len(grown & set(old["units"]))
            grown_ever += len(entered)

            # Who stays keeps every bit, also where it was dropped and grown at once.
            stays = sorted(set(new["units"]) & set(old["units"]))
            was, now = ([side["units"].index(u) for u in stays] for side in (old, new))
            assert torch.equal(new["values"][now], old["values"][was])
            for key, moved in new["state"].items():
                if isinstance(moved, torch.Tensor) and moved.dim() > 0:
                    assert torch.equal(moved[now], old["state"][key][was]), key
            fresh = [new["units"].index(u) for u in entered]
            assert not new["values"][fresh].any()
            if not entered:
                continue
            mean = (sums / collect)[at[entered]].view_as(new["values"][fresh])
            square = (squares / collect)[at[entered]].view_as(mean)
            first, second = (new["state"][key][fresh].double() for key in ("exp_avg", "exp_avg_sq"))
            torch.testing.assert_close(first, mean * (1 - BETAS[0] ** collect), rtol=1e-3, atol=float(scale) * 1e-6)
            torch.testing.assert_close(
                second, square * (1 - BETAS[1] ** collect), rtol=1e-3, atol=float(scale) ** 2 * 1e-8
            )
            if new["state"]["step"].dim():
                assert new["state"]["step"][fresh].tolist() == [collect] * len(entered)
    assert grown_ever > 5
    assert cancelled > 0  # units that were dropped and grown at once did occur


def test_the_first_move_replaces_a_random_start_almost_whole(tmp_path):
    config = make_config(density=0.02, schedule=[Regrow(every=10, grow=AccumulatedGradient(steps=2))])
    model = adapted(config)
    start = [support_of(layer) for layer in layers_of(model)]
    trainer = run(model, tmp_path, 4)
    (record,) = trainer.schedule_callbacks[0].events
    assert record["replaced"] > 0.9 * record["alive"]
    kept = sum(len(set(a) & set(support_of(b))) for a, b in zip(start, layers_of(model), strict=True))
    assert record["step"] == 2
    assert record["alive"] - record["replaced"] == kept


def test_a_chosen_start_survives_the_first_move_without_replace_all_first(tmp_path):
    regrowth = Regrow(every=10, grow=AccumulatedGradient(steps=2), fraction=0.25, replace_all_first=False)
    model = adapted(make_config(schedule=[regrowth]))
    start = [support_of(layer) for layer in layers_of(model)]
    run(model, tmp_path, 4)
    for before, layer in zip(start, layers_of(model), strict=True):
        assert len(set(before) - set(support_of(layer))) <= int(0.25 * len(before))


def test_two_identical_micro_batches_move_the_support_as_one_does(tmp_path):
    supports = []
    for accumulation in (1, 2):
        model = adapted(make_config(schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))]))
        data = TokenData(samples=1, repeated=96)
        run(model, tmp_path / str(accumulation), 12, accumulation=accumulation, batch=2, data=data)
        supports.append([support_of(layer) for layer in layers_of(model)])
    assert supports[0] == supports[1]


def test_units_that_enter_without_seeds_start_at_nothing(tmp_path):
    regrowth = Regrow(every=4, grow=AccumulatedGradient(steps=2, seed_moments=False))
    model = adapted(make_config(schedule=[regrowth]))
    watch = Watch(model, 0, 4, 2)
    run(model, tmp_path, 8, before=watch.before, after=watch.after)
    for update in watch.new:
        for old, new in zip(watch.old[update], watch.new[update], strict=True):
            fresh = [i for i, u in enumerate(new["units"]) if u not in old["units"]]
            assert not any(new["state"][key][fresh].any() for key in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_no_support_moves_after_the_last_update(schedule, tmp_path):
    # Units that entered there would never train: the values they replaced would be lost for nothing.
    fraction = Linear(0.5, 0.0) if schedule == "linear" else 0.5
    regrowth = Regrow(every=4, grow=AccumulatedGradient(steps=2), fraction=fraction)
    model = adapted(make_config(schedule=[regrowth]))
    trainer = run(model, tmp_path, 10)
    assert [record["step"] for record in trainer.schedule_callbacks[0].events] == [2, 6]
    assert all((layer.sparse_lora_values["default"] != 0).all() for layer in layers_of(model))


def test_candidates_that_were_chosen_before_a_pruning_all_compete_after_it(tmp_path):
    # Pruning comes first at a move and shrinks the support; cutting the candidates to its size would drop those with
    # the highest numbers, that is, the last rows of every matrix.
    pruning = Prune(final_fraction=0.3, start=0.0, end=0.9)
    regrowth = Regrow(every=4, grow=AccumulatedGradient(steps=2), replace_all_first=True)
    model = adapted(make_config(density=0.1, schedule=[pruning, regrowth]))
    watch = Watch(model, 0, 4, 2)
    run(model, tmp_path, 8, before=watch.before, after=watch.after)
    for number, layer in enumerate(layers_of(model)):
        old, new = watch.old[2][number], watch.new[2][number]
        assert len(new["units"]) < len(old["units"])
        (first,), (second,) = (watch.gradients[step][layer.module_name] for step in (1, 2))
        candidates = first.abs().topk(len(old["units"])).indices
        strongest = candidates[(first + second)[candidates].abs().topk(len(new["units"])).indices]
        assert new["units"] == sorted(strongest.tolist())  # everything is replaced at the first move


# Gradients that overflow


def overflow(model, update_of, at: dict[int, set[int]]):
    """Multiply the loss's gradient by infinity in the micro-batches `at[update]`, as a too large loss scale does."""
    seen = {"update": None, "micro": 0}

    def spoil(module, args, output):
        update = update_of()
        seen["micro"] = seen["micro"] + 1 if seen["update"] == update else 0
        seen["update"] = update
        if seen["micro"] in at.get(update, ()):
            output.loss = output.loss * float("inf")
        return output

    model.register_forward_hook(spoil)


class SkippingOptimizer(torch.optim.Optimizer):
    """SGD that leaves a step out where a gradient is not finite, as a gradient scaler does."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(torch.isfinite(p.grad).all() for p in params):
            for p in params:
                p.add_(p.grad, alpha=-0.1)


def run_with_overflow(tmp_path, at, collect, accumulation=1):
    model = adapted(make_config(schedule=[Regrow(every=10, grow=AccumulatedGradient(steps=collect))]))
    trainer = run(
        model, tmp_path, 6, train=False, optimizer="own", accumulation=accumulation, max_grad_norm=0.0,
        before=[], after=[],
    )  # fmt: skip
    trainer.optimizer = SkippingOptimizer([p for p in model.parameters() if p.requires_grad])
    overflow(model, lambda: trainer.state.global_step + 1, at)
    seen = {}

    def look(update, model, optimizer):
        layer = layers_of(model)[0]
        if "candidates" in layer.rule_state("default"):
            seen[update] = (
                layer.sparse_lora_rule_candidates["default"].clone(),
                layer.sparse_lora_rule_candidate_sums["default"].clone(),
            )

    trainer.callback_handler.callbacks.insert(0, Hook(on_step_end=look))
    trainer.train()
    return model, seen


def test_an_overflow_inside_a_phase_leaves_the_sums_untouched(tmp_path):
    _, seen = run_with_overflow(tmp_path, {2: {0}}, collect=4)
    assert torch.equal(seen[1][0], seen[2][0])
    assert torch.equal(seen[1][1], seen[2][1])
    assert seen[1][1].any()
    assert not torch.equal(seen[2][1], seen[3][1])
    assert torch.isfinite(seen[4][1]).all()


def test_an_overflow_in_one_micro_batch_leaves_out_its_whole_step(tmp_path):
    _, seen = run_with_overflow(tmp_path, {2: {1}}, collect=4, accumulation=2)
    assert torch.equal(seen[1][1], seen[2][1])


@pytest.mark.parametrize("micro", [0, 1])
def test_an_overflow_at_a_phases_first_step_puts_the_choice_off_instead_of_failing(tmp_path, micro):
    # fp16 training starts with a loss scale that overflows: its first step is as a rule a skipped one.
    model, seen = run_with_overflow(tmp_path, {1: {micro}}, collect=3, accumulation=2)
    assert not seen[1][1].any()
    if micro == 0:
        assert not seen[1][0].any()
    assert seen[2][0].all()
    assert seen[2][1].any()
    for layer in layers_of(model):
        assert len(support_of(layer)) == layer.sparse_lora_values["default"].shape[0]


def test_a_phase_of_overflows_only_moves_nothing(tmp_path):
    start = [support_of(layer) for layer in layers_of(adapted(make_config(schedule=[Regrow()])))]
    model, _ = run_with_overflow(tmp_path, {1: {0}, 2: {0}}, collect=2)
    assert [support_of(layer) for layer in layers_of(model)] == start


def test_the_loss_scale_of_fp16_is_divided_out_of_the_sums():
    from hf_sparse_peft.rules.choosing_readers import CandidateReader

    model = adapted(make_config(schedule=[Regrow()]))
    layer = layers_of(model)[0]
    gradient = torch.randn(layer.out_features, layer.in_features)
    sums = []
    for scale in (1.0, 1024.0):
        collector = CandidateReader(layer.unit_spaces("default")[0], starts=True)
        collector(gradient * scale)
        collector.finish_step(scale)
        sums.append(collector.sums.clone())
    assert torch.equal(sums[0], sums[1])
    assert sums[0].any()


def test_a_run_that_was_broken_off_inside_a_step_leaves_nothing_for_the_next_one(tmp_path):
    model = adapted(make_config(schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))]))
    trainer = run(model, tmp_path, 8, train=False)

    def fail(module, args, output):
        raise KeyboardInterrupt

    handle = layers_of(model)[0].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    assert not any(layer.sparse_lora_gradient_readers for layer in layers_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert [record["step"] for record in trainer.schedule_callbacks[0].events] == [2, 6]
    assert not any(layer.sparse_lora_gradient_readers for layer in layers_of(model))
