"""Stopping and going on changes no bit: 20 steps = 9 + save + resume + 11, with everything moving in both halves."""

import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from training_toolbox import (
    Hook,
    StopAt,
    adapted,
    all_state,
    differences,
    layers_of,
    make_config,
    moves_of,
    run,
    support_of,
    tiny_llama,
)
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    AverageRank,
    Linear,
    Orthogonality,
    Prune,
    Regrow,
    SparseLoraConfig,
)

STEPS = 20
STATE = (
    "sparse_lora_rule_sensitivity_A",
    "sparse_lora_rule_uncertainty_B",
    "sparse_lora_rule_candidates",
    "sparse_lora_rule_candidate_sums",
)


def everything_moves(granularity: str = "entry", **overrides) -> SparseLoraConfig:
    options = {
        "r": 4,
        "density": 0.05 if granularity == "entry" else 0.5,
        "granularity": granularity,
        "schedule": [
            Prune(start=0.1, end=0.9, every=2),
            Regrow(every=4, grow=AccumulatedGradient(steps=2), fraction=Linear(0.9, 0.0)),
            Allocate(budget=AverageRank(2), every=2, initial_warmup=0.1, final_warmup=0.2),
            Orthogonality(),
        ],
    }
    return make_config(**{**options, **overrides})


def finish(model, out, **options):
    """Train to the end; returns all state as the last update left it, and the moves."""
    last = {}

    def look(update, model, optimizer):
        if update == STEPS:
            last.update(all_state(model, optimizer))

    trainer = run(model, out, STEPS, after=[Hook(on_step_end=look)], batch=2, accumulation=2, **options)
    return last, trainer


CASES = {
    "entry-aged": {"optimizer": "aged"},
    "entry-default": {"optimizer": "default"},
    "block-aged": {"granularity": "block", "optimizer": "aged"},
    "block-default": {"granularity": "block", "optimizer": "default"},
}


@pytest.mark.parametrize(("case", "stop"), [("entry-aged", 8), ("entry-aged", 10), *((case, 9) for case in CASES)])
@pytest.mark.filterwarnings("ignore:.*has one scalar step")
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(case, stop, tmp_path):
    # Collecting phases are steps 9-10, 13-14, ...: 8 stops before one, 9 inside it, 10 right after its move.
    options = dict(CASES[case])
    config = everything_moves(options.pop("granularity", "entry"))
    whole, trainer = finish(adapted(config), tmp_path / "whole", **options)
    moves = moves_of(trainer)
    assert [move["step"] for move in moves] == [2, 6, 10, 14, 18]
    assert all(move["replaced"] for move in moves[:4])
    assert moves[-1]["alive"] < moves[2]["alive"] < moves[0]["alive"]

    run(adapted(config), tmp_path / "parts", STEPS, after=[StopAt(stop)], batch=2, accumulation=2, **options)
    fresh = adapted(config, seed=0)
    for parameter in fresh.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()  # nothing of the checkpoint may be missing from it
    resumed, _ = finish(fresh, tmp_path / "parts", resume=str(tmp_path / "parts" / f"checkpoint-{stop}"), **options)
    assert len(whole) > 20
    assert any(name.endswith("exp_avg") for name in whole)
    assert any("candidate_sums" in name for name in whole)
    assert differences(whole, resumed) == []


def test_resuming_over_an_nf4_base_changes_no_bit(tmp_path):
    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def model():
        base = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantised, device_map="cpu", dtype=torch.float32
        )
        return adapted(everything_moves(), base=base)

    whole, trainer = finish(model(), tmp_path / "whole")
    assert moves_of(trainer)[-1]["replaced"] > 0
    run(model(), tmp_path / "parts", STEPS, after=[StopAt(9)], batch=2, accumulation=2)
    resumed, _ = finish(model(), tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-9"))
    assert differences(whole, resumed) == []


def test_going_back_to_an_older_checkpoint_on_the_finished_model_changes_no_bit(tmp_path):
    config = everything_moves()
    model = adapted(config)
    whole, _ = finish(model, tmp_path, before=[StopAt(9, stop=False)])
    # The run is over: its state was freed, and must be there again before the checkpoint's is read.
    assert not any("default" in getattr(layer, name) for layer in layers_of(model) for name in STATE)
    again, _ = finish(model, tmp_path, resume=str(tmp_path / "checkpoint-9"))
    assert differences(whole, again) == []


def test_an_early_stop_keeps_the_state_and_the_end_drops_it(tmp_path):
    config = everything_moves()
    model = adapted(config)
    run(model, tmp_path / "early", STEPS, after=[StopAt(9)])
    assert all("default" in getattr(layer, name) for layer in layers_of(model) for name in STATE)
    assert not model.peft_config["default"].training_finished
    saved = load_file(tmp_path / "early" / "checkpoint-9" / "adapter_model.safetensors")
    assert all(any(name in key for key in saved) for name in STATE)

    model = adapted(config)
    trainer = run(model, tmp_path / "done", STEPS)
    assert not any(any(name in key for name in STATE) for key in model.state_dict())
    trainer.save_model(str(tmp_path / "shipped"))
    shipped = load_file(tmp_path / "shipped" / "adapter_model.safetensors")
    assert shipped
    assert not any(any(name in key for name in STATE) for key in shipped)
    assert SparseLoraConfig.from_pretrained(str(tmp_path / "shipped")).training_finished is True
    assert SparseLoraConfig.from_pretrained(str(tmp_path / "early" / "checkpoint-9")).training_finished is False


def test_a_checkpoint_loaded_for_inference_needs_no_state_and_gives_the_same_logits(tmp_path):
    model = adapted(everything_moves())
    run(model, tmp_path, STEPS, after=[StopAt(9)])
    ids = torch.arange(18).view(2, 9)
    model.eval()
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "checkpoint-9")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not any("default" in getattr(layer, name, {}) for layer in layers_of(loaded) for name in STATE)


def test_a_model_built_from_the_checkpoint_itself_resumes_too(tmp_path):
    config = everything_moves()
    whole, _ = finish(adapted(config), tmp_path / "whole")
    run(adapted(config), tmp_path / "parts", STEPS, after=[StopAt(9)], batch=2, accumulation=2)
    folder = str(tmp_path / "parts" / "checkpoint-9")
    model = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
    resumed, _ = finish(model, tmp_path / "parts", resume=folder)
    assert differences(whole, resumed) == []


def test_a_file_without_state_resumes_in_the_middle_of_a_phase(tmp_path):
    # E.g. a finished run that goes on with more steps. Candidates are chosen at the first gradient there is.
    config = make_config(schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=3))])
    model = adapted(config)
    run(model, tmp_path, 9, after=[StopAt(9, stop=False)])
    folder = tmp_path / "checkpoint-9"
    model.save_pretrained(str(folder))
    assert not any("candidate" in key for key in load_file(folder / "adapter_model.safetensors"))
    fresh = adapted(config)
    trainer = run(fresh, tmp_path, 20, resume=str(folder))
    assert [record["step"] for record in trainer.schedule_callbacks[0].events] == [11, 15, 19]
    assert all(record["replaced"] > 0 for record in trainer.schedule_callbacks[0].events[:2])
    for layer in layers_of(fresh):
        units = support_of(layer)
        assert len(set(units)) == len(units) == layer.sparse_lora_values["default"].shape[0]


def test_the_best_checkpoint_comes_back_whole_at_the_end(tmp_path):
    model = adapted(everything_moves(r=0, schedule=[Prune(start=0.1, end=0.9, every=2)]))
    best = {}

    def look(update, model, optimizer):
        if update == 5:
            best.update({k: v.clone() for k, v in model.state_dict().items() if "candidate" not in k})

    trainer = run(
        model, tmp_path, 10, evaluated=True, after=[Hook(on_step_end=look)], train=False, lr=1.0,
        lr_scheduler_type="constant", save_strategy="steps", eval_strategy="steps", save_steps=5, eval_steps=5,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": 1.0 if trainer.state.global_step == 5 else 2.0}
    trainer.train()
    shutil.rmtree(tmp_path)
    after = model.state_dict()
    assert [name for name in best if not torch.equal(best[name], after[name])] == []
    assert not any("candidate" in name for name in after)


def test_the_shipped_folder_loads_with_auto_classes(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(everything_moves(), base=base)
    trainer = run(model, tmp_path / "run", STEPS)
    trainer.save_model(str(tmp_path / "shipped"))
    ids = torch.arange(18).view(2, 9)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "shipped").eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
