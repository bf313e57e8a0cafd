"""MuonSpec: which parameters of an adapter are matrices, what is refused, whole runs that resume to the bit."""

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback

from hf_sparse_peft import KernelLoraConfig, MuonSpec, SparseLoraConfig, make_optimizer, trainer_options
from hf_sparse_peft.optim import innermost

SUPPORT = {"r": 0, "density": 0.2, "block_size": 4}
CONFIGS = {
    "factors": {"r": 4, "density": 0.0},
    "rank 1": {"r": 1, "density": 0.0},
    "blocks": {**SUPPORT, "granularity": "block"},
    "rows": {**SUPPORT, "granularity": "row"},
    "columns": {**SUPPORT, "granularity": "column"},
    "subnet": {**SUPPORT, "granularity": "subnet"},
    "moving rows": {
        **SUPPORT,
        "granularity": "row",
        "schedule": [{"type": "regrow", "every": 3, "grow": "random", "fraction": 0.5}],
    },
}


def adapted(options, **more):
    torch.manual_seed(1)
    config = SparseLoraConfig(target_modules=["q_proj", "down_proj"], optimizer=MuonSpec(**more), **options)
    return get_peft_model(tiny.llama(), config)


def train(model, out, *callbacks, resume=None, **given):
    options = trainer_options(model, tiny.arguments(out, 8, weight_decay=0.1), **given)
    options["callbacks"] = [*options["callbacks"], *callbacks]
    trainer = Trainer(model=model, train_dataset=tiny.TokenData(), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StopAt4(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == 4


def state(trainer):
    found = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    for at, entry in innermost(trainer.optimizer).state_dict()["state"].items():
        found |= {f"{at}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_of_an_adapter_get_momentum_alone_and_a_run_resumes_to_the_bit(name, tmp_path):
    whole = train(adapted(CONFIGS[name]), tmp_path / "whole")
    optimizer = innermost(whole.optimizer)
    assert all(set(entry) == {"momentum_buffer"} for entry in optimizer.state.values())
    assert {group["transposed"] for group in optimizer.param_groups} == {name == "columns"}
    train(adapted(CONFIGS[name]), tmp_path / "halves", StopAt4())
    again = train(adapted(CONFIGS[name]), tmp_path / "again", resume=str(tmp_path / "halves/checkpoint-4"))
    expected, found = state(whole), state(again)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_entries_are_refused_by_name_or_left_to_adamw():
    mixed = {"r": 2, "density": 0.05}
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' \(entry\).*entries='adamw'"):
        make_optimizer(adapted(mixed), lr=0.02)
    model = adapted(mixed, entries="adamw", adamw_ratio=0.1)
    optimizer = make_optimizer(model, lr=0.02)
    for group in optimizer.param_groups:
        assert group["orthogonal"] == (group["params"][0].dim() == 2)
        assert group["lr"] == (0.02 if group["orthogonal"] else pytest.approx(0.002))
    with pytest.raises(ValueError, match="found no matrix of a linear map"):
        make_optimizer(adapted({"r": 0, "density": 0.05}, entries="adamw"), lr=0.02)
    kernel = KernelLoraConfig(r=4, target_modules=["q_proj"], optimizer=MuonSpec())
    with pytest.raises(ValueError, match="found no matrix of a linear map"):
        make_optimizer(get_peft_model(tiny.llama(), kernel), lr=0.02)


def test_whole_weights_leave_embeddings_head_and_norms_to_adamw(tmp_path):
    model = tiny.llama()
    trainer = train(model, tmp_path, optimizer=MuonSpec(adamw_ratio=0.1))
    entries = innermost(trainer.optimizer).state
    for name, p in model.named_parameters():
        linear = p.dim() == 2 and "embed" not in name and "lm_head" not in name
        assert ("momentum_buffer" in entries[p]) == linear
        assert ("exp_avg" in entries[p]) != linear
