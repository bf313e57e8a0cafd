"""MoSA's divergence: whose gradient it has, and which positions it is averaged over, for every kind of loss."""

import pytest
import tiny
import torch
from peft import get_peft_model
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse_peft import callbacks_for, methods
from hf_sparse_peft.rules import ExpertDraw
from hf_sparse_peft.training.trainers import TwoPassTrainer, symmetric_divergence
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.utils.label_shift import measured_shift, shift_by_class

IDS = torch.randint(1, tiny.VOCAB, (3, 8), generator=torch.Generator().manual_seed(1))


def test_each_pass_is_pulled_to_the_other_which_stands_still():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    ours = [z.clone().float().requires_grad_() for z in (first, second)]
    symmetric_divergence(*ours).sum().backward()
    p, q = first.softmax(-1), second.softmax(-1)
    # d/dz KL(q || softmax(z)) = softmax(z) - q, and half of it counts; without the detached targets there is more.
    torch.testing.assert_close(ours[0].grad.double(), 0.5 * (p - q), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1].grad.double(), 0.5 * (q - p), rtol=1e-4, atol=1e-6)


def test_the_value_is_half_of_both_directions():
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(symmetric_divergence(one, two)) == pytest.approx(0.46212, abs=1e-5)  # not 0.92423


def bart() -> BartForCausalLM:
    torch.manual_seed(0)
    return BartForCausalLM(
        BartConfig(
            vocab_size=tiny.VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48,
            max_position_embeddings=32, dropout=0.0, activation_dropout=0.0, attention_dropout=0.0,
        )
    )  # fmt: skip


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=tiny.VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


class Renamed(LlamaForCausalLM):
    """Somebody's own class over a causal model."""


class UnshiftedLlama(LlamaForCausalLM):
    """A causal class whose loss takes labels as they stand."""

    def forward(self, labels=None, **inputs):
        outputs = super().forward(**inputs)
        outputs["loss"] = functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


def labels_of(count: int = tiny.VOCAB) -> torch.Tensor:
    labels = IDS % count
    labels[0, :5], labels[2, -2:] = -100, -100
    return labels


SEQUENCE = torch.tensor([0, 2, 1])
# name -> model, targets, labels, whether its loss shifts them
MODELS = {
    "causal": (lambda: tiny.llama(layers=1), ["q_proj", "down_proj"], labels_of(), True),
    "conv1d": (lambda: tiny.gpt2(layers=1), ["c_attn"], labels_of(), True),
    "subclass": (lambda: tiny.llama(Renamed, layers=1), ["q_proj", "down_proj"], labels_of(), True),
    "unshifted": (lambda: tiny.llama(UnshiftedLlama, layers=1), ["q_proj", "down_proj"], labels_of(), False),
    "bart-decoder": (bart, ["q_proj", "v_proj"], labels_of(), False),
    "seq2seq": (t5, ["q", "wo"], labels_of(), False),
    "tokens": (
        lambda: tiny.llama(LlamaForTokenClassification, layers=1, num_labels=5, classifier_dropout=0.0),
        ["q_proj"], labels_of(5), False,
    ),
    "sequence": (
        lambda: tiny.llama(LlamaForSequenceClassification, layers=1, num_labels=3), ["q_proj"], SEQUENCE, None
    ),
}  # fmt: skip


def draw_experts(model, *draw):
    """Let training passes use the experts of (step, micro-batch, pass)."""
    drawn = ExpertDraw(*draw, consistency=1.0)
    for layer in adapter_layers(model):
        layer.expert_draws["default"] = drawn


def trainer_of(name: str, out, task_type=None):
    build, targets, labels, _ = MODELS[name]
    config = methods.get("mosa", r=4, target_modules=targets, task_type=task_type).config
    base, generator = build(), torch.Generator().manual_seed(3)
    for parameter in base.parameters():
        if parameter.ndim == 2:  # 0.02, where it is the start, leaves the logits of one layer too flat to diverge
            parameter.data.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    trainer = TwoPassTrainer(model=model, args=tiny.arguments(out, 1), callbacks=callbacks_for(model))
    return trainer, model.train(), {"input_ids": IDS, "labels": labels}


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("name", MODELS)
def test_the_divergence_counts_the_positions_that_the_loss_counts(name, task_type, tmp_path):
    trainer, model, inputs = trainer_of(name, tmp_path, task_type)
    shifts, logits = MODELS[name][3], []
    found = None
    for _ in range(2):  # what the first batch told holds for the next
        draw_experts(model, 3, 0)
        found = float(trainer.compute_loss(model, dict(inputs)))
    for number in (0, 1):
        draw_experts(model, 3, 0, number)
        logits.append(model(**inputs).logits.detach().double())
    labels = inputs["labels"]
    if shifts:
        logits, labels = [z[:, :-1] for z in logits], labels[:, 1:]
    counted = labels != -100
    own = logits[0].log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    p, q = (z.softmax(-1) for z in logits)
    divergence = 0.5 * ((p - q) * (p.log() - q.log())).sum(-1)
    expected = -own[counted].mean() + divergence[counted].mean()
    assert divergence[counted].mean() > 0.01
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_where_a_batch_cannot_tell_the_class_does():
    same = torch.full((2, 5), 7)
    logits = torch.randn(2, 5, 1, generator=torch.Generator().manual_seed(0)).expand(2, 5, 9).clone()
    loss = functional.cross_entropy(logits.flatten(0, 1), same.flatten())
    assert measured_shift(logits, same, loss) is None  # ln 9 either way
    assert measured_shift(logits, same, loss + 3) is None
    assert measured_shift(logits, torch.full((2, 5), -100), loss) is None
    expected = {"causal": True, "conv1d": True, "subclass": True, "seq2seq": False, "tokens": False, "sequence": False}
    assert {name: shift_by_class(MODELS[name][0]()) for name in expected} == expected


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("items", [None, 40])
def test_the_shift_is_measured_from_the_loss(shift, items):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 11, generator=generator)
    labels = torch.randint(11, (2, 6), generator=generator)
    used = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    loss = functional.cross_entropy(used[0].flatten(0, 1), used[1].flatten(), reduction="sum")
    loss = loss / (items or used[1].numel())
    assert measured_shift(logits, labels, loss, items) is shift


def test_the_gradient_of_a_step_is_the_loss_plus_half_of_each_detached_divergence(tmp_path):
    trainer, model, inputs = trainer_of("causal", tmp_path)
    draw_experts(model, 3, 0)
    trainer.compute_loss(model, dict(inputs)).backward()
    found = [p.grad.clone() for layer in adapter_layers(model) for p in layer.parameters() if p.requires_grad]
    model.zero_grad()
    logits = []
    for number in (0, 1):
        draw_experts(model, 3, 0, number)
        logits.append(model(input_ids=IDS).logits[:, :-1])
    labels = inputs["labels"][:, 1:]
    counted = labels != -100
    p, q = (z.log_softmax(-1)[counted] for z in logits)
    # batchmean: per counted token; the target of each direction is detached.
    pull = functional.kl_div(p, q.detach().exp(), reduction="sum") + functional.kl_div(
        q, p.detach().exp(), reduction="sum"
    )
    loss = functional.nll_loss(p, labels[counted]) + 0.5 * pull / counted.sum()
    loss.backward()
    expected = [p.grad for layer in adapter_layers(model) for p in layer.parameters() if p.requires_grad]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
