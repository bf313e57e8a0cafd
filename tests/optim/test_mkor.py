"""MKOR's rank-one inverses, its preconditioned steps against float64, runs that resume to the bit."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_sparse_peft import SparseLoraConfig, make_optimizer, trainer_options
from hf_sparse_peft.optim import Mkor, MkorSpec, innermost, rank_one_inverse

F64 = torch.float64


def test_the_worked_numbers_and_the_inverse_of_the_sum():
    found = rank_one_inverse(torch.eye(2, dtype=F64), torch.tensor([1.0, 2.0], dtype=F64), 0.95)
    expected = torch.tensor([[0.833333, -0.333333], [-0.333333, 0.333333]], dtype=F64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    root = torch.randn(5, 5, dtype=F64)
    x, v = root @ root.T + torch.eye(5, dtype=F64), torch.randn(5, dtype=F64)
    inverse = torch.linalg.inv(torch.linalg.inv(x) + torch.outer(v, v))
    torch.testing.assert_close(rank_one_inverse(x, v), inverse, atol=1e-10, rtol=0)


def test_steps_follow_the_equations_over_layers_that_run_twice_and_micro_batches():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    start, lr, every = model.weight.detach().clone(), 0.01, 2
    optimizer = make_optimizer(model, lr=lr, spec=MkorSpec(every=every, reset_above=50.0))
    w, m, v = start.clone(), torch.zeros(3, 4, dtype=F64), torch.zeros(3, 4, dtype=F64)
    left, right = torch.eye(3, dtype=F64), torch.eye(4, dtype=F64)
    reset = 0
    for t in range(5):
        inputs, outs, total = [], [], torch.zeros(3, 4, dtype=F64)
        for _ in range(2):  # micro-batches
            x, target = torch.randn(6, 2, 4, dtype=F64), torch.randn(6, 2, 3, dtype=F64)
            loss = (model(x) - target).square().mean() + model(2 * x).square().mean()
            loss.backward()
            for one, aim in ((x, target), (2 * x, torch.zeros_like(target))):
                y = one.view(-1, 4) @ w.T + model.bias.detach()
                inputs.append(one.view(-1, 4))
                outs.append(2 * (y - aim.view(-1, 3)) / y.numel())
                total += outs[-1].T @ inputs[-1]
        torch.testing.assert_close(model.weight.grad, total, atol=1e-12, rtol=0)
        if t and t % every == 0:
            a, g = torch.cat(inputs).mean(0), torch.cat(outs).mean(0)
            right, left = rank_one_inverse(right, a, 0.95), rank_one_inverse(left, g, 0.95)
        turned = left @ total @ right
        turned = turned * total.norm() / turned.norm()
        m, v = 0.9 * m + 0.1 * turned, 0.999 * v + 0.001 * turned**2
        w = w - lr * (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        optimizer.step(), optimizer.zero_grad()
        torch.testing.assert_close(model.weight.detach(), w, atol=1e-11, rtol=0)
        reset += int((right - torch.eye(4, dtype=F64)).abs().max() > 0.01)
    assert reset
    torch.testing.assert_close(optimizer.state[model.weight]["right_inverse"], right, atol=1e-11, rtol=0)


def test_a_factor_with_a_large_entry_begins_anew():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = make_optimizer(model, lr=0.01, spec=MkorSpec(every=1, reset_above=0.5))
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    assert torch.equal(optimizer.state[model.weight]["left_inverse"], torch.eye(3))


class StopAt4(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == 4


def models(kind):
    if kind == "whole":
        return tiny.llama()
    torch.manual_seed(1)
    return get_peft_model(tiny.llama(), LoraConfig(r=8, target_modules="all-linear"))


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_a_run_resumes_to_the_bit(kind, tmp_path):
    spec = MkorSpec(every=3, largest_side=None if kind == "whole" else 8)

    def train(out, *callbacks, resume=None):
        model = models(kind)
        options = trainer_options(model, tiny.arguments(out, 8, weight_decay=0.1), optimizer=spec)
        trainer = Trainer(model=model, train_dataset=tiny.TokenData(), **{**options, "callbacks": list(callbacks)})
        trainer.train(resume_from_checkpoint=resume)
        names = {p: name for name, p in model.named_parameters()}
        found = dict(model.state_dict())
        for p, entry in innermost(trainer.optimizer).state.items():
            found |= {f"{names[p]}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        return found

    whole = train(tmp_path / "whole")
    train(tmp_path / "halves", StopAt4())
    again = train(tmp_path / "again", resume=str(tmp_path / "halves/checkpoint-4"))
    assert whole.keys() == again.keys()
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    factors = [value for key, value in whole.items() if key.endswith("_inverse")]
    assert any(not torch.equal(factor, torch.eye(len(factor))) for factor in factors)
    assert all(len(factor) == 8 for factor in factors) == (kind == "lora")


def test_what_has_no_linear_layer_and_options_out_of_range_are_refused(tmp_path):
    model = get_peft_model(tiny.llama(), SparseLoraConfig(r=4, density=0, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="none trains here"):
        make_optimizer(model, lr=1e-3, spec=MkorSpec())
    with pytest.raises(ValueError, match="not of a parameter of shape"):
        Mkor([torch.nn.Parameter(torch.zeros(3))], factored=True)
    with pytest.raises(ValueError, match="Mkor takes every"):
        Mkor([torch.nn.Parameter(torch.zeros(3, 2))], blend=2.0)
    with pytest.raises(ValueError, match=r"fp16=True scales"):
        MkorSpec().check_run(accumulation=1, clips=False, fp16=True)
