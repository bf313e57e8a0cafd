"""`AgedAdamWSpec(values_ratio="auto")`: the rate of sparse values over that of the factors, from the equation."""

import math
import warnings

import pytest
import tiny
import torch
from peft import get_peft_model
from training_toolbox import StopAt, TokenData, all_state, differences
from transformers import Trainer, TrainingArguments

from hf_sparse_peft import GradientSplit, Prune, SparseLoraConfig, calibrate, methods, trainer_options
from hf_sparse_peft.optim import AgedAdamW, OptimizerSettings
from hf_sparse_peft.sparsity import Global, GlobalByGroup, Grid, Numbers
from hf_sparse_peft.training import AgedAdamWSpec
from hf_sparse_peft.training.optimizers import warn_of_other_optimizer
from hf_sparse_peft.training.values_rate import CONSTANTS
from hf_sparse_peft.tuners import adapter_layers

AUTO = AgedAdamWSpec(values_ratio="auto")
SHAPES = [
    tuple(tiny.llama(layers=1).model.layers[0].self_attn.get_submodule(n).weight.shape) for n in ("q_proj", "k_proj")
]


DATA = [{"input_ids": ids[None], "labels": ids[None]} for ids in torch.arange(1, 41).view(4, 10)]


def adapted(**options):
    size = {} if "budget" in options else {"density": 0.05}
    options = {"r": 0, "target_modules": ["q_proj", "k_proj"], "optimizer": AUTO, **size, **options}
    return get_peft_model(tiny.llama(layers=1), SparseLoraConfig(**options))


def rates(model, lr: float = 0.5) -> dict[str, float]:
    """Layer -> learning rate of its values in the optimizer."""
    groups = AUTO.build(model, OptimizerSettings(lr=lr)).param_groups
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {
        name: by_id[id(p)]
        for name, layer in layers(model).items()
        for p in [*layer.sparse_lora_values.values(), *layer.sparse_lora_subnet.values()]
    }


def layers(model):
    return dict(zip(("q_proj", "k_proj"), adapter_layers(model), strict=False))


def mean_square_rows(layer) -> float:
    """k sqrt(f) of a support as it is: over all rows, the root of the mean square of their entries' number."""
    dense = torch.zeros(layer.get_base_layer().weight.shape, dtype=torch.float64)
    dense.view(-1)[layer.pieces("default")[-1].entries()[0]] = 1
    return dense.sum(1).square().mean().sqrt().item()


@pytest.mark.parametrize("granularity", ["entry", "block", "row", "column"])
def test_rates_are_those_of_the_equation_on_the_support_itself(granularity):
    model = adapted(granularity=granularity, block_size=4, density=0.25, criterion="random")
    shapes = [layer.get_base_layer().weight.shape for layer in adapter_layers(model)]
    assert len(set(shapes)) == 2
    rank = sum(0.25 * m * n for m, n in shapes) / sum(m + n for m, n in shapes)
    for name, layer in layers(model).items():
        expected = 0.5 * CONSTANTS[granularity][0] * 2.0 * rank / mean_square_rows(layer) * math.sqrt(4 / rank)
        # The equation expects equally many entries a row; drawn ones vary around that.
        assert rates(model)[name] == pytest.approx(expected, rel=0.25 if granularity in ("entry", "block") else 1e-6)
        assert rates(model)[name] >= expected * (1 - 1e-6)


def test_a_subnet_has_its_columns_in_its_rows():
    model = adapted(granularity="subnet", subnet_shares=(0.5, 0.25), density=0.005, target_modules=["q_proj"])
    (layer,) = adapter_layers(model)
    (rows, columns), (m, n) = layer.sparse_lora_subnet["default"].shape, layer.get_base_layer().weight.shape
    rank = rows * columns / (m + n)
    assert [*rates(model).values()] == [
        pytest.approx(0.5 * CONSTANTS["subnet"][0] * 2 * rank / (columns * math.sqrt(rows / m)) * math.sqrt(4 / rank))
    ]


def test_twice_the_entries_have_a_rate_lower_by_the_root_of_2_and_rows_keep_theirs():
    def rate(**options):
        return rates(adapted(criterion="random", **options))["q_proj"]

    assert rate(density=0.25) == pytest.approx(math.sqrt(2) * rate(density=0.5), rel=0.01)
    assert rate(density=0.5, granularity="row") == pytest.approx(rate(density=0.25, granularity="row"))


def test_a_low_rank_half_counts_by_its_scaling_and_its_rank():
    def rate(**options):
        return rates(adapted(criterion="random", **options))["q_proj"]

    assert rate(r=2, lora_alpha=8.0) == pytest.approx(2 * rate(r=2, lora_alpha=4.0))
    entries, numbers = (sum(0.05 * m * n for m, n in SHAPES), sum(m + n for m, n in SHAPES))
    alone = entries / numbers
    assert rate(r=2, lora_alpha=4.0) == pytest.approx(rate(r=0) * math.sqrt(alone / (2 + alone)), rel=0.02)
    assert rate(r=4, lora_alpha=4.0, use_rslora=True) == pytest.approx(rate(r=4, lora_alpha=8.0))


def test_ranks_of_modules_count_by_their_numbers():
    """R is over all modules: rank 8 in one of two shapes is less than rank 8 in both, by that shape's share."""

    def rate(**low_rank):
        return rates(adapted(criterion="random", **low_rank))["q_proj"]

    none = rate(r=0)
    both = rate(r=8, lora_alpha=16.0)
    one = rate(r=8, lora_alpha=16.0, rank_pattern={"k_proj": 0})
    (q, k), entries = (sum(shape) for shape in SHAPES), sum(0.05 * m * n for m, n in SHAPES)
    alone = entries / (q + k)
    assert one / none == pytest.approx(math.sqrt(alone / (alone + 8 * q / (q + k))), rel=0.01)
    assert both / none == pytest.approx(math.sqrt(alone / (alone + 8)), rel=0.01)


def test_where_data_finds_sizes_entries_are_spread_evenly_and_the_rank_is_that_of_the_low_rank_half():
    found = rates(adapted(r=2, lora_alpha=4.0, budget=Global(0.05), criterion="gradient"))
    even = sum(m * n for m, n in SHAPES) / sum(m + n for m, n in SHAPES)
    expected = {n: 0.5 * 0.5 * 2.0 * even / shape[1] * math.sqrt(4 / 2) for n, shape in zip(found, SHAPES, strict=True)}
    assert found == pytest.approx(expected)


def test_a_density_has_the_rate_that_the_documentation_gives():
    """By hand: c = 3, s = 2, k a quarter of the columns in all rows, R = r_S."""
    model = tiny.llama(layers=1)
    config = SparseLoraConfig(r=0, target_modules=["q_proj"], density=0.25, criterion="random", optimizer=AUTO)
    m, n = SHAPES[0]
    (rate,) = AUTO.ratios(get_peft_model(model, config)).values()
    rank = 0.25 * m * n / (m + n)
    assert rate == pytest.approx(3.0 * 2.0 * rank / (0.25 * n) * math.sqrt(4 / rank), rel=1e-3)


def test_each_adapter_has_ratios_of_its_own_numbers():
    model = adapted(criterion="random", density=0.25)
    alone = rates(model)
    second = SparseLoraConfig(r=0, target_modules=["q_proj"], density=0.5, optimizer=AUTO, criterion="random")
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    ratios = AUTO.ratios(model)
    for name, layer in layers(model).items():
        assert ratios[id(layer.sparse_lora_values["default"])] == pytest.approx(alone[name] / 0.5)  # lr=0.5
    assert len(ratios) == 3


def test_a_gradients_choice_is_slower_and_units_from_outside_are_not():
    random, gradient, given = (rates(adapted(criterion=name))["q_proj"] for name in ("random", "gradient", "given"))
    assert gradient / random == pytest.approx(CONSTANTS["entry"][1] / CONSTANTS["entry"][0])
    even = sum(m * n for m, n in SHAPES) / sum(m + n for m, n in SHAPES)
    assert given == pytest.approx(0.5 * CONSTANTS["entry"][0] * 2.0 * even / SHAPES[0][1])  # of unknown number: R = 4


def test_what_multiplies_the_halves_of_a_module_counts():
    def of(**options):
        return rates(adapted(r=2, lora_alpha=4.0, criterion="random", **options))

    plain, by_module = of(), of(alpha_pattern={"q_proj": 16.0})
    assert by_module["q_proj"] == pytest.approx(4 * plain["q_proj"])
    assert by_module["k_proj"] == plain["k_proj"]
    assert of(scale_support=4.0)["q_proj"] == pytest.approx(plain["q_proj"] / 4)


def test_a_grid_has_its_entries_in_some_of_the_rows():
    options = {"density": 0.02, "criterion": "random", "target_modules": ["q_proj"]}
    whole, grid = adapted(**options), adapted(**options, pattern=Grid(0.25, 0.25))
    spread = [mean_square_rows(adapter_layers(model)[0]) for model in (whole, grid)]
    assert spread[1] > spread[0]
    assert rates(grid)["q_proj"] / rates(whole)["q_proj"] == pytest.approx(spread[0] / spread[1], rel=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": Global(0.05), "criterion": "gradient"},
        {"start": GradientSplit(0.5)},
        {"start": GradientSplit(0.5), "r": 8, "density": 0.1},
        {"start": GradientSplit(0.5), "r": 4, "density": 0.005},
    ],
    ids=["global", "split", "split of many", "split of few"],
)
def test_sizes_that_data_finds_leave_the_rates_as_they_were_before(options):
    """The Trainer makes its optimizer before it calibrates, and a resumed run after its config has the sizes."""
    model = adapted(**{"r": 2, **options})
    before = rates(model)
    calibrate(model, DATA, show_progress=False)
    sizes = model.peft_config["default"].sizes
    assert len({tuple(found) for found in sizes.values()}) > 1
    assert rates(model) == before


def test_weights_that_data_leaves_without_a_support_count_as_before():
    budget = GlobalByGroup({"[qk]_proj": 2})
    options = {"target_modules": ["q_proj", "k_proj", "v_proj"], "r": 2, "criterion": "gradient", "budget": budget}
    model = adapted(granularity="block", block_size=8, **options)
    before = AUTO.ratios(model)
    calibrate(model, DATA, show_progress=False)
    after = AUTO.ratios(model)
    assert 0 < len(after) < len(before)
    assert set(after.values()) <= set(before.values())


def test_factors_keep_the_runs_rate():
    model = adapted(r=2, criterion="random")
    groups = AUTO.build(model, OptimizerSettings(lr=0.5)).param_groups
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    factors = [p for name, p in model.named_parameters() if name.split(".")[-2].endswith(("_A", "_B"))]
    assert len(factors) == 4
    assert {by_id[id(p)] for p in factors} == {0.5}


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.2, "criterion": "gradient", "schedule": [Prune(final_fraction=0.25)]},
        {"budget": Global(0.1), "criterion": "gradient"},
        {"density": 0.02, "start": GradientSplit()},
    ],
    ids=["thinned out on the way", "sizes found in data", "split by data"],
)
def test_a_resumed_run_has_the_rates_of_the_whole_one_and_ends_with_its_bits(options, tmp_path):
    def trained(folder, stop=None, resume=None, config=None):
        model = adapted(r=2, **options) if config is None else get_peft_model(tiny.llama(layers=1), config)
        args = TrainingArguments(
            str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1000,
        )  # fmt: skip
        trainer = Trainer(model=model, train_dataset=TokenData(), **trainer_options(model, args))
        for callback in [] if stop is None else [StopAt(stop)]:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return all_state(model, trainer.optimizer), [g["initial_lr"] for g in trainer.optimizer.param_groups]

    whole, rates_of_whole = trained(tmp_path / "whole")
    assert len(set(rates_of_whole)) > 1
    trained(tmp_path / "parts", stop=4)
    checkpoint = str(tmp_path / "parts" / "checkpoint-4")
    of_file = SparseLoraConfig.from_pretrained(checkpoint)  # which has the sizes that data gave
    of_file.inference_mode = False
    for config in (None, of_file):
        resumed, rates_of_resumed = trained(tmp_path / "parts", resume=checkpoint, config=config)
        assert rates_of_resumed == rates_of_whole
        assert differences(whole, resumed) == []


def test_an_optimizer_without_the_rates_is_told_of():
    model = adapted(r=2, criterion="random")
    flat = AgedAdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.warns(UserWarning, match="with other learning rates"):
        warn_of_other_optimizer(model, flat, "pass trainer_options")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_optimizer(model, AUTO.build(model, OptimizerSettings(lr=0.5)), "pass trainer_options")


def test_it_is_a_number_or_auto():
    with pytest.raises((TypeError, ValueError), match="values_ratio"):
        AgedAdamWSpec(values_ratio="fast")
    with pytest.raises(ValueError, match="values_ratio"):
        AgedAdamWSpec(values_ratio=-1.0)


def test_a_config_file_keeps_it(tmp_path):
    model = adapted(criterion="random")
    model.save_pretrained(tmp_path)
    assert SparseLoraConfig.from_pretrained(tmp_path).optimizer == AUTO


def test_the_default_method_asks_for_it():
    assert methods.get("sparse-lora").config.optimizer == AUTO
    assert methods.get("sparse-lora", values_ratio=0.5).config.optimizer == AgedAdamWSpec(values_ratio=0.5)
    budget = Numbers(500)
    assert methods.get("sparse-lora", budget=budget).config.optimizer == AUTO
