"""Muon against its worked numbers, a float64 reference and torch's own class; stacks, moves, resumption."""

import io

import pytest
import torch

from hf_sparse_peft.optim import Muon, move_optimizer_state, newton_schulz

F64 = torch.float64


def gradients(steps, *shape, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=F64) for _ in range(steps)]


def run(optimizer, p, grads):
    for grad in grads:
        p.grad = grad.to(p.dtype)
        optimizer.step()
    return p.detach()


def reference_iteration(g):
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / s.pow(2).sum().sqrt()  # the polynomial acts on singular values
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


def test_the_worked_numbers():
    diagonal = lambda *values: torch.diag(torch.tensor(values, dtype=F64))  # noqa: E731
    close = lambda got, want: torch.testing.assert_close(got, want, atol=1e-6, rtol=0)  # noqa: E731
    close(newton_schulz(diagonal(3, 4)), diagonal(0.72287613, 1.11920390))
    close(newton_schulz(diagonal(1, 0.01)), diagonal(0.69648800, 0.69889459))
    column = torch.tensor([[3.0], [4], [0], [0]], dtype=F64)
    close(newton_schulz(column), torch.tensor([[0.41786186], [0.55714914], [0], [0]], dtype=F64))
    p = torch.nn.Parameter(torch.ones(4, 1, dtype=F64))
    run(Muon([p], 0.1, weight_decay=0.5), p, [column])
    expected = [[0.95 - 0.083572372], [0.95 - 0.111429829], [0.95], [0.95]]  # decay first
    close(p.detach(), torch.tensor(expected, dtype=F64))


def test_the_iteration_is_odd_in_the_matrix_and_blind_to_its_scale():
    (g,) = gradients(1, 6, 4)
    torch.testing.assert_close(newton_schulz(g), reference_iteration(g), atol=1e-12, rtol=0)
    torch.testing.assert_close(newton_schulz(g.T), newton_schulz(g).T, atol=1e-12, rtol=0)
    torch.testing.assert_close(newton_schulz(7 * g), newton_schulz(g), atol=1e-12, rtol=0)
    assert bool((newton_schulz(torch.zeros(3, 3)) == 0).all())


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_matrices_are_torchs_muon_to_the_bit(adjust, nesterov):
    for shape in ((6, 4), (4, 6)):
        p, q = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        options = {"weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
        run(Muon([p], 0.02, adjust=adjust, **options), p, gradients(4, *shape))
        run(torch.optim.Muon([q], 0.02, adjust_lr_fn=adjust, **options), q, gradients(4, *shape))
        assert torch.equal(p, q)


def test_a_stack_is_one_matrix_each_and_columns_count_as_rows():
    grads = gradients(3, 5, 4, 3)
    stack = torch.nn.Parameter(torch.zeros(5, 4, 3, dtype=F64))
    run(Muon([stack], 0.02), stack, grads)
    for at in range(5):
        one = torch.nn.Parameter(torch.zeros(4, 3, dtype=F64))
        run(Muon([one], 0.02), one, [grad[at] for grad in grads])
        torch.testing.assert_close(stack[at].detach(), one.detach(), atol=1e-12, rtol=0)
    across, along = (torch.nn.Parameter(torch.zeros(*shape, dtype=F64)) for shape in ((3, 12), (12, 3)))
    grads = gradients(2, 3, 12)
    run(Muon([{"params": [across], "transposed": True}], 0.02), across, grads)
    run(Muon([along], 0.02), along, [grad.T for grad in grads])
    torch.testing.assert_close(across.detach().T, along.detach(), atol=1e-12, rtol=0)


def test_vectors_are_refused_and_other_groups_are_adamw_to_the_bit():
    with pytest.raises(ValueError, match=r"not a parameter of shape \(5,\)"):
        Muon([torch.nn.Parameter(torch.zeros(5))])
    for option, value in (("momentum", 1.0), ("adjust", "none"), ("iteration_dtype", "float8")):
        with pytest.raises(ValueError, match=f"{option}={value!r} is out of range"):
            Muon([torch.nn.Parameter(torch.zeros(2, 2))], **{option: value})
    p, q, grads = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5)), gradients(4, 5)
    run(Muon([{"params": [p], "orthogonal": False}], 0.02, weight_decay=0.1), p, grads)
    run(torch.optim.AdamW([q], 0.02, weight_decay=0.1, foreach=False), q, grads)
    assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_ends_with_the_same_bits_and_a_move_carries_the_momentum(dtype):
    grads = gradients(6, 6, 4)
    whole = torch.nn.Parameter(torch.ones(6, 4, dtype=dtype))
    run(Muon([whole], 0.02), whole, grads)
    first = torch.nn.Parameter(torch.ones(6, 4, dtype=dtype))
    optimizer, file = Muon([first], 0.02), io.BytesIO()
    run(optimizer, first, grads[:3])
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = Muon([second], 0.02)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(resumed, second, grads[3:]), whole)
    before = resumed.state[second]["momentum_buffer"].clone()
    move_optimizer_state(resumed, second, torch.tensor([0, 2, 5]), torch.tensor([1, 0, 3]))
    after = resumed.state[second]["momentum_buffer"]
    assert torch.equal(after[[1, 0, 3]], before[[0, 2, 5]])
    assert bool((after[[2, 4, 5]] == 0).all())
