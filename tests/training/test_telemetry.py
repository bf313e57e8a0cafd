"""`support_log.jsonl` says what lives where, once a step, across resumes and kills."""

import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import tiny
from peft import get_peft_model
from training_toolbox import (
    DenseTwin,
    Hook,
    StopAt,
    adapted,
    all_state,
    differences,
    layers_of,
    make_config,
    positions_of,
    run,
    support_of,
)
from transformers import TrainerCallback

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    AverageRank,
    KernelLoraConfig,
    Prune,
    Regrow,
    SupportTelemetryCallback,
    callbacks_for,
)
from hf_sparse_peft.rules import UnitSpace
from hf_sparse_peft.training import draw_support_history
from hf_sparse_peft.tuners import adapter_layers


def a_model():
    pruning = Prune(final_fraction=0.5, start=0.0, end=0.8, every=1)
    ranks = Allocate(budget=AverageRank(2), every=2, initial_warmup=0.0, final_warmup=0.2)
    return adapted(make_config(r=4, schedule=[pruning, ranks]))


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "support_log.jsonl").read_text().splitlines()]


def test_the_log_holds_density_and_rank_of_every_layer_every_few_steps_and_at_the_end(tmp_path):
    model, telemetry = a_model(), SupportTelemetryCallback(every=4)
    run(model, tmp_path, 10, after=[telemetry])
    log = records(tmp_path)
    assert log == telemetry.history
    assert [record["step"] for record in log] == [0, 4, 8, 10]
    for layer in layers_of(model):
        grid = layer.sparse_lora_grid["default"]
        start, end = log[0]["density"][layer.module_name], log[-1]["density"][layer.module_name]
        assert start == layer.sparse_lora_values["default"].shape[0] / grid.num_units
        assert end == len(support_of(layer)) / grid.num_units < start
        assert log[0]["rank"][layer.module_name] == 4
        assert log[-1]["rank"][layer.module_name] == layer.alive_components("default")
    assert sum(log[-1]["rank"].values()) == 2 * len(layers_of(model))


@pytest.mark.parametrize("torn", [False, True])
def test_a_resumed_run_repeats_no_step_and_survives_half_a_line(torn, tmp_path):
    # Killed at step 7, after the checkpoint of step 4.
    run(a_model(), tmp_path, 10, before=[StopAt(4, stop=False)], after=[SupportTelemetryCallback(1), StopAt(7)])
    assert [record["step"] for record in records(tmp_path)] == list(range(8))
    if torn:
        with (tmp_path / "support_log.jsonl").open("a") as file:
            file.write('{"step": 8, "dens')
    telemetry = SupportTelemetryCallback(1)
    run(a_model(), tmp_path, 10, after=[telemetry], resume=str(tmp_path / "checkpoint-4"))
    assert [record["step"] for record in records(tmp_path)] == list(range(11))
    assert telemetry.history == records(tmp_path)


def test_a_run_from_the_start_begins_a_new_log(tmp_path):
    for _ in range(2):
        run(a_model(), tmp_path, 4, after=[SupportTelemetryCallback(2)])
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4]


def test_nothing_is_written_with_write_off(tmp_path):
    telemetry = SupportTelemetryCallback(2, write=False)
    run(a_model(), tmp_path, 4, after=[telemetry])
    assert not (tmp_path / "support_log.jsonl").exists()
    assert [record["step"] for record in telemetry.history] == [0, 2, 4]


def moving_model():
    return adapted(make_config(density=0.1, schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))]))


def watched_run(out, steps=12, every=2, **options):
    """A run with every support copied after each step; returns telemetry and the supports, by step and module."""
    model, telemetry, seen = moving_model(), SupportTelemetryCallback(every, gradient_share=True), {}

    def look(update, model, optimizer):
        seen[update] = {layer.module_name: set(support_of(layer)) for layer in layers_of(model)}

    seen[0] = {layer.module_name: set(support_of(layer)) for layer in layers_of(model)}
    trainer = run(model, out, steps, after=[Hook(on_step_end=look), telemetry], **options)
    return telemetry, seen, trainer


def test_churn_and_overlap_are_those_of_the_supports_themselves(tmp_path):
    telemetry, seen, _ = watched_run(tmp_path)
    churned = 0.0
    for before, record in pairwise(telemetry.history):
        for name, alive in seen[record["step"]].items():
            assert record["churn"][name] == pytest.approx(len(alive - seen[before["step"]][name]) / len(alive))
            assert record["overlap"][name] == pytest.approx(len(alive & seen[0][name]) / len(alive))
            churned += record["churn"][name]
    assert churned > 1  # the first move alone replaces whole supports
    assert set(telemetry.history[0]["churn"].values()) == {0.0}
    assert set(telemetry.history[0]["overlap"].values()) == {1.0}


def test_ages_without_an_aged_optimizer_are_the_updates_since_a_unit_entered(tmp_path):
    telemetry, seen, _ = watched_run(tmp_path, optimizer="default")
    for record in telemetry.history:
        step = record["step"]
        assert record["age_source"] == "moves"
        for name, alive in seen[step].items():
            ages = sorted(
                step - max((s for s in range(1, step + 1) if u not in seen[s - 1][name]), default=0) for u in alive
            )
            assert record["age"][name] == [ages[int(q * (len(ages) - 1))] for q in (0, 0.25, 0.5, 0.75, 1)]


def test_ages_of_an_aged_optimizer_are_its_own(tmp_path):
    telemetry, _, trainer = watched_run(tmp_path)
    record = telemetry.history[-1]
    assert record["age_source"] == "optimizer"
    for layer in layers_of(trainer.model):
        steps = trainer.optimizer.optimizer.state[layer.sparse_lora_values["default"]]["step"]
        assert (record["age"][layer.module_name][0], record["age"][layer.module_name][4]) == (steps.min(), steps.max())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_share_is_that_of_dense_autograd(accumulation, tmp_path):
    model, telemetry, expected = moving_model(), SupportTelemetryCallback(3, gradient_share=True), {}
    twin = DenseTwin(model, seed=0)

    def gradients(update, model, optimizer):
        per_batch = twin.step_gradients()
        for layer in layers_of(model):
            at = positions_of(layer).reshape(-1)
            seen = sum(float(g[at].square().sum()) for g in per_batch[layer.module_name])
            total = sum(float(g.square().sum()) for g in per_batch[layer.module_name])
            expected[update, layer.module_name] = seen / total

    run(
        model, tmp_path, 8, after=[Hook(on_pre_optimizer_step=gradients), telemetry], accumulation=accumulation, batch=2
    )
    shares = {(r["step"], name): value for r in telemetry.history for name, value in r["gradient_share"].items()}
    assert {step for step, _ in shares} == {3, 6, 8}
    for at, share in shares.items():
        assert share == pytest.approx(expected[at], rel=1e-4)
        assert 0 < share < 1


@pytest.mark.parametrize("granularity", ["entry", "block", "row", "column"])
def test_watching_gradients_changes_no_bit_of_the_training_and_keeps_no_observer(granularity, tmp_path):
    states = []
    for watching in (True, False):
        config = make_config(
            density=0.25, granularity=granularity, schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))]
        )
        model = adapted(config)
        last = {}
        hook = Hook(on_step_end=lambda u, m, o, last=last: last.update(all_state(m, o)))
        run(model, tmp_path, 7, after=[hook, SupportTelemetryCallback(1, write=False, gradient_share=watching)])
        states.append(last)
        assert all(layer.passive_gradient_reader is None for layer in layers_of(model))
    assert differences(*states) == []


def test_a_resumed_run_records_what_the_uninterrupted_one_does(tmp_path):
    watched_run(tmp_path / "whole", every=3)
    model = moving_model()
    run(model, tmp_path / "parts", 12, after=[SupportTelemetryCallback(3, gradient_share=True), StopAt(7)])
    telemetry = SupportTelemetryCallback(3, gradient_share=True)
    run(moving_model(), tmp_path / "parts", 12, after=[telemetry], resume=str(tmp_path / "parts" / "checkpoint-7"))
    assert records(tmp_path / "parts") == records(tmp_path / "whole") == telemetry.history


def test_a_checkpoint_without_telemetry_counts_from_there_and_says_so(tmp_path, caplog):
    run(moving_model(), tmp_path, 12, after=[StopAt(7)])
    telemetry = SupportTelemetryCallback(3)
    run(moving_model(), tmp_path, 12, after=[telemetry], resume=str(tmp_path / "checkpoint-7"))
    assert "count from step 7" in caplog.text
    assert [record["step"] for record in telemetry.history] == [7, 9, 12]
    assert set(telemetry.history[0]["overlap"].values()) == {1.0}


class Reporter(TrainerCallback):
    """Sees what TensorBoard and W&B see: it stands before the callbacks that a user passes."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_the_trainers_history_and_its_reporters_have_the_figures_of_the_whole_model(tmp_path):
    model, reporter, telemetry = moving_model(), Reporter(), SupportTelemetryCallback(2, gradient_share=True)
    trainer = run(model, tmp_path, 6, before=[reporter], train=False, logging_steps=2)
    assert telemetry.attach(telemetry.attach(trainer) and trainer) is telemetry
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    keys = {f"support/{key}" for key in ("density", "churn", "overlap", "age_median", "gradient_share")}
    assert len(logged) == 3
    for log, seen, record in zip(logged, reporter.seen, telemetry.history[1:], strict=False):
        assert keys <= set(log)
        assert {k: v for k, v in seen.items() if k in keys} == {k: log[k] for k in keys}
        assert log["support/density"] == record["model"]["density"] == pytest.approx(0.1, abs=0.01)


def test_reporters_that_would_see_nothing_are_named(tmp_path, caplog):
    trainer = run(moving_model(), tmp_path, 3, train=False)
    trainer.args.report_to = ["tensorboard"]
    trainer.add_callback(SupportTelemetryCallback(1))
    trainer.train()
    assert "call telemetry.attach(trainer)" in caplog.text


def test_the_picture_shows_what_was_recorded(tmp_path):
    telemetry, _, _ = watched_run(tmp_path)
    drawn = draw_support_history(telemetry.history, tmp_path / "support.png", title="twelve steps")
    assert drawn.stat().st_size > 10_000
    assert draw_support_history([{"step": 0}], tmp_path / "none.png").exists()
    with pytest.raises(ValueError, match="history is empty"):
        draw_support_history([], tmp_path / "no.png")


def test_without_matplotlib_the_picture_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        draw_support_history([{"step": 0}], tmp_path / "no.png")


def test_a_kernel_adapters_log_holds_the_entries_that_survive_in_every_layer(tmp_path):
    competition = tiny.kernel_allocation(0.6, initial_warmup=0.0, final_warmup=0.2)
    config = KernelLoraConfig(r=4, sparsity=0.0, schedule=[competition], target_modules=["q_proj", "down_proj"])
    model, telemetry = get_peft_model(tiny.llama(), config), SupportTelemetryCallback(every=4, gradient_share=True)
    tiny.train(model, tmp_path, 10, callbacks=[*callbacks_for(model), telemetry])
    log = records(tmp_path)
    assert log == telemetry.history
    assert [record["step"] for record in log] == [0, 4, 8, 10]
    for layer in adapter_layers(model):
        dense = layer.get_delta_weight("default")
        assert log[0]["density"][layer.module_name] == 1.0
        assert log[-1]["density"][layer.module_name] == int((dense != 0).sum()) / dense.numel()
    assert len(set(log[-1]["density"].values())) > 1  # matrices share one budget
    assert log[-1]["model"] == {"density": pytest.approx(0.4, abs=1e-3)}
    assert not any(log[-1][field] for field in ("rank", "churn", "overlap", "age", "gradient_share"))
    assert draw_support_history(telemetry.history, tmp_path / "kernel.png").stat().st_size > 5_000


def test_units_of_a_kind_that_telemetry_never_heard_of_are_counted_and_drawn_under_their_kind(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Core(UnitSpace):
        kind: ClassVar[str] = "core"
        size = capacity = 7
        count, unit_numel = 5, 3

    model, telemetry = adapted(make_config()), SupportTelemetryCallback(every=2)
    layer_class, own = type(layers_of(model)[0]), type(layers_of(model)[0]).unit_spaces
    monkeypatch.setattr(layer_class, "unit_spaces", lambda layer, name: [Core(layer, name), *own(layer, name)])
    run(model, tmp_path, 4, after=[telemetry, StopAt(2, stop=False)])
    last = records(tmp_path)[-1]
    assert last["core"] == {layer.module_name: 5 for layer in layers_of(model)}
    assert last["numbers/core"] == {layer.module_name: 15 for layer in layers_of(model)}
    assert last["model"]["core"] == 5
    assert set(last["density"]) == {layer.module_name for layer in layers_of(model)}
    resumed = SupportTelemetryCallback(every=2)
    run(adapted(make_config()), tmp_path, 6, after=[resumed], resume=str(tmp_path / "checkpoint-2"))
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4, 6]
    assert draw_support_history(resumed.history, tmp_path / "core.png").stat().st_size > 5_000
