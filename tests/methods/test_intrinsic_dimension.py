"""Intrinsic dimension (Li et al., 2018; Aghajanyan et al., 2021; code read in rabeehk/compacter) against its equations,
in float64."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from spectral_toolbox import Linears, close, on, random, trained

from hf_sparse_peft import hub
from hf_sparse_peft.tuners.spectral_lora.subspace import Projection

WEIGHTS = random(4, 4), random(3, 4, seed=1), random(3, 3, seed=2)


def dense(projection: Projection) -> torch.Tensor:
    """P `[D, d]` from its definition, with a Hadamard matrix by its recursion."""
    L = projection.length
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < L:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    B = torch.zeros(L, projection.dimension, dtype=torch.float64)
    B[range(projection.dimension), range(projection.dimension)] = projection._signs().double()
    G, order = projection._normals()[0].double(), projection._order()
    P = H @ torch.diag(G) @ torch.eye(L, dtype=torch.float64)[order] @ H @ B
    return (P / (L * G.square().sum()).sqrt() / (projection.numel / L) ** 0.5)[: projection.numel]


@pytest.mark.parametrize(("numel", "dimension"), [(16, 5), (12, 5), (6, 20)])
def test_the_projection_is_fastfoods_and_its_adjoint_is_its_transpose(numel, dimension):
    projection = Projection(9876543210123, numel, dimension, torch.device("cpu"))
    P, z, y = dense(projection), random(dimension), random(numel, seed=1)
    close(projection.project(z), P @ z.double())
    close(projection.adjoint(y), P.t() @ y.double())
    close(projection.project(z) @ y, z @ projection.adjoint(y), 1e-5)
    norms = P.norm(dim=0)
    if numel == projection.length:
        close(norms, torch.ones(dimension))
    else:
        assert not torch.allclose(norms, torch.ones(dimension, dtype=torch.float64), atol=1e-3)


def test_signs_are_signs_normals_normal_and_orders_permutations():
    projection = Projection(3, 1 << 14, 1000, torch.device("cpu"))
    assert projection._signs().abs().unique().tolist() == [1.0]
    assert abs(projection._signs().mean()) < 0.1
    G = projection._normals()[0]
    assert abs(G.mean()) < 0.03
    assert abs(G.std() - 1) < 0.03
    assert abs((G**4).mean() - 3) < 0.3
    order = projection._order()
    assert order.sort().values.tolist() == list(range(1 << 14))
    assert abs(torch.corrcoef(torch.stack([order.double(), torch.arange(1 << 14).double()]))[0, 1]) < 0.05


def test_columns_have_norm_one_on_average():
    projection = Projection(5, 3000, 400, torch.device("cpu"))
    norms = torch.stack([projection.project(row) for row in torch.eye(400)[:50]]).norm(dim=1)
    assert abs(norms.mean() - 1) < 0.05


def test_one_point_and_a_factor_a_weight_are_d_numbers_and_start_at_the_base():
    model, layers = on("intrinsic-dimension", *WEIGHTS, dimension=10)
    sizes = {name: p.numel() for name, p in trained(model).items()}
    assert sizes == {"lin.0.spectral_lora_point.default": 7} | {
        f"lin.{at}.spectral_lora_scale.default": 1 for at in range(3)
    }
    assert model.get_nb_trainable_parameters()[0] == 10
    x = random(5, 4, seed=3)
    for factor in (1.0, -2.0):
        for layer in layers:
            layer.spectral_lora_scale["default"].data.fill_(factor)
        assert torch.equal(model(x), Linears(*WEIGHTS)(x))
    model, _ = on("intrinsic-dimension", *WEIGHTS, dimension=10, structure_aware=False)
    assert [p.numel() for p in trained(model).values()] == [10]


def filled(layers) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """z, the factors and the projections, float64."""
    layers[0].spectral_lora_point["default"].data.copy_(random(7, seed=5))
    for at, layer in enumerate(layers):
        layer.spectral_lora_scale["default"].data.fill_(1 + 0.5 * at)
    sites = [layer.site("default") for layer in layers]
    P = [dense(Projection(site.stream("P"), site.rows * site.cols, 7, torch.device("cpu"))) for site in sites]
    return layers[0].spectral_lora_point["default"].detach().double(), [1.0, 1.5, 2.0], P


def test_updates_and_gradients_are_those_of_the_dense_projections():
    model, layers = on("intrinsic-dimension", *WEIGHTS, dimension=10)
    z, factors, P = filled(layers)
    z = z.requires_grad_()
    factors = [torch.tensor([f], dtype=torch.float64, requires_grad=True) for f in factors]
    x = random(5, 4, seed=3)
    inputs, leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    y = leaf
    for layer, weight, factor, projection in zip(layers, WEIGHTS, factors, P, strict=True):
        delta = (factor * (projection @ z)).view(weight.shape)
        close(layer.get_delta_weight("default"), delta.detach())
        y = y @ (weight.double() + delta).t()
    found = model(inputs)
    close(found, y.detach())
    found.square().sum().backward()
    y.square().sum().backward()
    close(layers[0].spectral_lora_point["default"].grad, z.grad)
    close(inputs.grad, leaf.grad)
    for layer, factor in zip(layers, factors, strict=True):
        close(layer.spectral_lora_scale["default"].grad, factor.grad)


def test_weights_of_one_shape_have_other_projections_and_a_reloaded_adapter_the_same(tmp_path):
    weights = random(4, 4), random(4, 4, seed=1)
    model, layers = on("intrinsic-dimension", *weights, dimension=9)
    layers[0].spectral_lora_point["default"].data.copy_(random(7, seed=5))
    assert not torch.allclose(layers[0].get_delta_weight("default"), layers[1].get_delta_weight("default"))
    model.save_pretrained(tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in held.values() if t.is_floating_point()) == 9
    x = random(5, 4, seed=3)
    assert torch.equal(PeftModel.from_pretrained(Linears(*weights), tmp_path / "adapter")(x), model(x))
    with pytest.raises(ValueError, match="dense update, which has no exact low-rank form"):
        hub.export_lora(model, tmp_path / "lora")
    close(hub.merge_to_dense(model)(x), model(x))


def test_too_few_numbers_for_the_factors_are_refused():
    with pytest.raises(ValueError, match="leaves no number beside the factors of 3 weights"):
        on("intrinsic-dimension", *WEIGHTS, dimension=3)
