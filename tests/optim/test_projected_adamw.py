"""ProjectedAdamW against float64 references written from the papers' equations, and what it refuses."""

import io
import math

import pytest
import torch

from hf_sparse_peft.optim import (
    BlockProjection,
    ColumnProjection,
    EntryProjection,
    GradientResidual,
    NormScaledResidual,
    ProjectedAdamW,
    RandomProjection,
    SignResidual,
    SVDProjection,
    move_optimizer_state,
)

F64 = torch.float64
G1 = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=F64)
G2 = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=F64)


def matrix(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=F64).to(dtype))


def gradients(steps, *shape, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=F64) for _ in range(steps)]


def run(optimizer, parameter, grads):
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def basis(grad, r):
    """Right singular vectors of a tall matrix, left ones of a wide one, the largest entry of each positive."""
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    found = vh[:r].T if grad.shape[0] >= grad.shape[1] else u[:, :r]
    for j in range(r):
        if found[found[:, j].abs().argmax(), j] < 0:
            found[:, j] = -found[:, j]
    return found


def reference(w, grads, r, every, scale, lr, decay=0.0, betas=(0.9, 0.999), eps=1e-8, released=False, fira=0.0):
    """GaLore's algorithm 2, and Fira's with a growth limit, step by step."""
    w, m, v, last = w.clone(), 0.0, 0.0, None
    tall = w.shape[0] >= w.shape[1]
    for t, g in enumerate(grads):
        if t % every == 0:
            p = basis(g, r)
        low = g @ p if tall else p.T @ g
        m, v = betas[0] * m + (1 - betas[0]) * low, betas[1] * v + (1 - betas[1]) * low * low
        c1, c2 = 1 - betas[0] ** (t + 1), math.sqrt(1 - betas[1] ** (t + 1))
        n = m / (v.sqrt() + eps) if released else (m / c1) / (v.sqrt() / c2 + eps)

        def back(x, p=p):
            return x @ p.T if tall else p @ x

        step = back(n) * (scale if released else 1.0)
        if fira:
            rest = g - back(low) * (scale if released else 1.0)
            axis = 1 if tall else 0
            phi = n.pow(2).sum(axis, keepdim=True).sqrt() / (low.pow(2).sum(axis, keepdim=True).sqrt() + 1e-8)
            extra = phi * rest
            norm = extra.pow(2).sum().sqrt()
            if last is not None:
                limit = max(float(norm / (last + 1e-8)), fira) / fira
                extra, norm = extra / limit, norm / limit
            last = norm
            step = step + extra
        if not released:
            w = w * (1 - lr * decay)
        w = w - lr * step * (c2 / c1 if released else scale)
        if released:
            w = w * (1 - lr * decay)
    return w


def test_the_worked_numbers_of_galores_released_class():
    for every, expected in ((2, {(0, 0): -0.0417510162}), (1, {(0, 1): -0.0167512797, (1, 1): -0.0186031264})):
        p = torch.nn.Parameter(torch.zeros(3, 2, dtype=F64))
        options = {"eps": 1e-6, "projection": SVDProjection(1), "every": every, "scale": 0.25, "released": True}
        optimizer = ProjectedAdamW([p], 0.1, **options)
        assert run(optimizer, p, [G1])[0, 0].item() == pytest.approx(-0.0249997365, abs=1e-9)
        run(optimizer, p, [G2])
        for place, value in expected.items():
            assert p[place].item() == pytest.approx(value, abs=1e-9)
        assert bool((p[2] == 0).all())
    p = torch.nn.Parameter(torch.ones(3, 2, dtype=F64))
    found = run(ProjectedAdamW([p], 0.1, weight_decay=0.5, **options), p, [G1])
    assert found[0, 0].item() == pytest.approx(0.9262502503, abs=1e-9)  # decay after the update
    assert bool((found.flatten()[1:] == 0.95).all())


def test_the_papers_epsilon_is_added_after_the_correction():
    p = torch.nn.Parameter(torch.zeros(3, 2, dtype=F64))
    run(ProjectedAdamW([p], 0.1, eps=1e-6, projection=SVDProjection(1), scale=0.25), p, [G1])
    assert p[0, 0].item() == pytest.approx(-0.0249999917, abs=1e-9)


def test_the_worked_numbers_of_firas_released_class():
    p, g = torch.nn.Parameter(torch.zeros(3, 2, dtype=F64)), torch.tensor([[3, 0.5], [1, 2], [0, 0.5]], dtype=F64)
    options = {"eps": 1e-6, "projection": SVDProjection(1), "residual": NormScaledResidual(), "every": 100}
    optimizer = ProjectedAdamW([p], 0.1, released=True, **options)
    first = run(optimizer, p, [g]).clone()
    expected = [[-0.1028529955, -0.0171421660], [-0.0563792795, -0.1127585582], [-4.1e-9, -0.2287278648]]
    torch.testing.assert_close(first, torch.tensor(expected, dtype=F64), atol=1e-7, rtol=0)
    norms = [optimizer.state[p]["residual_norm"].item()]
    for factor in (1, 10):  # the norm is limited for ten times the gradient too
        run(optimizer, p, [factor * g])
        norms.append(optimizer.state[p]["residual_norm"].item())
    assert norms == pytest.approx([7.0061121854, 7.0761733174, 7.1469350606], abs=1e-6)
    assert torch.linalg.matrix_rank(first) == 2


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)], ids=str)
@pytest.mark.parametrize("fira", [0.0, 1.01], ids=["galore", "fira"])
@pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
def test_many_steps_follow_the_equations_over_several_subspaces(shape, fira, released):
    p, grads = matrix(*shape), gradients(9, *shape)
    start = p.detach().clone()
    options = {"r": 2, "every": 4, "scale": 0.5, "lr": 0.05, "decay": 0.1, "released": released}
    expected = reference(start, grads, fira=fira, **options)
    residual = NormScaledResidual(fira) if fira else None
    optimizer = ProjectedAdamW(
        [p], 0.05, weight_decay=0.1, projection=SVDProjection(2), residual=residual, every=4, scale=0.5,
        released=released,
    )  # fmt: skip
    torch.testing.assert_close(run(optimizer, p, grads), expected, atol=1e-11, rtol=0)
    small = (7, 2) if shape[0] > shape[1] else (2, 7)
    assert optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape == small


def test_the_update_has_the_rank_of_the_subspace_until_a_second_one_is_chosen():
    p = matrix(8, 6)
    start, optimizer = p.detach().clone(), ProjectedAdamW([p], 0.1, projection=SVDProjection(2), every=3)
    run(optimizer, p, gradients(3, 8, 6))
    assert torch.linalg.matrix_rank(p - start) == 2
    run(optimizer, p, gradients(1, 8, 6, seed=9))
    assert torch.linalg.matrix_rank(p - start) > 2


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
def test_a_subspace_of_full_rank_is_adam_in_rotated_coordinates(side, shape):
    projection = SVDProjection(4, side)
    p, grads = matrix(*shape), gradients(4, *shape)
    state = projection.choose(grads[0], 0)
    for name, tensor in state.items():
        eye = torch.eye(tensor.shape[1], dtype=F64)
        torch.testing.assert_close(tensor.T @ tensor, eye, atol=1e-12, rtol=0)
        largest = tensor.gather(0, tensor.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all()), name
    small = torch.nn.Parameter(torch.zeros(projection.reduced(shape), dtype=F64))
    assert small.shape == projection.down(grads[0], state).shape
    adam = torch.optim.Adam([small], 0.05)
    run(adam, small, [projection.down(g, state) for g in grads])
    expected = p.detach() + projection.up(small.detach(), state, shape)
    torch.testing.assert_close(
        run(ProjectedAdamW([p], 0.05, projection=projection), p, grads), expected, atol=1e-12, rtol=0
    )
    x = torch.randn(projection.reduced(shape), dtype=F64)
    torch.testing.assert_close(projection.down(projection.up(x, state, shape), state), x, atol=1e-12, rtol=0)


def test_firas_residual_of_a_full_subspace_is_nothing_and_never_lies_in_the_subspace():
    shapes, grads = (6, 4), gradients(3, 6, 4)
    p, q = matrix(*shapes), matrix(*shapes)
    run(ProjectedAdamW([p], 0.05, projection=SVDProjection(4)), p, grads)
    run(ProjectedAdamW([q], 0.05, projection=SVDProjection(4), residual=NormScaledResidual()), q, grads)
    torch.testing.assert_close(p, q, atol=1e-12, rtol=0)
    p, q = matrix(*shapes), matrix(*shapes)
    optimizer = ProjectedAdamW([p], 0.05, projection=SVDProjection(2), residual=NormScaledResidual())
    run(optimizer, p, grads[:1]), run(ProjectedAdamW([q], 0.05, projection=SVDProjection(2)), q, grads[:1])
    assert float((p - q).detach().abs().max()) > 1e-3
    torch.testing.assert_close((p - q) @ optimizer.state[p]["right"], torch.zeros(6, 2, dtype=F64), atol=1e-12, rtol=0)


def test_the_worked_numbers_of_frugal(monkeypatch):
    turns = iter([0, 1])

    def draw(size, count, generator):
        return torch.tensor([next(turns)], dtype=torch.int32)

    monkeypatch.setattr("hf_sparse_peft.optim.projections.random_units", draw)
    p = torch.nn.Parameter(torch.zeros(3, 2, dtype=F64))
    optimizer = ProjectedAdamW(
        [p], 0.1, projection=ColumnProjection(0.5), residual=SignResidual(0.1), every=2, reset_moments=True
    )
    run(optimizer, p, [G1, G2])
    expected = [[-0.1670058248, 0], [0, -0.02], [0, 0]]
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=F64), atol=1e-9, rtol=0)
    run(optimizer, p, [torch.tensor([[1.0, 2], [-2, 1], [0.5, 0]], dtype=F64)])
    expected = [[-0.1770058248, -0.0999999995], [0.01, -0.1199999990], [-0.01, 0]]
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=F64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("projection", [ColumnProjection(1.0), ColumnProjection(1.0, "rows"), EntryProjection(1.0),
                                        BlockProjection(1.0)], ids=str)  # fmt: skip
def test_all_of_a_matrix_in_the_subspace_is_adamw(projection):
    p, q, grads = matrix(6, 4), matrix(6, 4), gradients(5, 6, 4)
    run(ProjectedAdamW([p], 0.05, weight_decay=0.1, projection=projection, residual=SignResidual()), p, grads)
    run(torch.optim.AdamW([q], 0.05, weight_decay=0.1), q, grads)
    torch.testing.assert_close(p, q, atol=1e-12, rtol=0)


@pytest.mark.parametrize("residual", [SignResidual(0.1), GradientResidual(0.1)], ids=str)
def test_nothing_in_the_subspace_is_the_residual_alone_and_decay_moves_every_entry(residual):
    p, (grad,) = matrix(4, 6), gradients(1, 4, 6)
    start = p.detach().clone()
    run(ProjectedAdamW([p], 0.05, weight_decay=0.1, projection=BlockProjection(0.0), residual=residual), p, [grad])
    rest = grad.sign() if isinstance(residual, SignResidual) else grad
    torch.testing.assert_close(p.detach(), start * 0.995 - 0.005 * rest, atol=1e-14, rtol=0)
    for projection in (ColumnProjection(0.5), SVDProjection(2)):
        p = matrix(4, 6)
        optimizer = ProjectedAdamW([p], 0.05, weight_decay=0.1, projection=projection, residual=residual)
        torch.testing.assert_close(run(optimizer, p, [torch.zeros(4, 6)]), start * 0.995, atol=1e-14, rtol=0)


def test_blocks_take_turns_and_those_that_rest_have_no_moments():
    params = [matrix(3, 2, seed=s) for s in range(4)]
    projection = BlockProjection(0.5, "ascending")
    optimizer = ProjectedAdamW(params, 0.05, projection=projection, every=2, reset_moments=True)
    active = []
    for _ in range(6):
        for p in params:
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moved = [not torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True)]
        assert moved == ["exp_avg" in optimizer.state[p] for p in params]  # without a residual: BAdam
        active.append([at for at, one in enumerate(moved) if one])
    assert active == [[0, 1]] * 2 + [[2, 3]] * 2 + [[0, 1]] * 2
    drawn = {tuple(at for at in range(4) if BlockProjection(0.5).holds(at, 4, period, 3)) for period in range(20)}
    assert len(drawn) > 2
    assert {len(one) for one in drawn} == {2}
    down = BlockProjection(0.5, "descending")
    assert [at for at in range(4) if down.holds(at, 4, 0, 0)] == [2, 3]


def test_random_subspaces_are_orthonormal_seeded_and_new_in_each_period():
    p, q, other = matrix(6, 4), matrix(6, 4), matrix(6, 4)
    grads, seen = gradients(4, 6, 4), []
    for one, seed in ((p, 1), (q, 1), (other, 2)):
        optimizer = ProjectedAdamW([one], 0.05, projection=RandomProjection(2), every=2, seed=seed)
        for part in (grads[:2], grads[2:]):
            run(optimizer, one, part)
            found = optimizer.state[one]["right"]
            torch.testing.assert_close(found.T @ found, torch.eye(2, dtype=F64), atol=1e-12, rtol=0)
            seen.append(found.clone())
    assert torch.equal(p, q)
    assert not torch.equal(p, other)
    assert not torch.equal(seen[0], seen[1])


def test_groups_without_a_projection_and_vectors_are_adamw_to_the_bit():
    made = [[matrix(6, 4, dtype=torch.float32), matrix(5, dtype=torch.float32)] for _ in range(2)]
    plain = {"params": made[0][:1], "projection": None}
    ours = ProjectedAdamW([plain, {"params": made[0][1:]}], 0.05, weight_decay=0.1, projection=SVDProjection(2))
    theirs = torch.optim.AdamW(made[1], 0.05, weight_decay=0.1, foreach=False)
    for grads in zip(gradients(5, 6, 4), gradients(5, 5), strict=True):
        for optimizer, params in ((ours, made[0]), (theirs, made[1])):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.float()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(*made, strict=True))


def test_a_matrix_has_no_step_while_its_gradient_is_zero():
    p, grads = matrix(6, 4), gradients(2, 6, 4)
    start, optimizer = p.detach().clone(), ProjectedAdamW([p], 0.05, projection=SVDProjection(2))
    run(optimizer, p, [torch.zeros(6, 4)])  # as LoRA's A while B is 0
    assert torch.equal(p, start)
    assert "right" not in optimizer.state[p]
    q = matrix(6, 4)
    run(ProjectedAdamW([q], 0.05, projection=SVDProjection(2)), q, grads)
    assert torch.equal(run(optimizer, p, grads), q)
    p.grad = torch.full((6, 4), torch.nan, dtype=F64)
    with pytest.raises(ValueError, match="not finite at its step 0"):
        ProjectedAdamW([p], 0.05, projection=SVDProjection(2)).step()


W = torch.tensor([[3.0, 4], [0, 2], [1, 0]], dtype=F64)
G = torch.tensor([[1.0, 0], [0.5, 0.5], [0, 2]], dtype=F64)


def test_the_worked_numbers_of_gradnormlorps_released_class():
    p = torch.nn.Parameter(W.clone())
    options = {"eps": 1e-6, "projection": BlockProjection(1.0), "weight_norm": True, "released": True}
    optimizer = ProjectedAdamW([p], 0.1, **options)
    norms = run(optimizer, p, [G]).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([4.9000053, 1.9000063, 1.0], dtype=F64), atol=1e-5, rtol=0)
    norms = run(optimizer, p, [G]).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([4.8407166, 1.8028232, 1.0793893], dtype=F64), atol=1e-5, rtol=0)


def test_the_papers_magnitudes_go_on_and_its_directions_gradient_is_tangential():
    p = torch.nn.Parameter(W.clone())
    optimizer = ProjectedAdamW([p], 0.1, projection=BlockProjection(1.0), weight_norm=True)
    run(optimizer, p, [G])
    tangential = torch.tensor([[0.64, -0.48], [0.5, 0], [0, 2]], dtype=F64)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * tangential, atol=1e-12, rtol=0)
    run(optimizer, p, [G])
    assert run(ProjectedAdamW([p], 0.0, projection=BlockProjection(1.0)), p, [G]).norm(dim=1)[:2].tolist() == (
        pytest.approx([4.8, 1.8], abs=5e-3)
    )
    torch.testing.assert_close(p.norm(dim=1), optimizer.state[p]["magnitude"].abs(), atol=1e-12, rtol=0)
    assert not {"direction"} & set(optimizer.state[p])


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)], ids=str)
def test_weight_normalised_steps_follow_the_equations(shape):
    p, grads, lr, decay, r, every = matrix(*shape), gradients(7, *shape), 0.05, 0.1, 2, 3
    v, g = p.detach().clone(), p.detach().norm(dim=1)
    tall, m, s, mg, sg = shape[0] > shape[1], 0.0, 0.0, 0.0, 0.0
    for t, grad in enumerate(grads):
        unit = v / v.norm(dim=1, keepdim=True)
        grad_g = (grad * unit).sum(1)
        grad_v = (g / v.norm(dim=1))[:, None] * (grad - grad_g[:, None] * unit)
        torch.testing.assert_close((grad_v * v).sum(1), torch.zeros(shape[0], dtype=F64), atol=1e-12, rtol=0)
        if t % every == 0:
            basis_ = basis(grad_v, r)
        low = grad_v @ basis_ if tall else basis_.T @ grad_v
        m, s = 0.9 * m + 0.1 * low, 0.999 * s + 0.001 * low * low
        mg, sg = 0.9 * mg + 0.1 * grad_g, 0.999 * sg + 0.001 * grad_g * grad_g
        c1, c2 = 1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)
        n = (m / c1) / ((s / c2).sqrt() + 1e-8)
        v = v * (1 - lr * decay) - lr * (n @ basis_.T if tall else basis_ @ n)
        g = g * (1 - lr * decay) - lr * (mg / c1) / ((sg / c2).sqrt() + 1e-8)
    optimizer = ProjectedAdamW([p], lr, weight_decay=decay, projection=SVDProjection(r), every=every, weight_norm=True)
    expected = g[:, None] * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(run(optimizer, p, grads), expected, atol=1e-11, rtol=0)


def test_a_matrix_with_rows_of_zeros_has_no_directions_and_is_trained_as_it_is():
    p, q, grads = torch.nn.Parameter(torch.zeros(6, 4)), torch.nn.Parameter(torch.zeros(6, 4)), gradients(3, 6, 4)
    normed = ProjectedAdamW([p], 0.05, projection=SVDProjection(2), weight_norm=True)
    with pytest.warns(UserWarning, match="has rows of zeros, as LoRA's B"):
        run(normed, p, grads)
    run(ProjectedAdamW([q], 0.05, projection=SVDProjection(2)), q, grads)
    assert torch.equal(p, q)


STORED = {
    "gradnormlorp": {"projection": SVDProjection(3), "every": 4, "weight_norm": True},
    "gradnormlorp released": {"projection": SVDProjection(3), "every": 4, "weight_norm": True, "released": True},
    "galore": {"projection": SVDProjection(3), "every": 4},
    "galore 8-bit": {"projection": SVDProjection(3), "every": 4, "bits": 8},
    "fira": {"projection": SVDProjection(3), "residual": NormScaledResidual(), "every": 4, "released": True},
    "columns": {"projection": ColumnProjection(0.5), "residual": SignResidual(), "every": 4, "reset_moments": True},
    "entries": {"projection": EntryProjection(0.1), "residual": SignResidual(), "every": 4, "reset_moments": True},
    "blocks": {"projection": BlockProjection(0.5), "residual": SignResidual(), "every": 4, "reset_moments": True},
    "random": {"projection": RandomProjection(3), "every": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_a_resumed_run_ends_with_the_same_bits(name, dtype):
    shapes = [(1500, 6), (6, 12), (5,)]

    def build():
        params = [matrix(*shape, dtype=dtype, seed=s) for s, shape in enumerate(shapes)]
        return params, ProjectedAdamW(params, 0.05, weight_decay=0.1, **STORED[name])

    def steps(params, optimizer, first, last):
        for t in range(first, last):
            for s, p in enumerate(params):
                p.grad = gradients(1, *p.shape, seed=31 * t + s)[0].to(dtype)
            optimizer.step()

    whole, one = build()
    steps(whole, one, 0, 11)
    halves, first = build()
    steps(halves, first, 0, 6)  # no multiple of 4
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed, second = build()
    for p, q in zip(resumed, halves, strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(torch.load(file, weights_only=True))
    steps(resumed, second, 6, 11)
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))
    for p, q in zip(whole, resumed, strict=True):
        assert one.state[p].keys() == second.state[q].keys()
        for key, value in one.state[p].items():
            assert torch.equal(value, second.state[q][key])
            assert value.dtype == second.state[q][key].dtype


def test_8_bit_moments_are_bitsandbytes_own():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    p, q = (torch.nn.Parameter(torch.zeros(64, 128)) for _ in range(2))
    ours = ProjectedAdamW([p], 0.01, projection=BlockProjection(1.0), bits=8)
    theirs = bitsandbytes.optim.AdamW8bit([q], 0.01, weight_decay=0.0)
    grads = [grad.float() for grad in gradients(6, 64, 128)]
    run(ours, p, grads), run(theirs, q, grads)
    torch.testing.assert_close(p, q, atol=2e-5, rtol=0)
    assert ours.state[p]["exp_avg"].dtype == ours.state[p]["exp_avg_sq"].dtype == torch.uint8
    same = (ours.state[p]["exp_avg"] == theirs.state[q]["state1"]).float().mean()
    assert same > 0.99  # rounded at a tie otherwise
    small = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = ProjectedAdamW([small], 0.01, projection=SVDProjection(4), bits=8)
    run(optimizer, small, [torch.ones(8, 8)])
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32  # fewer than 4,096 numbers


def test_updates_in_the_backward_pass_are_those_after_it_and_free_every_gradient():
    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        return model, ProjectedAdamW(model.parameters(), 0.05, projection=SVDProjection(2), every=3)

    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))
    (one, after), (two, during) = build(), build()
    end = during.step_in_backward()
    for batch in x:
        for model, optimizer in ((one, after), (two, during)):
            model(batch).square().mean().backward()
            assert all((p.grad is None) == (optimizer is during) for p in model.parameters())
            optimizer.step(), optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    again = ProjectedAdamW(two.parameters(), 0.0, projection=SVDProjection(2))
    again.step_in_backward()  # takes the place of the first one's
    kept = [p.detach().clone() for p in two.parameters()]
    two(x[0]).sum().backward()
    assert all(torch.equal(p, old) for p, old in zip(two.parameters(), kept, strict=True))
    end(), again.step_in_backward()()
    two(x[0]).sum().backward()
    assert all(p.grad is not None for p in two.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": SignResidual()}, "of what a projection leaves out"),
        ({"projection": SVDProjection(2, "full"), "residual": NormScaledResidual()}, "scales rows or columns"),
        ({"projection": EntryProjection(), "residual": NormScaledResidual()}, "scales rows or columns"),
        ({"projection": BlockProjection(), "residual": NormScaledResidual()}, "scales rows or columns"),
        ({"projection": SVDProjection(2), "every": 0}, "every=0 is out of range"),
        ({"projection": SVDProjection(2), "bits": 4}, "bits=4 is out of range"),
        ({"projection": SVDProjection(2), "scale": 0}, "scale=0 is out of range"),
        ({"projection": "wavelet"}, "wavelet"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProjectedAdamW([matrix(4, 4)], **options)


def test_a_file_of_another_subspace_and_units_that_would_move_are_refused():
    p, (grad,) = matrix(6, 4), gradients(1, 6, 4)
    optimizer = ProjectedAdamW([p], projection=SVDProjection(2))
    run(optimizer, p, [grad])
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"saved with projection=.*'rank': 2"):
        ProjectedAdamW([matrix(6, 4)], projection=SVDProjection(3)).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(6, 2\)"):
        ProjectedAdamW([matrix(8, 4)], projection=SVDProjection(2)).load_state_dict(saved)
    units = torch.arange(3)
    with pytest.raises(ValueError, match="moments are those of a subspace"):
        move_optimizer_state(optimizer, p, units, units + 1)
    assert torch.equal(optimizer.state[p]["exp_avg"], saved["state"][0]["exp_avg"])
