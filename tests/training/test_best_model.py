"""`load_best_model_at_end` of a run without a callback of this package: the layers say what Trainer does not."""

import warnings

import pytest
import tiny
from peft import get_peft_model
from transformers import Trainer

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig

CONFIGS = {
    "sparse": lambda: SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj", "v_proj"]),
    "kernel": lambda: KernelLoraConfig(r=4, sparsity=0.5, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize(
    ("kind", "name", "best", "told"),
    [
        ("sparse", "mine", True, 1),
        ("kernel", "mine", True, 1),
        ("sparse", "default", True, 0),
        ("sparse", "mine", False, 0),
    ],
)
def test_a_named_adapter_is_told_once_that_its_best_state_stays_on_disk(kind, name, best, told, tmp_path):
    model = get_peft_model(tiny.llama(layers=1), CONFIGS[kind](), adapter_name=name)
    args = tiny.arguments(
        tmp_path, 2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=best,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = tiny.TokenData(8)
        Trainer(model=model, args=args, train_dataset=data, eval_dataset=data).train()
    found = [str(w.message) for w in caught if "load_best_model_at_end" in str(w.message)]
    assert len(found) == told
    assert all("['mine']" in one for one in found)
