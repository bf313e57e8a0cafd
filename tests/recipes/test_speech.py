"""`recipes/speech.py`: what trains, what stays, and what padding may not change, of Whisper and of wav2vec 2.0."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoTokenizer,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hf_sparse_peft import SparseLoraConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import common
import speech

OF_WAV2VEC = ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"]
SMALL = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}


def low_rank(base, targets):
    torch.manual_seed(0)
    model = get_peft_model(base, SparseLoraConfig(r=8, density=0.0, target_modules=targets))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


def whisper(tokenizer):
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50,
        max_target_positions=32, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, decoder_start_token_id=tokenizer.bos_token_id, **SMALL,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def wav2vec():
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer", do_stable_layer_norm=True, vocab_size=12, layerdrop=0.0, mask_time_prob=0.0,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config)


def trained(model, **batch):
    """The model after two steps on a batch, and its frozen weights before."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    return before


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2"])
def test_eight_ranks_on_the_six_linears_of_a_base_layer_are_110592_numbers(kind):
    with torch.device("meta"):
        if kind == "whisper":
            sides = {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
            base, targets = (
                WhisperForConditionalGeneration(WhisperConfig(**sides, **SMALL)).model.encoder,
                speech.TARGETS,
            )
        else:
            base, targets = Wav2Vec2ForCTC(Wav2Vec2Config(num_hidden_layers=1)), OF_WAV2VEC
        model = get_peft_model(base, SparseLoraConfig(r=8, density=0.0, target_modules=targets))
    found = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(found.values()) == 110_592
    assert not any("conv" in name or "norm" in name for name in found)


def test_the_convolutions_of_whisper_keep_every_bit_and_labels_padding_changes_no_logit():
    tokenizer = AutoTokenizer.from_pretrained(common.DEMO_BASE)
    base = whisper(tokenizer)
    extractor = WhisperFeatureExtractor(feature_size=80, sampling_rate=speech.RATE, chunk_length=1)
    recipe = SimpleNamespace(audio_column="audio", text_column="text", max_target_length=20)
    collate = speech.collator(recipe, tokenizer, extractor, base)
    rng = np.random.default_rng(0)
    rows = [
        {"audio": {"array": rng.standard_normal(count), "sampling_rate": speech.RATE}, "text": text}
        for count, text in ((6000, "1 2"), (16000, "3 4 5 6 7 8"))
    ]
    model, alone, both = low_rank(base, speech.TARGETS).eval(), collate(rows[:1]), collate(rows)
    known = int((both["labels"][0] >= 0).sum())
    assert known == alone["labels"].shape[1] < both["labels"].shape[1]
    assert torch.equal(both["input_features"][0], alone["input_features"][0])
    with torch.no_grad():
        torch.testing.assert_close(model(**both).logits[0, :known], model(**alone).logits[0], rtol=1e-4, atol=1e-5)
    before = trained(model, **both)
    assert {"conv1", "conv2"} <= {part for name in before for part in name.split(".")}
    now = dict(model.named_parameters())
    assert [name for name, tensor in before.items() if not torch.equal(now[name], tensor)] == []


def test_the_feature_encoder_of_wav2vec_keeps_every_bit_and_padding_changes_no_logit():
    model = low_rank(wav2vec(), OF_WAV2VEC).eval()
    sound = torch.randn(2, 900, generator=torch.Generator().manual_seed(1))
    sound[0, 500:] = 0
    mask = torch.ones(2, 900, dtype=torch.int64)
    mask[0, 500:] = 0
    with torch.no_grad():
        alone = model(input_values=sound[:1, :500], attention_mask=mask[:1, :500]).logits[0]
        padded = model(input_values=sound, attention_mask=mask).logits[0, : len(alone)]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
    before = trained(model, input_values=sound, attention_mask=mask, labels=labels)
    now = dict(model.named_parameters())
    assert any("feature_extractor.conv_layers" in name for name in before)
    assert [name for name, tensor in before.items() if not torch.equal(now[name], tensor)] == []
