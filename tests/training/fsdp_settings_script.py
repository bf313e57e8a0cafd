"""What every rank of `test_fsdp_settings.py` runs, and the single process it is compared with:
`python tests/training/fsdp_settings_script.py OUT`."""

from __future__ import annotations

import copy
import os
import sys
import traceback
from pathlib import Path

import torch
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `tiny` is: this runs as a script, too
import fsdp_on_cpu
import tiny
from training_toolbox import VOCAB, TokenData

from hf_sparse_peft import AgedAdamWSpec, Regrow, SparseLoraConfig, trainer_options
from hf_sparse_peft.rules import Gradient

GLOBAL_BATCH = 8
CASES: dict[str, dict] = {
    "activation checkpointing": {"fsdp_config": {"activation_checkpointing": True}},
    "kept after forward": {"fsdp_config": {"reshard_after_forward": False}},
    "tied weights, a named adapter": {"model": {"tie_word_embeddings": True}, "name": "mine"},
    "trained twice": {"again": True},
    "two adapters": {"two": True},
    "four bits": {"four_bit": True},
    "bf16": {"bf16": True, "model": {"dtype": torch.bfloat16}},
}


def run(
    out: Path,
    world: int,
    name: str = "default",
    model: dict | None = None,
    fsdp_config: dict | None = None,
    again: bool = False,
    two: bool = False,
    four_bit: bool = False,
    **arguments,
) -> dict[str, torch.Tensor]:
    """Train; the adapters' tensors at the end."""
    if world > 1:
        arguments |= copy.deepcopy(fsdp_on_cpu.OPTIONS)
        arguments["fsdp_config"] |= fsdp_config or {}
    args = TrainingArguments(
        str(out), max_steps=7, per_device_train_batch_size=GLOBAL_BATCH // world, learning_rate=1e-2,
        save_strategy="no", report_to=[], logging_steps=1000, disable_tqdm=True, use_cpu=True, seed=11, **arguments,
    )  # fmt: skip
    config = SparseLoraConfig(
        r=2, density=0.1, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
        schedule=[Regrow(every=3, grow=Gradient())], optimizer=AgedAdamWSpec(),
    )  # fmt: skip
    base = four_bits(out, world) if four_bit else tiny.llama(vocab_size=VOCAB, **(model or {}))
    torch.manual_seed(1)
    adapted = get_peft_model(base, config, adapter_name=name)
    if two:
        more = SparseLoraConfig(r=2, density=0.05, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
        adapted.add_adapter("more", more)
        adapted.base_model.set_adapter([name, "more"])
    trainer = Trainer(model=adapted, train_dataset=TokenData(), **trainer_options(adapted, args))
    for _ in range(1 + again):
        trainer.train()
    weight = adapted.get_submodule("base_model.model.model.layers.0.mlp.down_proj.base_layer").weight
    assert isinstance(weight, DTensor) == (world > 1)
    held = {key.replace("._checkpoint_wrapped_module", ""): one for key, one in adapted.state_dict().items()}
    return {key: tensor.detach().clone() for key, tensor in held.items() if "sparse_lora" in key}


def four_bits(out: Path, world: int) -> LlamaForCausalLM:
    """NF4 codes in bf16 storage, as QLoRA under FSDP has them, which FSDP2 shards; the one process saves the base."""
    if world == 1:
        tiny.llama(vocab_size=VOCAB, hidden=64).save_pretrained(out / "base")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip
    return LlamaForCausalLM.from_pretrained(
        out / "base", device_map={"": "cpu"}, dtype=torch.float32, quantization_config=quantised
    )


def main(out: Path) -> None:
    """Every case, as `OUT/<case>-<world>-<rank>.pt`."""
    torch.set_num_threads(1)
    fsdp_on_cpu.allow()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for case, options in CASES.items():
        try:
            result = run(out, world, **copy.deepcopy(options))
        except Exception:
            result = traceback.format_exc()
        torch.save(result, out / f"{case}-{world}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
