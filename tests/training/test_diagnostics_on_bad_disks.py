"""A diagnostic never stops a run and never blocks a resume: full disks, unwritable folders, damaged logs."""

import errno
import io
import json
import shutil
import warnings

import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from training_toolbox import StopAt

from hf_sparse_peft import Prune, SparseLoraConfig, SupportTelemetryCallback, callbacks_for
from hf_sparse_peft.optim.zeroth_order_log import LOG_NAME, read_log
from hf_sparse_peft.training import ZerothOrderTrainer, draw_support_history, zeroth_order_optimizer

STEPS = 6


def run(out, *callbacks, resume=None, **options):
    """Train a thinning support with telemetry; returns trained values, telemetry and the distinct warnings."""
    pruning = Prune(final_fraction=0.5, start=0.0, end=0.8, every=1)
    config = SparseLoraConfig(r=0, density=0.2, target_modules=["q_proj"], schedule=[pruning])
    model, telemetry = get_peft_model(tiny.llama(layers=1), config), SupportTelemetryCallback(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.train(
            model, out, STEPS, callbacks=[*callbacks_for(model), telemetry, *callbacks], resume=resume, **options
        )
    said = [str(one.message) for one in caught if "support_" in str(one.message)]
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return values, telemetry, said


def steps_in(file) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


class FullDisk:
    """Files whose name has `part` cannot be written while `full`; of what is written, half of a line arrives."""

    def __init__(self, monkeypatch, part: str) -> None:
        self.full, self.refused, real = True, 0, io.open

        def opened(file, mode="r", *args, **kwargs):
            if self.full and part in str(file) and set(mode) & set("wax+"):
                self.refused += 1
                if "a" in mode:
                    with real(file, "a") as half:
                        half.write('{"step": 3, "dens')
                raise OSError(errno.ENOSPC, "No space left on device", str(file))
            return real(file, mode, *args, **kwargs)

        monkeypatch.setattr(io, "open", opened)


def test_a_full_disk_is_said_once_and_the_run_ends_as_it_would(tmp_path, monkeypatch, undisturbed):
    disk = FullDisk(monkeypatch, "support_")
    values, telemetry, said = run(tmp_path, save_strategy="steps", save_steps=2)
    assert disk.refused > 3
    assert same(values, undisturbed[0])
    assert telemetry.history == undisturbed[1].history
    assert len([text for text in said if "support_log.jsonl' could not be written" in text]) == 1


def test_records_that_a_full_disk_refused_are_written_when_it_has_room(tmp_path, monkeypatch, undisturbed):
    disk = FullDisk(monkeypatch, "support_")
    disk.full = False

    def at(step, model, optimizer):
        disk.full = step in (2, 3)

    _, telemetry, said = run(tmp_path, tiny.At(on_step_begin=at))
    assert disk.refused
    assert steps_in(tmp_path / "support_log.jsonl") == list(range(STEPS + 1))
    assert telemetry.history == undisturbed[1].history
    assert len(said) == 1


def test_a_folder_in_the_place_of_the_log_stops_nothing(tmp_path, undisturbed):
    (tmp_path / "support_log.jsonl" / "x").mkdir(parents=True)
    values, telemetry, said = run(tmp_path)
    assert same(values, undisturbed[0])
    assert len(telemetry.history) == STEPS + 1
    assert len(said) == 1


def test_state_that_cannot_be_written_into_a_checkpoint_costs_the_state_alone(tmp_path, monkeypatch, undisturbed):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_sparse_peft.training.telemetry.save_file", full)
    values, _, said = run(tmp_path, save_strategy="steps", save_steps=2)
    assert same(values, undisturbed[0])
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-4" / "support_telemetry.safetensors").exists()
    assert len(said) == 1


def damaged_logs():
    good = {"density": {}, "rank": {}, "churn": {}, "overlap": {}, "age": {}, "gradient_share": {}, "model": {}}
    return {
        "half a line in the middle": lambda lines: [lines[0], lines[1][:20], *lines[2:]],
        "binary": lambda lines: [*lines[:2], b"\x00\xff\xfe{", *lines[2:]],
        "no record": lambda lines: [*lines[:2], b"[1, 2]", b"3", b"null", *lines[2:]],
        "record without step": lambda lines: [*lines[:2], json.dumps(good).encode(), *lines[2:]],
        "words for numbers": lambda lines: [
            *lines[:2], json.dumps({**good, "step": 2, "model": {"density": "much"}}).encode(), *lines[2:]
        ],
        "another run's": lambda lines: [
            *lines[:2], json.dumps({**good, "step": 2, "density": {"model.other": 0.5}}).encode(), *lines[2:]
        ],
        "steps twice": lambda lines: [*lines[:3], *lines[:3], *lines[3:]],
        "nested without end": lambda lines: [*lines[:2], b"[" * 100_000, *lines[2:]],
    }  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    run(folder, StopAt(4))
    return folder


def copy_of(folder, to):
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


@pytest.mark.parametrize("damage", damaged_logs())
def test_a_damaged_log_keeps_its_good_lines_and_the_run_goes_on(damage, interrupted, tmp_path, undisturbed):
    log = copy_of(interrupted, tmp_path) / "support_log.jsonl"
    log.write_bytes(b"\n".join(damaged_logs()[damage](log.read_bytes().splitlines())) + b"\n")
    values, telemetry, said = run(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert same(values, undisturbed[0])
    lost = {1} if damage == "half a line in the middle" else set()
    assert steps_in(log) == [step for step in range(STEPS + 1) if step not in lost]
    assert [record for record in undisturbed[1].history if record["step"] not in lost] == telemetry.history
    assert len(said) == 1
    assert "damaged or of another run" in said[0]


@pytest.mark.parametrize("damage", ["junk", "cut", "other tensors", "folder"])
def test_damaged_state_in_a_checkpoint_starts_anew(damage, interrupted, tmp_path, undisturbed):
    file = copy_of(interrupted, tmp_path) / "checkpoint-4" / "support_telemetry.safetensors"
    if damage == "junk":
        file.write_bytes(b"\x00" * 100)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        save_file({key: t.float() for key, t in load_file(file).items() if "recorded" not in key}, file)
    values, telemetry, said = run(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert same(values, undisturbed[0])
    assert [record["step"] for record in telemetry.history] == list(range(STEPS + 1))
    assert len(said) == (0 if damage == "other tensors" else 1)


def test_a_picture_that_cannot_be_written_is_warned_about(tmp_path, monkeypatch, undisturbed):
    (tmp_path / "support.png").write_bytes(b"the old one")
    FullDisk(monkeypatch, "support")
    monkeypatch.setattr("builtins.open", io.open)
    with pytest.warns(UserWarning, match="No space left"):
        draw_support_history(undisturbed[1].history, tmp_path / "support.png")
    assert (tmp_path / "support.png").read_bytes() == b"the old one"


# The replay log of zeroth-order runs


def mezo(out, steps=4, resume=None):
    config = SparseLoraConfig(r=2, density=0, target_modules=["q_proj"])
    model = get_peft_model(tiny.llama(layers=1), config)
    args = tiny.arguments(out, steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    optimizer = zeroth_order_optimizer(model, args)
    trainer = ZerothOrderTrainer(
        model=model, args=args, train_dataset=tiny.TokenData(), optimizers=(optimizer, None)
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("damage", ["junk", "another run's", "too short", "gone"])
def test_a_replay_log_that_cannot_go_on_is_left_alone_and_the_run_goes_on(damage, tmp_path, caplog):
    whole = mezo(tmp_path / "run")
    log = tmp_path / "run" / LOG_NAME
    assert len(list(read_log(log)[1])) == 4
    content = log.read_bytes()
    header, _, body = content.partition(b"\n")
    found = {
        "junk": b"\x00\xff" * 9,
        "another run's": json.dumps({**json.loads(header), "seed": 12345}).encode() + b"\n" + body,
        "too short": header + b"\n" + body[:30],
        "gone": None,
    }[damage]
    log.unlink() if found is None else log.write_bytes(found)
    assert same(mezo(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2")), whole)
    assert "without a replay log" in caplog.text
    assert (log.read_bytes() if log.exists() else None) == found


def test_a_full_disk_ends_the_replay_log_and_not_the_run(tmp_path, monkeypatch, caplog):
    whole = mezo(tmp_path / "run")
    disk = FullDisk(monkeypatch, LOG_NAME)
    assert same(mezo(tmp_path / "full"), whole)
    assert disk.refused
    assert caplog.text.count("without a replay log") == 1
