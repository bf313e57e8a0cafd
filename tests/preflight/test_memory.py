"""Estimates of memory: what is counted on the meta device is what a model with weights holds and keeps."""

import functools
import json
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig
from preflight_toolbox import BATCH, CONFIGS, SEQ, measured
from transformers import LlamaConfig, LlamaForSequenceClassification, MixtralConfig, T5Config, ViTConfig

from hf_sparse_peft import SparseLoraConfig, methods
from hf_sparse_peft.preflight import doctor, estimate
from hf_sparse_peft.preflight.memory import RESERVE, parse_bytes

AT_REST = {"base weights", "quantisation constants", "adapter values", "indices"}
MODEL = tiny.llama().config
WIDE = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64,
)  # fmt: skip


MIXTRAL = MixtralConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, num_local_experts=4, architectures=["MixtralForCausalLM"],
)  # fmt: skip


@functools.cache
def found(kind, bits):
    return estimate(MODEL, CONFIGS[kind](), bits=bits, seq=SEQ, batch=BATCH, optimizer="adamw_torch")


@tiny.crossed(kind=list(CONFIGS), base=["bf16", "nf4", "fp32"])
def test_what_is_counted_without_weights_is_what_a_model_with_weights_keeps(kind, base):
    bits = {"bf16": 16, "nf4": 4, "fp32": 32}[base]
    with_weights = tiny.base(base, compute_dtype=torch.bfloat16)
    if base == "nf4":
        for parameter in with_weights.parameters():  # as loaded with dtype="bfloat16": what is not quantised
            parameter.data = parameter.data.bfloat16() if parameter.dtype == torch.float32 else parameter.data
    real, told = measured(with_weights, CONFIGS[kind]()), found(kind, bits)
    sizes = {part.name: part.bytes for part in told.parts}
    assert sum(sizes.get(name, 0) for name in AT_REST) == pytest.approx(real["at_rest"], rel=0.01)
    # What a grid keeps follows from the costs of a device's products (ops/costs.json): a GPU's here, a CPU's there.
    assert told.saved == pytest.approx(real["saved"], rel=0.1 if kind == "grid" else 0.01)
    assert sizes["optimizer state"] == real["optimizer"]
    assert told.trained_numbers * 4 == real["gradients"]
    assert told.training == sum(sizes.values()) > sum(sizes[name] for name in AT_REST & set(sizes)) + told.saved


def test_columns_keep_less_than_entries_and_checkpoints_less_than_both():
    plain, columns = found("entries", 16), found("columns", 16)
    again = estimate(MODEL, CONFIGS["entries"](), seq=SEQ, batch=BATCH, gradient_checkpointing=True)
    assert again.kept < columns.kept < plain.kept


def test_ages_and_eight_bits_are_of_the_state_that_is_counted():
    state = {}
    for name in ("adamw_torch", "adamw_8bit", "sgd", "adafactor", {"type": "aged_adamw"}):
        given = name if isinstance(name, str) else None
        config = SparseLoraConfig(r=0, density=0.3, target_modules=["up_proj"], optimizer=None if given else name)
        told = estimate(WIDE, config, seq=8, optimizer=given)
        numbers = told.trained_numbers
        state[told.options["optimizer"]] = sum(part.bytes for part in told.parts if part.name == "optimizer state")
    assert state["adamw_torch"] == 8 * numbers + 4
    assert state["aged_adamw"] == 10 * numbers  # an int16 age a unit
    assert 2 * numbers < state["adamw_8bit"] < 2.1 * numbers
    assert (state["sgd"], state["adafactor"]) == (0, pytest.approx(4 * numbers, abs=16))


def test_a_move_shows_the_dense_gradient_of_the_largest_layer_and_data_its_statistics():
    moving = estimate(WIDE, "rigl", seq=8)
    sizes = {part.name: part.bytes for part in moving.parts}
    assert 0 < sizes["dense gradient at a move"] <= 512 * 1024 * 2
    assert moving.calibration == 0
    chosen = estimate(WIDE, "fish", seq=8)
    entries = 2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 1024
    assert chosen.calibration > 4 * entries > 0
    assert chosen.total == max(chosen.training, chosen.calibration)


def test_nothing_is_said_of_a_run_that_is_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(WIDE, "rigl", seq=8)
        doctor(WIDE, "rigl", bits=16)


def test_no_gradient_nothing_kept():
    told = estimate(WIDE, "mezo", seq=8)
    names = {part.name for part in told.parts}
    assert not names & {"gradients", "optimizer state", "kept by adapted layers", "kept by the frozen network"}


NEEDED = {"smt": {"block_size": 64}, "dsee": {"num_sparse": 64}}
DENSE_ONLY = {"pissa", "loha", "lokr"}


def told_of(name, **options):
    return estimate(WIDE, name, seq=4, **NEEDED.get(name, {}), **options)


@pytest.mark.parametrize("name", ["sparse-lora", "losia", "snella", "lora-xs", "vb-lora", "dora", "ln-tuning", "s2ft"])
def test_methods_of_every_kind_are_followed(name):
    told = told_of(name)
    assert told.trained_numbers > 0
    assert told.training > sum(part.bytes for part in told.parts if part.name == "base weights")
    assert json.loads(json.dumps(told.to_dict()))["total"] == told.total


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_followed(name, bits):
    if bits == 4 and name in DENSE_ONLY:
        with pytest.raises(ValueError, match="4 bits"):
            told_of(name, bits=bits)
        return
    assert told_of(name, bits=bits).trained_numbers > 0


def test_fit_takes_the_largest_density_and_rank_and_what_is_larger_does_not_fit():
    room = estimate(WIDE, CONFIGS["entries"](), seq=8).total + RESERVE + (4 << 20)
    told = estimate(WIDE, CONFIGS["entries"](), seq=8, fit=room)
    density = told.options["density"]
    assert told.fits
    assert density > 0.05
    assert not estimate(
        WIDE, SparseLoraConfig(r=0, density=density + 0.02, target_modules="all-linear"), seq=8, gpu=room
    ).fits
    told = estimate(WIDE, "lora", seq=8, fit=room)
    assert told.fits
    assert not estimate(WIDE, "lora", seq=8, gpu=room, r=told.options["r"] + 8).fits
    with pytest.raises(ValueError, match=r"r=1 needs .* Lower batch"):
        estimate(WIDE, "lora", seq=8, fit=RESERVE + 1)
    with pytest.raises(ValueError, match="neither"):
        estimate(WIDE, "ln-tuning", seq=8, fit="24G")


def test_a_head_for_sequences_is_estimated_by_its_class():
    model = tiny.llama(LlamaForSequenceClassification, num_labels=3)
    told = estimate(model, SparseLoraConfig(density=0.05, target_modules="all-linear", task_type="SEQ_CLS"), seq=8)
    assert told.model == "LlamaForSequenceClassification"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"seq": 0}, "seq=0"),
        ({"optimizer": "adamw_9bit"}, "adamw_9bit"),
        ({"gpu": "lots"}, "gpu='lots'"),
        ({"config_or_method": "no-such"}, "no-such"),
        ({"config_or_method": LoraConfig(target_modules=["nothing"])}, "nothing"),
        ({"model": ViTConfig(architectures=["ViTForImageClassification"])}, "ViTForImageClassification"),
    ],
)
def test_what_cannot_be_estimated_is_refused_by_name(options, message):
    given = {"model": MODEL, "config_or_method": "lora", "seq": 8, **options}
    with pytest.raises(ValueError, match=message):
        estimate(given.pop("model"), given.pop("config_or_method"), **given)


def test_sizes_of_memory():
    assert parse_bytes("24G", "gpu") == parse_bytes("24 GiB", "gpu") == 24 << 30
    assert parse_bytes("1.5m", "gpu") == parse_bytes(3 << 19, "gpu")


def test_the_table_adds_up():
    told = found("hybrid", 4)
    text = str(told.table())
    assert "training, at its highest" in text
    assert all(part.name in text for part in told.parts)
    assert f"{told.trained_numbers:,} numbers train" in str(told)
    assert all(line in str(told) for line in told.assumptions)


def test_units_over_fused_experts_are_estimated():
    config = SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    told = estimate(MIXTRAL, config, seq=8, bits=16)
    without = estimate(MIXTRAL, SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj"]), seq=8, bits=16)
    entries = 4 * 2 * 64 * 32
    assert told.trained_numbers - without.trained_numbers == pytest.approx(0.1 * entries, abs=2)


def test_layers_that_store_their_weight_transposed_are_quantised_and_those_of_t5_that_stay_wide_are_not():
    def weights(model, bits):
        told = estimate(model, SparseLoraConfig(r=0, density=0.1, target_modules="all-linear"), seq=8, bits=bits)
        return {part.name: part.bytes for part in told.parts}["base weights"]

    gpt2 = tiny.gpt2().config
    linear = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert weights(gpt2, 16) - weights(gpt2, 4) == 1.5 * linear
    t5 = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64, tie_word_embeddings=True,
        architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    quantised, wide = 3 * 4 * 32 * 32 + 2 * 64 * 32, 2 * 64 * 32
    assert weights(t5, 16) - weights(t5, 4) == 1.5 * quantised - 2 * wide
