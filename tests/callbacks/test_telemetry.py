"""`support_log.jsonl` says what lives where, once a step, across resumes and kills."""

import json

import pytest
from callback_toolbox import StopAt, adapted, layers_of, make_config, run, support_of

from hf_sparse_peft import PruningConfig, RankAllocationConfig, SupportTelemetryCallback


def a_model():
    pruning = PruningConfig(final_fraction=0.5, begin=0.0, end=0.8, interval=1)
    ranks = RankAllocationConfig(target_r=2, interval=2, initial_warmup=0.0, final_warmup=0.2)
    return adapted(make_config(r=4, pruning=pruning, rank_allocation=ranks))


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
