"""AdamR against its worked numbers and a float64 reference; resumption and what it refuses."""

import io
import math

import pytest
import torch

from hf_sparse_peft.optim import AdamR

F64 = torch.float64


def stepped(optimizer, params, grads):
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = None if grad is None else grad.to(p.dtype)
        optimizer.step()


def gradients(steps, *shapes, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(*shape, generator=generator, dtype=F64) for shape in shapes] for _ in range(steps)]


def test_the_worked_numbers():
    p, grad = torch.nn.Parameter(torch.tensor([1.5, 1.0], dtype=F64)), torch.tensor([0.3, -0.4], dtype=F64)
    optimizer = AdamR([p], 0.1, weight_decay=0.01)
    optimizer.state[p]["start"] = torch.tensor([1.0, 2.0], dtype=F64)
    stepped(optimizer, [p], [[grad]])
    assert p.tolist() == pytest.approx([1.39858579, 1.10282842], abs=1e-7)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("start", ["first", "zero"])
def test_q_is_one_number_for_all_parameters_that_have_a_gradient(norm, start):
    shapes, lr, decay = ((3, 2), (4,), (2,)), 0.05, 0.3
    params = [torch.nn.Parameter(torch.randn(*shape, dtype=F64)) for shape in shapes]
    values = [p.detach().clone() for p in params]
    first = [value.clone() if start == "first" else torch.zeros_like(value) for value in values]
    m, v, steps = [0.0] * 3, [0.0] * 3, [0] * 3
    grads = gradients(4, *shapes)
    grads[1][2] = grads[2][0] = None
    for step in grads:
        hats = {}
        for at, g in enumerate(step):
            if g is not None:
                steps[at] += 1
                m[at], v[at] = 0.9 * m[at] + 0.1 * g, 0.99 * v[at] + 0.01 * g * g
                hats[at] = v[at] / (1 - 0.99 ** steps[at])
        q = math.sqrt(sum(float(h.sum()) for h in hats.values()) / sum(h.numel() for h in hats.values()))
        for at, hat in hats.items():
            change = values[at] - first[at]
            values[at] = values[at] - lr * decay / q * (change if norm == "l2" else change.sign())
            values[at] = values[at] - lr * m[at] / (1 - 0.9 ** steps[at]) / (hat.sqrt() + 1e-8)
    optimizer = AdamR(params, lr, (0.9, 0.99), weight_decay=decay, norm=norm, start=start)
    stepped(optimizer, params, grads)
    for p, value in zip(params, values, strict=True):
        torch.testing.assert_close(p.detach(), value, atol=1e-12, rtol=0)
    assert all(("start" in optimizer.state[p]) == (start == "first") for p in params)


def test_without_gradients_of_size_q_is_1_and_with_larger_ones_the_pull_is_weaker():
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=F64))
    optimizer = AdamR([p], 0.1, weight_decay=0.5, start="zero")
    stepped(optimizer, [p], [[torch.zeros(1)]])
    assert p.item() == pytest.approx(2 * (1 - 0.05))
    moved = []
    for scale in (1.0, 10.0):
        p = torch.nn.Parameter(torch.tensor([2.0], dtype=F64))
        stepped(AdamR([p], 0.1, eps=1e-30, weight_decay=0.5, start="zero"), [p], [[torch.full((1,), scale)]])
        moved.append(2.0 - p.item() - 0.1)
    assert moved == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(dtype):
    def build(value=None):
        p = torch.nn.Parameter(torch.ones(4, 3, dtype=dtype) if value is None else value.clone())
        return p, AdamR([p], 0.05, weight_decay=0.1)

    grads = gradients(6, (4, 3))
    whole, one = build()
    stepped(one, [whole], grads)
    half, two = build()
    stepped(two, [half], grads[:3])
    file = io.BytesIO()
    torch.save(two.state_dict(), file)
    file.seek(0)
    resumed, three = build(half.detach())
    three.load_state_dict(torch.load(file, weights_only=True))
    assert three.state[resumed]["start"].dtype == dtype
    stepped(three, [resumed], grads[3:])
    assert torch.equal(whole, resumed)
    with pytest.raises(ValueError, match="its parameter"):
        AdamR([torch.nn.Parameter(torch.zeros(5, 3))]).load_state_dict(three.state_dict())


@pytest.mark.parametrize("options", [{"norm": "l3"}, {"start": "last"}, {"eps": 0.0}, {"betas": (0.9, 1.0)}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="AdamR takes"):
        AdamR([torch.nn.Parameter(torch.zeros(2))], **options)
