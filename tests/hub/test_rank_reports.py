"""Intruder dimensions and utilized ranks against their equations in float64, on adapters of every kind."""

import math

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_sparse_peft import SparseLoraConfig, methods
from hf_sparse_peft.hub.analysis import intruder_dimensions, utilized_rank
from hf_sparse_peft.hub.analysis.intruders import similarity_to_base
from hf_sparse_peft.hub.analysis.merged_weights import adapted_linears, merged_weight
from hf_sparse_peft.hub.analysis.utilization import utilization_of

W = torch.diag(torch.arange(16.0, 0, -1)).double()
Q = torch.full((16,), 0.25, dtype=torch.float64)
E = torch.eye(16, dtype=torch.float64)


def count(delta, k=10, epsilon=0.5, dtype=torch.float64):
    return int((similarity_to_base(W.to(dtype), (W + delta).to(dtype), k) < epsilon).sum())


@pytest.mark.parametrize(("c", "expected"), [(0, 0), (5, 0), (20, 0), (100, 1)])
def test_a_direction_that_the_base_does_not_have_is_an_intruder_once_it_leads(c, expected):
    delta = c * torch.outer(Q, E[0])
    assert count(delta) == expected
    assert count(delta, dtype=torch.float32) == expected
    if c == 20:
        assert float(similarity_to_base(W, W + delta, 10)[0]) == pytest.approx(0.695, abs=1e-3)
    if c == 100:  # left vectors: those of the transposed weight have none
        assert int((similarity_to_base(W.T, (W + delta).T, 10) < 0.5).sum()) == 0


def test_what_the_base_has_anywhere_is_none_and_the_count_is_monotone():
    assert count(100 * torch.outer(E[12], E[12])) == 0  # not among the leading ten of the base
    assert count(7 * torch.outer(E[0], E[0])) == 0
    delta = 100 * torch.outer(Q, E[0])
    assert int((similarity_to_base(W, 3 * (W + delta), 10) < 0.5).sum()) == 1
    assert [count(delta, k) for k in (1, 5, 16)] == sorted(count(delta, k) for k in (1, 5, 16))
    assert [count(delta, 16, e) for e in (0.2, 0.5, 0.9)] == sorted(count(delta, 16, e) for e in (0.2, 0.5, 0.9))


def reference(base, merged, k, epsilon):
    """From the definition, in float64."""
    U, V = (torch.linalg.svd(matrix.double(), full_matrices=False).U for matrix in (base, merged))
    return sum(max(abs(float(V[:, j] @ U[:, i])) for i in range(U.shape[1])) < epsilon for j in range(k))


def ours(**options):
    torch.manual_seed(1)
    targets = ["q_proj", "down_proj"]
    model = get_peft_model(tiny.llama(), SparseLoraConfig(target_modules=targets, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return model.eval()


def theirs(name):
    torch.manual_seed(1)
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny.llama(), methods.get(name, r=4, **targets).config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.eval()


MODELS = {
    "low-rank": lambda: ours(r=2, density=0.0),
    "entries": lambda: ours(r=0, density=0.05),
    "lora": lambda: theirs("rslora"),
    "dora": lambda: theirs("dora"),
    "hira": lambda: theirs("hira"),
    "miss": lambda: theirs("miss"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_report_is_the_definition_on_merged_weights_and_leaves_the_model_alone(kind):
    model = MODELS[kind]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = intruder_dimensions(model, k=6, epsilon=0.6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layers = adapted_linears(model, "default")
    assert list(report.modules) == list(layers) != []
    merged = {name: merged_weight(layer, ["default"]) for name, layer in layers.items()}
    base = dict(tiny.llama().named_parameters())
    model.merge_adapter()
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight if kind not in ("low-rank", "entries") else layer.base_layer.weight
        torch.testing.assert_close(merged[name], weight.detach().float(), rtol=1e-4, atol=1e-5)
        expected = reference(base[f"{name}.weight"], weight, 6, 0.6)
        assert report.modules[name].intruders == expected
    assert report.total == sum(module.intruders for module in report.modules.values())
    with pytest.raises(ValueError, match="are merged into the base weights"):
        intruder_dimensions(model)


def test_low_rank_updates_have_intruders_and_a_scaled_weight_has_none(tmp_path):
    report = intruder_dimensions(ours(r=1, density=0.0))
    assert report.total > 0
    assert f"{len(report.modules)} modules" in str(report.table())
    assert report.draw(tmp_path / "intruders.png").stat().st_size > 5_000
    none = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))  # B is 0
    assert intruder_dimensions(none).total == 0


def test_numbers_out_of_range_and_unknown_adapters_are_refused():
    model = ours(r=1, density=0.0)
    for options, says in (
        ({"k": 0}, "k=0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"adapter_name": "x"}, "'x' changes no"),
    ):
        with pytest.raises(ValueError, match=says):
            intruder_dimensions(model, **options)
    with pytest.raises(ValueError, match="threshold=0"):
        utilized_rank(model, [], threshold=0)


# Utilized rank


def gram(*vectors):
    return sum(torch.outer(v, v) for v in vectors)


def test_both_sides_matter():
    e = torch.eye(4, dtype=torch.float64)
    inputs = gram(e[0] + 0.5 * e[1], e[1])
    found = utilization_of(torch.eye(4), inputs, 1.0)
    assert (found.utilized, found.weight, found.inputs, found.outputs) == (2, 4, 2, 2)
    found = utilization_of(torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0])), inputs, 1.0)
    assert (found.utilized, found.weight, found.inputs) == (1, 3, 2)
    assert found.utilization == 0.25


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 1.0])
def test_projections_hold_the_variance_and_no_direction_more(threshold):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 9, generator=generator, dtype=torch.float64) * torch.tensor([5, 3, 2, 1, 1, 0.5, 0.1, 0, 0])
    found = utilization_of(weight, x.T @ x, threshold)
    for name, data in (("inputs", x), ("outputs", x @ weight.T)):
        energy = torch.linalg.svdvals(data) ** 2
        fractions = (energy.cumsum(0) / energy.sum()).tolist()
        rank = int((energy > 1e-12 * energy[0]).sum())
        expected = rank if threshold == 1 else next(i + 1 for i, f in enumerate(fractions) if f >= threshold)
        assert getattr(found, name) == expected
    Ux = torch.linalg.svd(x, full_matrices=False).Vh[: found.inputs]
    Uy = torch.linalg.svd(x @ weight.T, full_matrices=False).Vh[: found.outputs]
    projected = Uy.T @ Uy @ weight @ Ux.T @ Ux
    assert found.utilized == torch.linalg.matrix_rank(projected)
    if threshold == 1:
        torch.testing.assert_close(x @ projected.T, x @ weight.T)
    smaller = utilization_of(weight, x.T @ x, 0.5 * threshold)
    assert smaller.utilized <= found.utilized


class Line(nn.Module):
    """Two linear layers; inputs are the batch itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, attention_mask=None):
        return self.second(torch.relu(self.first(x)))


def batches(order=range(6), repeat=1):
    data = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(1))
    data[..., 3:] = 0
    return [{"x": data[i][None]} for i in order for _ in range(repeat)]


def ranks(data, **options):
    report = utilized_rank(Line(), data, None, show_progress=False, **options)
    return {name: (m.utilized, m.inputs, m.outputs) for name, m in report.modules.items()}


def test_the_report_reads_the_layers_inputs_in_any_order():
    expected = ranks(batches())
    assert list(expected) == ["first", "second"]
    assert expected["first"][1] == 3
    assert expected["second"][0] <= 4
    assert ranks(batches(reversed(range(6)))) == expected
    assert ranks(batches(repeat=2)) == expected
    assert ranks(batches(), examples=2)["first"][1] == 3


def test_the_report_of_an_adapter_is_a_rank_pattern_with_a_picture(tmp_path):
    model = ours(r=2, density=0.0)
    data = [{"input_ids": tiny.TokenData()[i]["input_ids"][None]} for i in range(4)]
    report = utilized_rank(model, data, show_progress=False)
    assert set(report.rank_pattern) == set(adapted_linears(model, "default"))
    assert all(0 < module.utilized <= module.largest for module in report.modules.values())
    assert 0 < report.utilization <= 1
    assert not math.isnan(report.utilization)
    assert "utilized" in str(report.table())
    assert report.draw(tmp_path / "ranks.png").stat().st_size > 5_000
    LoraConfig(r=8, rank_pattern=report.rank_pattern, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"No batch reached|no batch"):
        utilized_rank(model, [], show_progress=False)


@pytest.mark.parametrize("name", ["adalora-peft", "dora", "miss"])
def test_a_report_on_a_4bit_base_measures_the_dequantised_weight_and_changes_no_bit(name):
    ranks = {"init_r": 4, "target_r": 2} if name == "adalora-peft" else {"r": 4}
    model = get_peft_model(tiny.base("nf4", layers=1), methods.get(name, target_modules=["q_proj"], **ranks).config)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert intruder_dimensions(model.eval()).total == 0  # fresh
    (report,) = utilized_rank(model, [{"input_ids": torch.arange(1, 9)[None]}], show_progress=False).modules.values()
    assert (report.weight, report.inputs <= 8) == (32, True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
