"""MOS's adapter merging: the closed form of the pull, in a loop and in a Trainer."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.merging import EarlierAdaptersCallback, PullToEarlier

SPARSE = {"r": 2, "density": 0.1, "criterion": "random", "target_modules": ["q_proj"]}


def several(count, make=lambda at: SparseLoraConfig(**SPARSE)):
    model = get_peft_model(tiny.llama(layers=1), make(0), "t0")
    for at in range(1, count):
        model.add_adapter(f"t{at}", make(at))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".t{at}" in name for at in range(count)):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.set_adapter(f"t{count - 1}")
    return model


def parameters(model, adapter):
    return {
        name.replace(f".{adapter}", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if f".{adapter}" in name
    }


@pytest.mark.parametrize(
    "make", [lambda at: SparseLoraConfig(**SPARSE), lambda at: LoraConfig(r=2, target_modules=["q_proj"])]
)
def test_n_pulls_leave_the_own_part_with_a_power_of_n_and_the_mean_of_two(make):
    model = several(3, make)
    before = [parameters(model, f"t{at}") for at in range(3)]
    pull = PullToEarlier(model, ["t0", "t1"], rate=0.1)
    for _ in range(5):
        pull()
    found = parameters(model, "t2")
    assert found
    for name, value in found.items():
        mean = (before[0][name] + before[1][name]) / 2
        torch.testing.assert_close(value, mean + 0.9**5 * (before[2][name] - mean), atol=1e-5, rtol=1e-4)
    for at in (0, 1):  # the earlier ones stay as they were
        assert all(torch.equal(value, before[at][name]) for name, value in parameters(model, f"t{at}").items())


def test_a_rate_of_zero_and_a_first_task_change_nothing():
    model = several(2)
    before = parameters(model, "t1")
    PullToEarlier(model, ["t0"], rate=0.0)()
    PullToEarlier(model, [])()
    assert all(torch.equal(value, before[name]) for name, value in parameters(model, "t1").items())


def test_in_a_trainer_it_acts_once_a_step_behind_the_update(tmp_path):
    model = several(2)
    before = [parameters(model, f"t{at}") for at in range(2)]
    rows = [{"input_ids": torch.arange(1, 9), "labels": torch.full((8,), -100)} for _ in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.0,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=rows, callbacks=[EarlierAdaptersCallback(["t0"], rate=0.2)]).train()
    for name, value in parameters(model, "t1").items():
        expected = before[0][name] + 0.8**4 * (before[1][name] - before[0][name])
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
    model.eval()(torch.arange(1, 9)[None])  # the authors' code pulls in evaluation too
    assert all(torch.equal(value, before[0][name]) for name, value in parameters(model, "t0").items())


def test_other_supports_other_ranks_and_unknown_names_are_refused_by_name():
    other_units = several(2, lambda at: SparseLoraConfig(**{**SPARSE, "seed": at}))
    with pytest.raises(ValueError, match=r"q_proj.*other units or bases"):
        PullToEarlier(other_units, ["t0"])
    other_ranks = several(2, lambda at: SparseLoraConfig(**{**SPARSE, "r": 1 + at}))
    with pytest.raises(ValueError, match="same ranks"):
        PullToEarlier(other_ranks, ["t0"])
    for earlier in (["none"], ["t1"], ["t0", "t0"]):
        with pytest.raises(ValueError, match="earlier="):
            PullToEarlier(several(2), earlier)
    with pytest.raises(ValueError, match="rate"):
        EarlierAdaptersCallback(["t0"], rate=1.5)
