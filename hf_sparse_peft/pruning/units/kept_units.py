"""Which heads and channels of each block are left: what slices a model, and a file of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...utils.checksums import CHECKSUMS, save_checked
from ...utils.file_length import read_safetensors
from ...utils.file_writing import whole_file
from ...utils.json_text import read_json_text
from .structure import CHANNELS, HEADS, BlockStructure, Kind


@dataclass(frozen=True)
class KeptOfBlock:
    """What one block keeps: sorted int64 vectors on the CPU, and how many there were."""

    heads: Tensor
    """Key and value heads, each with its query heads (`BlockStructure.query_heads`)."""
    channels: Tensor
    """Intermediate channels of the feed-forward part."""
    all_heads: int
    """Key and value heads of the whole block; 0 where heads were not looked at."""
    all_channels: int

    def units(self, kind: Kind) -> Tensor:
        """Kept units of a kind."""
        return self.heads if kind == HEADS else self.channels

    def all_units(self, kind: Kind) -> int:
        """Units of a kind in the whole block."""
        return self.all_heads if kind == HEADS else self.all_channels

    def removed(self, kind: Kind) -> Tensor:
        """Units of a kind that are gone, sorted int64."""
        gone = torch.ones(self.all_units(kind), dtype=torch.bool)
        gone[self.units(kind)] = False
        return gone.nonzero().flatten()


@dataclass
class KeptUnits:
    """What each block keeps, by the block's name. A block that is not named keeps all."""

    blocks: dict[str, KeptOfBlock] = field(default_factory=dict)

    @classmethod
    def all_of(cls, structures: Iterable[BlockStructure]) -> KeptUnits:
        """Everything: no block has lost anything."""
        return cls({s.name: KeptOfBlock(torch.arange(s.kv_heads), torch.arange(s.width), s.kv_heads, s.width)
                    for s in structures})  # fmt: skip

    def units(self, block: str, kind: Kind) -> Tensor | None:
        """Kept units of a block; None: all of them."""
        kept = self.blocks.get(block)
        return None if kept is None or not kept.all_units(kind) else kept.units(kind)

    def keep(self, block: str, kind: Kind, units: Tensor) -> None:
        """Set what a block keeps of a kind.

        Raises:
            ValueError: units that the block does not have, or one twice.
        """
        old = self.blocks[block]
        new = {HEADS: old.heads, CHANNELS: old.channels}
        new[kind] = _checked(units.detach().cpu().long().sort().values, old.all_units(kind), f"{block}: {kind}")
        self.blocks[block] = KeptOfBlock(new[HEADS], new[CHANNELS], old.all_heads, old.all_channels)

    def check(self, structures: Iterable[BlockStructure]) -> None:
        """Raises `ValueError` where they are not of a model with these structures, or leave a block none of a kind."""
        known = {structure.name: structure for structure in structures}
        for name, kept in self.blocks.items():
            if name not in known:
                raise ValueError(f"Kept units name a block '{name}', which the model does not have.")
            for kind in (HEADS, CHANNELS):
                has, told = known[name].units(kind), kept.all_units(kind)
                if told and has != told:
                    raise ValueError(
                        f"Kept units are of a block '{name}' with {told} {kind}, and the model's has {has}: load the "
                        "model that was pruned."
                    )
                if told and not len(kept.units(kind)):
                    raise ValueError(f"Kept units leave '{name}' without {kind}: keep one at least.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: `{block: {"heads": [...], "channels": [...], "of": [heads, channels]}}`."""
        return {
            name: {
                "heads": kept.heads.tolist(),
                "channels": kept.channels.tolist(),
                "of": [kept.all_heads, kept.all_channels],
            }
            for name, kept in self.blocks.items()
        }

    @classmethod
    def from_dict(cls, data: Any) -> KeptUnits:
        """Read `to_dict`.

        Raises:
            ValueError: another form, units out of range, not sorted, or one twice.
        """
        found = {}
        for name, block in (data if isinstance(data, Mapping) else {"": data}).items():
            totals = block.get("of") if isinstance(block, Mapping) else None
            counts = isinstance(totals, (list, tuple)) and len(totals) == 2 and all(map(_is_count, totals))
            lists = [block.get(kind) for kind in (HEADS, CHANNELS)] if counts else []
            if not counts or not all(isinstance(one, (list, tuple)) and all(map(_is_count, one)) for one in lists):
                raise ValueError(
                    f"Kept units of '{name}' are not understood: they are {{'heads': [...], 'channels': [...], 'of': "
                    "[heads, channels]}} with whole numbers."
                )
            units = [
                _checked(torch.tensor(one, dtype=torch.int64), total, f"{name}: {kind}")
                for one, total, kind in zip(lists, totals, (HEADS, CHANNELS), strict=True)
            ]
            found[name] = KeptOfBlock(*units, *totals)
        return cls(found)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file, whole: int64 tensors `<block>.heads` and `<block>.channels`; totals and a
        checksum as metadata."""
        tensors = {f"{name}.{kind}": kept.units(kind).clone()
                   for name, kept in self.blocks.items() for kind in (HEADS, CHANNELS)}  # fmt: skip
        totals = {name: [kept.all_heads, kept.all_channels] for name, kept in self.blocks.items()}
        with whole_file(Path(file)) as temporary:
            save_checked(tensors, temporary, metadata={"of": json.dumps(totals)})

    @classmethod
    def load(cls, file: str | Path) -> KeptUnits:
        """Read what `save` wrote.

        Raises:
            ValueError: a damaged file, or one of something else.
        """
        tensors, metadata = read_safetensors(Path(file))
        try:
            totals = read_json_text(metadata.get("of", ""))
            wanted = {f"{name}.{kind}" for name in totals for kind in (HEADS, CHANNELS)}
            if CHECKSUMS not in metadata:
                raise ValueError("it has no checksums")
            if wanted != set(tensors) or any(t.dtype != torch.int64 or t.dim() != 1 for t in tensors.values()):
                raise ValueError("its tensors are others than those it lists")
            return cls.from_dict({
                name: {"of": of, **{kind: tensors[f"{name}.{kind}"].tolist() for kind in (HEADS, CHANNELS)}}
                for name, of in totals.items()
            })  # fmt: skip
        except (ValueError, TypeError) as error:
            raise ValueError(f"'{file}' holds no kept units: {error}.") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked(units: Tensor, total: int, where: str) -> Tensor:
    steps = units.diff()
    if len(units) and (int(units[0]) < 0 or int(units[-1]) >= total or bool((steps <= 0).any())):
        raise ValueError(f"Kept units of {where} are not sorted numbers below {total}, each once.")
    return units
