"""Nothing here may reach a hub: set before transformers and datasets read it. One thread: tensors are tiny."""

import gc
import os
import re
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect():
    """Trainer collects garbage after every run: 0.2 s over a million objects of imported modules, more than the run."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> list[str]:
    """Installed versions that are not the tested ones, so that a failure's first suspect is on the first line."""
    others = []
    for name, tested in re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(), re.M):
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "none"
        if found != tested:
            others.append(f"{name} {found} (tested: {tested})")
    return ["not the versions of constraints.txt: " + ", ".join(others)] if others else []
