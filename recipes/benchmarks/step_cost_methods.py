"""What `step_cost.py` measures: one frozen Llama, and the methods that adapt it with equally many trained numbers.

Every method gets the same base tensors (one copy in memory), so models of all methods fit side by side; full
fine-tuning alone has a copy of its own. LoRA r=16 on all linears sets the budget, `r * (rows + cols)` a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse_peft import SparseLoraConfig

RANK = 16
BLOCK = 32
SPIEL = "spiel"


@dataclass(frozen=True)
class Preset:
    """Shapes of the model and of the batch."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    tokens: int
    """Tokens of one sequence."""
    tied: bool = True


PRESETS = {
    # A small vocabulary, so that the head, which nothing here adapts, does not dominate.
    "cpu": Preset(4, 1024, 2816, 16, 4, 512, 1, 1024),
    "llama-3b": Preset(28, 3072, 8192, 24, 8, 128256, 4, 768),  # meta-llama/Llama-3.2-3B
}


def sized(preset: Preset, layers: int | None, hidden: int | None, tokens: int | None) -> Preset:
    """`preset` with another depth, width (heads of 32 or more, feed-forward 2.75 x as wide) or sequence length."""
    shape = dict(vars(preset))
    if layers:
        shape["layers"] = layers
    if tokens:
        shape["tokens"] = tokens
    if hidden:
        heads = min(preset.heads, max(1, hidden // 32))
        kv_heads = max(1, heads // (preset.heads // preset.kv_heads))
        # Multiples of 32, so that blocks fit.
        shape |= {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "intermediate": -(-hidden * 11 // 128) * 32}
    return Preset(**shape)


def build_base(preset: Preset, base: str, device: str) -> LlamaForCausalLM:
    """The frozen model with random weights; `base` is bf16, fp32 or nf4 (double quantisation, bf16 compute)."""
    config = LlamaConfig(
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        vocab_size=preset.vocab,
        tie_word_embeddings=preset.tied,
        max_position_embeddings=max(2048, preset.tokens),
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if base == "fp32" else torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if base == "nf4":
        _to_nf4(model, device)
    model.requires_grad_(False)
    return model.train()


def _to_nf4(model: LlamaForCausalLM, device: str) -> None:
    import bitsandbytes as bnb

    for name in targets(model):
        dense = model.get_submodule(name)
        quantised = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        quantised.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4").to(device)
        model.set_submodule(name, quantised)
    model.is_loaded_in_4bit = True  # what peft's dispatcher for 4-bit LoRA layers asks


def targets(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Names of all adapted linears of a bare model, with `(rows, cols)`; the head is left out, as upstream does."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def share(base: nn.Module) -> nn.Module:
    """A copy of `base` with modules of its own and the very same parameters and buffers."""
    memo = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, memo)


class ReferenceSpielLinear(nn.Module):
    """SpIEL's own layer: `W + S` in a clone of the weight, a dense `dW`, then a gather (Ansell et al., 2024)."""

    def __init__(self, base_layer: nn.Module, rows: int, cols: int, k: int):
        super().__init__()
        self.base_layer, self.shape = base_layer, (rows, cols)
        device = base_layer.weight.device
        self.values = nn.Parameter(torch.zeros(k, device=device))
        self.register_buffer("indices", torch.randperm(rows * cols)[:k].sort().values.to(device, torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _SpielProduct.apply(x, self.values, self.indices, self.base_layer.weight, self.shape)


class _SpielProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, indices, weight, shape):
        ctx.save_for_backward(x, values, indices, weight)
        ctx.shape = shape
        return x @ _with_deltas(weight, indices, values, shape, x.dtype).t()

    @staticmethod
    def backward(ctx, dy):
        x, values, indices, weight = ctx.saved_tensors
        dx = dy @ _with_deltas(weight, indices, values, ctx.shape, dy.dtype)
        dense = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        return dx, dense.view(-1).gather(0, indices.long()).to(values.dtype), None, None, None


def _with_deltas(weight, indices, values, shape, dtype):
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes as bnb

        dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    else:
        dense = weight.detach().clone()
    return dense.view(-1).scatter_add_(0, indices.long(), values.to(dtype)).view(shape)


def _lora(base: nn.Module, lean: bool) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=_names(base))
    return get_peft_model(share(base), config, autocast_adapter_dtype=not lean)


def _shira(base: nn.Module) -> nn.Module:
    return get_peft_model(share(base), ShiraConfig(r=RANK, target_modules=_names(base), random_seed=0))


def _supertuning(base: nn.Module) -> nn.Module:
    # One density for all weights: the total is LoRA's, the split over weights is its own.
    weights = targets(base)
    density = sum(RANK * sum(shape) for shape in weights.values()) / sum(m * n for m, n in weights.values())
    return get_peft_model(share(base), SupertuningConfig(target_modules=_names(base), sparsity=1 - density))


def _full(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base).requires_grad_(True)


def _spiel(base: nn.Module) -> nn.Module:
    model = share(base)
    for name, (rows, cols) in targets(base).items():
        layer = ReferenceSpielLinear(model.get_submodule(name), rows, cols, RANK * (rows + cols))
        model.set_submodule(name, layer)
    return model


def _ours(base: nn.Module, granularity: str, r: int = 0) -> nn.Module:
    def count(rows: int, cols: int) -> int:
        unit = {"entry": 1, "block": BLOCK * BLOCK, "row": cols, "column": rows}[granularity]
        return max(1, round((RANK - r) * (rows + cols) / unit))

    config = SparseLoraConfig(
        r=r,
        lora_alpha=2 * r,
        granularity=granularity,
        block_size=BLOCK,
        support_pattern={name: count(*shape) for name, shape in targets(base).items()},
        target_modules=_names(base),
    )
    return get_peft_model(share(base), config)


def _names(base: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in targets(base)})


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": share,
    "lora": lambda base: _lora(base, lean=False),
    "lora_lean": lambda base: _lora(base, lean=True),
    "shira": _shira,
    "supertuning": _supertuning,
    "full": _full,
    SPIEL: _spiel,
    "entry": lambda base: _ours(base, "entry"),
    "block32": lambda base: _ours(base, "block"),
    "row": lambda base: _ours(base, "row"),
    "column": lambda base: _ours(base, "column"),
    "hybrid": lambda base: _ours(base, "entry", r=RANK // 2),
}
OURS = ("entry", "block32", "row", "column", "hybrid")
DENSE_ONLY = ("supertuning", "full")


def build(method: str, base: nn.Module) -> nn.Module:
    """The model of `method` over the weights of `base`, in training mode.

    Its embeddings ask for a gradient, so that every method sends one through all layers and differs in nothing else.

    Raises:
        NotImplementedError: the method has no form for 4-bit weights.
    """
    if method in DENSE_ONLY and getattr(base, "is_loaded_in_4bit", False):
        raise NotImplementedError("it has no form for 4-bit weights")
    model = METHODS[method](base).train()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return model
