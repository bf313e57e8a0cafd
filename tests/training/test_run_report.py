"""`report.html`: one page a run that needs nothing else, says what was measured, and leaves out what says nothing."""

import json
import re
import warnings
import xml.etree.ElementTree as ET

import pytest
import tiny
from peft import get_peft_model

from hf_sparse_peft import Prune, RunReportCallback, SparseLoraConfig, SupportTelemetryCallback, callbacks_for
from hf_sparse_peft.training import RunRecord, write_report

pytest.importorskip("matplotlib")


def a_run(out, steps=6, report=None, resume=None, telemetry=True, **options):
    schedule = [Prune(final_fraction=0.5, start=0.0, end=0.8, every=1)]
    config = SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj", "v_proj"], schedule=schedule)
    model = get_peft_model(tiny.llama(layers=1), config)
    watching = [SupportTelemetryCallback(2)] if telemetry else []
    callbacks = [*callbacks_for(model), *watching, *([report] if report else [])]
    log = {"logging_strategy": "steps", "logging_steps": 2}
    return tiny.train(model, out, steps, callbacks=callbacks, resume=resume, **log, **options)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out, report = (
        tmp_path_factory.mktemp("run"),
        RunReportCallback(2, estimate={"seconds": 0.5}, facts={"data": "<tokens>"}),
    )
    a_run(out, report=report)
    return (out / "report.html").read_text(), report, out


def test_the_page_stands_alone_and_follows_dark_and_light(page):
    text, _, _ = page
    fetched = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)\)""", text)
    assert all("".join(one).startswith(("#", "data:image/png;base64,")) for one in fetched)
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    pictures = re.findall(r"<svg .*?</svg>", text, re.S)
    names = [ET.fromstring(svg).get("aria-label") for svg in pictures]
    assert {"loss", "density", "budget", "time of a step"} <= set(names)
    assert "#000000" not in "".join(pictures)  # nothing in black on black
    assert "&lt;tokens&gt;" in text


def test_flat_panels_are_sentences_and_facts_are_those_of_the_run(page):
    text, report, _ = page
    assert "rank: living components: 2 in every layer at every record" in text
    record = report.record
    assert record.facts["steps"] == "6 of 6"
    assert record.facts["rules of the adapter"] == "prune"
    assert record.facts["examples a step"] == "4"
    assert {"time of a step, median", "training time", "memory of the process, highest"} == set(record.cost)
    assert [event["rule"] for event in record.events]
    assert re.search(r"prune</th><td>\d+ times, first at step \d+, last at step \d+", text)
    assert "torch" in record.environment


def test_measurements_are_a_line_every_few_steps_and_at_the_end(page):
    _, report, out = page
    lines = [json.loads(line) for line in (out / "run_log.jsonl").read_text().splitlines()]
    assert lines == report.measured
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(0 < line["seconds"] < 60 and line["process_bytes"] > 1e7 for line in lines)


def test_a_resumed_run_goes_on_in_its_measurements(tmp_path):
    a_run(tmp_path, report=RunReportCallback(1), save_strategy="steps", save_steps=4)
    report = RunReportCallback(1)
    a_run(tmp_path, report=report, resume=str(tmp_path / "checkpoint-4"))
    assert [one["step"] for one in report.measured] == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_after_training_is_on_the_page_and_in_the_record(tmp_path):
    report = RunReportCallback()
    trainer = a_run(tmp_path, report=report, telemetry=False, eval_strategy="no")
    assert report.record.metrics == {}
    trainer.eval_dataset = tiny.TokenData(samples=8)
    loss = trainer.evaluate()["eval_loss"]
    assert report.record.metrics == {"loss": pytest.approx(loss)}
    assert f"{loss:.4g}" in (tmp_path / "report.html").read_text()
    assert report.record.support == []


def test_a_report_changes_no_bit_of_the_training(tmp_path):
    models = [a_run(tmp_path / str(i), report=RunReportCallback() if i else None).model for i in range(2)]
    one, two = ({n: p for n, p in model.named_parameters() if p.requires_grad} for model in models)
    assert all(one[name].equal(two[name]) for name in one)


def test_a_page_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    def full(record, path):
        raise OSError("no space left")

    monkeypatch.setattr("hf_sparse_peft.training.run_report.write_report", full)
    with pytest.warns(UserWarning, match=r"report\.html could not be written \(no space left\)"):
        a_run(tmp_path, report=RunReportCallback())


def test_a_run_without_anything_is_a_page_too(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write_report(RunRecord(title="nothing"), tmp_path / "r.html").read_text()
    assert "<svg" not in text
    assert "<h1>nothing</h1>" in text


@pytest.mark.parametrize("estimate", [{"hours": 1}, {"seconds": "fast"}, {"seconds": True}])
def test_estimates_of_other_things_are_refused(estimate):
    with pytest.raises(ValueError, match=r"RunReportCallback\(estimate=.*numbers for \['seconds', 'gpu_bytes'"):
        RunReportCallback(estimate=estimate)
    with pytest.raises(ValueError, match=r"RunReportCallback\(every\)"):
        RunReportCallback(every=0)
