"""Tiny models and adapters for the tests of the hub floor."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers

TARGETS = ["q_proj", "v_proj", "down_proj"]


def tiny_base(tie: bool = False, hidden: int = 64) -> LlamaForCausalLM:
    """A Llama of 2 layers; the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval()


def adapted(base=None, *, train: bool = False, adapter_name: str = "default", **options):
    """`base` with an adapter whose values are large enough to change every logit."""
    options = {"r": 0, "density": 0.02, "block_size": 8, "target_modules": TARGETS, **options}
    if "budget" in options:
        del options["density"]
    elif options.get("granularity", "entry") != "entry":
        options["density"] = max(options["density"], 0.05)
    torch.manual_seed(1)
    config = SparseLoraConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(base if base is not None else tiny_base(), config, adapter_name=adapter_name)
    fill(model, adapter_name)
    return model.train(train)


@torch.no_grad()
def fill(model, adapter_name: str = "default") -> None:
    """Random values in every trained tensor of the adapter."""
    generator = torch.Generator().manual_seed(2)
    for layer in adapter_layers(model):
        for kind in layer.adapter_layer_names:
            held = getattr(layer, kind)
            if adapter_name in held:
                draw = torch.randn(held[adapter_name].shape, generator=generator) * 0.3
                held[adapter_name].copy_(draw)


@torch.no_grad()
def logits(model, seed: int = 3) -> torch.Tensor:
    """Logits of fixed tokens."""
    tokens = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(seed))
    return model.eval()(input_ids=tokens).logits.float()
