"""Supports in a file of their own, so that a run can start from what another one estimated."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..sparsity import UnitGrid, codes_length, decode_support, encode_support
from ..utils.file_length import read_safetensors
from ..utils.file_writing import whole_file

FORMAT, VERSION = "hf_sparse_peft.support", "1"


def write_support_file(
    path: str | Path, units: dict[str, torch.Tensor], grids: dict[str, UnitGrid], about: dict[str, object]
) -> None:
    """Write the units of each module, gap-coded as in adapter files, and what they were chosen by."""
    codes = {name: encode_support(u, grids[name], u.numel()).cpu().contiguous() for name, u in units.items()}
    with whole_file(path) as file:
        save_file(codes, file, metadata={"format": FORMAT, "version": VERSION, "about": json.dumps(about)})


def read_support_file(path: str | Path, grids: dict[str, UnitGrid]) -> tuple[dict[str, torch.Tensor], dict]:
    """Units of every module in `grids`, and what they were chosen by.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, of another version, cut, damaged, or made for other modules or grids; the message
            names the first module that differs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no support file '{path}'. initialize_support(..., save_to=...) writes one.")
    stored, about = read_safetensors(path)
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise ValueError(
            f"'{path}' is not a support file of version {VERSION}: its format is {about.get('format')!r}, version "
            f"{about.get('version')!r}. initialize_support(..., save_to=...) writes them."
        )
    missing, extra = sorted(set(grids) - set(stored)), sorted(set(stored) - set(grids))
    if missing or extra:
        raise ValueError(
            f"'{path}' was made for another model or other target_modules: it lacks {missing[:3]} ({len(missing)} "
            f"modules) and has {extra[:3]} ({len(extra)} modules) that this adapter does not."
        )
    units = {}
    for name, grid in grids.items():
        capacity = stored[name].numel() - codes_length(grid, 0)
        if not 0 <= capacity <= grid.num_units:
            raise ValueError(f"'{name}' in '{path}' has a support of another weight than {grid.rows}x{grid.cols}.")
        units[name] = decode_support(stored[name], grid, capacity, f"{name} in '{path}'")
    return units, _chosen_by(about, path)


def _chosen_by(about: dict[str, str], path: Path) -> dict:
    try:
        found = json.loads(about.get("about", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' does not say what its units were chosen by: {error}. Write it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' says {found!r} where an object of what its units were chosen by is due.")
    return found
