"""A zeroth-order run as a few bytes a step: what the directions were multiplied by, and how to walk the way again.

The file begins with one line of JSON (seed, epsilon, sparsity, perturbation, parameter groups); then comes a record of
`20 + 8 * groups` bytes for every optimizer step: `uint32` update, `uint32` micro-batches, `float64` projected gradient,
`float64` learning rate of each group, and the CRC-32 of the first line and these, little-endian.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..utils.file_writing import whole_file
from ..utils.json_text import read_json_text
from .zeroth_order import ZerothOrderSGD

LOG_NAME = "zeroth_order.log"
_FIELDS = ("seed", "epsilon", "sparsity", "perturbation", "groups")


class ZerothOrderLog:
    """Writes the log of a run; a resumed run goes on behind the last step that it still has.

    Raises:
        ValueError: the run goes on, and the file there is no log, another run's, or without some of its steps.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, optimizer: ZerothOrderSGD) -> None:
        self.path, groups = path, optimizer.param_groups
        header = {
            "seed": groups[0]["seed"],
            "epsilon": optimizer.epsilon,
            "sparsity": optimizer.sparsity,
            "perturbation": optimizer.perturbation,
            "groups": [{"weight_decay": g["weight_decay"], "names": g["param_names"]} for g in groups],
        }
        kept = b""
        if optimizer.updates:
            kept = _beginning(path, header, optimizer.updates)
        line = json.dumps(header).encode()
        self._seed = zlib.crc32(line)
        with whole_file(path) as file:
            file.write_bytes(line + b"\n" + kept)

    def append(self, update: dict[str, Any]) -> None:
        """Add `ZerothOrderSGD.last_update`."""
        record = struct.pack(
            f"<IId{len(update['lr'])}d", update["update"], update["passes"], update["projected_gradient"], *update["lr"]
        )
        with self.path.open("ab") as file:
            file.write(record + zlib.crc32(record, self._seed).to_bytes(4, "little"))


def read_log(path: str | Path) -> tuple[dict[str, Any], Iterator[tuple[int, int, float, list[float]]]]:
    """Header and records (update, micro-batches, projected gradient, learning rates) of a log.

    Raises:
        ValueError: not such a file, a cut one, or one whose records do not count up from 0.
    """
    header, body, size = _read(Path(path))
    if len(body) % size:
        raise ValueError(
            f"'{path}' ends within a record: the run was killed while it wrote. Cut {len(body) % size} bytes."
        )
    records = [
        (update, passes, gradient, list(lrs))
        for update, passes, gradient, *lrs, _ in struct.iter_unpack(f"<IId{len(header['groups'])}dI", body)
    ]
    if [record[0] for record in records] != list(range(len(records))):
        raise ValueError(f"'{path}' skips steps: it does not hold the whole run, so the way cannot be walked again.")
    return header, iter(records)


def replay(model: nn.Module, path: str | Path, until: int | None = None) -> int:
    """Give `model`, as it was when the run began, the weights it had after `until` steps (None: all); returns how many.

    No forward pass and no data. The walk repeats every rounding, so on a device of the same kind and one version of
    torch the weights agree to the last bit.

    Raises:
        ValueError: a damaged log, or a model without the parameters that were trained.
    """
    header, records = read_log(path)
    parameters = dict(model.named_parameters())
    missing = [name for group in header["groups"] for name in group["names"] if name not in parameters]
    if missing:
        raise ValueError(
            f"The model has no parameter {missing[:3]} that the log of '{path}' trained. Build it as the run did: the "
            "same base, the same adapter under the same name."
        )
    groups = [
        {"params": [(name, parameters[name]) for name in group["names"]], "weight_decay": group["weight_decay"]}
        for group in header["groups"]
    ]
    options = {field: header[field] for field in ("epsilon", "seed", "sparsity", "perturbation")}
    optimizer = ZerothOrderSGD(groups, **options)
    for update, passes, gradient, lrs in records:
        if until is not None and update >= until:
            break
        optimizer.replay_step(passes, gradient, lrs)
    return optimizer.updates


def _beginning(path: Path, header: dict[str, Any], steps: int) -> bytes:
    """The first `steps` records of the log that a resumed run goes on with.

    Raises:
        ValueError: see `ZerothOrderLog`.
    """
    if not path.exists():
        raise ValueError(f"There is no '{path}' to go on with.")
    known, body, size = _read(path)
    if known != header:
        raise ValueError(f"'{path}' is the log of another run: its seed, epsilon or parameters differ.")
    kept = body[: steps * size]
    numbers = [int.from_bytes(kept[at : at + 4], "little") for at in range(0, len(kept), size)]
    if len(kept) < steps * size or numbers != list(range(steps)):
        raise ValueError(f"'{path}' is damaged, or lacks some of the {steps} steps that the run has taken.")
    return kept


def _read(path: Path) -> tuple[dict[str, Any], bytes, int]:
    line, _, body = path.read_bytes().partition(b"\n")
    try:
        header = read_json_text(line)
        known = set(header) == set(_FIELDS)
    except (ValueError, TypeError):
        known = False
    if not known:
        raise ValueError(f"'{path}' is not the log of a zeroth-order run: it does not begin with one's header.")
    _check_header(header, path)
    size, seed = 20 + 8 * len(header["groups"]), zlib.crc32(line)
    for at in range(0, len(body) - size + 1, size):
        record, due = body[at : at + size - 4], body[at + size - 4 : at + size]
        if zlib.crc32(record, seed) != int.from_bytes(due, "little"):
            raise ValueError(f"'{path}' is damaged: its record {at // size}, or its first line, is another.")
    return header, body, size


def _check_header(header: dict[str, Any], path: Path) -> None:
    """Refuse values of other types than a run writes; names the field."""

    def number(one: Any) -> bool:
        return type(one) in (int, float) and math.isfinite(one)

    groups = header["groups"]
    wanted = {
        "seed": type(header["seed"]) is int and -(2**63) <= header["seed"] < 2**64,
        "epsilon": number(header["epsilon"]) and header["epsilon"] > 0,
        "sparsity": number(header["sparsity"]),
        "perturbation": isinstance(header["perturbation"], str),
        "groups": isinstance(groups, list)
        and all(isinstance(one, dict) and set(one) == {"weight_decay", "names"} for one in groups)
        and all(number(one["weight_decay"]) and isinstance(one["names"], list) for one in groups)
        and all(isinstance(name, str) for one in groups for name in one["names"]),
    }
    for name, right in wanted.items():
        if not right:
            raise ValueError(f"'{path}' is damaged: its first line has {name}={str(header[name])[:100]}.")
