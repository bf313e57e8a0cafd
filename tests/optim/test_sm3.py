"""SparseSM3: a step worked out by hand, accumulators that never fall, a state of m + n numbers, and agreement with
dense SM3 and Adagrad."""

import io

import pytest
import torch

from hf_sparse_peft.optim import SparseSM3, move_optimizer_state, move_rows


def make(indices, rows, columns, start=None, **options):
    indices = torch.as_tensor(indices)
    p = torch.nn.Parameter(torch.zeros(len(indices)) if start is None else start.clone())
    return p, SparseSM3([p], indices_of=lambda q: (indices, rows, columns) if q is p else None, **options)


def reference(indices, columns, rows, gradients, lr, eps):
    """From the equations, entry by entry, in Python floats."""
    R, C, w = [0.0] * rows, [0.0] * columns, [0.0] * len(indices)
    for g in gradients:
        nu = [min(R[x // columns], C[x % columns]) + g[e] ** 2 for e, x in enumerate(indices)]
        for e, x in enumerate(indices):
            w[e] -= lr * g[e] / (nu[e] + eps) ** 0.5
            R[x // columns] = max(R[x // columns], nu[e])
            C[x % columns] = max(C[x % columns], nu[e])
    return w, R, C


def test_one_step_on_a_2x2_with_two_entries_matches_the_formula_by_hand():
    p, optimizer = make([0, 3], 2, 2, lr=0.1)
    p.grad = torch.tensor([2.0, -3.0])
    optimizer.step()
    assert p.tolist() == pytest.approx([-0.1, 0.1])
    row, column = optimizer.accumulators(p)
    assert row.tolist() == [4, 9]
    assert column.tolist() == [4, 9]
    p.grad = torch.tensor([0.0, 4.0])
    optimizer.step()
    assert p.tolist() == pytest.approx([-0.1, 0.1 - 0.1 * 4 / 5])
    assert row.tolist() == [4, 25]


def test_many_steps_match_the_formula_and_accumulators_never_decrease():
    torch.manual_seed(0)
    rows, columns = 5, 7
    indices = torch.randperm(rows * columns)[:11].sort().values
    gradients = torch.randn(9, 11)
    p, optimizer = make(indices.int(), rows, columns, lr=0.02, eps=1e-8)
    last = [torch.zeros(rows), torch.zeros(columns)]
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        now = [a.clone() for a in optimizer.accumulators(p)]
        assert all((a >= b).all() for a, b in zip(now, last, strict=True))
        last = now
    w, R, C = reference(indices.tolist(), columns, rows, gradients.tolist(), 0.02, 1e-8)
    assert p.tolist() == pytest.approx(w, rel=1e-4, abs=1e-6)
    assert last[0].tolist() == pytest.approx(R, rel=1e-5)
    assert last[1].tolist() == pytest.approx(C, rel=1e-5)


def test_state_is_one_number_per_row_and_column_and_none_per_entry():
    p, optimizer = make(torch.arange(40), 6, 9)
    p.grad = torch.ones(40)
    optimizer.step()
    assert sum(v.numel() for v in optimizer.state[p].values()) == 6 + 9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_full_support_equals_dense_sm3(momentum):
    torch.manual_seed(0)
    p, sparse = make(torch.arange(12), 3, 4, lr=0.1, momentum=momentum)
    q = torch.nn.Parameter(torch.zeros(3, 4))
    dense = SparseSM3([q], lr=0.1, momentum=momentum)
    for _ in range(6):
        q.grad = torch.randn(3, 4)
        p.grad = q.grad.flatten().clone()
        sparse.step()
        dense.step()
    assert torch.allclose(p.view(3, 4), q, rtol=1e-5, atol=1e-7)
    assert torch.allclose(sparse.state[p]["sm3_row"], dense.state[q]["sm3_dim0"])
    assert torch.allclose(sparse.state[p]["sm3_col"], dense.state[q]["sm3_dim1"])


def test_vectors_and_scalars_get_adagrad():
    for shape in ((5,), ()):
        torch.manual_seed(0)
        p, q = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(shape))
        ours, theirs = SparseSM3([p], lr=0.1), torch.optim.Adagrad([q], lr=0.1)
        for _ in range(5):
            p.grad = torch.randn(shape)
            q.grad = p.grad.clone()
            ours.step()
            theirs.step()
        assert torch.allclose(p, q, atol=1e-6)


def test_the_bound_covers_adagrads_sum_in_three_dimensions():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(3, 4, 2))
    optimizer, total = SparseSM3([p]), torch.zeros(3, 4, 2)
    for _ in range(5):
        p.grad = torch.randn(3, 4, 2)
        optimizer.step()
        total += p.grad**2
        s = optimizer.state[p]
        bound = torch.minimum(torch.minimum(s["sm3_dim0"][:, None, None], s["sm3_dim1"][:, None]), s["sm3_dim2"])
        assert (bound >= total - 1e-5).all()


def test_a_move_leaves_rows_and_columns_alone_also_when_lengths_coincide_and_clears_momentum():
    p, optimizer = make([0, 5, 10, 15], 4, 4, momentum=0.9)  # 4 values, 4 rows, 4 columns
    p.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    optimizer.step()
    row, column = (a.clone() for a in optimizer.accumulators(p))
    momentum = optimizer.state[p]["momentum_buffer"].clone()
    old, new = torch.tensor([1, 3]), torch.tensor([0, 1])
    move_optimizer_state(optimizer, p, old, new)
    move_rows(p, old, new)
    assert torch.equal(optimizer.accumulators(p)[0], row)
    assert torch.equal(optimizer.accumulators(p)[1], column)
    want = [momentum[1].item(), momentum[3].item(), 0, 0]
    assert optimizer.state[p]["momentum_buffer"].tolist() == want


def test_indices_are_read_anew_after_a_move():
    support = {"indices": torch.tensor([0, 1])}
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = SparseSM3([p], indices_of=lambda _: (support["indices"], 3, 3))
    p.grad = torch.ones(2)
    optimizer.step()
    support["indices"] = torch.tensor([0, 8])
    optimizer.step()
    assert optimizer.accumulators(p)[0].tolist() == [2, 0, 1]


def test_an_entry_without_gradient_stays_exactly_zero():
    p, optimizer = make([0, 3], 2, 2, weight_decay=1.0)
    p.grad = torch.tensor([0.0, 1.0])
    for _ in range(5):
        optimizer.step()
    assert p[0].item() == 0.0
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_training_equals_uninterrupted_training_to_the_last_bit(dtype):
    torch.manual_seed(0)
    gradients = torch.randn(8, 5).to(dtype)
    start = torch.randn(5).to(dtype)

    def train(p, optimizer, part):
        for gradient in part:
            p.grad = gradient.clone()
            optimizer.step()

    p, optimizer = make([1, 4, 5, 9, 11], 3, 4, start, momentum=0.5)
    train(p, optimizer, gradients[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q, fresh = make([1, 4, 5, 9, 11], 3, 4, p.detach(), momentum=0.5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert all(v.dtype == torch.float32 for v in fresh.state[q].values())
    train(p, optimizer, gradients[4:])
    train(q, fresh, gradients[4:])
    assert torch.equal(p, q)


def test_wrong_indices_and_options_are_named():
    for indices, message in (([0, 9], "outside 0..3"), ([0, 1, 2], None)):
        p, optimizer = make(indices, 2, 2)
        p.grad = torch.ones_like(p)
        if message:
            with pytest.raises(ValueError, match=message):
                optimizer.step()
        else:
            optimizer.step()
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="must be \\[k\\]"):
        SparseSM3([p], indices_of=lambda _: (torch.arange(3), 2, 2)).step()
    for option in ({"lr": -1.0}, {"momentum": 1.0}, {"eps": 0.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            SparseSM3([p], **option)


def test_a_checkpoint_of_another_layer_is_refused():
    p, optimizer = make([0, 3], 2, 2)
    p.grad = torch.ones(2)
    optimizer.step()
    q, other = make([0, 3], 3, 2)
    other.load_state_dict(optimizer.state_dict())
    q.grad = torch.ones(2)
    with pytest.raises(ValueError, match="another layer"):
        other.step()
