"""`recipes/benchmarks/distributed_costs.py`: its fit, its simulation, and all of it over a tiny model."""

import json
import sys
from pathlib import Path

import numpy as np
import processes
import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "distributed_costs.py"
sys.path.insert(0, str(SCRIPT.parent))


@pytest.fixture(scope="module")
def costs():
    import distributed_costs

    return distributed_costs


@pytest.fixture(scope="module")
def gloo():
    import gloo_costs

    return gloo_costs


def measured(gloo, start, latency, seconds_a_byte):
    """Times without noise, of a network that is as the model has it."""
    for ranks in (2, 4):
        for collective in ("all_reduce", "broadcast"):
            for size in gloo.timed_sizes(1 << 24):
                count, share = gloo.messages(collective, ranks)
                seconds = start + count * latency + share * size * seconds_a_byte
                yield ranks, {"collective": collective, "bytes": size, "seconds": [seconds] * 3}


def test_a_network_is_found_again_from_its_times(gloo):
    true = 2e-5, 3e-5, 4e-10
    for collective in ("all_reduce", "broadcast"):
        found = gloo.fit(list(measured(gloo, *true)), collective)
        assert (found.start, found.latency, found.seconds_a_byte) == pytest.approx(true, rel=1e-6)
        assert found.residual[1] < 1e-6
        assert found.seconds("all_reduce", 8, 1000) == pytest.approx(2e-5 + 14 * 3e-5 + 14 / 8 * 1000 * 4e-10)


def test_no_coefficient_is_below_zero(gloo):
    assert gloo.fit(list(measured(gloo, 0.0, 3e-5, 4e-10)), "all_reduce").start >= 0
    found = [(2, {"collective": "all_reduce", "bytes": size, "seconds": [1e-3 / size]}) for size in (1 << 10, 1 << 20)]
    fitted = gloo.fit(found, "all_reduce")
    assert min(fitted.start, fitted.latency, fitted.seconds_a_byte) >= 0


def test_a_ring_without_noise_takes_what_the_formula_says_and_noise_makes_it_slower(gloo):
    fitted, generator = gloo.Fit(2e-5, 3e-5, 4e-10, (0.0,)), np.random.default_rng(0)
    for ranks, size in ((2, 1 << 10), (8, 1 << 20), (64, 1 << 24)):
        quiet = gloo.simulate(fitted, np.ones(1), ranks, size, generator)
        assert quiet == pytest.approx(fitted.seconds("all_reduce", ranks, size))
        noisy = gloo.simulate(fitted, np.array([0.5, 1.5]), ranks, size, generator)
        assert noisy > quiet  # the same mean: ranks wait for the slower of two


def test_a_page_keeps_all_but_the_tables(costs, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- memory -->\nold\n<!-- /memory -->\nafter\n")
    costs.write_page(page, {"memory": "new\n", "another": "x\n"})
    assert page.read_text() == "before\n<!-- memory -->\nnew\n<!-- /memory -->\nafter\n"


def test_models_have_the_sizes_of_their_names(costs):
    import torch
    from transformers import AutoModelForCausalLM

    sizes = {}
    for name, config in costs.MODELS.items():
        shallow = [type(config)(**{**config.to_dict(), "num_hidden_layers": layers}) for layers in (1, 2)]
        with torch.device("meta"):
            one, two = (AutoModelForCausalLM.from_config(each).num_parameters() for each in shallow)
        sizes[name] = (one + (config.num_hidden_layers - 1) * (two - one)) / 1e9
    assert sizes == pytest.approx({"1B": 1.24, "8B": 8.03, "70B": 70.6, "400B MoE": 405}, rel=0.02)


TINY = """
import sys
sys.path.insert(0, {folder!r})
import distributed_costs as costs
from transformers import LlamaConfig
costs.MODELS = {{"tiny": LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=64)}}
costs.main(["--models", "tiny", "--seq", "16", "--density", "0.1", "--rounds", "2", "--largest", "4096", "--draws", "2",
    "--output", {output!r}, "--page", {page!r}])
"""


@pytest.mark.slow
def test_all_of_it_over_a_tiny_model(costs, tmp_path):
    names = ("memory", "traffic", "gloo fit", "gloo points", "simulated moves")
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    code = TINY.format(folder=str(SCRIPT.parent), output=str(tmp_path), page=str(page))
    processes.python("-c", code, check=True)
    rows = json.loads((tmp_path / "distributed_costs.json").read_text())["rows"]
    assert [row["part"] for row in rows] == ["step", "step", "gloo", "gloo"]
    text = page.read_text()
    assert text.count("| tiny | bf16 | fsdp2 |") == 2
    for name in names:
        assert len(text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].splitlines()) > 3
