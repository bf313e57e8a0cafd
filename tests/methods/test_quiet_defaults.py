"""A method by name warns of nothing that nobody asked for."""

import warnings

import pytest
import tiny
from peft import get_peft_model

from hf_sparse_peft import methods

FITTING = {
    "mask-lora": {"mask": "given"},
    "perp": {"mask": "given"},
    "unlearn-sparse": {"mask": "given"},
    "curing": {"max_rank": 5},
    "sketchtune": {"groups": 1, "bits": 2},
    "sst": {"r": 4},
    "smt": {"block_size": 8},
    "diablo": {"blocks": 8},
    "diffusekrona": {"rows": 8, "cols": 4},
    "ether": {"blocks": 4},
    "ether+": {"blocks": 4},
    "compacter": {"reduction": 8},
    "compacter++": {"reduction": 8},
    "hyperformer": {"reduction": 8},
    "hyperformer++": {"reduction": 8},
}
CASES = [(name, FITTING.get(name, {})) for name in methods.names(upstream=False)]
CASES += [("s2ft", options) for options in ({"o": 0.25, "v": 0.25}, {"channels": 0.1}, {"heads": 0.5})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_injection_with_the_methods_own_options_warns_of_nothing(name, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny.llama(layers=4), methods.get(name, **options).config)
