"""Estimates against what the benchmark of steps measures, at its shapes."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

from hf_sparse_peft.preflight import estimate

CASES = ("lora", "entry", "block32", "row", "column", "diagonal", "subnet", "hybrid")


@pytest.fixture(scope="module", params=["bf16", "nf4"])
def base(request):
    from llama import PRESETS, build_base

    return request.param, PRESETS["cpu"], build_base(PRESETS["cpu"], request.param, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_within_a_tenth_of_what_a_step_takes(base, name):
    from llama import adapt
    from step_cost import CANDIDATES, RANK
    from trial import Trial, first_step, peak_bytes

    kind, preset, frozen = base
    model, method = adapt(frozen, CANDIDATES[name], RANK)
    trial = Trial(model, torch.randint(preset.vocab, (preset.batch, preset.tokens)), method)
    real = first_step(trial, set())
    peak = peak_bytes(trial.model, trial.optimizer, trial.step, "cpu")
    config = LlamaConfig(
        hidden_size=preset.hidden, intermediate_size=preset.intermediate, num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads, num_key_value_heads=preset.kv_heads, vocab_size=preset.vocab,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    told = estimate(
        config, method.config, bits={"bf16": 16, "nf4": 4}[kind], seq=preset.tokens, batch=preset.batch,
        input_gradients=True,
    )  # fmt: skip
    kept = (told.saved, real["saved_bytes"])
    figures = [f"{size / 2**20:.1f}" for size in (*kept, told.training, peak)]
    print(f"{kind:5s}{name:8s} kept, peak: estimated and measured MiB {figures}, {told.training / peak:.3f}")
    assert told.trained_numbers == real["trained_numbers"]
    assert kept[0] == pytest.approx(kept[1], rel=0.1)
    assert told.training == pytest.approx(peak, rel=0.1)
