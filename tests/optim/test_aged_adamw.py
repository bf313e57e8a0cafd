"""AgedAdamW against an independent float64 reference, torch's AdamW, and its own checkpoints."""

import io
import math

import pytest
import tiny
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from hf_sparse_peft.optim import AgedAdamW, aged_adamw_groups, move_optimizer_state, move_rows


def reference(values, gradients, births, lr, betas, eps, decay):
    """Per element, in Python floats, from the equations; `births[i]` = the step at which unit i was (re)born."""
    out = []
    for i, w in enumerate(values):
        m = v = 0.0
        age = 0
        for t, g in enumerate(gradients):
            if t == births[i] and t > 0:
                w, m, v, age = 0.0, 0.0, 0.0, 0
            age += 1
            w -= lr * decay * w
            m = betas[0] * m + (1 - betas[0]) * g[i]
            v = betas[1] * v + (1 - betas[1]) * g[i] ** 2
            w -= lr * (m / (1 - betas[0] ** age)) / (math.sqrt(v / (1 - betas[1] ** age)) + eps)
        out.append(w)
    return out


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.9, 0.0)], ids=str)
def test_units_of_different_age_follow_the_equation_in_float64(betas):
    torch.manual_seed(0)
    lr, eps, decay, births = 0.05, 1e-8, 2.0, [0, 0, 4, 9, 0]
    start, gradients = torch.randn(5), torch.randn(12, 5)
    p = torch.nn.Parameter(start.clone())
    optimizer = AgedAdamW([p], lr=lr, betas=betas, eps=eps, weight_decay=decay, per_unit_age=True)
    for t, gradient in enumerate(gradients):
        if t in (4, 9):
            kept = torch.tensor([i for i in range(5) if births[i] != t])
            move_optimizer_state(optimizer, p, kept, kept)
            move_rows(p, kept, kept)
        p.grad = gradient.clone()
        optimizer.step()
    want = reference(start.tolist(), gradients.tolist(), births, lr, betas, eps, decay)
    assert p.tolist() == pytest.approx(want, rel=2e-5, abs=2e-6)
    assert optimizer.state[p]["step"].tolist() == [12, 12, 8, 3, 12]


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scalar_age_equals_torchs_adamw_to_the_last_bit(dtype, decay):
    torch.manual_seed(0)
    start = torch.randn(33, 7, dtype=dtype)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = AgedAdamW([p], lr=3e-3, weight_decay=decay)
    theirs = torch.optim.AdamW([q], lr=3e-3, weight_decay=decay, foreach=False, capturable=False)
    for _ in range(20):
        p.grad = torch.randn_like(start)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(p, q)
    assert torch.equal(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3)], ids=str)
def test_ages_that_never_differ_train_like_torchs_adamw(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours, theirs = AgedAdamW([p], per_unit_age=True), torch.optim.AdamW([q])
    for _ in range(20):
        p.grad = torch.randn(shape)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert ours.state[p]["step"].shape == (6,)
    assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_a_reborn_unit_takes_a_full_first_step_where_a_scalar_step_overshoots_threefold():
    steps = {}
    for name, make in {"aged": lambda p: AgedAdamW(p, per_unit_age=True), "scalar": torch.optim.AdamW}.items():
        p = torch.nn.Parameter(torch.zeros(2))
        optimizer = make([{"params": [p], "lr": 1e-3, "weight_decay": 0.0}])
        kept = torch.tensor([0])
        for t in range(5001):
            if t == 5000:
                move_optimizer_state(optimizer, p, kept, kept)
                move_rows(p, kept, kept)
            p.grad = torch.ones(2)
            if t in (0, 1, 5000):
                optimizer.step()
            elif t == 2:  # skip ahead: constant gradients have constant corrected moments
                state = optimizer.state[p]
                state["step"].fill_(5000)
                state["exp_avg"].fill_(1.0)
                state["exp_avg_sq"].fill_(1.0 - 0.999**5000)
        steps[name] = -p[1].item() / 1e-3
    assert steps["aged"] == pytest.approx(1.0, rel=1e-4)
    assert steps["scalar"] == pytest.approx(0.1 / math.sqrt(0.001), rel=1e-2)


@pytest.mark.parametrize("per_unit_age", [True, False])
def test_a_dead_unit_stays_exactly_zero(per_unit_age):
    p = torch.nn.Parameter(torch.tensor([0.0, 1.0, 0.0]))
    optimizer = AgedAdamW([p], lr=0.1, weight_decay=30.0, per_unit_age=per_unit_age)
    for t in range(50):
        p.grad = torch.tensor([0.0, math.sin(t), 0.0])
        optimizer.step()
    assert p[0].item() == 0.0
    assert p[2].item() == 0.0
    assert torch.isfinite(p).all()


def test_weight_decay_pulls_the_delta_to_zero_and_never_past_the_gradient():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = AgedAdamW([p], lr=0.01, weight_decay=10.0, per_unit_age=True)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert p.item() == pytest.approx(0.9)


def trained(seed, steps, dtype, optimizer=None, p=None):
    generator = torch.Generator().manual_seed(seed)
    if p is None:
        p = torch.nn.Parameter(torch.randn(8, 3, generator=generator).to(dtype))
    if optimizer is None:
        optimizer = AgedAdamW([p], lr=0.01, per_unit_age=True)
    for _ in range(steps):
        p.grad = torch.randn(8, 3, generator=generator).to(dtype)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_training_equals_uninterrupted_training_to_the_last_bit(dtype, wrapped):
    p, optimizer = trained(1, 5, dtype)
    kept = torch.tensor([0, 2, 3])
    move_optimizer_state(optimizer, p, kept, kept)  # ages now differ
    file = io.BytesIO()
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    q = torch.nn.Parameter(saved["p"])
    fresh = AgedAdamW([q], lr=0.01, per_unit_age=True)
    (Accelerator(cpu=True).prepare_optimizer(fresh) if wrapped else fresh).load_state_dict(saved["optimizer"])
    for name, value in optimizer.state[p].items():
        assert value.dtype == (torch.int16 if name == "step" else torch.float32)
        assert fresh.state[q][name].dtype == value.dtype, name
        assert torch.equal(fresh.state[q][name], value), name
    trained(2, 5, dtype, optimizer, p)
    trained(2, 5, dtype, fresh, q)
    assert torch.equal(p, q)


def test_ages_and_moments_of_bf16_parameters_survive_loading_in_their_own_dtype():
    p, optimizer = trained(0, 1, torch.bfloat16)
    ages = [1, 255, 256, 257, 300, 4097, 20001, 32767]
    optimizer.state[p]["step"].copy_(torch.tensor(ages))
    optimizer.state[p]["exp_avg"].fill_(1 + 2**-20)
    fresh = AgedAdamW([torch.nn.Parameter(p.detach().clone())], per_unit_age=True)
    fresh.load_state_dict(optimizer.state_dict())
    (state,) = fresh.state.values()
    assert state["step"].dtype == torch.int16
    assert state["step"].tolist() == ages
    assert (state["exp_avg"] == 1 + 2**-20).all()


def test_old_ages_stop_counting_and_their_bias_correction_is_exactly_one():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AgedAdamW([p], per_unit_age=True)
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[p]["step"].fill_(32766)
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[p]["step"].tolist() == [32767, 32767]
    assert torch.tensor(1 - 0.999**32767, dtype=torch.float32) == 1


def test_a_beta_that_forgets_slower_than_short_ages_count_keeps_long_ones():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AgedAdamW([p], betas=(0.9, 0.9999), per_unit_age=True)
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[p]["step"].dtype == torch.float32


def test_a_long_torch_checkpoint_becomes_the_oldest_age_not_a_negative_one():
    p = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([p])
    p.grad = torch.ones(3)
    theirs.step()
    theirs.state[p]["step"].fill_(70001)
    ours = AgedAdamW([p], per_unit_age=True)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state[p]["step"].tolist() == [32767] * 3


def test_the_age_of_bf16_parameters_counts_past_256():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = AgedAdamW([p], per_unit_age=True)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["step"].tolist() == [300, 300]


def test_two_optimizers_never_share_state_after_loading():
    p, optimizer = trained(0, 2, torch.float32)
    fresh = AgedAdamW([torch.nn.Parameter(p.detach().clone())], per_unit_age=True)
    fresh.load_state_dict(optimizer.state_dict())
    before = optimizer.state[p]["step"].clone()
    (state,) = fresh.state.values()
    state["step"].add_(1)
    assert torch.equal(optimizer.state[p]["step"], before)


def test_a_checkpoint_of_torchs_adamw_keeps_ages_on_and_gives_every_unit_its_step():
    p = torch.nn.Parameter(torch.zeros(4))
    theirs = torch.optim.AdamW([p])
    for _ in range(3):
        p.grad = torch.ones(4)
        theirs.step()
    ours = AgedAdamW([p], per_unit_age=True)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["per_unit_age"] is True
    assert ours.state[p]["step"].tolist() == [3, 3, 3, 3]
    ours.step()


def test_loading_into_a_smaller_support_is_refused_at_once():
    _, optimizer = trained(0, 1, torch.float32)
    other = AgedAdamW([torch.nn.Parameter(torch.zeros(5, 3))], per_unit_age=True)
    with pytest.raises(ValueError, match=r"\(5, 3\)|\(5,\)"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("option", "message"),
    [({"lr": -1.0}, "lr"), ({"eps": 0.0}, "eps"), ({"betas": (0.9, 1.0)}, "betas"), ({"weight_decay": -1}, "decay")],
)
def test_options_out_of_range_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        AgedAdamW([torch.nn.Parameter(torch.zeros(1))], **option)


def test_scalar_parameters_have_no_ages_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="scalar parameter"):
        AgedAdamW([torch.nn.Parameter(torch.zeros(()))], per_unit_age=True)
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="dense"):
        AgedAdamW([p]).step()


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.input_layernorm = torch.nn.LayerNorm(3)
        self.values = torch.nn.Parameter(torch.zeros(4))
        self.frozen = torch.nn.Parameter(torch.zeros(4), requires_grad=False)


def test_groups_decay_what_trainer_decays_and_age_what_moves():
    model = Toy()
    groups = aged_adamw_groups(model, lambda name, _: name == "values", weight_decay=3.0)
    got = {(g["weight_decay"], g["per_unit_age"]): [id(p) for p in g["params"]] for g in groups}
    norm = model.input_layernorm
    assert got == {
        (3.0, True): [id(model.values)],
        (3.0, False): [id(model.linear.weight)],
        (0.0, False): [id(model.linear.bias), id(norm.weight), id(norm.bias)],
    }
    AgedAdamW(groups)
    assert [g["per_unit_age"] for g in aged_adamw_groups(model, lambda *_: False, 0.1)] == [False, False]
    with pytest.raises(ValueError, match="no trainable"):
        aged_adamw_groups(model.requires_grad_(False), lambda *_: True, 0.0)


def tiny_llama():
    return tiny.llama(hidden=8, layers=1, num_attention_heads=2, vocab_size=32)


def factory():
    def build(model, **options):
        return AgedAdamW(aged_adamw_groups(model, lambda name, _: "mlp" in name, 0.1), **options)

    return build


def test_the_decay_split_is_trainers_own(tmp_path):
    model = tiny_llama()
    arguments = TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True)
    wanted = set(Trainer(model=model, args=arguments).get_decay_parameter_names(model))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = aged_adamw_groups(model, lambda *_: True, 0.1)
    assert {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]} == wanted & set(names.values())


def test_trainer_resumes_it_to_the_last_bit(tmp_path):
    data = [{"input_ids": [i % 32] * 6, "labels": [i % 32] * 6} for i in range(16)]

    def run(steps_saved, resume):
        model = tiny_llama()
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=4,
            save_steps=steps_saved,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, optimizer_cls_and_kwargs=(factory, {"lr": 1e-2})
        )
        trainer.train(resume_from_checkpoint=resume)
        return {k: v.clone() for k, v in model.state_dict().items()}

    whole = run(2, None)
    resumed = run(100, str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())
