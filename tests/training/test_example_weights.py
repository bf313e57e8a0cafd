"""Weights of examples against their closed form in float64, and what is refused."""

import pytest
import tiny
import torch

from hf_sparse_peft.training.example_weights import meta_weights, soft_label_losses

F64 = torch.float64


def test_weights_are_the_positive_parts_of_products_of_gradients():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x, teacher = torch.randn(6, 4, dtype=F64), torch.randn(6, 3, dtype=F64)
    val, labels = torch.randn(5, 4, dtype=F64), torch.tensor([0, 1, 2, 1, 0])
    weights = meta_weights(
        model.parameters(),
        lambda: soft_label_losses(model(x), teacher),
        lambda: torch.nn.functional.cross_entropy(model(val), labels),
    )
    w, b = model.weight.detach(), model.bias.detach()
    soft = lambda z: torch.exp(z - z.logsumexp(-1, keepdim=True))  # noqa: E731
    outer = (soft(val @ w.T + b) - torch.eye(3, dtype=F64)[labels]) / 5
    grad_w, grad_b = outer.T @ val, outer.sum(0)
    error = soft(x @ w.T + b) - soft(teacher)  # of KL by the student's logits
    products = torch.einsum("nc,cd,nd->n", error, grad_w, x) + error @ grad_b
    positive = products.clamp(min=0)
    assert 0 < int((products > 0).sum()) < 6
    torch.testing.assert_close(weights, positive / (positive.sum() + 1e-6), atol=1e-12, rtol=0)
    assert all(p.grad is None for p in model.parameters())
    kl = (soft(teacher) * (soft(teacher).log() - soft(x @ w.T + b).log())).sum(-1)
    torch.testing.assert_close(soft_label_losses(model(x), teacher).detach(), kl, atol=1e-12, rtol=0)


def test_a_transformer_has_the_second_derivative_and_a_step_by_the_weights_helps():
    model = tiny.llama()
    ids = tiny.TokenData(12).ids
    target = ids[:4]

    def losses(rows):
        logits = model(input_ids=rows).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)

    validation = lambda: losses(target).mean()  # noqa: E731
    rows = torch.cat([target[:2], ids[6:10]])
    weights = meta_weights(model.parameters(), lambda: losses(rows), validation)
    assert weights[:2].sum() > 0.6  # the validation rows' own
    before = float(validation().detach())
    (weights * losses(rows)).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.01 * p.grad)
    assert float(validation().detach()) < before


def test_losses_that_are_no_vector_or_of_other_parameters_are_refused():
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="one loss an example"):
        meta_weights(model.parameters(), lambda: model(x).sum(), lambda: model(x).sum())
    other = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="No parameter has a part in both"):
        meta_weights([*model.parameters(), *other.parameters()], lambda: model(x).sum(1), lambda: other(x).sum())
