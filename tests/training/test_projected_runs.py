"""ProjectedAdamW in real runs: whole weights and factors, in a Trainer, in a loop, on two ranks, resumed to the bit."""

import warnings
from pathlib import Path

import processes
import projected_ranks_script
import pytest
import tiny
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_sparse_peft import (
    AgedAdamWSpec,
    Controller,
    ProjectedAdamWSpec,
    Regrow,
    SparseLoraConfig,
    estimate,
    make_optimizer,
    trainer_options,
)
from hf_sparse_peft.optim import (
    BlockProjection,
    ColumnProjection,
    NormScaledResidual,
    ProjectedAdamW,
    SignResidual,
    SVDProjection,
    innermost,
)

GALORE = ProjectedAdamWSpec(SVDProjection(4), every=3, scale=0.25)
SPECS = {
    "galore": GALORE,
    "galore 8-bit": ProjectedAdamWSpec(SVDProjection(24), every=3, bits=8),
    "galore by layer": ProjectedAdamWSpec(SVDProjection(4), every=3, layerwise=True),
    "fira": ProjectedAdamWSpec(SVDProjection(4), NormScaledResidual(), every=3, released=True),
    "frugal": ProjectedAdamWSpec(ColumnProjection(0.25), SignResidual(0.1), every=3, reset_moments=True),
    "gradnormlorp": ProjectedAdamWSpec(SVDProjection(4), every=3, weight_norm=True),
    "badam": ProjectedAdamWSpec(BlockProjection(0.25), every=3, reset_moments=True),
}
STEPS, SAVE_AT = 8, 4  # SAVE_AT is no multiple of `every`


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == SAVE_AT


def models(kind):
    if kind == "8-bit":
        return tiny.llama(hidden=192, layers=1)
    if kind == "factors":
        torch.manual_seed(1)
        return get_peft_model(tiny.llama(), SparseLoraConfig(r=8, density=0, target_modules="all-linear"))
    if kind == "upstream's factors":
        torch.manual_seed(1)
        return get_peft_model(tiny.llama(), LoraConfig(r=8, target_modules="all-linear"))
    return tiny.llama(dtype=torch.bfloat16 if kind == "bf16" else torch.float32)


def train(model, out, spec, resume=None, callbacks=(), **arguments):
    quiet = {"weight_decay": 0.1, "max_grad_norm": 0.0 if spec.layerwise else 1.0, "learning_rate": 1e-2}
    options = trainer_options(model, tiny.arguments(out, STEPS, **{**quiet, **arguments}), optimizer=spec)
    options["callbacks"] = [*options["callbacks"], *callbacks]
    trainer = Trainer(model=model, train_dataset=tiny.TokenData(), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state(trainer):
    found = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    for at, entry in innermost(trainer.optimizer).state_dict()["state"].items():
        found |= {f"{at}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "8-bit" if "8-bit" in name else "whole") for name in SPECS]
    + [("galore", "bf16"), ("galore", "factors"), ("fira", "upstream's factors"), ("frugal", "factors")],
)
def test_a_run_resumes_to_the_bit(name, kind, tmp_path):
    whole = train(models(kind), tmp_path / "whole", SPECS[name])
    assert type(innermost(whole.optimizer)) is ProjectedAdamW
    train(models(kind), tmp_path / "halves", SPECS[name], callbacks=[StopAt()])
    again = train(models(kind), tmp_path / "halves", SPECS[name], resume=str(tmp_path / f"halves/checkpoint-{SAVE_AT}"))
    expected, found = state(whole), state(again)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    subspaces = [key for key in expected if key.endswith((".left", ".right", ".indices"))]
    assert bool(subspaces) == (name != "badam")
    eight = [key for key, value in expected.items() if value.dtype == torch.uint8]
    assert bool(eight) == (name == "galore 8-bit")


def test_what_is_projected_leaves_embeddings_heads_and_vectors_whole(tmp_path):
    model = tiny.llama()
    optimizer = make_optimizer(model, tiny.arguments(tmp_path, 1, weight_decay=0.1), spec=GALORE)
    projected = {name for name, p in model.named_parameters() if optimizer.projects(p)}
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert projected == linear - {"lm_head.weight"}
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert all(p.dim() == 2 for p in decayed)
    only = ProjectedAdamWSpec(SVDProjection(4), target_modules=["mlp", "q_proj"])
    chosen = make_optimizer(model, lr=1e-3, spec=only)
    names = {name for name, p in model.named_parameters() if chosen.projects(p)}
    assert names == {name for name in projected if "mlp" in name or "q_proj" in name}


def test_a_config_carries_it_through_its_file(tmp_path):
    spec = ProjectedAdamWSpec(SVDProjection(2), NormScaledResidual(1.05), every=5, bits=8, target_modules=["q_proj"])
    SparseLoraConfig(r=8, density=0, target_modules="all-linear", optimizer=spec).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.optimizer == spec
    model = get_peft_model(tiny.llama(), loaded)
    optimizer = make_optimizer(model, lr=1e-3)
    names = {name for name, p in model.named_parameters() if optimizer.projects(p)}
    assert names
    assert all("q_proj" in name for name in names)
    with pytest.raises(ValueError, match="is given, and the config asks for"):
        make_optimizer(model, lr=1e-3, spec=GALORE)


def test_accumulated_micro_batches_are_projected_once(tmp_path):
    one = train(tiny.llama(), tmp_path / "a", GALORE, per_device_train_batch_size=8)
    two = train(tiny.llama(), tmp_path / "b", GALORE, gradient_accumulation_steps=2)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)
    steps = {float(entry["step"]) for entry in innermost(two.optimizer).state.values()}
    assert steps == {float(STEPS)}


def test_a_loop_of_ones_own_and_a_weight_that_two_layers_share():
    model = tiny.llama(tie_word_embeddings=True)
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    optimizer, losses = make_optimizer(model, lr=1e-2, spec=GALORE), []
    for p in model.model.layers[1].mlp.parameters():
        p.requires_grad_(False)  # frozen after the optimizer was made: no gradient, no step
    ids = tiny.TokenData(8).ids
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not any(optimizer.state.get(p) for p in model.model.layers[1].mlp.parameters())
    assert all(not (p is model.lm_head.weight and optimizer.projects(p)) for p in model.parameters())


def test_bytes_of_the_state_are_those_that_a_count_gives(tmp_path):
    model, r = tiny.llama(), 4
    trainer = train(model, tmp_path, GALORE)
    found = sum(t.nbytes for entry in innermost(trainer.optimizer).state.values() for t in entry.values() if t.dim())
    expected = 0
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed" not in name and "lm_head" not in name:
            m, n = sorted(p.shape)
            expected += 4 * (2 * r * n + m * r)
        else:
            expected += 8 * p.numel()
    assert found == expected


def test_preflight_counts_the_same_bytes_without_weights():
    config = SparseLoraConfig(r=8, density=0, target_modules="all-linear", optimizer=GALORE)
    model = get_peft_model(tiny.llama(), config)
    optimizer = make_optimizer(model, lr=1e-3)
    ids = tiny.TokenData(4).ids
    for _ in range(2):  # A has no gradient at first
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    counted = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values())
    parts = {part.name: part.bytes for part in estimate(tiny.llama().config, config).parts}
    assert parts["optimizer state"] == counted


@pytest.mark.parametrize(
    ("config", "spec", "message"),
    [
        ({"r": 0, "density": 0.1}, GALORE, "is for matrices, and none trains here"),
        ({"r": 4}, ProjectedAdamWSpec(SVDProjection(4)), "makes no matrix that trains smaller"),
        ({"r": 8}, ProjectedAdamWSpec(SVDProjection(4), target_modules=["k_prj"]), "names no matrix that trains"),
        ({"r": 0, "density": 0.1, "granularity": "row", "schedule": [Regrow(every=3, grow="random")]},
         ProjectedAdamWSpec(SVDProjection(1)), "Regrow moves units of"),
        ({"r": 8, "schedule": [{"type": "frobenius_decay"}]}, SPECS["galore by layer"], "layerwise=True updates in"),
    ],
    ids=["entries", "rank", "target", "moves", "rules"],
)  # fmt: skip
def test_what_cannot_be_projected_is_refused_before_training(config, spec, message, tmp_path):
    config = SparseLoraConfig(target_modules=["q_proj", "down_proj"], **{"density": 0.0, **config})
    with pytest.raises(ValueError, match=message):
        train(get_peft_model(tiny.llama(), config), tmp_path, spec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "before gradient_accumulation_steps=2 acts"),
        ({"max_grad_norm": 1.0}, "before clipping acts"),
    ],
    ids=["accumulation", "clipping"],
)
def test_updates_in_the_backward_pass_are_refused_where_gradients_are_not_final(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tiny.llama(), tmp_path, SPECS["galore by layer"], **arguments)


def test_an_interrupted_run_and_a_second_one_on_the_same_model(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    model, spec = tiny.llama(), SPECS["galore by layer"]
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "a", spec, callbacks=[Interrupt()])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    again = train(model, tmp_path / "b", spec)
    fresh = tiny.llama()
    fresh.load_state_dict(start)
    expected = train(fresh, tmp_path / "c", spec)
    assert state(again).keys() == state(expected).keys()
    assert all(torch.equal(value, state(expected)[key]) for key, value in state(again).items())


def test_a_controller_runs_rules_over_it():
    config = SparseLoraConfig(
        r=8, density=0, target_modules="all-linear", optimizer=GALORE,
        schedule=[{"type": "switch_layers", "layers": 1, "every": 2}],
    )  # fmt: skip
    model = get_peft_model(tiny.llama(), config)
    optimizer, ids = make_optimizer(model, lr=1e-2), tiny.TokenData(8).ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Controller(model, optimizer, total_steps=4) as control:
            for _ in range(4):
                control.before_step()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                control.after_step()
                optimizer.zero_grad()
    assert any(optimizer.projects(p) and "exp_avg" in entry for p, entry in optimizer.state.items())


def test_the_class_itself_is_a_trainers_optimizer_and_resumes(tmp_path):
    def trained(out, *callbacks, resume=None):
        args = tiny.arguments(out, STEPS, max_grad_norm=1.0)
        given = (ProjectedAdamW, {"lr": 1e-2, "projection": SVDProjection(4), "every": 3})
        trainer = Trainer(
            tiny.llama(),
            args,
            train_dataset=tiny.TokenData(),
            callbacks=list(callbacks),
            optimizer_cls_and_kwargs=given,
        )
        trainer.train(resume_from_checkpoint=resume)
        return state(trainer)

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "halves", StopAt())
    again = trained(tmp_path / "again", resume=str(tmp_path / f"halves/checkpoint-{SAVE_AT}"))
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []


@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_factors_over_4_bit_and_bf16_bases_and_a_head_train(base, tmp_path):
    torch.manual_seed(1)
    config = SparseLoraConfig(r=8, density=0, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny.base(base), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(model, tmp_path, GALORE)
    optimizer = innermost(trainer.optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    projected = {name for name, p in model.named_parameters() if optimizer.projects(p)}
    assert projected
    assert all("lora_" in name for name in projected)


def test_another_optimizer_of_a_config_may_be_given_for_a_plain_model(tmp_path):
    trainer = train(tiny.llama(), tmp_path, GALORE)
    assert innermost(trainer.optimizer).param_groups[0]["betas"] == (0.9, 0.999)
    options = trainer_options(tiny.llama(), tiny.arguments(tmp_path, 1), optimizer=AgedAdamWSpec())
    make, _ = options["optimizer_cls_and_kwargs"]
    assert type(make()(tiny.llama())).__name__ == "AgedAdamW"


@pytest.mark.slow
def test_two_ranks_hold_one_subspace_and_train_as_one_process_with_their_batch(tmp_path):
    processes.ranks(2, Path(__file__).parent / "projected_ranks_script.py", tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one.keys() == two.keys()
    assert bool(one["refused"])
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    alone = projected_ranks_script.train(tmp_path / "alone", 8)
    for name, spec in projected_ranks_script.OTHERS.items():
        trained = projected_ranks_script.train(tmp_path / "alone", 8, spec)
        alone |= {f"{name}.{key}": value for key, value in trained.items()}
    for name, value in alone.items():
        if not any(part.isdigit() for part in name.split(".")[:2]):
            torch.testing.assert_close(one[name], value, atol=3e-4, rtol=0)
        elif name.endswith("_inverse"):
            torch.testing.assert_close(one[name], value, atol=1e-4, rtol=0)
