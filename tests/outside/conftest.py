import importlib
import sys
from pathlib import Path

import pytest

from hf_sparse_peft.methods import registry
from hf_sparse_peft.utils import parts


@pytest.fixture(scope="module")
def outside():
    """The package of somebody else; what it registers is gone afterwards, for tests that list what is registered."""
    sys.path.insert(0, str(Path(__file__).parent))
    known = dict(parts._PARTS), dict(registry._METHODS)
    yield importlib.import_module("outside_package")
    for table, before in zip((parts._PARTS, registry._METHODS), known, strict=True):
        table.clear()
        table.update(before)
    del sys.modules["outside_package"]
    sys.path.remove(str(Path(__file__).parent))
