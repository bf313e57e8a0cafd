"""The callbacks under trl's SFTTrainer, and after transformers' own `model.add_adapter`."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from training_toolbox import VOCAB, TokenData, layers_of, make_config, run, support_of, tiny_llama
from transformers import PreTrainedTokenizerFast

from hf_sparse_peft import AccumulatedGradient, Allocate, AverageRank, Regrow, SupportTelemetryCallback, callbacks_for


def moving_config(**overrides):
    return make_config(
        r=4,
        schedule=[
            Regrow(every=4, grow=AccumulatedGradient(steps=2)),
            Allocate(budget=AverageRank(2), every=2, initial_warmup=0.0, final_warmup=0.2),
        ],
        **overrides,
    )


def check_everything_moved(start, model, callbacks) -> None:
    layers = layers_of(model)
    assert [event["step"] for event in callbacks[0].events if event["rule"] == "regrow"] == [2, 6]
    assert callbacks[0].events[0]["replaced"] > 0.5 * callbacks[0].events[0]["alive"]
    assert all(set(before) != set(support_of(layer)) for before, layer in zip(start, layers, strict=True))
    assert all(len(before) == len(support_of(layer)) for before, layer in zip(start, layers, strict=True))
    alive = sum(int((layer.sparse_lora_gate["default"] != 0).sum()) for layer in layers)
    assert alive == 2 * len(layers)
    assert all(layer.adapter_configs["default"].training_finished for layer in layers)


@pytest.fixture
def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(VOCAB - 3)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@tiny.needs("trl>=1.16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_supports_and_ranks_move_under_trl_sft_trainer(dtype, tokenizer, tmp_path):
    import trl

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB - 3, (48, 8), generator=generator).tolist()
    data = Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in ids]})
    config = moving_config()
    callbacks = callbacks_for(config)
    args = trl.SFTConfig(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, max_length=16, bf16=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=tiny_llama(dtype=dtype), args=args, train_dataset=data, processing_class=tokenizer,
        peft_config=config, callbacks=callbacks,
    )  # fmt: skip
    layers = layers_of(trainer.model)
    assert {layer.sparse_lora_values["default"].dtype for layer in layers} == {torch.float32}
    start = [support_of(layer) for layer in layers]
    trainer.train()
    check_everything_moved(start, trainer.model, callbacks)


def test_supports_and_ranks_move_after_transformers_add_adapter(tmp_path):
    model = tiny_llama()
    config = moving_config()
    torch.manual_seed(1)
    model.add_adapter(copy.deepcopy(config), adapter_name="default")
    start = [support_of(layer) for layer in layers_of(model)]
    callbacks = callbacks_for(model)
    run(model, tmp_path, 8, callbacks=callbacks, after=[SupportTelemetryCallback(4)])
    check_everything_moved(start, model, callbacks)
    model.save_pretrained(tmp_path / "saved")
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path / "saved"))
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_supports_move_under_gradient_checkpointing_as_without_it(tmp_path):
    from training_toolbox import adapted

    found = []
    for checkpointing in (False, True):
        model = adapted(make_config(schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))]))
        run(model, tmp_path / str(checkpointing), 8, data=TokenData(), gradient_checkpointing=checkpointing)
        found.append([(support_of(layer), layer.sparse_lora_values["default"].detach()) for layer in layers_of(model)])
    for (plain, values), (checkpointed, again) in zip(*found, strict=True):
        assert plain == checkpointed
        torch.testing.assert_close(values, again)
