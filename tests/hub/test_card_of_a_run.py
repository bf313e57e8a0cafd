"""A card tells the run that it is of: its figures as the Hub keeps them, settings, cost, environment and picture."""

import pytest
from hub_toolbox import adapted
from huggingface_hub import EvalResult, ModelCard

from hf_sparse_peft import hub
from hf_sparse_peft.training import RunRecord

RUN = RunRecord(
    title="a run",
    facts={"steps": "20 of 20", "seed": "3"},
    environment={"torch": "9.9.9", "device": "an abacus"},
    log=[
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": 1.0},
        {"step": 20, "eval_loss": 1.5, "eval_accuracy": 0.75, "eval_runtime": 9.0, "eval_samples_per_second": 7.0},
        {"step": 20, "train_runtime": 3725.0},
    ],
    measured=[{"step": 10, "seconds": 0.2, "gpu_bytes": 3e9}, {"step": 20, "seconds": 0.4, "gpu_bytes": 5e9}],
)


def test_the_last_evaluation_settings_cost_and_environment_are_on_the_card():
    card = hub.adapter_card(adapted(), run=RUN, evaluated_on="me/words", base_model="me/base", repo_id="me/x")
    text = str(card)
    for part in (
        "| loss | 1.5 | me/words |", "| accuracy | 0.75 | me/words |", "| steps | 20 of 20 |",
        "| time of a step, median | 300 ms |", "| training time | 1 h 2 min |", "| GPU memory, highest | 5.00 GB |",
        "- torch 9.9.9", "- device an abacus",
    ):  # fmt: skip
        assert part in text, part
    assert "runtime" not in text
    assert "per_second" not in text
    data = ModelCard(text).data
    assert {(one.dataset_type, one.metric_type, one.metric_value) for one in data.eval_results} == {
        ("me/words", "loss", 1.5), ("me/words", "accuracy", 0.75),
    }  # fmt: skip
    assert {one.task_type for one in data.eval_results} == {"text-generation"}
    assert data.model_name == "x"
    assert data.to_dict()["base_model_relation"] == "adapter"


def test_results_without_a_data_set_of_the_hub_are_a_table_and_no_metadata():
    card = hub.adapter_card(adapted(), metrics={"accuracy": 0.5}, evaluated_on="200 sums that nobody keeps")
    assert "| accuracy | 0.5 | 200 sums that nobody keeps |" in str(card)
    assert card.data.eval_results is None
    assert "model_name" not in str(card)
    infinite = hub.adapter_card(adapted(), metrics={"loss": float("inf"), "name": "x"}, evaluated_on="me/words")
    assert infinite.data.eval_results is None
    assert "| loss | inf | me/words |" in str(infinite)


def test_results_of_the_hubs_own_type_are_taken_as_they_are():
    one = EvalResult("text-generation", "me/words", "Words", "exact_match", 0.25, metric_name="exact match")
    card = hub.adapter_card(adapted(), metrics=[one], run=RUN)
    assert "| exact match | 0.25 | Words |" in str(card)
    assert card.data.eval_results == [one]
    with pytest.raises(ValueError, match=r"metrics=\['accuracy'\] is not a mapping.*EvalResult"):
        hub.adapter_card(adapted(), metrics=["accuracy"])


def test_the_picture_of_the_run_lies_beside_the_card(tmp_path):
    pytest.importorskip("matplotlib")
    place = hub.save_adapter(adapted(), tmp_path / "adapter", run=RUN)
    assert sorted(file.name for file in place.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "training.png",
    ]  # fmt: skip
    assert "](training.png)" in (place / "README.md").read_text()
    assert (place / "training.png").read_bytes()[:4] == b"\x89PNG"
