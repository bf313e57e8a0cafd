"""`Distil`: the loss by the equation in float64, in a Trainer's steps and in a loop, with labels left out, heads and
masks; the teacher is the base, and passes leave no trace."""

import pytest
import torch
from peft import get_peft_model
from training_toolbox import TokenData, adapted, make_config, tiny_llama
from transformers import Trainer, TrainingArguments

from hf_sparse_peft import Controller, Distil, callbacks_for
from hf_sparse_peft.rules.distil import adapters_left_out


def batch(masked: bool = True):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 48, (2, 8), generator=generator)
    labels = ids.clone()
    if masked:
        labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def expected(teacher, student, labels, weight, temperature):
    """From the equation, in float64, one position after the other."""
    divergences, losses = [], []
    for row in range(labels.shape[0]):
        for at in range(labels.shape[1] - 1):
            if labels[row, at + 1] == -100:
                continue
            p = (teacher[row, at].double() / temperature).softmax(-1)
            q = (student[row, at].double() / temperature).softmax(-1)
            divergences.append(temperature**2 * float((p * (p.log() - q.log())).sum()))
            losses.append(-float(student[row, at].double().log_softmax(-1)[labels[row, at + 1]]))
    return sum(weight * d + (1 - weight) * c for d, c in zip(divergences, losses, strict=True)) / len(losses)


def moved(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return model


@pytest.mark.parametrize(("weight", "temperature"), [(1 / 3, 1.0), (0.8, 2.0), (1.0, 1.0)])
def test_the_loss_is_the_equations_and_its_gradient_reaches_the_adapter(weight, temperature):
    config = make_config(r=2, modules_to_save=["lm_head"], schedule=[Distil(weight, temperature)])
    model = moved(adapted(config)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    one = batch()
    with torch.no_grad():
        student = model(input_ids=one["input_ids"]).logits
        with adapters_left_out(model):
            teacher = model(input_ids=one["input_ids"]).logits
    base = tiny_llama()
    assert torch.equal(teacher, base(input_ids=one["input_ids"]).logits)
    trained = [p for p in model.parameters() if p.requires_grad]
    with Controller(model, optimizer, total_steps=1) as rules:
        rules.before_step()
        loss = model(**one).loss
        assert float(loss) == pytest.approx(expected(teacher, student, one["labels"], weight, temperature), rel=1e-5)
        loss.backward()
        assert all(p.requires_grad for p in trained)
        assert all(p.grad is not None and p.grad.any() for p in trained)
        model.eval()
        assert float(model(**one).loss) != pytest.approx(float(loss))  # evaluation is the model's own
        model.train()
        optimizer.step()
        rules.after_step()
    assert float(model(**one).loss) == pytest.approx(float(model.get_base_model()(**one).loss))


def test_accumulated_batches_of_different_lengths_are_averaged_over_all_labels(tmp_path):
    """As Trainer averages the loss: by the labels of the whole step, not of each micro-batch."""

    class Data(TokenData):
        def __getitem__(self, index):
            one = super().__getitem__(index)
            one["labels"][: index % 4 * 2] = -100
            return one

    states = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = adapted(make_config(r=2, schedule=[Distil(0.7)]))
        args = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            learning_rate=1e-2, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=11,
        )  # fmt: skip
        Trainer(model, args, train_dataset=Data(), callbacks=callbacks_for(model)).train()
        states.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-5), name


def test_dropout_is_the_students_alone():
    config = make_config(schedule=[Distil(1.0)])
    base = tiny_llama()
    base.config.attention_dropout = 0.5
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Controller(model, optimizer, total_steps=1) as rules:
        rules.before_step()
        assert float(model(**batch()).loss) > 1e-4  # the adapter adds nothing yet: the two differ by dropout
        assert all(module.training for module in model.modules())


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(ValueError, match="Distil's teacher is the base, and bias='all'"):
        make_config(bias="all", schedule=[Distil()])
    model = adapted(make_config(schedule=[Distil()])).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Controller(model, optimizer, total_steps=1) as rules:
        rules.before_step()
        with pytest.raises(ValueError, match="needs the model's own loss and logits"):
            model(input_ids=batch()["input_ids"])
    model.add_adapter("other", make_config(schedule=[Distil()]))
    model.base_model.set_adapter(["default", "other"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="'default' and 'other' both ask for it"):
        Controller(model, optimizer, total_steps=1)
