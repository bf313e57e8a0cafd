"""Running what README and the pages of docs print, block after block."""

from __future__ import annotations

import re
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

import datasets
import tiny
import torch
from transformers import TrainingArguments

from hf_sparse_peft.merging import table as merge_table
from hf_sparse_peft.methods import registry
from hf_sparse_peft.utils import parts

ROOT = Path(__file__).parents[1]


def blocks(page: Path, language: str = "python") -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.+?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def reader() -> dict:
    """What a reader brings along, in the working folder: a model, arguments, data."""
    tiny.llama(hidden=128, layers=1).save_pretrained("base")
    rows = torch.randint(0, 64, (64, 8), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = {"max_steps": 61, "per_device_train_batch_size": 1, "use_cpu": True, "report_to": "none"}
    return {
        "torch": torch,
        "name": "base",
        "args": TrainingArguments("out", save_strategy="no", disable_tqdm=True, **arguments),
        "dataset": datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
    }


@contextmanager
def nothing_stays_registered():
    """What a page registers is gone afterwards, for tests that list what is registered."""
    tables = (parts._PARTS, registry._METHODS, merge_table._ROWS)
    known = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, known, strict=True):
        table.clear()
        table.update(before)


def run(page: Path, names: dict) -> list[str]:
    """Executes the page's Python in a module that has `names`; returns what it was warned of."""
    module = types.ModuleType("printed_example")  # classes of a page find their annotations through their module
    vars(module).update(names)
    sys.modules[module.__name__] = module
    with warnings.catch_warnings(record=True) as found, nothing_stays_registered():
        warnings.simplefilter("always")
        for number, block in enumerate(blocks(page)):
            exec(compile(block, f"{page.name}, block {number}", "exec"), vars(module))
    del sys.modules[module.__name__]
    return [str(one.message) for one in found if not issubclass(one.category, (DeprecationWarning, FutureWarning))]
