"""A frozen Llama with random weights, and the layers and methods that are put over it.

All of them share one copy of the base's tensors, so models of all candidates fit side by side; full fine-tuning alone
has a copy of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from harness import Options, build_method, option
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_sparse_peft.methods import Method
from hf_sparse_peft.sparsity import UnitGrid


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
    tokens: int  # of one sequence


PRESETS = {
    # A small vocabulary, so that the head, which nothing here adapts, does not dominate.
    "cpu": Preset(4, 1024, 2816, 16, 4, 512, 1, 1024),
    "llama-3b": Preset(28, 3072, 8192, 24, 8, 128256, 4, 768),  # meta-llama/Llama-3.2-3B
    "llama-8b": Preset(32, 4096, 14336, 32, 8, 128256, 4, 768),  # meta-llama/Llama-3.1-8B
}


@dataclass
class LlamaOptions(Options):
    """Options of the benchmarks on this model."""

    device: Literal["cpu", "cuda"] = option("cpu", "where to compute")
    preset: Literal["cpu", "llama-3b", "llama-8b"] = option("cpu", "shapes of model and batch")
    layers: int | None = option(None, "instead of the preset's")
    hidden: int | None = option(None, "instead of the preset's, a multiple of 32; the feed-forward is 2.75 x as wide")
    tokens: int | None = option(None, "tokens of a sequence, instead of the preset's")

    def sizes(self) -> Preset:
        """The preset, with what was given instead."""
        preset = PRESETS[self.preset]
        given = {name: getattr(self, name) for name in ("layers", "hidden", "tokens") if getattr(self, name)}
        if self.hidden:
            heads = min(preset.heads, max(1, self.hidden // 32))
            given |= {"heads": heads, "kv_heads": max(1, heads // (preset.heads // preset.kv_heads))}
            given["intermediate"] = -(-self.hidden * 11 // 128) * 32  # a multiple of 32, so that blocks fit
        return replace(preset, **given)


def build_base(preset: Preset, base: str, device: str) -> LlamaForCausalLM:
    """The frozen model; `base` is bf16, fp32 or nf4 (double quantisation, bf16 compute)."""
    config = LlamaConfig(
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        vocab_size=preset.vocab,
        tie_word_embeddings=True,
        max_position_embeddings=max(2048, preset.tokens),
        use_cache=False,
        attn_implementation="sdpa",
    )
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
    return model.requires_grad_(False).train()


def _to_nf4(model: LlamaForCausalLM, device: str) -> None:
    import bitsandbytes as bnb

    for name in targets(model):
        dense = model.get_submodule(name)
        quantised = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        quantised.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4").to(device)
        model.set_submodule(name, quantised)
    keep_4bit_layout(model)
    model.is_loaded_in_4bit = True  # what peft's dispatcher for 4-bit LoRA layers asks


def keep_4bit_layout(model: nn.Module) -> nn.Module:
    """`model`, whose 4-bit weights stay as they are: on a CPU the first forward without gradients would repack them for
    good, for a kernel without gradients. This package's layers see to it themselves, upstream's do not."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


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


def adapt(base: nn.Module, candidate: str, rank: int, lean: bool = False) -> tuple[nn.Module, Method | None]:
    """The model of a candidate over the weights of `base` in training mode, and its method.

    Three candidates are no adapters: `frozen`, `full`, and `spiel`, the reference layer below. `$rank` in a candidate
    is `rank`, whose LoRA sets the numbers of all. `lean` keeps values in the base's dtype. The embeddings ask for a
    gradient, so that every candidate sends one through all layers and differs in nothing else.

    Raises:
        NotImplementedError: the candidate has no form for these weights, or needs a Trainer of its own.
    """
    weights, method = targets(base), None
    numbers = {name: rank * sum(shape) for name, shape in weights.items()}
    if getattr(base, "is_loaded_in_4bit", False) and candidate.partition(":")[0] in ("full", "peft-supertuning"):
        raise NotImplementedError("it has no form for 4-bit weights")
    if candidate == "frozen":
        model = share(base)
    elif candidate == "full":
        model = copy.deepcopy(base).requires_grad_(True)
    elif candidate == "spiel":
        model = share(base)
        for name, (rows, cols) in weights.items():
            model.set_submodule(name, SpielLinear(model.get_submodule(name), rows, cols, numbers[name]))
    else:
        names = sorted({name.rsplit(".", 1)[-1] for name in weights})
        # One density for all weights: the total is LoRA's, the split over weights is its own.
        density = sum(numbers.values()) / sum(rows * cols for rows, cols in weights.values())
        if "type: grid" in candidate and density > 1 / 16:
            raise NotImplementedError(f"a quarter of the rows and columns has no room for {density:.0%} of the entries")
        given = {"rank": rank, "half": rank // 2, "alpha": 2 * rank, "density": density, "sparsity": 1 - density}
        given["blocks"] = _blocks(list(weights.values()), sum(numbers.values()))
        method = build_method(candidate, given, target_modules=names)
        if method.trainer_class.training_step is not Trainer.training_step:
            raise NotImplementedError(f"its step is that of {method.trainer_class.__name__}")
        model = get_peft_model(share(base), method.config, autocast_adapter_dtype=not lean)
    model.train()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    return model, method


def _blocks(weights: list[tuple[int, int]], numbers: int) -> int:
    """The number of diagonal blocks that fits all `weights` and comes nearest to `numbers` in all."""
    totals = {}
    for blocks in range(1, min(map(min, weights)) + 1):
        try:
            grids = [UnitGrid(*shape, "diagonal", blocks) for shape in weights]
        except ValueError:
            continue
        totals[blocks] = sum(grid.num_units * grid.unit_numel for grid in grids)
    return min(totals, key=lambda blocks: abs(totals[blocks] - numbers))


class SpielLinear(nn.Module):
    """SpIEL's own layer: `W + S` in a clone of the weight, a dense `dW`, then a gather (Ansell et al., 2024)."""

    def __init__(self, base_layer: nn.Module, rows: int, cols: int, k: int):
        super().__init__()
        self.base_layer, self.shape = base_layer, (rows, cols)
        device = base_layer.weight.device
        self.values = nn.Parameter(torch.zeros(k, device=device))
        self.register_buffer("indices", torch.randperm(rows * cols, device=device)[:k].sort().values.int())

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
