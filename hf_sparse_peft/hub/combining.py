"""Combining adapter folders into a new one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tuners.shared.config import AdapterConfig
from ..tuners.shared.file_check import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from .folders import check_place
from .loading import load_adapter
from .saving import save_adapter


def combine_adapters(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    weights: Sequence[float],
    *,
    base: str | None = None,
    combination_type: str = "cat",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    modules_to_save_from: str | None = None,
    **arguments: Any,
) -> Path:
    r"""Write the adapter :math:`\sum_i w_i \Delta W_i` of adapters in folders, of one tuner and one base, to `out`.

    `combination_type` and what follows are those of `add_weighted_adapter` of the tuner's model: `cat` (exact), `svd`,
    `linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` and their `_svd` forms. Heads are those of the one
    adapter that has them, equal ones, or those of the folder `modules_to_save_from`. Returns `out`.

    Args:
        paths: two adapter folders or more.
        out: folder to write.
        weights: one for each.
        base: Hub id or folder of the base; None: what the adapters' configs name.
        arguments: go on to the base's `from_pretrained`.

    Raises:
        ValueError: fewer than two folders, adapters of other tuners or, without `base`, of other bases, `out` that
            holds something else, or what `add_weighted_adapter` refuses; nothing is written then.
    """
    folders = [Path(path) for path in paths]
    if len(folders) < 2:
        raise ValueError(f"paths={[str(path) for path in paths]} is one adapter or none; give two or more to combine.")
    if len(weights) != len(folders):
        raise ValueError(
            f"weights={list(weights)} has {len(weights)} numbers for {len(folders)} adapters; give one each."
        )
    # Everything is read and checked before the base is loaded.
    configs = [read_adapter(folder / CONFIG_FILE, folder / WEIGHTS_FILE).config for folder in folders]
    _check_alike(folders, configs, base)
    check_place(out, configs[0].peft_type.value)
    names = [f"adapter_{number}" for number in range(len(folders))]
    heads = None
    if modules_to_save_from is not None:
        known = {str(Path(path)): name for path, name in zip(folders, names, strict=True)}
        heads = known.get(str(Path(modules_to_save_from)))
        if heads is None:
            raise ValueError(f"modules_to_save_from={modules_to_save_from!r} is none of {list(known)}.")
    model = load_adapter(folders[0], base=base, **arguments)
    names[0] = "default"
    heads = "default" if heads == "adapter_0" else heads
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    model.base_model.add_weighted_adapter(
        names, list(weights), "combined", combination_type, svd_rank=svd_rank, density=density,
        majority_sign_method=majority_sign_method, modules_to_save_from=heads,
    )  # fmt: skip
    shown = ", ".join(f"{weight:g} x {folder.name}" for weight, folder in zip(weights, folders, strict=True))
    return save_adapter(model, out, adapter_name="combined", notes=f"A combination ({combination_type}): {shown}.")


def _check_alike(folders: list[Path], configs: list[AdapterConfig], base: str | None) -> None:
    for field in ("peft_type", "base_model_name_or_path"):
        if field == "base_model_name_or_path" and base is not None:
            continue
        values = [getattr(config, field) for config in configs]
        odd = next((at for at, value in enumerate(values) if value != values[0]), None)
        if odd is None:
            continue
        mend = "" if field == "peft_type" else " Pass base= if they are one model by two names."
        raise ValueError(
            f"'{folders[0]}' and '{folders[odd]}' differ in {field} ({values[0]}, {values[odd]}), and only adapters "
            f"that share it can be combined.{mend}"
        )
