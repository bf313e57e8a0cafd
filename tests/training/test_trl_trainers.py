"""trl's trainers: fp32 values on 4-bit bases, and reference adapters that are the policy."""

import math
import warnings

import pytest
import tiny
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    AverageRank,
    KernelLoraConfig,
    Regrow,
    SparseLoraConfig,
    StructuredConfig,
    callbacks_for,
)
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.structured import PHM, Bottleneck, Kronecker, LowRankExperts, ScaleShift

trl = pytest.importorskip("trl")

PAIRS = [{"prompt": f"w{i} w9", "chosen": f" w{i + 3} w5", "rejected": " w4 w8"} for i in range(3, 11)]
ROWS = {
    "sft": [{"text": "w3 w4 w5 w6"}] * 8,
    "dpo": PAIRS,
    "grpo": [{"prompt": f"w{i} w9"} for i in range(3, 11)],
    "kto": [{"prompt": p["prompt"], "completion": p["chosen"], "label": bool(i % 2)} for i, p in enumerate(PAIRS)],
    "reward": [{"chosen": "w1 w2 w3", "rejected": "w4 w5 w6"}] * 8,
}
ROWS["rloo"] = ROWS["grpo"]
CLASSES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "kto": "KTO", "reward": "Reward", "rloo": "RLOO"}


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w1", eos_token="w2", unk_token="w0")


def trainer_of(kind, model, out, tokenizer, steps, callbacks=(), **options):
    """A trl trainer of that kind for `steps` steps of two samples."""
    if kind in ("grpo", "rloo"):
        options = {"num_generations": 2, "max_completion_length": 3, "beta": 0.1, **options}
    defaults = {
        "max_steps": steps, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1, "learning_rate": 1e-4,
    }  # fmt: skip
    args = getattr(trl, f"{CLASSES[kind]}Config")(str(out), **{**defaults, **options})
    rewards = (
        {"reward_funcs": lambda completions, **_: [float(len(c)) + i for i, c in enumerate(completions)]}
        if kind in ("grpo", "rloo")
        else {}
    )
    return getattr(trl, f"{CLASSES[kind]}Trainer")(
        model=model, args=args, train_dataset=Dataset.from_list(ROWS[kind]), processing_class=tokenizer,
        callbacks=list(callbacks), **rewards,
    )  # fmt: skip


def adapted(base, config=None, seed=1, std=0.3, **options):
    """An adapter with random fp32 values that no bf16 holds."""
    config = config or SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def values_of(model, adapter="default"):
    return {
        f"{layer.module_name}.{kind}": getattr(layer, kind)[adapter].detach().clone()
        for layer in adapter_layers(model)
        for kind in layer.adapter_layer_names
        if adapter in getattr(layer, kind)
    }


class Watch(tiny.TrainerCallback):
    def __init__(self):
        self.first, self.dtypes, self.state = None, set(), set()

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.first = self.first or values_of(model)
        self.dtypes |= {p.dtype for p in model.parameters() if p.requires_grad}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.state |= {
            t.dtype for one in optimizer.state.values() for t in one.values() if torch.is_tensor(t) and t.numel() > 1
        }


@pytest.mark.parametrize("kind", CLASSES)
def test_trl_on_nf4_trains_the_fp32_values_it_was_given(kind, tokenizer, tmp_path):
    base = tiny.base("nf4", layers=1) if kind != "reward" else nf4_classifier()
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    model = adapted(base, SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"], task_type=task))
    before, watch = values_of(model), Watch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(kind, model, tmp_path, tokenizer, 2, [watch], gradient_checkpointing=False, bf16=False)
        trainer.train()
    assert watch.dtypes == {torch.float32}
    assert watch.state == {torch.float32}
    assert all(torch.equal(watch.first[name], value) for name, value in before.items())
    said = [str(w.message) for w in caught if "were cast to" in str(w.message)]
    assert ["bit for bit" in one for one in said] == ([True, False] if kind == "reward" else [True])
    assert kind != "reward" or "start from what the cast rounded them to" in said[1]  # the trained head's
    # One of the six, DPO, has no advantage of zero here and no early saturation: every value moves below bf16's grid.
    if kind == "dpo":
        after = values_of(model)
        assert all((after[name] != value).all() for name, value in before.items() if "_values" in name)


BY_DEFAULT = {("sft", "bf16"), ("dpo", "fp32"), ("grpo", "fp32"), ("kto", "nf4"), ("reward", "fp32")}
"""The others take seconds each."""


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        pytest.param(kind, base, marks=() if (kind, base) in BY_DEFAULT else pytest.mark.slow)
        for kind in CLASSES
        for base in ("fp32", "bf16", "nf4")
    ],
)
def test_supports_move_and_the_base_stays_under_every_trl_trainer(kind, base, tokenizer, tmp_path):
    def make_base():
        if kind == "reward":
            return nf4_classifier() if base == "nf4" else classifier(getattr(torch, DTYPES[base]))
        return tiny.base(base, layers=1)

    config = SparseLoraConfig(
        r=2, density=0.1, target_modules=["q_proj", "down_proj"],
        task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM",
        schedule=[Regrow(every=1, grow=AccumulatedGradient(steps=1), fraction=0.5)],
    )  # fmt: skip
    model = adapted(make_base(), config, std=0.1)
    start = {layer.module_name: layer.units("default").clone() for layer in adapter_layers(model)}
    bits = {layer.module_name: layer.get_base_layer().weight.detach().clone() for layer in adapter_layers(model)}
    trainer = trainer_of(kind, model, tmp_path / "run", tokenizer, 3, callbacks_for(model), learning_rate=1e-3)
    trainer.train()
    layers = adapter_layers(trainer.accelerator.unwrap_model(trainer.model), adapter_name="default")
    assert any(not torch.equal(start[layer.module_name], layer.units("default")) for layer in layers)
    assert all(torch.equal(bits[layer.module_name], layer.get_base_layer().weight) for layer in layers)
    trainer.save_model(tmp_path / "saved")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "saved").eval()
    ids = torch.tensor([[3, 4, 5, 2]])
    expected = trainer.accelerator.unwrap_model(trainer.model).eval()(input_ids=ids).logits
    torch.testing.assert_close(again(input_ids=ids).logits.float(), expected.float(), rtol=1e-2, atol=1e-2)


STRUCTURED = {
    "kronecker": Kronecker(8, 4), "scale and shift": ScaleShift(), "compacter": Bottleneck(4, matrix=PHM(2)),
    "experts": LowRankExperts(4, 2),
}  # fmt: skip
QUICK = {("kronecker", "sft", "nf4"), ("scale and shift", "dpo", "bf16")}


@pytest.mark.parametrize(
    ("form", "kind", "base"),
    [
        pytest.param(form, kind, base, marks=() if (form, kind, base) in QUICK else pytest.mark.slow)
        for form in STRUCTURED
        for kind in ("sft", "dpo")
        for base in ("fp32", "bf16", "nf4")
    ],
)
def test_structured_adapters_train_fp32_masters_and_leave_the_base_under_trl(form, kind, base, tokenizer, tmp_path):
    """What is shared by both layers, what maps outputs and what routes come out of the trainer's casts as they went
    in, and DPO's reference is the policy at its start."""
    config = StructuredConfig(form=STRUCTURED[form], target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
    model, watch = adapted(tiny.base(base, layers=2), config, std=0.1), Watch()
    before = values_of(model)
    bits = {layer.module_name: layer.get_base_layer().weight.detach().clone() for layer in adapter_layers(model)}
    trainer = trainer_of(kind, model, tmp_path / "run", tokenizer, 3, [watch], learning_rate=1e-3)
    trainer.train()
    assert watch.dtypes == {torch.float32} == watch.state
    assert all(torch.equal(watch.first[name], value) for name, value in before.items())
    policy = trainer.accelerator.unwrap_model(trainer.model)
    after = values_of(policy)
    assert not [name for name, value in before.items() if torch.equal(after[name], value)]
    layers = adapter_layers(policy)
    assert all(torch.equal(bits[layer.module_name], layer.get_base_layer().weight) for layer in layers)
    if kind == "dpo":
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
        reference = values_of(policy, "ref")
        assert all(torch.equal(reference[name], value) for name, value in before.items())
    trainer.save_model(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny.base(base, layers=2), tmp_path / "saved").eval()
    ids = torch.tensor([[3, 4, 5, 2]])
    expected = policy.eval()(input_ids=ids).logits
    torch.testing.assert_close(again(input_ids=ids).logits.float(), expected.float(), rtol=1e-2, atol=1e-2)


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def classifier(dtype):
    return tiny.llama(LlamaForSequenceClassification, num_labels=1, layers=1, dtype=dtype)


def nf4_classifier():
    import tempfile

    from transformers import BitsAndBytesConfig

    folder = tempfile.mkdtemp()
    tiny.llama(LlamaForSequenceClassification, num_labels=1, layers=1).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return LlamaForSequenceClassification.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )


def test_schedules_run_on_fp32_values_under_trl_on_nf4(tokenizer, tmp_path):
    config = SparseLoraConfig(
        r=2, density=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM",
        schedule=[
            Regrow(every=3, grow=AccumulatedGradient(steps=2)), Allocate(budget=AverageRank(1), every=1),
        ],
    )  # fmt: skip
    model, watch = adapted(tiny.base("nf4", layers=1), config), Watch()
    trainer_of("sft", model, tmp_path, tokenizer, 4, [*callbacks_for(model), watch]).train()
    assert watch.dtypes == {torch.float32} == watch.state


def test_a_resumed_trl_run_on_nf4_ends_where_the_whole_one_does(tokenizer, tmp_path):
    """A checkpoint that is read into bf16 values, and moments cast with them, would be rounded."""
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "learning_rate": 1e-3}

    def trained(resume=None):
        model = adapted(tiny.base("nf4", layers=1))
        trainer_of("sft", model, tmp_path, tokenizer, 4, **options).train(resume_from_checkpoint=resume)
        return values_of(model)

    whole, resumed = trained(), trained(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_bf16_values_that_were_asked_for_stay_bf16_under_trl(tokenizer, tmp_path):
    model, watch = adapted(tiny.base("nf4", layers=1), autocast_adapter_dtype=False), Watch()
    trainer_of("sft", model, tmp_path, tokenizer, 2, [watch]).train()
    assert watch.dtypes == {torch.bfloat16} == watch.state


CONFIGS = {
    "entry": {"r": 0, "density": 0.2},
    "row": {"r": 0, "density": 0.2, "granularity": "row"},
    "block": {"r": 0, "density": 0.2, "granularity": "block", "block_size": 4},
    "hybrid": {"r": 3, "density": 0.2},
    "ranks": {"r": 4, "density": 0.1, "schedule": [Allocate(budget=AverageRank(2), every=1)]},
}


def reference_case(case):
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if case == "kernel":
        return adapted(tiny.llama(), KernelLoraConfig(r=8, kernel="mixed", sparsity=0.5, **common))
    model = adapted(tiny.llama(), SparseLoraConfig(**CONFIGS[case], **common))
    for number, layer in enumerate(adapter_layers(model)):  # a support and components that the seed does not give
        if (values := layer.sparse_lora_values.get("default")) is not None:
            generator = torch.Generator().manual_seed(number)
            units = torch.randperm(layer.sparse_lora_grid["default"].num_units, generator=generator)[: len(values)]
            layer.write_support("default", units.sort().values)
        if case == "ranks":
            layer.sparse_lora_rank_mask["default"][number % 4] = 0
            layer.sparse_lora_gate["default"].data[number % 4] = 0
    return model


@pytest.mark.parametrize("case", [*CONFIGS, "kernel"])
def test_first_dpo_loss_of_a_trained_adapter_is_log_2(case, tokenizer, tmp_path):
    model = reference_case(case)
    trainer = trainer_of("dpo", model, tmp_path, tokenizer, 1, beta=1.0, gradient_checkpointing=False)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("kind", ["kto", "grpo", "rloo"])
def test_the_reference_adapter_of_other_trl_trainers_is_the_policy(kind, tokenizer, tmp_path):
    model = reference_case("hybrid")
    trainer = trainer_of(kind, model, tmp_path, tokenizer, 1, gradient_checkpointing=False)
    ids = torch.arange(3, 11).view(1, -1)
    with torch.no_grad():
        policy = trainer.model.eval()(input_ids=ids).logits
        trainer.model.set_adapter("ref")
        assert torch.equal(trainer.model(input_ids=ids).logits, policy)
        with trainer.model.disable_adapter():
            assert not torch.allclose(trainer.model(input_ids=ids).logits, policy)


def test_the_reference_stays_while_the_supports_of_the_policy_move(tokenizer, tmp_path):
    config = SparseLoraConfig(
        r=0, density=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM",
        schedule=[Regrow(every=2, grow=AccumulatedGradient(steps=1))],
    )  # fmt: skip
    model = adapted(tiny.llama(), config)
    start = [layer.get_delta_weight("default") for layer in adapter_layers(model)]
    trainer = trainer_of("dpo", model, tmp_path, tokenizer, 4, callbacks_for(model), gradient_checkpointing=False)
    trainer.train()
    layers = adapter_layers(trainer.model)
    assert all(torch.equal(layer.get_delta_weight("ref"), delta) for layer, delta in zip(layers, start, strict=True))
    assert any(layer.units("ref").tolist() != layer.units("default").tolist() for layer in layers)


def test_a_resumed_dpo_run_has_the_reference_of_the_whole_one(tokenizer, tmp_path):
    config = SparseLoraConfig(
        r=2, density=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM",
        schedule=[Regrow(every=2, grow=AccumulatedGradient(steps=1))],
    )  # fmt: skip

    def trained(resume=None):
        model = adapted(tiny.llama(layers=1), config)
        options = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": False, "learning_rate": 1e-2}
        trainer = trainer_of("dpo", model, tmp_path, tokenizer, 4, callbacks_for(model), **options)
        trainer.train(resume_from_checkpoint=resume)
        deltas = [
            layer.get_delta_weight(name) for layer in adapter_layers(trainer.model) for name in ("default", "ref")
        ]
        return deltas, trainer.state.log_history[-2]["loss"]

    (whole, loss), (resumed, loss_after) = trained(), trained(str(tmp_path / "checkpoint-2"))
    assert loss == loss_after
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
