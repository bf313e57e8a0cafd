"""Subnets: some rows x some columns of each weight, trained as one dense matrix."""

import copy
import math

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_sparse_peft import AgedAdamWSpec, SparseLoraConfig, callbacks_for, hub, make_optimizer
from hf_sparse_peft.hub.summary import adapter_summary
from hf_sparse_peft.rules import move_units
from hf_sparse_peft.sparsity import Fisher, Global, Numbers
from hf_sparse_peft.training import calibrate
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared.pieces import Subgrid
from hf_sparse_peft.utils.checksums import save_checked

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.arange(1, 11)[None]


class Two(nn.Module):
    """Two linears with biases, the first of which runs twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 20)

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


def adapted(base=None, **options):
    torch.manual_seed(0)
    options = {"r": 0, "granularity": "subnet", "density": 0.1, "target_modules": TARGETS, **options}
    model = get_peft_model(tiny.base() if base is None else base, SparseLoraConfig(**options))
    return model, adapter_layers(model)


def on_two(**options):
    model, layers = adapted(Two(), target_modules=["first", "second"], **options)
    for layer in layers:
        for parameter in layer.trained_parameters("default"):
            parameter.data.normal_()
    return model, layers


def dense_update(layer, name="default"):
    """`[out, in]` float64, autograd through the values."""
    rows, columns = (one.long() for one in layer.subnet(name))
    update = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    return update.index_put((rows[:, None], columns), layer.sparse_lora_subnet[name].double())


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


def test_outputs_and_gradients_are_those_of_the_dense_weight_with_the_values_at_the_crossings():
    model, (first, second) = on_two(r=2, lora_alpha=6)
    x, dy = torch.randn(7, 12), torch.randn(7, 20)
    y = model(x)
    y.backward(dy)
    leaves = {layer: layer.sparse_lora_subnet["default"] for layer in (first, second)}
    found = {layer: leaf.grad.clone() for layer, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None

    def linear(layer, x):
        A, B = (getattr(layer, f"sparse_lora_{one}")["default"].detach().double() for one in "AB")
        base = layer.get_base_layer()
        weight = base.weight.detach().double() + dense_update(layer) + 3 * B @ A
        return x @ weight.t() + base.bias.detach().double()

    expected = linear(second, torch.tanh(linear(first, torch.tanh(linear(first, x.double())))))
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for layer, leaf in leaves.items():
        torch.testing.assert_close(found[layer].double(), leaf.grad.double(), rtol=1e-4, atol=1e-4)


def test_the_backward_pass_keeps_the_columns_of_the_input_alone():
    _, (_, second) = on_two()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        second(torch.randn(50, 12, requires_grad=True))
    activations = [t for t in kept if t.shape[:1] == (50,)]
    assert [t.shape[1] for t in activations] == [second.subnet("default")[1].numel()] == [4]


@pytest.mark.parametrize(("density", "shape", "sides"), [(0.01, (1000, 500), (100, 50)), (0.5, (3, 3), (2, 2))])
def test_a_density_is_about_equal_shares_of_both_sides_and_no_more_numbers_than_it_says(density, shape, sides):
    base = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    _, (layer,) = adapted(base, density=density, target_modules=["0"])
    assert tuple(layer.sparse_lora_subnet["default"].shape) == sides
    assert math.prod(sides) <= density * math.prod(shape)


@pytest.mark.parametrize("criterion", ["magnitude", "low_rank_magnitude"])
def test_a_budget_over_the_model_counts_rows_times_columns_and_the_file_tells_the_sides(criterion, tmp_path):
    options = {"density": 0.005, "budget": Global(0.02) if criterion == "magnitude" else Numbers(300)}
    model, layers = adapted(criterion=criterion, **options)
    sides = {layer.module_name: list(layer.sparse_lora_subnet["default"].shape) for layer in layers}
    assert {name: found[:2] for name, found in model.peft_config["default"].sizes.items()} == sides
    total = sum(layer.out_features * layer.in_features for layer in layers)
    asked = 300 if criterion != "magnitude" else 0.02 * total
    assert 0.85 * asked <= model.get_nb_trainable_parameters()[0] <= asked
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_rows_and_columns_of_a_magnitude_hold_more_of_it_than_independent_draws():
    for criterion in ("magnitude", "random"):
        _, layers = adapted(criterion=criterion, density=0.05)
        held = []
        for layer in layers:
            rows, columns = (one.long() for one in layer.subnet("default"))
            weight = layer.get_base_layer().weight.abs()
            held.append(float(weight[rows][:, columns].mean() / weight.mean()))
        assert (min(held) > 1.1) == (criterion == "magnitude")


def test_data_chooses_rows_and_columns_by_the_sum_of_the_score_over_their_crossings():
    data = tiny.TokenData(8)
    batches = [{key: torch.stack([data[i][key] for i in (a, a + 1)]) for key in data[0]} for a in range(0, 8, 2)]
    model, layers = adapted(criterion=Fisher(examples=8), density=0.05)
    with pytest.raises(ValueError, match="starts from data"):
        model.train()(**batches[0])
    calibrate(model, batches, show_progress=False)
    squares, base = {}, tiny.base().double()
    for index in range(8):
        base.zero_grad()
        base(**{key: value[None] for key, value in data[index].items()}).loss.backward()
        for layer in layers:
            gradient = base.get_submodule(layer.module_name).weight.grad
            squares[layer.module_name] = squares.get(layer.module_name, 0) + gradient**2
    for layer in layers:
        score = squares[layer.module_name]
        rows, columns = (one.long() for one in layer.subnet("default"))
        R, C = layer.sparse_lora_subnet["default"].shape
        independent = score[score.sum(1).topk(R).indices][:, score.sum(0).topk(C).indices].sum()
        assert float(score[rows][:, columns].sum()) >= float(independent) * (1 - 1e-4)
        # Neither side alone can be improved.
        assert set(score[:, columns].sum(1).topk(R).indices.tolist()) == set(rows.tolist())
        assert set(score[rows].sum(0).topk(C).indices.tolist()) == set(columns.tolist())


@pytest.mark.parametrize("side", [0, 1])
def test_one_side_moves_and_values_and_moments_of_what_stays_follow_along_its_axis(side):
    _, (_, layer) = on_two()
    values = layer.sparse_lora_subnet["default"]
    optimizer = torch.optim.AdamW([values], lr=1e-2)
    for _ in range(3):
        layer(torch.randn(5, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    kind = ("subnet_row", "subnet_column")[side]
    space = next(one for one in layer.unit_spaces("default") if one.kind == kind)
    other = layer.subnet("default")[1 - side].clone()
    old = space.alive()
    new = torch.tensor(sorted({*old.tolist()[1:], next(u for u in range(12) if u not in old.tolist())}))
    before = {
        "value": values.detach().clone(),
        **{k: optimizer.state[values][k].clone() for k in ("exp_avg", "exp_avg_sq")},
    }
    move_units(space, new.to(old.dtype), optimizer)
    assert torch.equal(space.alive().long(), new)
    assert torch.equal(layer.subnet("default")[1 - side], other)
    after = {"value": values.detach(), **{k: optimizer.state[values][k] for k in ("exp_avg", "exp_avg_sq")}}
    for key, was in before.items():
        for place, unit in enumerate(new.tolist()):
            slice_ = after[key].select(side, place)
            if unit in old.tolist():
                assert torch.equal(slice_, was.select(side, old.tolist().index(unit)))
            else:
                assert not slice_.any()


def test_a_side_of_another_length_or_out_of_range_is_refused_and_nothing_is_written():
    _, (layer, _) = on_two()
    before = [one.clone() for one in layer.subnet("default")]
    for rows, message in (([0], "has 3 rows, and is given 1"), ([0, 1, 50], "out of range"), ([1, 0, 2], "sorted")):
        with pytest.raises(ValueError, match=message):
            layer.write_subnet("default", rows=torch.tensor(rows))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.subnet("default"), strict=True))


def test_active_adapters_of_all_kinds_add_up():
    model, layers = on_two()
    model.add_adapter("rows", SparseLoraConfig(r=2, density=0.2, granularity="row", target_modules=["first", "second"]))
    model.add_adapter(
        "again", SparseLoraConfig(r=0, density=0.2, granularity="subnet", target_modules=["second"], seed=4)
    )
    for layer in layers:
        for name in ("rows", "again"):
            for parameter in layer.trained_parameters(name):
                parameter.data.normal_()
    x, names = torch.randn(5, 12), ["default", "rows", "again"]
    model.base_model.set_adapter(names)
    second = layers[1]
    weight = second.get_base_layer().weight.double() + sum(second.get_delta_weight(name).double() for name in names)
    y = second(x)
    torch.testing.assert_close(y.double(), x.double() @ weight.t() + second.get_base_layer().bias, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    G = torch.ones(5, 20).t() @ x
    for name in ("default", "again"):
        rows, columns = (one.long() for one in second.subnet(name))
        torch.testing.assert_close(second.sparse_lora_subnet[name].grad, G[rows][:, columns], rtol=1e-4, atol=1e-4)
    model.base_model.add_weighted_adapter(["default", "again"], [2.0, -1.0], "both", "linear")
    expected = 2 * second.get_delta_weight("default") - second.get_delta_weight("again")
    torch.testing.assert_close(second.get_delta_weight("both"), expected)


def test_it_leaves_as_a_lora_of_the_smaller_side_and_as_shira_exactly(tmp_path):
    model, layers = adapted(density=0.05)
    for layer in layers:
        layer.sparse_lora_subnet["default"].data.normal_(0, 0.1)
    y = logits(model)
    ranks = hub.export_lora(model, tmp_path / "lora").ranks
    assert ranks == {layer.module_name: min(layer.sparse_lora_subnet["default"].shape) for layer in layers}
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny.base(), tmp_path / "lora")), y, atol=1e-5, rtol=1e-5
    )
    hub.export_shira(model, tmp_path / "shira")
    shira = logits(PeftModel.from_pretrained(tiny.base(), tmp_path / "shira"))
    torch.testing.assert_close(shira, y, atol=1e-5, rtol=1e-5)
    (row,) = adapter_summary(model)[:1]
    assert [space["kind"] for space in row["spaces"]] == ["subnet_row", "subnet_column"]
    assert sum(one["parameters"] for one in adapter_summary(model)) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_factors_of_a_sub_grid_multiply_to_it(shape):
    rows, columns = torch.tensor([1, 2, 5, 6, 8])[: shape[0]], torch.tensor([0, 3, 4, 9, 10])[: shape[1]]
    piece = Subgrid(rows, columns, torch.randn(shape), (9, 11))
    dense = torch.zeros(9, 11)
    piece.add_(dense)
    A, B = piece.factors()
    torch.testing.assert_close(B @ A, dense)
    assert A.shape[0] == piece.exact_rank == min(shape)
    positions, values = piece.entries()
    assert torch.equal(dense.view(-1)[positions], values)
    assert int((dense != 0).sum()) == values.numel()
    assert positions.tolist() == sorted(positions.tolist())


def test_compaction_drops_rows_and_columns_of_zeros_and_changes_no_output(tmp_path):
    model, layers = on_two()
    values = layers[1].sparse_lora_subnet["default"]
    values.data[0], values.data[:, 2] = 0.0, 0.0
    layers[0].sparse_lora_subnet["default"].data.zero_()
    x = torch.randn(4, 12)
    y = model(x).detach()
    model.compact(compact_tolerance=0.0)
    assert tuple(layers[1].sparse_lora_subnet["default"].shape) == (5, 3)
    assert not layers[0].holds("default")
    torch.testing.assert_close(model(x), y)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Two(), tmp_path)(x), model(x))


def test_copies_and_deletion_leave_nothing_shared():
    model, layers = on_two()
    x = torch.randn(3, 12)
    twin = copy.deepcopy(model)
    y = model(x).detach()
    layers[0].sparse_lora_subnet["default"].data.zero_()
    layers[0].write_subnet("default", rows=torch.tensor([0, 1, 2]))
    assert torch.equal(twin(x), y)
    model.add_adapter("other", SparseLoraConfig(granularity="subnet", density=0.1, target_modules=["first", "second"]))
    model.delete_adapter("default")
    assert not any("default" in name for name in model.state_dict())


def test_a_compiled_graph_follows_rows_and_columns():
    model, layers = on_two()
    x = torch.randn(6, 12)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        y.sum().backward()
        found = [layer.sparse_lora_subnet["default"].grad.clone() for layer in layers]
        model.zero_grad()
        model(x).sum().backward()
        for layer, gradient in zip(layers, found, strict=True):
            torch.testing.assert_close(gradient, layer.sparse_lora_subnet["default"].grad)
        model.zero_grad()
        layers[1].write_subnet("default", rows=torch.tensor([0, 2, 4, 6, 8, 10]), columns=torch.tensor([1, 5, 7, 9]))


def test_a_head_and_a_name_travel_along_and_a_second_run_goes_on(tmp_path):
    model, _ = adapted(modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    for _ in range(2):
        tiny.train(model, tmp_path, 2, callbacks=callbacks_for(model))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.base(), tmp_path / "adapter", adapter_name="task")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("tensor", ["sparse_lora_subnet", "sparse_lora_subnet_rows", "sparse_lora_subnet_columns"])
@pytest.mark.parametrize("harm", ["missing", "cut", "flipped"])
def test_a_damaged_file_is_refused_by_the_tensors_name(tensor, harm, tmp_path):
    model, _ = on_two()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = f"base_model.model.second.{tensor}"
    if harm == "missing":
        del tensors[key]
    elif harm == "cut":
        tensors[key] = tensors[key][:-1].contiguous()
    elif tensor == "sparse_lora_subnet":
        tensors[key][0, 0] = float("nan")
    else:
        tensors[key][25] ^= 1
    save_checked(tensors, file, metadata={"format": "pt"})
    for read in (lambda: hub.check_adapter(tmp_path), lambda: PeftModel.from_pretrained(Two(), tmp_path)):
        with pytest.raises(ValueError, match=r"second.*sparse_lora_subnet"):
            read()


def test_what_cannot_be_is_refused_by_name():
    for options, message in (
        ({"subnet_shares": (0.1, 0.1), "granularity": "row"}, "subnet_shares=.*no module has one"),
        ({"criterion": "given"}, "criterion='given' chooses single units"),
        ({"criterion": "fisher", "density": 0.005, "budget": Global(0.01)}, "only data has"),
        ({"subnet_shares": (0.1, 1.5)}, "subnet_shares"),
        ({"schedule": [{"type": "prune"}]}, "Prune acts on units of .*with granularity='subnet'"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseLoraConfig(**{"r": 0, "granularity": "subnet", **options})


def test_shares_of_its_own_for_each_side():
    _, (first, second) = adapted(Two(), target_modules=["first", "second"], subnet_shares=(0.25, 0.5))
    assert tuple(first.sparse_lora_subnet["default"].shape) == (3, 6)
    assert tuple(second.sparse_lora_subnet["default"].shape) == (5, 6)
    _, (first, second) = adapted(Two(), target_modules=["first", "second"], granularity_pattern={"first": "row"})
    assert "default" in first.sparse_lora_values
    assert "default" in second.sparse_lora_subnet


def test_the_learning_rate_of_values_reaches_subnets():
    model, layers = on_two(r=2, optimizer=AgedAdamWSpec(values_ratio=3.0))
    optimizer = make_optimizer(model, lr=0.01)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(layers[0].sparse_lora_subnet["default"])] == pytest.approx(0.03)
    assert rates[id(layers[0].sparse_lora_A["default"])] == pytest.approx(0.01)
