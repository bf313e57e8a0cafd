"""A base model on the meta device: every shape and dtype of the real one, and no weights."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from ..hub.base_model import base_class_name

DTYPES = {4: torch.bfloat16, 8: torch.bfloat16, 16: torch.bfloat16, 32: torch.float32}
"""By the bits of the base's linear layers: dtype of everything else, and of the products."""
_OF_TOKENS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForTokenClassification", "ForMaskedLM")
BLOCK, BLOCKS_OF_BLOCKS = 64, 256
"""bitsandbytes: numbers that share a scale, and scales that share one of their own (double quantisation)."""


def read_model_config(model: Any) -> PretrainedConfig:
    """The config of `model`: a model, a config or its dict, a `config.json`, its folder, or a Hub id.

    Raises:
        ValueError: a file or a dict that names no architecture known here.
        TypeError: none of these.
    """
    if isinstance(model, PretrainedConfig):
        return model
    if isinstance(model, nn.Module):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"model is a {type(model).__name__} without a transformers config. Pass a transformers model, its "
                "config, a config.json, a folder or a Hub id."
            )
        return model.config
    if isinstance(model, (str, Path)) and str(model).endswith(".json"):
        model = json.loads(Path(model).read_text(encoding="utf-8"))
    if isinstance(model, Mapping):
        options = dict(model)
        kind = options.pop("model_type", None)
        try:
            return AutoConfig.for_model(kind, **options)
        except ValueError as error:
            raise ValueError(f"model_type={kind!r} is no architecture that transformers knows here: {error}") from error
    if not isinstance(model, (str, Path)):
        raise TypeError(
            f"model={model!r} is a {type(model).__name__}. Pass a transformers model, its config, a config.json, a "
            "folder or a Hub id."
        )
    return AutoConfig.from_pretrained(str(model))


def meta_base(
    config: PretrainedConfig, bits: int = 16, adapter: Mapping[str, Any] | PeftConfig | None = None
) -> PreTrainedModel:
    """The frozen model of `config` on the meta device in training mode, its linear layers stored in `bits` bits.

    4: NF4 with double quantisation; 8: LLM.int8(); 16: bf16; 32: fp32. As transformers does, quantised models keep
    their output embeddings in bf16. The class is that of the `adapter` config's task, else the config's own, else a
    causal language model.

    Raises:
        ValueError: other bits, or a class that transformers does not have.
    """
    if bits not in DTYPES:
        raise ValueError(f"bits={bits!r} is no form of a base known here; choose 4 (NF4), 8 (LLM.int8), 16 or 32.")
    config, before = copy.deepcopy(config), torch.get_default_dtype()
    config.use_cache = False  # as a Trainer has it
    torch.set_default_dtype(DTYPES[bits])
    try:
        with torch.device("meta"):
            model = _make(config, adapter or {})
    finally:
        torch.set_default_dtype(before)
    if bits < 16:
        kept, wide = set(get_keys_to_not_convert(model)), set(model._keep_in_fp32_modules or ())
        for name, module in list(model.named_modules()):
            if wide & set(name.split(".")):  # T5's wo
                module.float()
            elif type(module) in (nn.Linear, Conv1D) and name not in kept:
                module = module if type(module) is nn.Linear else _as_linear(module)
                model.set_submodule(name, _as_nf4(module) if bits == 4 else _as_int8(module))
        setattr(model, f"is_loaded_in_{bits}bit", True)  # what peft's dispatchers ask
    return model.requires_grad_(False).train()


def _make(config: PretrainedConfig, adapter: Mapping[str, Any] | PeftConfig) -> PreTrainedModel:
    if not isinstance(adapter, Mapping):
        adapter = {name: getattr(adapter, name, None) for name in ("task_type", "auto_mapping")}
    name = base_class_name(adapter, config.architectures or ["AutoModelForCausalLM"])
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(
            f"The config names the class {name}, which transformers does not have. Name one in architectures, or give "
            "the adapter's config a task_type."
        )
    return cls.from_config(config) if name.startswith("Auto") else cls._from_config(config)


def _as_linear(module: Conv1D) -> nn.Linear:
    """What transformers quantises a layer as that stores its weight transposed."""
    rows, cols = module.weight.shape
    return nn.Linear(rows, cols, module.bias is not None, device="meta", dtype=module.weight.dtype)


def _as_nf4(dense: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    dtype, numel = dense.weight.dtype, dense.weight.numel()
    blocks = math.ceil(numel / BLOCK)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    scales = QuantState(
        empty(math.ceil(blocks / BLOCKS_OF_BLOCKS)), code=empty(256), blocksize=256, dtype=torch.float32
    )
    state = QuantState(
        empty(blocks, dtype=torch.uint8), dense.weight.shape, empty(16), BLOCK, "nf4", dtype, empty(), scales
    )
    quantised = bnb.nn.Linear4bit(
        dense.in_features, dense.out_features, dense.bias is not None, dtype, quant_type="nf4", device="meta"
    )
    packed = empty((numel + 1) // 2, 1, dtype=torch.uint8)
    quantised.weight = _params_4bit()(packed, False, state, BLOCK, True, "nf4", bnb_quantized=True, module=quantised)
    quantised.quant_state = state
    if dense.bias is not None:
        quantised.bias = dense.bias
    quantised.support_avx512bf16_for_cpu = False
    return quantised


@functools.cache
def _params_4bit() -> type:
    import bitsandbytes as bnb

    class Params4bit(bnb.nn.Params4bit):  # peft asks for the name
        """bitsandbytes' own is copied by way of a tensor on the CPU, which cannot become one on meta."""

        def __deepcopy__(self, memo: dict) -> Params4bit:
            options = {"quant_storage": self.quant_storage, "module": self.module, "bnb_quantized": True}
            data = self.data.clone()
            return Params4bit(data, False, self.quant_state, BLOCK, True, self.quant_type, **options)

    return Params4bit


def _as_int8(dense: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    quantised = bnb.nn.Linear8bitLt(
        dense.in_features,
        dense.out_features,
        dense.bias is not None,
        has_fp16_weights=False,
        threshold=0.0,
        device="meta",
    )
    codes = torch.empty(dense.weight.shape, dtype=torch.int8, device="meta")
    scales = torch.empty(dense.out_features, dtype=torch.float32, device="meta")
    quantised.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    if dense.bias is not None:
        quantised.bias = dense.bias
    return quantised


def constants_of(model: nn.Module) -> list[torch.Tensor]:
    """The tensors that quantised weights are dequantised with: scales, codes, offsets."""
    found = []
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            found += [one for one in (state.absmax, state.code, state.offset) if torch.is_tensor(one)]
            state = state.state2
        for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
            scales = getattr(holder, "SCB", None)
            found += [scales] if torch.is_tensor(scales) else []
    return found


def batch_of(model: PreTrainedModel, batch: int, seq: int) -> dict[str, torch.Tensor]:
    """One batch of `model`'s inputs on the meta device, labels included.

    Raises:
        ValueError: neither a model of tokens with a loss nor one whose inputs are known here.
    """
    ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        if model.config.pad_token_id is None:
            model.config.pad_token_id = 0
        return {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.long, device="meta")}
    if name.endswith("ForQuestionAnswering"):
        place = torch.zeros(batch, dtype=torch.long, device="meta")
        return {"input_ids": ids, "start_positions": place, "end_positions": place}
    if name.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForTokenClassification", "ForMaskedLM")
    ):
        if model.config.is_encoder_decoder and getattr(model.config, "decoder_start_token_id", None) is None:
            model.config.decoder_start_token_id = 0
        if model.main_input_name != "input_ids":
            raise ValueError(f"{name} takes {model.main_input_name}; only models of tokens can be estimated here.")
        return {"input_ids": ids, "labels": ids}
    raise ValueError(
        f"Nothing says how {name} is trained. Estimates are for causal and sequence-to-sequence language models, and "
        "for heads that classify sequences or tokens or answer questions: name one in the config's architectures."
    )
