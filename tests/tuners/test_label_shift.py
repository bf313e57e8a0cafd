"""What a batch's mean loss is a mean of, by the model's class."""

import pytest
import tiny
import torch
from transformers import LlamaForCausalLM, LlamaForTokenClassification, T5Config, T5ForConditionalGeneration

from hf_sparse_peft.rules.calibration_data import items_in


class Renamed(LlamaForCausalLM):
    """Somebody's own class over a causal model."""


@pytest.mark.parametrize(
    ("build", "shifts"),
    [
        (lambda: tiny.llama(layers=1), True),
        (lambda: tiny.llama(Renamed, layers=1), True),
        (lambda: tiny.gpt2(layers=1), True),
        (lambda: tiny.llama(LlamaForTokenClassification, layers=1, num_labels=5), False),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=tiny.VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            False,
        ),
    ],
    ids=["llama", "subclass", "gpt2", "tokens", "seq2seq"],
)
def test_the_items_of_a_batch_are_the_labels_that_its_loss_counts(build, shifts):
    labels = torch.ones(2, 6, dtype=torch.long)
    labels[0, 3:] = -100
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "labels": labels}
    assert items_in(batch, build()) == 9 - 2 * shifts
