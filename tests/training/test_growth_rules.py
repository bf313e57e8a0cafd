"""Every rule of who leaves and who enters, against a brute-force reading of it in a real Trainer loop."""

import math

import pytest
import torch
from ties import priority
from training_toolbox import (
    DenseTwin,
    Hook,
    TokenData,
    adapted,
    differences,
    layers_of,
    make_config,
    positions_of,
    run,
    snapshot,
    support_of,
)

from hf_sparse_peft import SM3, Cosine, Gradient, Linear, Random, RandomUnfired, Regrow, methods
from hf_sparse_peft.rules import Age
from hf_sparse_peft.sparsity import stream_seed


class Record:
    """Both sides of every move: supports, values and optimizer state, before the step, before the move and after it."""

    def __init__(self, model, moves, twin=None, look=lambda model, optimizer: None):
        self.moves, self.twin, self.look = moves, twin, look
        self.stepped, self.old, self.new, self.gradients, self.seen = {}, {}, {}, {}, {}
        self.before = [Hook(on_pre_optimizer_step=self.before_step, on_step_end=self.before_move)]
        self.after = [Hook(on_step_end=self.after_move)]

    def before_step(self, update, model, optimizer):
        gradients = self.twin.step_gradients() if self.twin else None
        if update in self.moves:
            self.stepped[update], self.gradients[update] = snapshot(model, optimizer), gradients

    def before_move(self, update, model, optimizer):
        if update in self.moves:
            self.old[update], self.seen[update] = snapshot(model, optimizer), self.look(model, optimizer)

    def after_move(self, update, model, optimizer):
        if update in self.moves:
            self.new[update] = snapshot(model, optimizer)


def smallest(worth, units, k):
    """Units with the smallest worth, ties to the lowest."""
    return set(sorted(units, key=lambda u: (worth[u], u))[:k])


def magnitudes(side):
    values = side["values"][: len(side["units"])]
    return dict(zip(side["units"], values.abs().reshape(len(values), -1).sum(1).tolist(), strict=True))


def check_sides(old, new, kept_state=True):
    """Equal numbers; who stays keeps value and state bit for bit, also when dropped and grown at once; new ones: 0."""
    assert len(set(new["units"])) == len(new["units"]) == len(old["units"])
    stays = sorted(set(old["units"]) & set(new["units"]))
    was, now = ([side["units"].index(u) for u in stays] for side in (old, new))
    fresh = [new["units"].index(u) for u in sorted(set(new["units"]) - set(old["units"]))]
    assert torch.equal(new["values"][now], old["values"][was])
    assert not new["values"][fresh].any()
    for key, state in new["state"].items():
        if isinstance(state, torch.Tensor) and state.shape[:1] == new["values"].shape[:1]:
            assert torch.equal(state[now], old["state"][key][was]), key
            assert not state[fresh].any(), key
    return fresh


RIGL = {
    "entry": {},
    "entry-accumulated": {"accumulation": 3, "batch": 2},
    "block": {"config": {"granularity": "block", "density": 0.25}},
    "column-accumulated": {"config": {"granularity": "column", "density": 0.25}, "accumulation": 2, "batch": 2},
    "step-not-skipped": {"rule": {"in_place_of_update": False}},
    "sensitivity": {"rule": {"drop": "sensitivity"}},
}


@pytest.mark.parametrize("case", RIGL)
def test_rigl_grows_the_brute_force_top_k_over_all_inactive_units(case, tmp_path):
    options = dict(RIGL[case])
    rule = {"in_place_of_update": True, **options.pop("rule", {})}
    steps, interval, fraction, stop = 20, 4, 0.6, 0.75
    regrowth = Regrow(every=interval, grow=Gradient(), fraction=Cosine(fraction, 0.0), stop_at=stop, **rule)
    model = adapted(make_config(schedule=[regrowth], **{"density": 0.05, **options.pop("config", {})}), seed=2)
    record = Record(model, (4, 8, 12, 16), DenseTwin(model, 2))
    trainer = run(
        model, tmp_path, steps, before=record.before, after=record.after, lr=5e-3, max_grad_norm=0.0, **options
    )
    assert [move["step"] for move in trainer.schedule_callbacks[0].events] == [4, 8, 12]
    returned = entered = 0
    for update in (4, 8, 12):
        share = fraction * (1 + math.cos(math.pi * update / (stop * steps))) / 2
        for number, layer in enumerate(layers_of(model)):
            stepped, old, new = (side[update][number] for side in (record.stepped, record.old, record.new))
            same = torch.equal(stepped["values"], old["values"])
            assert same == rule["in_place_of_update"]
            if rule["in_place_of_update"]:
                assert all(torch.equal(v, old["state"][k]) for k, v in stepped["state"].items())
            micro = record.gradients[update][layer.module_name]
            assert len(micro) == options.get("accumulation", 1)
            every = list(range(layer.sparse_lora_grid["default"].num_units))
            at = positions_of(layer, every)
            dense = torch.stack(micro).sum(0)
            strength = dense[at].abs().sum(1).tolist()
            k = int(share * len(old["units"]))
            worth = magnitudes(old)
            if rule.get("drop") == "sensitivity":
                flat = dense[at[stepped["units"]]]
                values = stepped["values"].double().reshape(len(flat), -1)
                worth = dict(zip(stepped["units"], (values * flat).abs().sum(1).tolist(), strict=True))
            dropped = smallest(worth, old["units"], k)
            survivors = set(old["units"]) - dropped
            inactive = [u for u in every if u not in survivors]
            grown = set(sorted(inactive, key=lambda u: -strength[u])[:k])
            assert set(new["units"]) == survivors | grown, (update, layer.module_name)
            returned += len(grown & dropped)
            entered += len(grown - dropped)
            check_sides(old, new)
    assert entered > 5
    assert returned or case != "entry"  # a just dropped unit did come back, with value and moments
    assert record.old[16][0]["units"] == record.new[16][0]["units"]  # after T_end nothing moves


def test_rigls_share_is_alpha_at_0_and_0_at_the_end():
    (rule,) = methods.get("rigl").config.schedule
    assert rule.replaced_fraction(0, 1000) == 0.3
    assert rule.replaced_fraction(375, 1000) == pytest.approx(0.15)
    assert rule.replaced_fraction(750, 1000) == 0.0


def test_following_candidates_instead_of_dense_sums_takes_them_from_the_first_micro_batch(tmp_path):
    regrowth = Regrow(every=4, grow=Gradient(candidates=2), fraction=0.5)
    model = adapted(make_config(schedule=[regrowth]), seed=2)
    record = Record(model, (4,), DenseTwin(model, 2))
    run(model, tmp_path, 6, before=record.before, after=record.after, accumulation=3, batch=2)
    for number, layer in enumerate(layers_of(model)):
        old, new, micro = record.old[4][number], record.new[4][number], record.gradients[4][layer.module_name]
        k = len(old["units"]) // 2
        first = micro[0].abs().tolist()
        inactive = [u for u in range(len(first)) if u not in old["units"]]
        dropped = smallest(magnitudes(old), old["units"], k)
        rivals = dropped | set(sorted(inactive, key=lambda u: -first[u])[: 2 * k])
        total = torch.stack(micro).sum(0).abs().tolist()
        grown = set(sorted(rivals, key=lambda u: -total[u])[:k])
        assert set(new["units"]) == (set(old["units"]) - dropped) | grown


@pytest.mark.parametrize("score", ["product", "min"])
def test_spiel_ma_grows_the_brute_force_top_k_of_sm3s_accumulators(score, tmp_path):
    method = methods.get(
        "spiel-ma", every=5, first=2, fraction=Linear(0.5, 0.0), score=score, density=0.05,
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    model = adapted(method.config, seed=3)

    def accumulators(model, optimizer):
        inner = getattr(optimizer, "optimizer", optimizer)
        found = [inner.accumulators(layer.sparse_lora_values["default"]) for layer in layers_of(model)]
        for layer, state in zip(layers_of(model), found, strict=True):
            held = inner.state[layer.sparse_lora_values["default"]]
            assert sum(t.numel() for t in held.values()) == layer.out_features + layer.in_features
            assert [t.shape[0] for t in state] == [layer.out_features, layer.in_features]
        return [tuple(t.clone() for t in state) for state in found]

    record = Record(model, (2, 7, 12), look=accumulators)
    trainer = run(model, tmp_path, 16, train=False)
    trainer.optimizer = method.optimizer(model, trainer.args)
    for callback in reversed(record.before):
        trainer.callback_handler.callbacks.insert(0, callback)
    trainer.callback_handler.callbacks.extend(record.after)
    trainer.train()
    last = None
    for update in (2, 7, 12):
        share = 1.0 if update == 2 else 0.5 * (1 - update / 16)
        for number in range(len(layers_of(model))):
            old, new = record.old[update][number], record.new[update][number]
            row, column = (t.double() for t in record.seen[update][number])
            outer = (
                row[:, None] * column
                if score == "product"
                else torch.minimum(row[:, None], column.expand(len(row), -1))
            )
            flat = outer.reshape(-1).tolist()
            k = int(share * len(old["units"]))
            dropped = smallest(magnitudes(old), old["units"], k)
            inactive = [u for u in range(len(flat)) if u not in set(old["units"])]
            seed = stream_seed(0, "grow", update, layers_of(model)[number].module_name)
            grown = set(sorted(inactive, key=lambda u: (-flat[u], -priority(seed, u)))[:k])
            assert len(grown) == k > 0
            assert set(new["units"]) == (set(old["units"]) - dropped) | grown
            assert not grown & dropped  # positions dropped in the same move cannot return
            check_sides(old, new)
        now = record.seen[update]
        if last:  # accumulators never decrease, moves or not
            assert all((a <= b).all() for x, y in zip(last, now, strict=True) for a, b in zip(x, y, strict=True))
        last = now


@pytest.mark.parametrize("drop", ["magnitude", "oldest", "youngest"])
@pytest.mark.parametrize("grow", ["random", "random_unfired"])
def test_random_growth_and_each_drop_rule(grow, drop, tmp_path):
    rule = {} if drop == "magnitude" else {"drop": Age(drop)}
    regrowth = Regrow(every=3, grow=grow, fraction=0.3, **rule)
    model = adapted(make_config(schedule=[regrowth], density=0.1), seed=4)
    moves = (3, 6, 9)
    record = Record(model, moves)
    run(model, tmp_path, 12, before=record.before, after=record.after)
    for number in range(len(layers_of(model))):
        entered = dict.fromkeys(record.old[3][number]["units"], 0)
        ever = set(entered)
        for update in moves:
            old, new = record.old[update][number], record.new[update][number]
            k = int(0.3 * len(old["units"]))
            weight = magnitudes(old)
            sign = {"magnitude": 0, "oldest": 1, "youngest": -1}[drop]
            worth = {u: (sign * entered[u], weight[u]) for u in old["units"]}
            dropped = smallest(worth, old["units"], k)
            survivors = set(old["units"]) - dropped
            assert survivors <= set(new["units"])
            grown = set(new["units"]) - survivors
            assert len(grown) == k > 0
            if grow == "random_unfired":
                assert not grown & ever
            ever |= grown
            entered.update(dict.fromkeys(grown - set(old["units"]), update))
            check_sides(old, new)
        assert len(ever) > len(record.old[3][number]["units"])


def test_unfired_growth_takes_fired_units_only_when_no_others_are_left(tmp_path):
    regrowth = Regrow(every=2, grow=RandomUnfired(), fraction=0.5)
    model = adapted(make_config(schedule=[regrowth], granularity="column", density=0.6, target_modules=["q_proj"]))
    record = Record(model, (2, 4, 6))
    run(model, tmp_path, 8, before=record.before, after=record.after)
    ever = set(record.old[2][0]["units"])
    for update in (2, 4, 6):
        old, new = set(record.old[update][0]["units"]), set(record.new[update][0]["units"])
        unfired = set(range(32)) - ever
        k = len(old) // 2
        assert len(new) == len(old)
        assert len(new & unfired) == min(k, len(unfired))
        ever |= new
    assert ever == set(range(32))


def test_random_moves_are_drawn_by_seed_step_and_module_not_from_the_global_stream(tmp_path):
    supports = []
    for noise, seed in ((0, 0), (5, 0), (0, 1)):
        regrowth = Regrow(every=2, grow=Random(), fraction=0.5)
        model = adapted(make_config(schedule=[regrowth], seed=seed), seed=1)
        taken = []

        def disturb(update, model, optimizer, noise=noise, taken=taken):
            torch.rand(noise)
            taken.append([support_of(layer) for layer in layers_of(model)])

        run(model, tmp_path / f"{noise}-{seed}", 6, after=[Hook(on_step_end=disturb)])
        supports.append(taken)
    assert supports[0] == supports[1]
    assert supports[0] != supports[2]
    assert supports[0][1] != supports[0][3]


STATEFUL = {
    "rigl": {"grow": "gradient", "in_place_of_update": True},
    "set": {"grow": "random"},
    "oldest-unfired": {"grow": "random_unfired", "drop": "age"},
    "sensitivity": {"grow": "gradient", "drop": "sensitivity"},
}


@pytest.mark.parametrize("case", STATEFUL)
def test_resumed_moves_change_no_bit(case, tmp_path):
    from training_toolbox import StopAt, all_state

    config = make_config(schedule=[Regrow(every=3, fraction=Linear(0.5, 0.0), **STATEFUL[case])])
    last = {}

    def look(update, model, optimizer):
        if update == 14:
            last.update(all_state(model, optimizer))

    def finish(model, out, **options):
        last.clear()
        run(model, out, 14, after=[Hook(on_step_end=look)], batch=2, accumulation=2, **options)
        return dict(last)

    whole = finish(adapted(config), tmp_path / "whole")
    run(adapted(config), tmp_path / "parts", 14, after=[StopAt(7)], batch=2, accumulation=2)
    resumed = finish(adapted(config), tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-7"))
    assert whole
    assert differences(whole, resumed) == []


@pytest.mark.parametrize(("accumulation", "batch"), [(1, 4), (2, 2)])
def test_rigl_selects_the_same_units_whatever_the_accumulation(accumulation, batch, tmp_path):
    regrowth = Regrow(every=3, grow=Gradient(), fraction=Linear(0.5, 0.0), in_place_of_update=True)
    model = adapted(make_config(schedule=[regrowth]))
    data = TokenData(samples=1, repeated=96)
    run(model, tmp_path, 5, accumulation=accumulation, batch=batch, data=data, max_grad_norm=0.0)
    found = [support_of(layer) for layer in layers_of(model)]
    reference = adapted(make_config(schedule=[regrowth]))
    run(reference, tmp_path, 5, accumulation=4, batch=1, data=data, max_grad_norm=0.0)
    assert found == [support_of(layer) for layer in layers_of(reference)]


REFUSED = {
    "sm3 with AdamW": ({"grow": "sm3"}, r"grow=SM3.*AgedAdamW.*spiel-ma"),
    "longer than the run": ({"grow": "random", "every": 10}, r"every=10 is not less.*10 steps.*[Tt]rain longer"),
    "after stop_at": ({"grow": "random", "every": 6, "stop_at": 0.5}, r"every=6 .*stop_at=0.5.*10"),
    "first move": ({"grow": "random", "first": 12}, r"first=12 "),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_move_is_refused_before_the_first_step(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run(adapted(make_config(schedule=[Regrow(**options)])), tmp_path, 10)


WRONG = {
    "no rule for who leaves": ({"drop": None, "grow": "random"}, "drop=None.*grow=Random"),
    "exponential to 0": (
        {"fraction": {"type": "exponential", "start": 0.2, "end": 0.0}},
        "exponential curve from 0.2 to 0.0",
    ),
    "floor above the start": ({"fraction": Linear(0.2, 0.5)}, "fraction=.*end=0.5"),
    "seeds without candidates": ({"grow": {"type": "sm3", "seed_moments": True}}, "no option.*seed_moments"),
    "unknown option": ({"grow": {"type": "sm3", "rank": 3}}, "no option.*rank"),
    "unknown score": ({"grow": {"type": "sm3", "score": "sum"}}, "score.*'product' or 'min'"),
    "rank 0": ({"grow": {"type": "low_rank_magnitude", "rank": 0}}, "rank=0"),
    "stop_at 0": ({"stop_at": 0.0}, "stop_at=0.0"),
    "first move inside the collecting": ({"first": 3}, "first=3.*>= 5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_rule_that_contradicts_itself_names_the_field(case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Regrow(**options)


def test_sm3_growth_refuses_units_that_are_not_entries():
    with pytest.raises(ValueError, match=r"grow=SM3.*granularity='row'"):
        make_config(granularity="row", schedule=[Regrow(grow=SM3())])
