"""Methods for whole weights: each trains a model by the table's own call, holds as much state as it says."""

import re

import pytest
import tiny
import torch
from transformers import Trainer

from hf_sparse_peft import methods
from hf_sparse_peft.optim import innermost

SMALL = {
    "galore": {"rank": 4, "every": 2},
    "fira": {"rank": 4, "every": 2},
    "frugal": {"every": 2},
    "gradnormlorp": {"rank": 4, "every": 2},
    "lisa": {"layers": 1, "every": 2},
    "owlore": {"layers": 1, "every": 2, "threshold": 3.0, "rank": 4, "refresh": 3},
    "badam": {"every": 2},
    "gauss-southwell": {"every": 2},
    "muon": {"adamw_ratio": 0.1},
    "adamr": {},
    "mkor": {"every": 2},
}


NUMBERS = {
    "mn": lambda m, n, r: m * n,
    "2mn": lambda m, n, r: 2 * m * n,
    "2mn + mm + nn": lambda m, n, r: 2 * m * n + m * m + n * n,
    "3mn": lambda m, n, r: 3 * m * n,
    "2rn + rm": lambda m, n, r: 2 * r * n + r * m,
    "2rn + rm + 1": lambda m, n, r: 2 * r * n + r * m + 1,
    "2rn + rm + 4m": lambda m, n, r: 2 * r * n + r * m + 4 * m,
    "2dmn, d the density": lambda m, n, r: 2 * 0.25 * m * n,
}


@pytest.mark.parametrize("name", methods.whole_names())
def test_each_trains_and_keeps_the_state_that_the_table_says(name, tmp_path):
    model = tiny.llama(layers=3)
    method = methods.whole(name, **SMALL[name])
    args, data = tiny.arguments(tmp_path, 6, weight_decay=0.01), tiny.TokenData(4)
    losses = [float(model(input_ids=data.ids, labels=data.ids).loss.detach())]
    trainer = Trainer(model=model, train_dataset=data, **method.options(model, args))
    trainer.train()
    losses.append(float(model(input_ids=data.ids, labels=data.ids).loss.detach()))
    assert losses[1] < losses[0]
    found = expected = 0
    entries = innermost(trainer.optimizer).state
    for parameter_name, p in model.named_parameters():
        if p.dim() != 2 or ".layers." not in parameter_name or not entries.get(p):
            continue
        m, n = sorted(p.shape)
        expected += NUMBERS[methods.whole_weights._METHODS[name].state.split(" in ")[0]](m, n, 4)
        found += sum(t.numel() for key, t in entries[p].items() if key != "step")
    # Magnitudes have a row each, of the longer side too; blocks come whole.
    assert found == pytest.approx(expected, rel=0.35 if name in ("gradnormlorp", "frugal") else 0)


def test_every_row_names_its_source_and_unknown_ones_are_refused():
    assert set(SMALL) == set(methods.whole_names())
    for line in methods.whole_table().splitlines()[2:]:
        assert re.search(r"\w+ et al\., 20\d\d", line)
    with pytest.raises(ValueError, match="no method 'gallore' for whole weights; choose one of"):
        methods.whole("gallore")
    with pytest.raises(ValueError, match="choose one of"):
        methods.whole("frugal", projection="wavelet")


def test_frugal_takes_every_projection_of_its_paper():
    shapes = {}
    for projection in ("blocks", "columns", "rows", "entries", "random", "svd"):
        spec = methods.whole("frugal", projection=projection, rank=4).optimizer
        shapes[projection] = spec.projection.reduced((16, 8))
        assert spec.reset_moments
    assert shapes == {
        "blocks": (16, 8), "columns": (16, 2), "rows": (4, 8), "entries": (32,), "random": (16, 4), "svd": (16, 4),
    }  # fmt: skip
    assert torch.Size(shapes["entries"]).numel() == 32
