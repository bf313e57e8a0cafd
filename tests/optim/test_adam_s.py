"""AdamS against the equations in float64, the sheet's worked numbers, Adam, and its own checkpoints."""

import io

import pytest
import torch

from hf_sparse_peft.optim import AdamS, move_optimizer_state, move_rows
from hf_sparse_peft.sparsity import n_of_m_mask

STEP = {"lr": 0.01, "decay": 0.5, "total_steps": 10, "cast_scope": True}


def reference(w, gradients, lr, decay, total, every=10, betas=(0.9, 0.999), eps=1e-8, offset=0.0):
    """From the equations, in float64, groups of 4 along the last axis."""
    w, mu = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    v, keep = mu.clone(), None
    for t, g in enumerate(gradients.double()):
        whole = w + offset
        if t % every == 0:
            keep = torch.zeros_like(w, dtype=torch.bool)
            for row in range(w.shape[0]):
                for begin in range(0, w.shape[1], 4):
                    best = sorted(range(4), key=lambda i: -abs(float(whole[row, begin + i])))[:2]
                    keep[row, [begin + i for i in best]] = True
        mu = betas[0] * mu + (1 - betas[0]) * g
        pulled = torch.where(keep, mu, (1 - t / total) * mu + t / total * decay * whole.sign())
        v = betas[1] * v + (1 - betas[1]) * pulled**2
        rate = lr[t] if isinstance(lr, list) else lr
        w = w - rate * (pulled / (1 - betas[0] ** (t + 1))) / ((v / (1 - betas[1] ** (t + 1))).sqrt() + eps)
    return w, mu


def run(start, gradients, offset=None, **options):
    p = torch.nn.Parameter(start.clone())
    optimizer = AdamS([p], offset_of=lambda q: offset, **{**STEP, **options})
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach(), optimizer


def test_the_worked_numbers():
    start = torch.tensor([[0.4, -0.1, 0.3, -0.2]])
    gradients = torch.tensor([[[0.1, 0.1, -0.1, 0.2]], [[0.1, -0.3, 0.2, 0.1]]])
    first, _ = run(start, gradients[:1])
    assert first.tolist()[0] == pytest.approx([0.3, -0.2, 0.4, -0.3], abs=1e-5)
    second, optimizer = run(start, gradients)
    assert second.tolist()[0] == pytest.approx([0.234143, -0.126357, 0.344926, -0.242064], abs=2e-6)
    (state,) = optimizer.state.values()
    assert state["exp_avg"].tolist()[0] == pytest.approx([0.019, -0.021, 0.011, 0.028])
    assert state["mask"].tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("offset", [False, True])
def test_many_steps_follow_the_equations_and_the_mask_is_chosen_anew(offset):
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 8), torch.randn(25, 3, 8)
    base = torch.randn(3, 8) if offset else None
    got, optimizer = run(start, gradients, base, lr=0.1, total_steps=25, mask_every=5)
    want, mu = reference(start, gradients, 0.1, 0.5, 25, every=5, offset=0.0 if base is None else base.double())
    assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-5)
    (state,) = optimizer.state.values()
    assert torch.allclose(state["exp_avg"].double(), mu, rtol=1e-5, atol=1e-7)
    before = n_of_m_mask((start if base is None else start + base).abs(), 2, 4)
    assert not torch.equal(state["mask"], before)


def test_mu_is_adams_and_kept_weights_do_not_see_the_decay():
    torch.manual_seed(1)
    start, gradients = torch.randn(4, 8), torch.randn(6, 4, 8)
    weak, optimizer = run(start, gradients, decay=0.0, mask_every=100)
    strong, _ = run(start, gradients, decay=5.0, mask_every=100)
    kept = n_of_m_mask(start.abs(), 2, 4)
    assert torch.equal(weak[kept], strong[kept])
    assert not torch.isclose(weak[~kept], strong[~kept]).any()
    q = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([q], lr=0.01)
    for gradient in gradients:
        q.grad = gradient.clone()
        adam.step()
    (state,) = optimizer.state.values()
    assert torch.allclose(state["exp_avg"], adam.state[q]["exp_avg"], rtol=1e-6, atol=1e-8)


def test_masked_weights_of_a_quadratic_end_within_twice_the_last_rate():
    torch.manual_seed(2)
    target = torch.randn(4, 16)
    p, steps = torch.nn.Parameter(target + 0.1 * torch.randn(4, 16)), 600
    optimizer = AdamS([p], lr=0.02, decay=2.0, total_steps=steps, cast_scope=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - 0.9 * step / steps)
        p.grad = (p - target).detach()
        optimizer.step()
    kept = n_of_m_mask(p.detach().abs(), 2, 4)
    assert (p[~kept].abs() < 2 * 0.002 * 1.05).all()
    assert torch.allclose(p[kept], target[kept], atol=0.01)
    assert (target[~kept].abs() > 0.1).sum() > 10  # it was not small before


def test_other_groups_are_adamw_to_the_bit():
    torch.manual_seed(3)
    p, q = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    ours = AdamS([{"params": [p], "weight_decay": 0.1}], lr=1e-2)
    theirs = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1, foreach=False)
    for _ in range(4):
        p.grad = torch.randn(5, 3)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(p, q)


def test_a_resumed_run_ends_with_the_same_bits_and_a_move_carries_all_state():
    torch.manual_seed(4)
    start, gradients = torch.randn(4, 8), torch.randn(10, 4, 8)
    whole, _ = run(start, gradients, mask_every=4)
    half, optimizer = run(start, gradients[:6], mask_every=4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    p = torch.nn.Parameter(half.clone())
    resumed = AdamS([p], **{**STEP, "total_steps": None})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0]["total_steps"] == 10
    assert resumed.state[p]["mask"].dtype == torch.bool
    for gradient in gradients[6:]:
        p.grad = gradient.clone()
        resumed.step()
    assert torch.equal(p, whole)
    before = {name: value.clone() for name, value in resumed.state[p].items()}
    old, new = torch.tensor([1, 3]), torch.tensor([0, 2])
    move_optimizer_state(resumed, p, old, new)
    move_rows(p, old, new)
    for name in ("exp_avg", "exp_avg_sq", "mask"):
        assert torch.equal(resumed.state[p][name][new], before[name][old])
        assert not resumed.state[p][name][1].any()


@pytest.mark.parametrize(
    ("parameter", "options", "message"),
    [
        (torch.zeros(16), {}, r"multiple of of=4, got a parameter of shape \(16,\)"),
        (torch.zeros(4, 6), {}, "multiple of of=4"),
        (torch.zeros(4, 8, dtype=torch.bfloat16), {}, "below its resolution"),
        (torch.zeros(4, 8), {"keep": 4}, "keep=4 of=4"),
        (torch.zeros(4, 8), {"mask_every": 0}, "mask_every=0"),
        (torch.zeros(4, 8), {"decay": -1.0}, "decay=-1.0"),
    ],
    ids=["flat", "width", "bf16", "keep", "mask_every", "decay"],
)
def test_what_cannot_be_in_scope_is_refused(parameter, options, message):
    with pytest.raises(ValueError, match=message):
        AdamS([torch.nn.Parameter(parameter)], cast_scope=True, **options)


def test_steps_without_a_length_and_offsets_of_another_shape_are_refused():
    p = torch.nn.Parameter(torch.zeros(4, 8))
    p.grad = torch.ones(4, 8)
    with pytest.raises(ValueError, match="no total_steps"):
        AdamS([p], cast_scope=True).step()
    with pytest.raises(ValueError, match=r"added to a matrix of shape \(8, 4\)"):
        AdamS([p], offset_of=lambda q: torch.zeros(8, 4), **STEP).step()
