"""Tiny models in the place of those that peft's tests download, saved in a folder under names that end alike: the tests
look for "gpt2" or "Bert" in them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as t

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
_BERT = {**_SIZES, "intermediate_size": 64, "max_position_embeddings": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}

TASKS = ("CausalLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
"""Ends of names of the auto classes that load them."""

CONFIGS = {
    "tiny-random-OPTForCausalLM": lambda: (
        t.OPTForCausalLM,
        t.OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, **_TOKENS),
    ),
    "wide-random-OPTForCausalLM": lambda: (  # 4-bit products of bitsandbytes on a CPU take whole blocks of 64 columns
        t.OPTForCausalLM,
        t.OPTConfig(
            **{**_SIZES, "hidden_size": 64}, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64, **_TOKENS
        ),
    ),
    "tiny-random-GPT2LMHeadModel": lambda: (t.GPT2LMHeadModel, t.GPT2Config(**_GPT, eos_token_id=2)),
    "tiny-random-LlamaForCausalLM": lambda: (t.LlamaForCausalLM, t.LlamaConfig(**_LLAMA, **_TOKENS)),
    "tiny-random-T5ForConditionalGeneration-calibrated": lambda: (
        t.T5ForConditionalGeneration,
        t.T5Config(
            vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    ),
    "tiny-random-BartForConditionalGeneration": lambda: (
        t.BartForConditionalGeneration,
        t.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, decoder_start_token_id=2,
            **_TOKENS,
        ),
    ),
    "tiny-random-BertModel": lambda: (t.BertModel, t.BertConfig(**_BERT)),
    "tiny-random-DebertaV2Model": lambda: (t.DebertaV2Model, t.DebertaV2Config(**_BERT)),
    "tiny-random-BertForSequenceClassification": lambda: (
        t.BertForSequenceClassification, t.BertConfig(**_BERT),
    ),
    "tiny-LlamaForSequenceClassification-3.2": lambda: (
        t.LlamaForSequenceClassification, t.LlamaConfig(**_LLAMA, num_labels=1, **_TOKENS),
    ),
    "tiny-GptOssForCausalLM": lambda: (
        t.GptOssForCausalLM,
        t.GptOssConfig(**_LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, **_TOKENS),
    ),
}  # fmt: skip


def local(model_id: str, folder: Path) -> str | None:
    """Where the stand-in of a model of the Hub is; None if there is none."""
    name = model_id.rpartition("/")[2]
    if name not in CONFIGS or "/" not in model_id:
        return None
    place = folder / name
    if not place.is_dir():
        torch.manual_seed(0)
        cls, config = CONFIGS[name]()
        model = cls(config)
        with torch.no_grad():  # initializers of 0.02 make so few layers too flat for adapters to be seen
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.save_pretrained(place)
    return str(place)


def tokenizer() -> t.PreTrainedTokenizerFast:
    """A tokenizer of the stand-ins' 64 tokens: a word is a token by its length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **{"a" * at: at for at in range(3, 64)}}, "</s>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=16
    )


def quotes():
    """Sentences of such words, as the data set that the tests train on."""
    from datasets import Dataset, DatasetDict

    lines = [" ".join("a" * (3 + (at * place) % 60) for place in range(1, 9)) for at in range(1, 33)]
    return DatasetDict({"train": Dataset.from_dict({"quote": lines, "author": lines, "tags": [[]] * len(lines)})})
