"""TensorBoard and Weights & Biases receive what telemetry records, in the files that they write."""

import importlib.util

import pytest
import tiny
from peft import get_peft_model

from hf_sparse_peft import AccumulatedGradient, Regrow, SparseLoraConfig, SupportTelemetryCallback, callbacks_for

KEYS = ("density", "churn", "overlap", "age_median", "gradient_share")


def tracked_run(out, tracker):
    """A run that reports to `tracker`; returns what telemetry recorded at the logged steps: step -> key -> value."""
    schedule = [Regrow(every=4, grow=AccumulatedGradient(steps=2))]
    model = get_peft_model(
        tiny.llama(layers=1), SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj"], schedule=schedule)
    )
    telemetry = SupportTelemetryCallback(2, gradient_share=True)
    args = tiny.arguments(out, 12, report_to=[tracker], logging_strategy="steps", logging_steps=2, run_name="telemetry")
    trainer = tiny.Trainer(
        model=model, args=args, train_dataset=tiny.TokenData(), callbacks=[*callbacks_for(model), telemetry]
    )
    telemetry.attach(trainer)
    trainer.train()
    return {
        record["step"]: {f"support/{key}": value for key, value in record["model"].items()}
        for record in telemetry.history
        if record["step"]
    }


def test_tensorboard_has_every_figure_at_every_logged_step(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    wanted = tracked_run(tmp_path / "run", "tensorboard")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    for key in KEYS:
        found = {event.step: event.value for event in board.Scalars(f"train/support/{key}")}
        assert found == {step: pytest.approx(one[f"support/{key}"], rel=1e-6) for step, one in wanted.items()}, key
    assert set(wanted) == {2, 4, 6, 8, 10, 12}
    assert any(one["support/churn"] for one in wanted.values())


def stored_records(content):
    """What a `.wandb` file holds: seven bytes, then LevelDB's log, records cut into parts at blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.slow  # a server process of its own
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb (extra: trackers)")
def test_weights_and_biases_offline_has_every_figure_at_every_logged_step(tmp_path, monkeypatch):
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_WATCH", "false")
    wanted = tracked_run(tmp_path / "run", "wandb")
    wandb.finish()
    wandb.teardown()  # its server has written all when it is gone
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for data in stored_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {(one.key or "/".join(one.nested_key)): one.value_json for one in record.history.item}
        step = items.get("train/global_step")
        if step is not None and "train/support/density" in items:
            found[int(float(step))] = {key: float(items[f"train/support/{key}"]) for key in KEYS}
    assert set(found) == set(wanted)
    for step, figures in found.items():
        assert figures == {key: pytest.approx(wanted[step][f"support/{key}"], rel=1e-6) for key in KEYS}
