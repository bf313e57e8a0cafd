"""Tiny bases, configs and an independent dense reference for the tests of `sparse_lora`."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path

import tiny
import torch
from peft import get_peft_model
from support_codes import read_codes
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.sparse_lora import SparseLoraLayer

HIDDEN, INNER, VOCAB = 64, 128, 96
GRANULARITIES = ("entry", "block", "row", "column")
HALVES = ("sparse", "low_rank", "hybrid")
BASES = ("fp32", "bf16", "nf4", "int8", "conv1d")
TARGETS = {"conv1d": ["c_attn", "c_fc"]}
CASES = [f"{half}-{unit}" for half in ("sparse", "hybrid") for unit in GRANULARITIES] + ["low_rank-entry"]


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> LlamaForCausalLM:
    options = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": VOCAB,
        "pad_token_id": None,
        **overrides,
    }
    return tiny.llama(seed=seed, dtype=dtype, **options)


def make_base(kind: str, folder: Path | None = None):
    """A tiny model of a kind in `BASES`; `folder` holds the saved fp32 Llama that quantised ones are loaded from."""
    if kind == "conv1d":
        return tiny.gpt2(hidden=HIDDEN, vocab_size=VOCAB)
    if kind in ("fp32", "bf16"):
        return tiny_llama(dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    return copy.deepcopy(_quantised(kind, folder))


@functools.cache
def _quantised(kind: str, folder: Path) -> LlamaForCausalLM:
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LlamaForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
        )


def make_config(case: str = "hybrid-entry", base: str = "fp32", **overrides) -> SparseLoraConfig:
    half, granularity = case.split("-")
    options = {
        "r": 0 if half == "sparse" else 4,
        "density": 0.0
        if half == "low_rank"
        else {"entry": 0.05, "block": 0.25, "row": 0.1, "column": 0.1}[granularity],
        "granularity": granularity,
        "block_size": 16,
        "target_modules": TARGETS.get(base, ["q_proj", "v_proj", "down_proj"]),
        "task_type": "CAUSAL_LM",
    }
    if "budget" in overrides:
        del options["density"]
    return SparseLoraConfig(**{**options, **overrides})


def fill(model, adapter: str = "default", scale: float = 0.3, seed: int = 7) -> None:
    """Give an adapter values that change the output, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model):
        for name in layer.adapter_layer_names:
            held = getattr(layer, name)
            if adapter in held:
                std = scale if name in ("sparse_lora_values", "sparse_lora_gate") else scale**0.5 / 4
                held[adapter].data.normal_(std=std, generator=generator)


def saved(folder, base_of, base="fp32", case="hybrid-entry", **options):
    """An adapter with values, saved in `folder`; returns its model."""
    model = get_peft_model(base_of(base), make_config(case, base, **options))
    fill(model)
    model.save_pretrained(folder)
    return model


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    model.eval()
    return model(input_ids=token_ids() if ids is None else ids, **kwargs).logits


def base_bits(model) -> dict[str, torch.Tensor]:
    """Copies of every tensor of the model that is no adapter's, by name without wrapping."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if "sparse_lora_" not in name
    }


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def dense_sparse_half(layer: SparseLoraLayer, adapter: str, values: torch.Tensor | None = None) -> torch.Tensor:
    """`S` as a dense float64 `[out, in]` matrix, differentiable in `values`; one unit after the other."""
    values = layer.sparse_lora_values[adapter].detach().double() if values is None else values
    config = layer.adapter_configs[adapter]
    rows, cols, size = layer.out_features, layer.in_features, config.block_size
    dense = torch.zeros(rows, cols, dtype=torch.float64)
    for at, unit in enumerate(read_codes(layer.sparse_lora_support[adapter])):
        mask = torch.zeros(rows, cols, dtype=torch.bool)
        if config.granularity == "entry":
            mask[unit // cols, unit % cols] = True
        elif config.granularity == "row":
            mask[unit] = True
        elif config.granularity == "column":
            mask[:, unit] = True
        else:
            top, left = size * (unit // (cols // size)), size * (unit % (cols // size))
            mask[top : top + size, left : left + size] = True
        dense = dense.masked_scatter(mask, values[at].reshape(-1))
    return dense


def dense_delta(layer: SparseLoraLayer, adapter: str) -> torch.Tensor:
    """`dW` of one adapter as a dense float64 `[out, in]` matrix, from the equation."""
    delta = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    if adapter in layer.sparse_lora_values:
        delta = delta + dense_sparse_half(layer, adapter)
    if adapter in layer.sparse_lora_A:
        A, B = layer.sparse_lora_A[adapter].detach().double(), layer.sparse_lora_B[adapter].detach().double()
        g = torch.ones(A.shape[0], dtype=torch.float64)
        if adapter in layer.sparse_lora_gate:
            g = layer.sparse_lora_gate[adapter].detach().double()
        delta = delta + layer.sparse_lora_scaling[adapter] * (B * g) @ A
    return delta


def trained(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's trained parameters, by name."""
    return {
        f"{layer.module_name}.{name}": getattr(layer, name)[adapter]
        for layer in adapter_layers(model)
        for name in layer.adapter_layer_names
        if adapter in getattr(layer, name)
    }


def same_adapter(plain, model, adapter: str = "default") -> None:
    """Assert that transformers' `load_adapter` gave `plain` the "default" adapter of `model`, to the last bit.

    Logits may differ in the last place: transformers keeps the mapped file as parameters, and BLAS rounds by how its
    operands are aligned in memory.
    """
    expected, found = trained(model), trained(plain, adapter)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name].float(), parameter.float()) for name, parameter in expected.items())
    for layer, other in zip(adapter_layers(model), adapter_layers(plain), strict=True):
        if "default" in layer.sparse_lora_values:
            assert torch.equal(layer.units("default"), other.units(adapter))
    tolerance = 0.1 if plain.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits(plain), logits(model), rtol=tolerance, atol=tolerance)
