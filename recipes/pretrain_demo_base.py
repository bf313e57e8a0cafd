"""Make `demo_base`: a tokenizer and a small Llama pretrained on the text of `demo_data`, about 5 min on one CPU core.

    python recipes/pretrain_demo_base.py --output_dir recipes/demo_base
    python recipes/pretrain_demo_base.py --output_dir BASE --text lines.txt --vocab_size 2048 --hidden_size 256

`--text` has another base read a file of your own, a document a line; every 50th goes to `heldout.jsonl` instead. The
folder holds safetensors and JSON only. Run it again with the same arguments for the same data and the same start; the
weights differ in the last digits between machines.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parent))
from demo_data import chunk_text, pretraining_text


@dataclass
class BaseArguments:
    """Size of the model and length of the run."""

    output_dir: str = field(default="recipes/demo_base", metadata={"help": "Where model, tokenizer and card go."})
    text: str = field(default="", metadata={"help": "File of documents, one a line, instead of the demo's."})
    documents: int = field(default=40000, metadata={"help": "Training documents (about 70 tokens each)."})
    heldout_documents: int = field(default=500, metadata={"help": "Documents for the held-out loss."})
    block: int = field(default=128, metadata={"help": "Tokens in a training row."})
    batch_size: int = field(default=16, metadata={"help": "Rows in a step."})
    steps: int = field(default=1200, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak of the cosine schedule."})
    vocab_size: int = field(default=640, metadata={"help": "Entries of the byte-level BPE."})
    hidden_size: int = field(default=192, metadata={"help": "A multiple of 64: NF4 blocks have 64 values."})
    intermediate_size: int = field(default=512, metadata={"help": "A multiple of 64."})
    layers: int = field(default=4, metadata={"help": "Decoder layers."})
    heads: int = field(default=6, metadata={"help": "Query heads."})
    kv_heads: int = field(default=2, metadata={"help": "Key/value heads."})
    threads: int = field(default=1, metadata={"help": "CPU threads; 2 gain little on matrices this small."})
    bf16: bool = field(default=True, metadata={"help": "False where the CPU has no bf16 units: many times as fast."})
    seed: int = field(default=0, metadata={"help": "Seed of data, weights and order."})


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# demo_base

A Llama of {millions:.2f} M parameters for the demo recipes of hf_sparse_peft: small enough to fine-tune in 4 bits on
two CPU cores in two minutes. It continues simple stories and knows sums and differences up to 20. It has no other use.

- Data: {documents} documents made by `recipes/demo_data.py` (templates, seed {seed}); no outside text.
- Tokenizer: byte-level BPE trained on the same documents; a number up to 20 is one token.
- Training: {steps} steps of {batch_size} rows of {block} tokens from random weights, AdamW, peak learning rate
  {learning_rate}, cosine. Stored in bfloat16.
- Held-out loss (documents not in the training text, nats per token): {loss:.4f}.
- Made by: `python recipes/pretrain_demo_base.py --output_dir recipes/demo_base`
"""


def train_tokenizer(texts, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has a code, and a frequent word with its space is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",  # for batched generation; a causal loss with masked padding does not mind
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def new_model(args: BaseArguments, tokenizer) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def documents(args: BaseArguments) -> tuple[Dataset, Dataset]:
    """Columns `text` to train on and to hold out: the demo's, or the lines of a file."""
    if not args.text:
        text = pretraining_text(args.documents, seed=args.seed)
        return text, pretraining_text(args.heldout_documents, args.seed, "heldout")
    lines = [line for line in Path(args.text).read_text().splitlines() if line.strip()]
    parts = ([line for n, line in enumerate(lines) if bool(n % 50) == train] for train in (True, False))
    train, heldout = (Dataset.from_dict({"text": part}) for part in parts)
    return train, heldout


@torch.no_grad()
def heldout_loss(model, rows, batch_size: int = 32) -> float:
    """Mean loss in nats per token over rows of equal length."""
    model.eval()
    total = 0.0
    for start in range(0, len(rows), batch_size):
        ids = torch.tensor(rows[start : start + batch_size]["input_ids"], device=model.device)
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    return total / len(rows)


def main(args: BaseArguments) -> None:
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    text, heldout_text = documents(args)
    tokenizer = train_tokenizer(text["text"], args.vocab_size)
    train, heldout = (chunk_text(part, tokenizer, args.block) for part in (text, heldout_text))
    model = new_model(args, tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens, {len(train)} rows", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(100, args.steps // 10),
                weight_decay=0.1,
                adam_beta2=0.98,
                bf16=args.bf16,
                use_cpu=not torch.cuda.is_available(),  # transformers refuses bf16 without a GPU unless told
                logging_steps=100,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=args.seed,
            ),
            train_dataset=train,
        )
        trainer.train()

    # Saved in bfloat16, so the loss in the card is that of the weights that are stored.
    model = model.to(torch.bfloat16)
    model.config.use_cache = True  # Trainer turned it off; the stored config is for generation
    loss = heldout_loss(model, heldout)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    if args.text:
        heldout_text.to_json(str(Path(args.output_dir, "heldout.jsonl")))
    else:
        card = CARD.format(millions=model.num_parameters() / 1e6, loss=loss, **vars(args))
        Path(args.output_dir, "README.md").write_text(card)
    if AutoTokenizer.from_pretrained(args.output_dir)("Tom has 7 .").input_ids != tokenizer("Tom has 7 .").input_ids:
        raise RuntimeError(f"The tokenizer read back from {args.output_dir} differs from the one that was trained.")
    print(f"held-out loss {loss:.4f}")


if __name__ == "__main__":
    main(HfArgumentParser(BaseArguments).parse_args_into_dataclasses()[0])
