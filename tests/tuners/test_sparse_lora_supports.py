"""Which units an adapter trains: counts, criteria, allocations, seeds."""

from pathlib import Path

import processes
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from support_codes import read_codes
from ties import best
from tuner_toolbox import BASES, GRANULARITIES, fill, logits, make_config, tiny_llama

from hf_sparse_peft import ErdosRenyi, Global, Numbers
from hf_sparse_peft.sparsity import stream_seed
from hf_sparse_peft.tuners import adapter_layers

CRITERIA = ("random", "magnitude", "smallest_magnitude", "low_rank_magnitude")
SIZE = 16


def unit_sums(matrix, granularity, size=SIZE):
    """Sum of a float64 matrix over every unit, by its definition."""
    if granularity == "entry":
        return matrix.reshape(-1)
    if granularity == "row":
        return matrix.sum(1)
    if granularity == "column":
        return matrix.sum(0)
    rows, cols = matrix.shape
    return torch.stack(
        [
            matrix[top : top + size, left : left + size].sum()
            for top in range(0, rows, size)
            for left in range(0, cols, size)
        ]
    )


def total_units(layer, granularity):
    rows, cols = layer.out_features, layer.in_features
    return {"entry": rows * cols, "row": rows, "column": cols, "block": rows * cols // SIZE**2}[granularity]


def supports(model, adapter="default"):
    return {layer.module_name: read_codes(layer.sparse_lora_support[adapter]) for layer in adapter_layers(model)}


@tiny.crossed(base=BASES, granularity=GRANULARITIES, criterion=CRITERIA)
def test_every_layer_has_exactly_its_share_of_distinct_sorted_units(base_of, base, granularity, criterion):
    config = make_config(f"sparse-{granularity}", base, criterion=criterion)
    model = get_peft_model(base_of(base), config)
    for layer in adapter_layers(model):
        units, total = read_codes(layer.sparse_lora_support["default"]), total_units(layer, granularity)
        assert len(units) == int(config.density * total + 1e-9) == layer.sparse_lora_values["default"].shape[0]
        assert units == sorted(set(units))
        assert 0 <= units[0] <= units[-1] < total
        assert layer.units("default").tolist() == units


@tiny.crossed(base=BASES, granularity=GRANULARITIES, criterion=["magnitude", "smallest_magnitude"])
def test_magnitude_supports_equal_brute_force_on_the_weight_the_layer_sees(base_of, base, granularity, criterion):
    model = get_peft_model(base_of(base), make_config(f"sparse-{granularity}", base, criterion=criterion))
    for layer in adapter_layers(model):
        weight = layer.get_base_weight().detach().double()
        weight = weight.t() if base == "conv1d" else weight
        scores = unit_sums(weight.abs(), granularity) * (1 if criterion == "magnitude" else -1)
        chosen = torch.tensor(read_codes(layer.sparse_lora_support["default"]))
        left = torch.ones(scores.numel(), dtype=torch.bool)
        left[chosen] = False
        assert scores[chosen].min() >= scores[left].max() - 1e-4 * scores.abs().max()
        if granularity == "entry":  # nothing is summed, so nothing is rounded
            seed = stream_seed(0, layer.module_name)
            assert best(scores.tolist(), chosen.numel(), seed=seed) == chosen.tolist()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_counts_are_exact_where_all_scores_tie(granularity, criterion):
    base = tiny_llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.fill_(0.5)
    model = get_peft_model(base, make_config(f"sparse-{granularity}", criterion=criterion))
    for layer in adapter_layers(model):
        units = read_codes(layer.sparse_lora_support["default"])
        assert len(units) == layer.sparse_lora_values["default"].shape[0]
        if criterion in ("magnitude", "smallest_magnitude"):
            total = total_units(layer, granularity)
            assert units == best([0.0] * total, len(units), seed=stream_seed(0, layer.module_name))


def test_low_rank_magnitude_follows_the_exact_svd_where_the_spectrum_is_clear():
    base = tiny_llama()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "q_proj" in name:
                parameter.copy_(torch.randn(64, 3) @ torch.randn(3, 64) + 1e-4 * torch.randn(64, 64))
    config = make_config("sparse-entry", target_modules=["q_proj"], criterion={"type": "low_rank_magnitude", "rank": 3})
    model = get_peft_model(base, config)
    for layer in adapter_layers(model):
        U, S, Vh = torch.linalg.svd(layer.get_base_weight().detach().double())
        scores = ((U[:, :3] * S[:3]) @ Vh[:3]).abs().reshape(-1)
        chosen = set(read_codes(layer.sparse_lora_support["default"]))
        expected = set(scores.topk(len(chosen)).indices.tolist())
        assert len(chosen & expected) >= 0.99 * len(chosen)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layers_of_one_shape_draw_different_supports(granularity):
    model = get_peft_model(tiny_llama(), make_config(f"sparse-{granularity}", target_modules=["q_proj", "o_proj"]))
    drawn = [tuple(units) for units in supports(model).values()]
    assert len(drawn) == len(set(drawn)) == 4


def test_seed_decides_and_the_global_generator_does_not():
    torch.manual_seed(1)
    one = supports(get_peft_model(tiny_llama(), make_config(seed=3)))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    config = make_config("sparse-entry", seed=3)
    model = tiny_llama()
    torch.set_rng_state(state)
    two = supports(get_peft_model(model, config))
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)  # choosing a support draws nothing from it
    assert one != supports(get_peft_model(tiny_llama(), make_config(seed=4)))


def test_another_process_draws_the_same_supports():
    folder = Path(__file__).parent
    script = (
        f"import sys; sys.path[:0] = [{str(folder.parent)!r}, {str(folder)!r}]; import tuner_toolbox as t;"
        "from peft import get_peft_model; from test_sparse_lora_supports import supports;"
        "print(supports(get_peft_model(t.tiny_llama(), t.make_config(seed=3))))"
    )
    drawn = supports(get_peft_model(tiny_llama(), make_config(seed=3)))
    assert processes.python("-c", script, check=True).stdout == f"{drawn}\n"


# Allocation


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "options",
    [{"budget": ErdosRenyi(0.25)}, {"budget": Global(0.25), "criterion": "magnitude"}, {"budget": Numbers(6000)}],
    ids=["erdos_renyi", "global", "numbers"],
)
def test_allocations_over_the_model_keep_the_budget_and_are_written_to_the_config(
    base_of, options, granularity, tmp_path
):
    if isinstance(options["budget"], Global):  # random weights of other shapes have other scales and would get nothing
        options = {**options, "target_modules": ["q_proj", "o_proj"]}
    config = make_config(f"sparse-{granularity}", **options)
    model = get_peft_model(base_of(), config)
    layers = adapter_layers(model)
    counts = {layer.module_name: len(read_codes(layer.sparse_lora_support["default"])) for layer in layers}
    assert tiny.units_of_sizes(model.peft_config["default"]) == counts
    numel = {layer.module_name: layer.in_features * layer.out_features for layer in layers}
    spent = sum(layer.sparse_lora_values["default"].numel() for layer in layers)
    budget = 6000 if isinstance(options["budget"], Numbers) else int(0.25 * sum(numel.values()))
    assert spent <= budget * 1.0001 or isinstance(options["budget"], Global)
    if granularity == "entry":
        if isinstance(options["budget"], Numbers):
            assert counts == {name: 6000 * size // sum(numel.values()) for name, size in numel.items()}
        else:
            assert spent == budget
    fill(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(), tmp_path)), logits(model))


def test_erdos_renyi_gives_thin_matrices_a_higher_density():
    model = get_peft_model(tiny_llama(), make_config("sparse-entry", budget=ErdosRenyi(0.1)))
    density = {
        layer.module_name.rsplit(".")[-1]: layer.sparse_lora_values["default"].numel() / layer.get_base_weight().numel()
        for layer in adapter_layers(model)
    }
    shapes = {"q_proj": (64, 64), "v_proj": (32, 64), "down_proj": (64, 128)}
    ratio = {name: (rows + cols) / (rows * cols) for name, (rows, cols) in shapes.items()}
    for name in shapes:
        assert density[name] / density["q_proj"] == pytest.approx(ratio[name] / ratio["q_proj"], rel=0.01)


def test_global_allocation_is_one_ranking_of_all_entries():
    model = get_peft_model(tiny_llama(), make_config("sparse-entry", budget=Global(0.05), criterion="magnitude"))
    weights = {layer.module_name: layer.get_base_weight().detach().abs().reshape(-1) for layer in adapter_layers(model)}
    everything = torch.cat(list(weights.values()))
    threshold = everything.topk(round(0.05 * everything.numel())).values[-1]
    for name, units in supports(model).items():
        assert units == (weights[name] >= threshold).nonzero().squeeze(1).tolist()


def test_a_config_that_was_shared_out_for_one_model_is_refused_by_another():
    config = get_peft_model(tiny_llama(), make_config(budget=ErdosRenyi(0.05))).peft_config["default"]
    with pytest.raises(ValueError, match=r"sizes was made for another model.*layers\.2"):
        get_peft_model(tiny_llama(num_hidden_layers=3), config)
    with pytest.raises(ValueError, match=r"sizes gives 'model\.layers\.0"):
        get_peft_model(tiny_llama(hidden_size=8, intermediate_size=16), config)


def test_a_wrong_support_is_never_drawn_for_values_that_came_from_a_file():
    model = get_peft_model(tiny_llama(), make_config("sparse-entry", inference_mode=True))
    layer = adapter_layers(model)[0]
    layer.sparse_lora_values["default"].data.fill_(1.0)  # values are here, their units are not
    with pytest.raises(ValueError, match="was not yet written"):
        logits(model)
