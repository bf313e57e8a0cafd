"""`AgedAdamWSpec(values_ratio="auto")`: the rate of sparse values over that of the factors, from the equation."""

import math

import pytest
import tiny
import torch
from peft import get_peft_model
from training_toolbox import run

from hf_sparse_peft import Prune, SparseLoraConfig, callbacks_for, methods
from hf_sparse_peft.optim import OptimizerSettings
from hf_sparse_peft.sparsity import Numbers
from hf_sparse_peft.training import AgedAdamWSpec
from hf_sparse_peft.training.values_rate import CONSTANTS
from hf_sparse_peft.tuners import adapter_layers

AUTO = AgedAdamWSpec(values_ratio="auto")


def adapted(**options):
    options = {"r": 0, "target_modules": ["q_proj", "k_proj"], "density": 0.05, "optimizer": AUTO, **options}
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
    return dict(zip(("q_proj", "k_proj"), adapter_layers(model), strict=True))


def mean_square_rows(layer) -> float:
    """k sqrt(f) of a support as it is: over all rows, the root of the mean square of their entries' number."""
    dense = torch.zeros(layer.get_base_layer().weight.shape, dtype=torch.float64)
    piece = layer.pieces("default")[-1].entries()
    dense.view(-1)[piece[0]] = 1
    return dense.sum(1).square().mean().sqrt().item()


@pytest.mark.parametrize("granularity", ["entry", "block", "row", "column"])
def test_rates_are_those_of_the_equation_on_the_support_itself(granularity):
    model = adapted(granularity=granularity, block_size=4, density=0.25, criterion="random", lora_alpha=6.0)
    for name, layer in layers(model).items():
        expected = 0.5 * CONSTANTS[granularity][0] * 6.0 / mean_square_rows(layer)
        found = rates(model)[name]
        # The equation expects equally many entries a row; drawn ones vary around that.
        assert found == pytest.approx(expected, rel=0.25 if granularity in ("entry", "block") else 1e-6)
        assert found >= expected * (1 - 1e-6)


def test_a_subnet_has_its_columns_in_its_rows():
    model = adapted(granularity="subnet", subnet_shares=(0.5, 0.25), density=0.005)
    layer = adapter_layers(model)[0]
    rows, columns = layer.sparse_lora_subnet["default"].shape
    spread = columns * math.sqrt(rows / layer.get_base_layer().weight.shape[0])
    assert rates(model)["q_proj"] == pytest.approx(0.5 * 1.8 * 16 / spread)


def test_twice_the_density_halves_the_rate_and_twice_alpha_doubles_it():
    one, dense, alpha = (
        rates(adapted(density=density, lora_alpha=a))["q_proj"] for density, a in ((0.25, 16), (0.5, 16), (0.25, 32))
    )
    assert one / dense == pytest.approx(2, rel=0.01)
    assert alpha / one == pytest.approx(2)


def test_a_gradients_choice_is_slower_and_units_from_outside_are_not():
    random, gradient, given = (rates(adapted(criterion=name))["q_proj"] for name in ("random", "gradient", "given"))
    assert gradient / random == pytest.approx(CONSTANTS["entry"][1] / CONSTANTS["entry"][0])
    assert given == random


def test_factors_keep_the_runs_rate():
    model = adapted(r=2, criterion="random")
    groups = AUTO.build(model, OptimizerSettings(lr=0.5)).param_groups
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    factors = [p for name, p in model.named_parameters() if name.split(".")[-2].endswith(("_A", "_B"))]
    assert len(factors) == 4
    assert {by_id[id(p)] for p in factors} == {0.5}


def test_rates_are_of_the_size_at_the_start_so_that_a_resumed_run_has_them_too(tmp_path):
    model = adapted(density=0.2, criterion="random", schedule=[Prune(final_fraction=0.25)])
    before = rates(model)
    run(model, tmp_path, 4, callbacks=callbacks_for(model))
    assert rates(model) == before


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
