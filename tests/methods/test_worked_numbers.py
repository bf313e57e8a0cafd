"""Worked numbers of the papers' rules, computed by hand or with the official code in float64."""

import math

import pytest
import torch

from hf_sparse_peft.optim.zeroth_order import ZerothOrderSGD
from hf_sparse_peft.rules.sample_layers import updated_importance
from hf_sparse_peft.sparsity import competition_counts
from hf_sparse_peft.tuners.kernel_lora.kernels import Competition, Threshold


@pytest.mark.parametrize("perturbation", ["in_place"])
@pytest.mark.parametrize(("sparsity", "decay", "expected"), [(0.0, 0.01, (0.7495, -0.25025)), (0.5, 0.0, (0.5, -0.25))])
def test_a_zeroth_order_step_on_a_quadratic(sparsity, decay, expected, perturbation, monkeypatch):
    # 0.5 x' diag(2, 1) x - (1, -1) x at (0.5, 0.25) along z = (1, -2): c = -2.5 for any epsilon. Sparse MeZO masks the
    # larger entry: z = (0, -2), and c = -2.5 again.
    monkeypatch.setattr(torch, "randn", lambda *size, dtype=None, **_: torch.tensor([1.0, -2.0], dtype=dtype))
    theta = torch.nn.Parameter(torch.tensor([0.5, 0.25], dtype=torch.float64))
    optimizer = ZerothOrderSGD(
        [("theta", theta)], lr=0.1, epsilon=0.1, weight_decay=decay, sparsity=sparsity, perturbation=perturbation
    )

    def loss():
        x = theta.detach()
        return x[0] ** 2 + 0.5 * x[1] ** 2 - x[0] + x[1]

    optimizer.step(loss)
    assert optimizer.last_update["projected_gradient"] == pytest.approx(-2.5, abs=1e-9)
    assert theta.tolist() == pytest.approx(expected, abs=1e-9)


def test_importance_of_layers_after_three_probes():
    found = updated_importance([0.0] * 4, [[0, 1], [0, 2], [1, 3]], [1.0, 1.2, 0.8], 10.0)
    assert found == pytest.approx([-0.19132023, 0.17901665, -0.17901665, 0.19132023], abs=1e-8)
    weights = torch.sigmoid(-torch.tensor(found, dtype=torch.float64)).tolist()
    assert weights == pytest.approx([0.54768469, 0.45536497, 0.54463503, 0.45231531], abs=1e-8)


def test_a_suppressed_layer_that_is_not_missed_gains_by_the_centred_reward():
    found = updated_importance([0.0] * 5, [[0, 4], [1, 4], [2, 4]], [1.0, 1.1, 1.3], 10.0)
    assert found[0] == pytest.approx(0.10863, abs=1e-5)
    assert found[3] == 0.0
    assert found[4] == pytest.approx(0.0, abs=1e-12)  # in all three probes


@pytest.mark.parametrize("loss", [math.nan, -1e4])
def test_a_probe_without_a_reward_leaves_every_importance_as_it_was(loss):
    before = [0.3, -0.2, 0.0]
    assert updated_importance(before, [[0], [1], [2]], [1.0, loss, 1.2], 10.0) == before
    infinite = updated_importance(before, [[0], [1], [2]], [1.0, math.inf, 1.2], 10.0)  # a reward of 0
    assert all(map(math.isfinite, infinite))
    assert infinite[1] < before[1]


def test_winners_of_the_kernels_competition():
    w = torch.tensor([[0.5, -0.2], [0.1, -0.4]], dtype=torch.float64)
    threshold = Threshold(0.2, 0, source=None, priority=None)  # nobody wins at the threshold itself
    code, factor = Competition("code", threshold)(w)
    assert code.flatten().tolist() == pytest.approx([0.25, 0.0, 0.0, -0.16])  # w |w| where |w| > tau
    assert factor.flatten().tolist() == pytest.approx([0.5, 0.0, 0.0, 0.4])  # the second factor is detached
    paper, slope = Competition("paper", threshold)(w)
    assert paper.flatten().tolist() == pytest.approx([0.15, 0.0, 0.0, -0.08])  # w (|w| - tau)
    assert slope.flatten().tolist() == pytest.approx([0.8, 0.0, 0.0, 0.6])  # 2 |w| - tau


def test_shares_of_the_budget_among_matrices():
    # B = 100: z gives 60, 30, 10; the first is full at 40, and its 20 go to the others as 3 : 1.
    counts = competition_counts({"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 40, "b": 80, "c": 80}, 100)
    assert counts == {"a": 40, "b": 45, "c": 15}
    assert competition_counts({"a": 0.0, "b": 0.0}, {"a": 30, "b": 90}, 40) == {"a": 10, "b": 30}
