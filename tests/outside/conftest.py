import importlib
import sys
from pathlib import Path

import pytest
from markdown_pages import nothing_stays_registered


@pytest.fixture(scope="module")
def outside():
    """The package of somebody else; what it registers is gone afterwards, for tests that list what is registered."""
    sys.path.insert(0, str(Path(__file__).parent))
    with nothing_stays_registered():
        yield importlib.import_module("outside_package")
    del sys.modules["outside_package"]
    sys.path.remove(str(Path(__file__).parent))
