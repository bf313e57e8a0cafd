"""The matrices that a method adapts when nobody names them: those of its paper."""

import pytest
import tiny
from peft import get_peft_model

from hf_sparse_peft import methods
from hf_sparse_peft.tuners import adapter_layers

ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# LoRA on query and value, as the released code of these has it.
QUERY_VALUE = {"capaboost", "dsee", "mezo", "mosa", "nola", "sharelora", "loretta-rep", "surm", "1-bit-adapters"}
OTHERS = {
    "curing": {"q_proj", "k_proj", "gate_proj"},
    "s2ft": {"down_proj"},
    "diablo": {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"},
    "ist": {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"},
    "smt": {"q_proj", "k_proj", "v_proj"},
    "diffusekrona": set(ATTENTION),
    "houlsby": {"o_proj", "down_proj"},
    "mpoe": set(FFN),
    "compacter": {"o_proj", "down_proj"},
    "compacter++": {"down_proj"},
    "loretta-adp": {"o_proj", "down_proj"},
    "mov": {"k_proj", "v_proj", "down_proj"},
    "hyperformer": {"o_proj", "down_proj"},
    "hyperformer++": {"o_proj", "down_proj"},
}
SIZES = {
    "dsee": {"num_sparse": 8},
    "mask-lora": {"mask": "given"},
    "curing": {"max_rank": 5},
    "sketchtune": {"groups": 1, "bits": 2},
    "perp": {"mask": "given"},
    "welore": {"reduction": 0.8, "min_ratio": 0.0},
    "unlearn-sparse": {"mask": "given"},
    "diablo": {"blocks": 8},
    "smt": {"block_size": 8, "attention": 4},
    "diffusekrona": {"rows": 8, "cols": 4},
    "ether": {"blocks": 4},
    "ether+": {"blocks": 4},
    "compacter": {"reduction": 8},
    "compacter++": {"reduction": 8},
    "hyperformer": {"reduction": 8},
    "hyperformer++": {"reduction": 8},
}
"""What fits into the small model."""


def expected(name: str) -> set[str]:
    return OTHERS.get(name, {"q_proj", "v_proj"} if name in QUERY_VALUE else {*ATTENTION, *FFN})


def adapted(name: str, **options) -> set[str]:
    model = get_peft_model(tiny.llama(layers=2), methods.get(name, **{**SIZES.get(name, {}), **options}).config)
    return {layer.module_name for layer in adapter_layers(model)}


@pytest.mark.parametrize("name", methods.names(upstream=False))
def test_a_method_adapts_its_papers_matrices_in_every_block_and_no_head(name):
    found = adapted(name)
    assert {module.rpartition(".")[2] for module in found} == expected(name)
    assert len(found) == 2 * len(expected(name))


@pytest.mark.parametrize("name", methods.names(upstream=False))
def test_named_targets_take_the_place_of_the_default(name):
    groups = {"attention": None, "mlp": 4} if name == "smt" else {}
    found = adapted(name, target_modules=["down_proj"], **groups)
    assert {module.rpartition(".")[2] for module in found} == {"down_proj"}


FORMS = [
    n for n in methods.names(upstream=False) if methods.describe(n).build.__module__.endswith(("_forms", "rotations"))
]


@pytest.mark.parametrize("name", FORMS)
def test_a_runs_default_of_all_linears_leaves_structured_adapters_in_their_papers_places(name):
    whole_networks = name == "mpoe"  # all linears of a block would be no network
    assert methods.describe(name).keeps_places == (whole_networks or expected(name) != {*ATTENTION, *FFN})
