"""MeZO under the real Trainer: adapters on dense and 4-bit bases, whole models, accumulation, resume, replay."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_toolbox import TokenData, all_state, differences, make_config, tiny_llama
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_sparse_peft import Regrow, methods
from hf_sparse_peft.optim import AgedAdamW, replay
from hf_sparse_peft.optim.zeroth_order_log import read_log
from hf_sparse_peft.training import ZerothOrderTrainer, zeroth_order_optimizer

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


def load(folder, kind):
    options = {}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return LlamaForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options)


def make(kind, folder):
    """A model of a kind like `mezo-fp32`, and how to build its optimizer."""
    what, base = kind.split("-")
    model = load(folder, base)
    torch.manual_seed(1)
    if what == "full":
        return model, lambda model, args: zeroth_order_optimizer(model, args, sparsity=0.75, perturbation="layerwise")
    if what == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=TARGETS, r=4, lora_dropout=0.5, task_type="CAUSAL_LM"))
        return model, zeroth_order_optimizer
    name = {"mezo": "mezo", "sparse": "sparse-mezo"}[what]
    method = methods.get(name, target_modules=TARGETS, task_type="CAUSAL_LM")
    assert method.trainer_class is ZerothOrderTrainer
    return get_peft_model(model, method.config), method.optimizer


KINDS = ["mezo-fp32", "mezo-nf4", "sparse-fp32", "sparse-nf4", "lora-fp32", "lora-nf4", "full-fp32"]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def train(kind, folder, out, steps=STEPS, *, resume=None, stop=None, callbacks=(), built=None, **arguments):
    model, make_optimizer = built or make(kind, folder)
    options = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.1,
        "lr_scheduler_type": "linear", "save_strategy": "no", "report_to": [], "logging_steps": 1,
        "disable_tqdm": True, "use_cpu": True, "seed": 11,
    }  # fmt: skip
    args = TrainingArguments(str(out), **{**options, **arguments})
    trainer = ZerothOrderTrainer(
        model=model, args=args, train_dataset=TokenData(), optimizers=(make_optimizer(model, args), None),
        callbacks=[*callbacks, *([StopAt(stop)] if stop else [])],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_and_replay_walks_the_same_way(kind, folder, tmp_path):
    start, make_optimizer = make(kind, folder)
    frozen = {n: p.detach().clone() for n, p in start.named_parameters() if not p.requires_grad}
    begin = {n: p.detach().clone() for n, p in start.named_parameters() if p.requires_grad}
    whole = train(kind, folder, tmp_path / "whole", built=(start, make_optimizer), gradient_accumulation_steps=2)
    end = trained(whole)
    assert all(not torch.equal(end[name], begin[name]) for name in end)
    after = dict(whole.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())

    train(kind, folder, tmp_path / "parts", stop=3, gradient_accumulation_steps=2)
    resumed = train(
        kind, folder, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"), gradient_accumulation_steps=2
    )
    found = [all_state(t.model, t.optimizer) for t in (whole, resumed)]
    assert differences(*found) == []

    log = tmp_path / "parts" / "zeroth_order.log"
    records = read_log(log)[1]
    assert len(list(records)) == STEPS
    assert log.read_bytes() == (tmp_path / "whole" / "zeroth_order.log").read_bytes()
    body = log.stat().st_size - log.read_bytes().index(b"\n") - 1
    assert body <= 36 * STEPS
    again = make(kind, folder)[0]
    assert replay(again, log) == STEPS
    assert differences(end, {n: p.detach() for n, p in again.named_parameters() if p.requires_grad}) == []


def test_a_log_replays_up_to_a_step(folder, tmp_path):
    train("mezo-fp32", folder, tmp_path, stop=2)
    half = trained(train("mezo-fp32", folder, tmp_path / "other", stop=2))
    train("mezo-fp32", folder, tmp_path)
    again = make("mezo-fp32", folder)[0]
    assert replay(again, tmp_path / "zeroth_order.log", until=2) == 2
    assert differences(half, {n: p.detach() for n, p in again.named_parameters() if p.requires_grad}) == []


@pytest.mark.parametrize("kind", ["mezo-fp32", "sparse-nf4"])
def test_accumulation_takes_the_step_of_the_whole_batch(kind, folder, tmp_path):
    def same_step(accumulation):
        found = train(
            kind, folder, tmp_path / str(accumulation), 3, per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        return trained(found), [r["projected_gradient"] for r in found.state.log_history if "loss" in r]

    (one, gradients), (two, others) = same_step(1), same_step(2)
    assert others == pytest.approx(gradients, rel=2e-2, abs=2e-3)  # losses of about 4 in fp32, over 2 epsilon
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_dropout_is_off_and_the_data_order_is_trainers_own(folder, tmp_path):
    class Seen(TokenData):
        def __init__(self):
            super().__init__()
            self.order = []

        def __getitem__(self, index):
            self.order.append(index)
            return super().__getitem__(index)

    orders = []
    for cls in (Trainer, ZerothOrderTrainer):
        torch.manual_seed(0)
        data, model = Seen(), make("lora-fp32", folder)[0]
        args = TrainingArguments(
            str(tmp_path), max_steps=4, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
        )
        training = []
        model.register_forward_pre_hook(lambda module, args, seen=training: seen.append(module.training))
        cls(model=model, args=args, train_dataset=data).train()
        orders.append(data.order)
    assert not any(training)
    assert orders[0] == orders[1]


def test_loss_falls_on_one_batch_learned_by_heart(folder, tmp_path):
    class One(TokenData):
        def __getitem__(self, index):
            return super().__getitem__(0)

    model, make_optimizer = make("mezo-fp32", folder)
    args = TrainingArguments(
        str(tmp_path), max_steps=150, per_device_train_batch_size=1, learning_rate=3e-3, lr_scheduler_type="constant",
        report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = ZerothOrderTrainer(
        model=model, args=args, train_dataset=One(), optimizers=(make_optimizer(model, args), None)
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0] - 0.2


def test_log_shows_g_the_schedulers_learning_rate_and_the_share(folder, tmp_path):
    trainer = train("full-fp32", folder, tmp_path)
    records = [record for record in trainer.state.log_history if "loss" in record]
    sizes = {n: (p.numel(), round(0.25 * p.numel())) for n, p in load(folder, "fp32").named_parameters()}
    # A fresh norm's weights are all 1 and tie at the threshold, which lets them all move.
    moved = sum(numel if "norm" in name else quarter for name, (numel, quarter) in sizes.items())
    assert records[0]["perturbed_share"] == pytest.approx(moved / sum(numel for numel, _ in sizes.values()))
    assert all(abs(r["projected_gradient"]) == pytest.approx(r["grad_norm"], rel=1e-4) for r in records)
    assert [lrs[0] for *_, lrs in read_log(tmp_path / "zeroth_order.log")[1]] == pytest.approx(
        [1e-3 * (1 - step / STEPS) for step in range(STEPS)]
    )


def test_no_gradient_is_ever_made(folder, tmp_path):
    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            assert all(p.grad is None for p in model.parameters())

    train("mezo-fp32", folder, tmp_path, 2, callbacks=[Watch()])


def test_support_of_sparse_mezo_is_the_papers_mask_before_training(folder):
    model = make("sparse-fp32", folder)[0]
    for name, module in model.named_modules():
        if hasattr(module, "sparse_lora_values"):
            weight = module.base_layer.weight.detach().double().abs()
            threshold = weight.flatten().sort().values[weight.numel() // 4 - 1]
            wanted = (weight.flatten() <= threshold).nonzero().squeeze(1)
            assert torch.equal(module.units("default").long(), wanted), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "fp16=True scales"),
    ],
)
def test_unsuited_arguments_are_refused(options, message, folder, tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    for name, value in options.items():
        object.__setattr__(args, name, value)
    monkeypatch.setattr(Trainer, "__init__", lambda self, args: self.__dict__.update(args=args, model=None))
    with pytest.raises(ValueError, match=message):
        ZerothOrderTrainer(args)


def test_an_optimizer_that_wants_gradients_is_refused(folder, tmp_path):
    model = make("mezo-fp32", folder)[0]
    optimizer = AgedAdamW([{"params": [p for p in model.parameters() if p.requires_grad], "per_unit_age": False}])
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(TypeError, match=r"AgedAdamW by gradients.*ZerothOrderSpec"):
        ZerothOrderTrainer(model=model, args=args, train_dataset=TokenData(), optimizers=(optimizer, None))


def test_a_moving_support_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), make_config(schedule=[Regrow()]))
    args = TrainingArguments(str(tmp_path), max_steps=30, use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="Regrow reads or changes gradients"):
        ZerothOrderTrainer(model=model, args=args, train_dataset=TokenData()).train()


def test_replay_on_another_model_names_what_is_missing(folder, tmp_path):
    train("mezo-fp32", folder, tmp_path, 2)
    with pytest.raises(ValueError, match="no parameter"):
        replay(tiny_llama(), tmp_path / "zeroth_order.log")
    (tmp_path / "zeroth_order.log").write_bytes(b"noise")
    with pytest.raises(ValueError, match="not the log"):
        replay(tiny_llama(), tmp_path / "zeroth_order.log")


def test_sparsity_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"sparsity=1.5"):
        methods.get("sparse-mezo", sparsity=1.5)
