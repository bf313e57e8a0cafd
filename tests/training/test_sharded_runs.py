"""Runs in which a callback would be blind must not start."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from hf_sparse_peft.training import PruningCallback, RuleRunner


@pytest.mark.parametrize("callback", [RuleRunner, PruningCallback])
@pytest.mark.parametrize("option", ["deepspeed", "fsdp"])
def test_a_sharded_run_is_refused_with_the_mend(callback, option):
    args = SimpleNamespace(deepspeed=None, fsdp=None)
    setattr(args, option, "full_shard")
    with pytest.raises(ValueError, match="DDP or on one device"):
        callback().on_train_begin(args, TrainerState(max_steps=10), TrainerControl(), model=None)
