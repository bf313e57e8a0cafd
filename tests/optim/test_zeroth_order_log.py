"""The log of a zeroth-order run: a damaged one gives no weights."""

import json

import pytest
import torch

from hf_sparse_peft.optim.zeroth_order import ZerothOrderSGD
from hf_sparse_peft.optim.zeroth_order_log import ZerothOrderLog, read_log, replay


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


@pytest.fixture
def log(tmp_path):
    optimizer = ZerothOrderSGD(model().named_parameters(), lr=0.1, epsilon=0.01, seed=5)
    written = ZerothOrderLog(tmp_path / "zeroth_order.log", optimizer)
    for at in range(4):
        written.append({"update": at, "passes": 1, "projected_gradient": 0.5 + at, "lr": [0.1]})
    return written.path


def test_any_damaged_byte_is_found_and_the_model_is_as_it_was(log):
    fresh = model()
    before = {name: one.clone() for name, one in fresh.state_dict().items()}
    assert replay(fresh, log) == 4
    assert not torch.equal(fresh.weight, before["weight"])
    content = log.read_bytes()
    for at in range(0, len(content), 3):
        log.write_bytes(content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :])
        target = model()
        with pytest.raises(ValueError, match="zeroth_order"):
            replay(target, log)
        assert all(torch.equal(target.state_dict()[name], one) for name, one in before.items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "1"), ("seed", 10**40), ("epsilon", 0), ("epsilon", None), ("sparsity", []), ("perturbation", 3),
        ("groups", [{"names": ["weight"]}]), ("groups", 3), ("groups", [{"names": "weight", "weight_decay": 0.0}]),
    ],
)  # fmt: skip
def test_header_of_wrong_types_names_the_field(log, field, value):
    line, _, body = log.read_bytes().partition(b"\n")
    log.write_bytes(json.dumps({**json.loads(line), field: value}).encode() + b"\n" + body)
    with pytest.raises(ValueError, match=f"{field}="):
        read_log(log)


def test_log_of_fewer_steps_says_how_many(log):
    content = log.read_bytes()
    size = (len(content) - content.index(b"\n") - 1) // 4
    log.write_bytes(content[:-size])
    assert replay(model(), log) == 3
    log.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="within a record"):
        replay(model(), log)
