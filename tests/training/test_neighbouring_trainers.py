"""Seq2SeqTrainer, sentence-transformers, accelerate and lm-eval with adapters of this package, dense and in 4 bits."""

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_sparse_peft import AccumulatedGradient, Controller, Regrow, SparseLoraConfig, callbacks_for
from hf_sparse_peft.tuners import adapter_layers

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
KINDS = ["fp32", "nf4"]


def moving(**options):
    rule = Regrow(every=2, grow=AccumulatedGradient(steps=1), fraction=0.5)
    return SparseLoraConfig(**{"r": 2, "density": 0.1, "schedule": [rule], **options})


def units(model):
    return {layer.module_name: layer.units("default").clone() for layer in adapter_layers(model)}


def check_moved(before, model):
    after = units(model)
    assert before
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(layer.adapter_configs["default"].training_finished for layer in adapter_layers(model))


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "w0", "eos_token": "w1", "cls_token": "w2", "unk_token": "w3", "sep_token": "w4"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=tiny.VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_seq2seq_trainer_moves_supports_and_generates_for_its_metrics(kind, t5_folder, tokenizer, tmp_path):
    def make():
        options = {"quantization_config": NF4, "device_map": "cpu"} if kind == "nf4" else {}
        return T5ForConditionalGeneration.from_pretrained(t5_folder, dtype=torch.float32, **options)

    model = get_peft_model(make(), moving(target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM"))
    before = units(model)
    data = [{"input_ids": [5, 6, 7, 1], "labels": [8, 9, 1]}, {"input_ids": [10, 11, 1], "labels": [12, 1]}] * 4
    args = Seq2SeqTrainingArguments(
        str(tmp_path / "run"), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, predict_with_generate=True, generation_max_length=4,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks_for(model),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=lambda found: {"length": float(found.predictions.shape[1])},
    )  # fmt: skip
    trainer.train()
    check_moved(before, model)
    assert trainer.evaluate()["eval_length"] >= 1
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(make(), tmp_path / "saved").eval()
    ids = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 8]])}
    assert torch.equal(again(**ids).logits, model.eval()(**ids).logits)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_trains_a_moving_support(kind, encoder_folder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    def make():
        options = {"model_kwargs": {"quantization_config": NF4, "device_map": "cpu"}} if kind == "nf4" else {}
        return sentence_transformers.SentenceTransformer(str(encoder_folder), device="cpu", **options)

    model = make()
    model.add_adapter(moving(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    before = units(model)
    pairs = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 1} w{i + 2}"} for i in range(5, 21)]
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=5, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    sentence_transformers.SentenceTransformerTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(pairs), loss=MultipleNegativesRankingLoss(model),
        callbacks=callbacks_for(model),
    ).train()  # fmt: skip
    check_moved(before, model)
    expected = model.encode(["w5 w6 w7"])
    if kind == "fp32":  # bitsandbytes cannot run so narrow a 4-bit layer itself
        assert abs(expected - make().encode(["w5 w6 w7"])).max() > 1e-4
    model[0].auto_model.save_pretrained(tmp_path / "saved")
    again = make()
    again.load_adapter(str(tmp_path / "saved"))
    assert (again.encode(["w5 w6 w7"]) == expected).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerate_loop_moves_supports_and_saves_what_was_trained(kind, tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = get_peft_model(tiny.base(kind, layers=1), moving(target_modules=["q_proj", "down_proj"]))
    before = units(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(tiny.TokenData(samples=32), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    with Controller(model, optimizer, total_steps=4, accumulation=2) as rules:
        for batch in loader:
            with accelerator.accumulate(model):
                rules.before_step()
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                rules.after_step() if accelerator.sync_gradients else rules.after_micro_batch()
                optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    check_moved(before, plain)
    plain.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(model))
    again = PeftModel.from_pretrained(tiny.base(kind, layers=1), tmp_path).eval()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(ids).logits, plain.eval()(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_measures_an_adapter_by_its_folder(kind, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    base = tiny.base(kind, layers=1)
    model = get_peft_model(
        base, SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"], init_weights=False)
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    scores = torch.log_softmax(model(ids).logits[0].double(), -1)
    expected = float(scores[1, 7] + scores[2, 8])
    loaded = PeftModel.from_pretrained(tiny.base(kind, layers=1), tmp_path / "adapter").eval()
    measured = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=1)
    requests = [(("w5 w6", " w7 w8"), [5, 6], [7, 8])]
    assert measured._loglikelihood_tokens(requests)[0][0] == pytest.approx(expected, abs=1e-3)
