"""MeZO and Sparse MeZO against the papers' equations, and what a step leaves behind."""

import math

import pytest
import torch
from torch import nn

from hf_sparse_peft.optim import ZerothOrderSGD, zeroth_order_groups
from hf_sparse_peft.sparsity import pack_bits, unpack_bits

BOTH = ("in_place", "layerwise")


class Bowl(nn.Module):
    """`sum_i c_i (theta_i - t_i)^2 / 2` over two tensors, with a tensor that no one trains."""

    def __init__(self, sizes=((7, 5), (11,)), dtype=torch.float32, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        made = [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes for _ in range(3)]
        self.weight, self.bias = (nn.Parameter(tensor.to(dtype)) for tensor in made[::3])
        self.target, self.curve = made[1::3], [tensor.abs() + 0.1 for tensor in made[2::3]]
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self):
        pairs = zip((self.weight, self.bias), self.target, self.curve, strict=True)
        return sum((c * (p.double() - t) ** 2).sum() / 2 for p, t, c in pairs)


def bits(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def take_step(model, optimizer):
    """One step of a whole batch through the public pieces; returns both losses."""
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            with optimizer.shifted(sign, model):
                losses.append(float(model()))
    optimizer.add_difference(losses[0] - losses[1])
    optimizer.step()
    return losses


def directions(model, **options):
    """The coming step's z of a float64 model: how far one shift moves its parameters. Leaves them moved."""
    optimizer = ZerothOrderSGD(zeroth_order_groups(model), epsilon=1.0, **options)
    before = bits(model)
    with optimizer.shifted(1):
        return {name: parameter - before[name] for name, parameter in bits(model).items() if name != "frozen"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", BOTH)
def test_a_step_with_learning_rate_0_brings_every_parameter_back(way, dtype):
    model = Bowl(dtype=dtype)
    before = bits(model)
    optimizer = ZerothOrderSGD(zeroth_order_groups(model), lr=0.0, perturbation=way)
    for _ in range(20):
        take_step(model, optimizer)
    if way == "layerwise":
        assert same(before, bits(model))  # in every dtype, to the last bit
    elif dtype == torch.float32:
        torch.testing.assert_close(bits(model), before, rtol=1e-6, atol=20 * 1e-6)


def test_bf16_drifts_in_place_by_what_the_docs_warn_of_and_not_layerwise():
    drift = {}
    for way in BOTH:
        model = Bowl(sizes=((60, 50), (11,)), dtype=torch.bfloat16)
        before = bits(model)["weight"].double()
        optimizer = ZerothOrderSGD(zeroth_order_groups(model), lr=0.0, perturbation=way)
        for _ in range(10):
            take_step(model, optimizer)
        drift[way] = ((bits(model)["weight"].double() - before).norm() / before.norm()).item()
    assert drift["layerwise"] == 0
    assert 1e-4 < drift["in_place"] < 1e-1


def test_projected_gradient_of_a_linear_loss_is_its_slope_along_z():
    slope = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = nn.Parameter(torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    start = theta.detach().clone()
    seen = []

    def loss():
        seen.append(theta.detach().clone())
        return slope @ theta

    optimizer = ZerothOrderSGD([("theta", theta)], lr=0.1, epsilon=1e-2, weight_decay=0.5)
    optimizer.step(loss)
    z = (seen[0] - start) / 1e-2
    g = float(slope @ z)
    assert optimizer.last_update["projected_gradient"] == pytest.approx(g, abs=1e-4)
    torch.testing.assert_close(seen[1], start - 1e-2 * z)
    torch.testing.assert_close(theta.detach(), start - 0.1 * (g * z + 0.5 * start))  # eta (g z + wd theta)


@pytest.mark.parametrize("way", BOTH)
def test_update_is_the_papers_in_float64(way):
    z = directions(Bowl(dtype=torch.float64), seed=5)
    model = Bowl(dtype=torch.float64)
    start, epsilon, lr, decay = bits(model), 1e-3, 0.05, 0.1
    optimizer = ZerothOrderSGD(zeroth_order_groups(model, decay), lr=lr, epsilon=epsilon, seed=5, perturbation=way)
    sides = [
        sum(
            (c * (start[n] + sign * epsilon * z[n] - t) ** 2).sum() / 2
            for n, t, c in zip(("weight", "bias"), model.target, model.curve, strict=True)
        )
        for sign in (1, -1)
    ]
    g = (sides[0] - sides[1]) / (2 * epsilon)
    take_step(model, optimizer)
    assert optimizer.last_update["projected_gradient"] == pytest.approx(float(g), rel=1e-9)
    torch.testing.assert_close(model.weight.data, start["weight"] - lr * (g * z["weight"] + decay * start["weight"]))
    torch.testing.assert_close(model.bias.data, start["bias"] - lr * g * z["bias"])  # no decay on a bias
    assert torch.equal(model.frozen, torch.ones(3))


def test_mean_of_g_z_points_along_the_gradient():
    theta = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    curve = torch.linspace(0.5, 3, 10, dtype=torch.float64)
    total = torch.zeros(10, dtype=torch.float64)
    for seed in range(300):
        point = nn.Parameter(theta.clone())
        optimizer = ZerothOrderSGD([("point", point)], lr=1.0, seed=seed)
        optimizer.step(lambda point=point: (curve * point**2).sum() / 2)
        total += theta - point.detach()  # lr g z
    assert torch.cosine_similarity(total, curve * theta, dim=0) > 0.9


def test_directions_are_standard_normal_and_differ_by_step_name_and_seed():
    def drawn(seed=0, name="a", updates=0):
        parameter = nn.Parameter(torch.zeros(50_000))
        optimizer = ZerothOrderSGD([(name, parameter)], epsilon=1.0, seed=seed)
        optimizer.param_groups[0]["updates"] = updates
        with optimizer.shifted(1):
            return parameter.detach().clone()

    z = drawn()
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.02
    assert abs((z**4).mean() - 3) < 0.2
    for other in (drawn(seed=1), drawn(name="b"), drawn(updates=1)):
        assert abs(torch.corrcoef(torch.stack([z, other]))[0, 1]) < 0.03
    assert torch.equal(z, drawn())


def test_chunks_of_one_tensor_do_not_share_a_direction(monkeypatch):
    monkeypatch.setattr("hf_sparse_peft.optim.parameter_chunks._CPU_CHUNK", 16)
    for parameter in (nn.Parameter(torch.zeros(64)), nn.Parameter(torch.zeros(8, 12).t())):
        optimizer = ZerothOrderSGD([("p", parameter)], epsilon=1.0)
        with optimizer.shifted(1):
            assert parameter.unique().numel() == parameter.numel()


@pytest.mark.parametrize("way", BOTH)
def test_the_global_random_state_is_not_touched(way):
    model = Bowl()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take_step(model, ZerothOrderSGD(zeroth_order_groups(model), sparsity=0.5, perturbation=way))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("way", BOTH)
def test_two_micro_batches_make_the_step_of_one_batch(way):
    ends = []
    for parts in (1, 2):
        model = Bowl(dtype=torch.float64)
        optimizer = ZerothOrderSGD(zeroth_order_groups(model), lr=0.01, perturbation=way)
        for _ in range(3):
            for _ in range(parts):
                with torch.no_grad():
                    with optimizer.shifted(1, model):
                        plus = float(model()) / parts
                    with optimizer.shifted(-1, model):
                        minus = float(model()) / parts
                optimizer.restore()
                optimizer.add_difference(plus - minus)
            optimizer.step()
        ends.append(bits(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("way", BOTH)
def test_an_exception_in_the_loss_brings_the_parameters_back(way):
    model = Bowl(dtype=torch.float64)
    before = bits(model)
    optimizer = ZerothOrderSGD(zeroth_order_groups(model), perturbation=way)

    def broken():
        raise ArithmeticError

    model.forward = broken
    with pytest.raises(ArithmeticError), optimizer.shifted(1, model):
        model()
    torch.testing.assert_close(bits(model), before, rtol=0, atol=1e-15)


def test_a_loss_that_is_not_finite_moves_nothing():
    theta = nn.Parameter(torch.randn(5, dtype=torch.float64))
    before = theta.detach().clone()
    optimizer = ZerothOrderSGD([("theta", theta)], lr=1.0, weight_decay=0.1)
    optimizer.step(lambda: theta.sum() * math.inf)
    torch.testing.assert_close(theta.detach(), before, rtol=0, atol=1e-15)
    assert optimizer.updates == 1


def test_loss_falls_on_a_bowl():
    model = Bowl()
    optimizer = ZerothOrderSGD(zeroth_order_groups(model), lr=5e-3)
    first = model().item()
    for _ in range(400):
        optimizer.step(model)
    assert model().item() < first / 5


# Sparse MeZO


def kth_smallest(parameter, share):
    flat = parameter.detach().abs().flatten().sort().values
    return flat[round(share * flat.numel()) - 1]


@pytest.mark.parametrize("way", BOTH)
def test_entries_above_the_threshold_keep_every_bit(way):
    model = Bowl(sizes=((40, 30), (50,)))
    before = bits(model)
    optimizer = ZerothOrderSGD(zeroth_order_groups(model, 0.1), lr=1e-2, sparsity=0.75, perturbation=way)
    take_step(model, optimizer)
    for name in ("weight", "bias"):
        above = before[name].abs() > kth_smallest(before[name], 0.25)
        after = bits(model)[name]
        assert torch.equal(after[above], before[name][above])
        assert (after[~above] != before[name][~above]).float().mean() > 0.95


@pytest.mark.parametrize("way", BOTH)
def test_share_perturbed_at_the_first_step_is_one_minus_sparsity(way):
    model = Bowl(sizes=((40, 30), (40,)))
    optimizer = ZerothOrderSGD(zeroth_order_groups(model), sparsity=0.8, perturbation=way)
    take_step(model, optimizer)
    assert optimizer.last_update["perturbed_share"] == (240 + 8) / 1240


@pytest.mark.parametrize("way", BOTH)
def test_an_infinite_threshold_is_mezo_bit_for_bit(way):
    ends = []
    for sparsity in (0.0, 0.5):
        model = Bowl()
        optimizer = ZerothOrderSGD(zeroth_order_groups(model, 0.1), lr=1e-2, sparsity=sparsity, perturbation=way)
        if sparsity:
            for parameter in (model.weight, model.bias):
                optimizer.state[parameter]["threshold"] = torch.tensor(math.inf)
        for _ in range(3):
            take_step(model, optimizer)
        ends.append(bits(model))
    assert same(*ends)


def test_vanilla_and_layerwise_variants_give_equal_g():
    found = []
    for way in BOTH:
        model = Bowl(dtype=torch.float64, sizes=((40, 30), (50,)))
        optimizer = ZerothOrderSGD(zeroth_order_groups(model), lr=1e-3, sparsity=0.75, perturbation=way)
        gradients = []
        for _ in range(5):
            take_step(model, optimizer)
            gradients.append(optimizer.last_update["projected_gradient"])
        found.append(gradients)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("way", BOTH)
def test_masked_step_restores_with_learning_rate_0(way):
    # A large epsilon sends most entries across the threshold: a mask taken anew between the passes would not restore.
    model = Bowl(sizes=((40, 30), (50,)))
    before = bits(model)
    optimizer = ZerothOrderSGD(zeroth_order_groups(model), lr=0.0, epsilon=1.0, sparsity=0.75, perturbation=way)
    take_step(model, optimizer)
    torch.testing.assert_close(bits(model), before, rtol=1e-6, atol=1e-6)


def test_mask_follows_the_weights_while_the_threshold_stays():
    model = Bowl(sizes=((40, 30), (50,)))
    optimizer = ZerothOrderSGD(zeroth_order_groups(model), lr=1e-2, sparsity=0.75)
    take_step(model, optimizer)
    threshold = optimizer.state[model.weight]["threshold"].clone()
    model.weight.data.mul_(2)
    model.bias.data.mul_(2)
    take_step(model, optimizer)
    assert torch.equal(optimizer.state[model.weight]["threshold"], threshold)
    assert optimizer.last_update["perturbed_share"] < 0.2


def test_ties_at_the_threshold_are_all_let_move():
    theta = nn.Parameter(torch.tensor([0.5, 1.0, 1.0, -1.0, 2.0, 3.0, 4.0, 5.0]))
    optimizer = ZerothOrderSGD([("theta", theta)], sparsity=0.75)
    optimizer.step(lambda: theta.sum())
    assert optimizer.last_update["perturbed_share"] == 4 / 8  # |theta| <= h


def test_a_checkpoint_carries_step_and_thresholds(tmp_path):
    def run(steps, saved=None, dtype=torch.bfloat16):
        model = Bowl(sizes=((40, 30), (50,)), dtype=dtype)
        optimizer = ZerothOrderSGD(zeroth_order_groups(model), lr=1e-2, sparsity=0.5, seed=3)
        if saved:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for _ in range(steps):
            take_step(model, optimizer)
        torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
        return bits(model)

    whole = run(6)
    run(3)
    assert same(whole, run(3, torch.load(tmp_path / "saved.pt", weights_only=True)))


# Bits, layers, errors


def test_bits_survive_packing():
    draw = torch.Generator().manual_seed(0)
    for numel in (1, 7, 8, 9, 1000):
        mask = torch.rand(numel, generator=draw) < 0.3
        packed = pack_bits(mask)
        assert packed.numel() == -(-numel // 8)
        assert torch.equal(unpack_bits(packed, numel), mask)


class Tied(nn.Module):
    """One weight that two modules own, one inside the other, and a container that is never called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.weight = self.inner.weight
        self.extra = nn.ParameterDict({"a": nn.Parameter(torch.ones(4, dtype=torch.float64))})
        self.double()

    def forward(self, x):
        return self.inner(x) @ self.weight.t() + self.extra["a"]


def test_layerwise_shifts_tied_weights_once_and_reaches_containers():
    found = []
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for way in BOTH:
        torch.manual_seed(0)
        model = Tied()
        optimizer = ZerothOrderSGD(zeroth_order_groups(model), epsilon=0.1, perturbation=way)
        with torch.no_grad(), optimizer.shifted(1, model):
            found.append(model(x))
    assert torch.equal(*found)


def test_layerwise_warns_where_a_parameter_is_read_elsewhere():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 2)

        def forward(self):
            return self.table.weight.sum()

    model = Reader()
    optimizer = ZerothOrderSGD(zeroth_order_groups(model), perturbation="layerwise")
    with pytest.warns(UserWarning, match=r"never reached \['table.weight'\].*in_place"), optimizer.shifted(1, model):
        model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"perturbation": "copy"}, "perturbation='copy'.*layerwise"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ZerothOrderSGD([("p", nn.Parameter(torch.ones(2)))], **options)


def test_unnamed_parameters_are_refused():
    with pytest.raises(ValueError, match="named_parameters"):
        ZerothOrderSGD([nn.Parameter(torch.ones(2))])


def test_a_parameter_that_starts_at_zero_has_no_magnitude_to_mask_by():
    optimizer = ZerothOrderSGD([("values", nn.Parameter(torch.zeros(8)))], sparsity=0.5)
    with pytest.raises(ValueError, match=r"'values' a threshold of 0.*sparse-mezo"):
        optimizer.step(lambda: torch.tensor(0.0))


def test_a_step_without_losses_says_who_gives_them():
    with pytest.raises(RuntimeError, match="ZerothOrderTrainer"):
        ZerothOrderSGD([("p", nn.Parameter(torch.ones(2)))]).step()
