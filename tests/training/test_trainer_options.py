"""`optimizer=` in a config and `trainer_options`: the file alone makes the run that the method made."""

import json
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from training_toolbox import StopAt, TokenData, adapted, make_config, tiny_llama
from transformers import Trainer, TrainingArguments

from hf_sparse_peft import (
    AdamWSpec,
    AgedAdamWSpec,
    Controller,
    KernelLoraConfig,
    Orthogonality,
    SparseLoraConfig,
    SparseSM3Spec,
    ZerothOrderSpec,
    callbacks_for,
    make_optimizer,
    methods,
    trainer_class_for,
    trainer_options,
)
from hf_sparse_peft.optim import AgedAdamW, SparseSM3, ZerothOrderSGD, innermost
from hf_sparse_peft.training import TwoPassTrainer, ZerothOrderTrainer

TARGETS = ["q_proj", "v_proj", "down_proj"]
SPECS = {
    AdamWSpec(): torch.optim.AdamW,
    AgedAdamWSpec(values_ratio=3.0, betas=(0.8, 0.95)): AgedAdamW,
    AgedAdamWSpec(per_unit_age=False): AgedAdamW,
    SparseSM3Spec(momentum=0.9): SparseSM3,
    ZerothOrderSpec(epsilon=1e-2): ZerothOrderSGD,
}


def arguments(out, steps: int = 6, **options) -> TrainingArguments:
    fixed = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 11,
    }  # fmt: skip
    return TrainingArguments(str(out), **{**fixed, **options})


def state_of(model, optimizer) -> dict[str, torch.Tensor]:
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in innermost(optimizer).state.items():
        found |= {f"{names[parameter]}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_spec_survives_the_file_and_builds_its_optimizer(spec, tmp_path):
    config = make_config(optimizer=spec)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.optimizer == spec
    built = make_optimizer(adapted(loaded), arguments(tmp_path))
    assert type(built) is SPECS[spec]
    assert type(make_optimizer(adapted(loaded), lr=1e-3)) is SPECS[spec]


def test_options_of_a_spec_reach_the_optimizer(tmp_path):
    model = adapted(make_config(r=2, optimizer=AgedAdamWSpec(values_ratio=3.0, betas=(0.8, 0.95))))
    args = arguments(tmp_path, adam_epsilon=1e-5)
    built = make_optimizer(model, args)
    rates = {parameter: group for group in built.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group, is_support = rates[parameter], "sparse_lora_values" in name
            assert group["lr"] == pytest.approx(3e-2 if is_support else 1e-2)
            assert group["per_unit_age"] == is_support
            assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-5, 0.1)
    momentum = make_optimizer(adapted(make_config(optimizer=SparseSM3Spec(momentum=0.9))), args)
    assert momentum.param_groups[0]["momentum"] == 0.9
    zeroth = make_optimizer(adapted(make_config(optimizer=ZerothOrderSpec(0.5, 0.75, "layerwise"))), args)
    assert (zeroth.epsilon, zeroth.sparsity, zeroth.perturbation) == (0.5, 0.75, "layerwise")
    assert zeroth.param_groups[0]["seed"] == 11


@pytest.mark.parametrize("name", ["spiel-ag", "spiel-ma", "lift", "mezo"])
def test_the_folder_alone_resumes_the_run_with_its_optimizer(name, tmp_path):
    extra = {"spiel-ag": {"every": 3, "steps": 1}, "spiel-ma": {"every": 3, "first": 2}}
    extra |= {"lift": {"every": 3, "density": 0.02, "filter_rank": 4}}
    method = methods.get(name, target_modules=TARGETS, task_type="CAUSAL_LM", **extra.get(name, {}))

    def trained(model, out, *callbacks, resume=None):
        args, cls = arguments(out), trainer_class_for(model)
        options = trainer_options(model, args, cls)
        options["callbacks"] += callbacks
        trainer = cls(model=model, train_dataset=TokenData(), **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has one scalar step")
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    torch.manual_seed(1)
    whole = trained(get_peft_model(tiny_llama(), method.config), tmp_path / "whole")
    torch.manual_seed(1)
    trained(get_peft_model(tiny_llama(), method.config), tmp_path / "halves", StopAt(4))
    folder = tmp_path / "halves" / "checkpoint-4"
    model = PeftModel.from_pretrained(tiny_llama(), str(folder), is_trainable=True)  # nobody remembers the method
    again = trained(model, tmp_path / "again", resume=str(folder))
    expected, found = state_of(whole.model, whole.optimizer), state_of(model, again.optimizer)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_trainer_options_train_as_the_methods_own_calls_do(tmp_path):
    method = methods.get("spiel-ag", every=3, steps=1, target_modules=TARGETS)
    args, models = arguments(tmp_path), [adapted(method.config) for _ in range(2)]
    old = Trainer(
        models[0], args, train_dataset=TokenData(), callbacks=method.callbacks(models[0]),
        optimizers=(method.optimizer(models[0], args), None),
    )  # fmt: skip
    new = Trainer(models[1], train_dataset=TokenData(), **trainer_options(models[1], args))
    old.train(), new.train()
    assert type(innermost(new.optimizer)) is AgedAdamW
    expected, found = state_of(models[0], old.optimizer), state_of(models[1], new.optimizer)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_a_config_is_enough_where_the_trainer_makes_the_adapter(tmp_path):
    trl = pytest.importorskip("trl")
    config = make_config(optimizer=SparseSM3Spec())
    args = trl.SFTConfig(**{**arguments(tmp_path).to_dict(), "bf16": False, "output_dir": str(tmp_path)})
    options = trainer_options(config, args, trl.SFTTrainer)
    make, nothing = options["optimizer_cls_and_kwargs"]
    assert nothing == {}
    assert type(make()(adapted(config))) is SparseSM3


def test_no_optimizer_is_named_where_the_config_names_none(tmp_path):
    args = arguments(tmp_path)
    assert trainer_options(make_config(), args) == {"args": args, "callbacks": []}
    assert make_optimizer(adapted(make_config()), args) is None
    assert trainer_class_for(make_config()) is Trainer


@pytest.mark.parametrize(("name", "needed"), [("mosa", TwoPassTrainer), ("mezo", ZerothOrderTrainer)])
def test_a_trainer_that_cannot_run_the_config_is_refused_by_name(name, needed, tmp_path):
    config, args = methods.get(name).config, arguments(tmp_path)
    assert trainer_class_for(config) is needed
    with pytest.raises(ValueError, match=f"trains with {needed.__name__}, not with Trainer"):
        trainer_options(config, args)
    assert trainer_options(config, args, needed)["args"] is args
    with pytest.raises(ValueError, match="at once"):
        trainer_class_for(methods.get("mosa", optimizer=ZerothOrderSpec()).config)


def test_an_unknown_optimizer_loads_for_inference_survives_a_save_and_refuses_training(tmp_path):
    adapted(make_config()).save_pretrained(tmp_path / "first")
    file = tmp_path / "first" / "adapter_config.json"
    foreign = {"type": "from_a_plugin", "rank": 4}
    file.write_text(json.dumps({**json.loads(file.read_text()), "optimizer": foreign}))
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "first"))
    model(input_ids=torch.arange(6)[None])
    model.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["optimizer"] == foreign
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "second"), is_trainable=True)
    args = arguments(tmp_path)
    for refused in (
        lambda: trainer_options(model, args),
        lambda: make_optimizer(model, args),
        lambda: model.train()(input_ids=torch.arange(6)[None]),
    ):
        with pytest.raises(ValueError, match="from_a_plugin"):
            refused()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: AgedAdamWSpec(values_ratio=0.0), "values_ratio=0.0"),
        (lambda: AgedAdamWSpec(betas=(0.9, 1.0)), "betas="),
        (lambda: SparseSM3Spec(momentum=1.0), "momentum=1.0"),
        (lambda: ZerothOrderSpec(epsilon=0.0), "epsilon=0.0"),
        (lambda: SparseLoraConfig(optimizer=3), "optimizer=3"),
    ],
)
def test_options_out_of_range_are_refused_when_the_config_is_made(spec, message):
    with pytest.raises(ValueError, match=message):
        spec()


def test_adapters_of_other_tuners_name_optimizers_too(tmp_path):
    model = get_peft_model(tiny_llama(), KernelLoraConfig(r=4, target_modules=TARGETS, optimizer=ZerothOrderSpec()))
    assert type(make_optimizer(model, arguments(tmp_path))) is ZerothOrderSGD


def test_a_loop_of_ones_own_builds_the_optimizer_of_the_config():
    model = adapted(make_config(optimizer="aged_adamw"))
    optimizer = make_optimizer(model, lr=1e-2)
    with pytest.raises(ValueError, match="no learning rate"):
        make_optimizer(model)
    ids = TokenData()[0]["input_ids"][None]
    with Controller(model, optimizer, 1) as rules:
        rules.before_step()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        rules.after_step()


def test_a_row_with_factors_alone_trains_with_its_own_optimizer_which_is_adamw_then(tmp_path):
    def trained(optimizer):
        torch.manual_seed(0)
        config = methods.get("sparse-lora", density=0.0, r=2, target_modules=TARGETS).config
        model = adapted(config)
        args = arguments(tmp_path)
        own = trainer_options(model, args)
        if optimizer is not None:
            own = {"args": args, "optimizers": (optimizer(model, args), None)}
        trainer = Trainer(model=model, train_dataset=TokenData(), **own)
        trainer.train()
        return type(innermost(trainer.optimizer)), state_of(model, trainer.optimizer)

    def adamw(model, args):
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay, foreach=False)

    (own, ours), (other, theirs) = trained(None), trained(adamw)
    assert (own, other) == (AgedAdamW, torch.optim.AdamW)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("spec", [AdamWSpec(B_ratio=4.0), AgedAdamWSpec(B_ratio=4.0, component_ages=True)], ids=str)
def test_b_learns_at_a_ratio_of_as_rate_through_every_door(spec, tmp_path):
    """LoRA+: the first step of Adam moves every number by its own rate, whatever its gradient."""
    config = make_config(r=2, optimizer=spec, init_weights=False)

    def moved(train) -> dict[str, float]:
        model = adapted(config)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        train(model)
        after = dict(model.named_parameters())
        return {name: float((after[name] - was).abs().median()) for name, was in before.items()}

    def by_trainer(model):
        args = arguments(tmp_path, 1, weight_decay=0.0)
        Trainer(model=model, train_dataset=TokenData(), **trainer_options(model, args)).train()

    def by_hand(model):
        optimizer = make_optimizer(model, lr=1e-2)
        ids = torch.stack([TokenData()[number]["input_ids"] for number in range(4)])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    for train in (by_trainer, by_hand):
        for name, size in moved(train).items():
            assert size == pytest.approx(4e-2 if "lora_B" in name else 1e-2, rel=1e-2), name


def test_a_ratio_that_the_runs_optimizer_has_not_is_warned_of_and_one_without_b_is_refused(tmp_path):
    model = adapted(make_config(r=2, optimizer=AdamWSpec(B_ratio=4.0), schedule=[Orthogonality()]))
    args = arguments(tmp_path, 1, weight_decay=0.0)
    with pytest.warns(UserWarning, match=r"B_ratio=4.*AdamW with other learning rates"):
        Trainer(model=model, args=args, train_dataset=TokenData(), callbacks=callbacks_for(model)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        Trainer(model=model, train_dataset=TokenData(), **trainer_options(model, args)).train()
    with pytest.raises(ValueError, match="none trains in this model"):
        make_optimizer(adapted(make_config(optimizer=AgedAdamWSpec(B_ratio=4.0))), lr=1e-3)
