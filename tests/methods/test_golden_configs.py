"""Each method's `adapter_config.json`, as it was agreed on: a change of a method is a change of its golden file.

python tests/methods/test_golden_configs.py        writes them all anew
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_sparse_peft import methods

GOLDEN = Path(__file__).parent / "golden"


def written(name: str) -> dict:
    """The method's config as its file has it; without what says something of the installation."""
    options = methods.get(name).config.to_dict()
    del options["peft_version"]
    options.pop("install_hint", None)  # upstream's configs have none
    return json.loads(json.dumps(options))


@pytest.mark.parametrize("name", methods.names())
def test_config_is_the_golden_one(name):
    assert (GOLDEN / f"{name}.json").is_file(), (
        f"{name} has no golden config: run python tests/methods/test_golden_configs.py"
    )
    assert written(name) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_every_golden_config_is_a_methods():
    assert sorted(file.stem for file in GOLDEN.glob("*.json")) == methods.names()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in methods.names():
        text = json.dumps(written(name), indent=2, sort_keys=True)
        (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")
