"""`export_patch`: an adapter of a model or a folder, written as a weight patch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import nn

from ..base_model import load_base
from ..check import check_adapter
from ..folders import staged_folder
from .making import Only, make_patch
from .patch_files import MODULES_FILE, SUPPORT_FILE, write_patch
from .slime import Checksum, Encoding, write_slime_delta
from .weight_patch import Patch


@dataclass(frozen=True)
class PatchExport:
    """What `export_patch` wrote."""

    path: Path
    """The folder."""
    patch: Patch
    """What is in it."""
    file_bytes: int
    """Size of its files."""


def export_patch(
    model: nn.Module | str | os.PathLike,
    path: str | os.PathLike,
    format: Literal["vllm", "slime"] = "vllm",
    *,
    base: nn.Module | str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    adapter_names: Iterable[str] | None = None,
    weights: Iterable[float] | None = None,
    only: Only | None = None,
    keep_unchanged: bool = False,
    version: int = 1,
    since: Patch | None = None,
    encoding: Encoding = "overwrite",
    checksum: Checksum = "adler32",
) -> PatchExport:
    """Write what an adapter changes as new values of its base's checkpoint, for engines that patch what they serve.

    `format="vllm"` writes `patch.safetensors` into the new folder `path` (read it with `read_patch`, hand it over with
    `to_vllm_patches`), and heads and biases as whole tensors into `modules.safetensors`, for a second call.
    `format="slime"` writes `path/weight_v000001`, see `write_slime_delta` for `version`, `since`, `encoding` and
    `checksum`. Whole or not at all.

    `model` may be the folder of an adapter: `base` is then the checkpoint's folder or Hub id (None: what the adapter's
    config names), which is loaded in its own dtype. All else as `make_patch` takes it.

    Raises:
        ValueError: what `make_patch` and `write_slime_delta` refuse, an unknown format, or `path` is not empty.
    """
    if format not in ("vllm", "slime"):
        raise ValueError(f"format={format!r} is unknown; choose 'vllm' or 'slime'.")
    if not isinstance(model, nn.Module):
        model, base = _loaded(Path(model), base), None
    options = {"adapter_names": adapter_names, "weights": weights, "keep_unchanged": keep_unchanged}
    patch = make_patch(model, base=base, dtype=dtype, only=only, **options)
    path = Path(path)
    if format == "slime":
        source = base
        if source is None:
            source = model.get_base_model() if isinstance(model, PeftModel) else model
        options = {"version": version, "since": since, "encoding": encoding, "checksum": checksum}
        path = write_slime_delta(patch, path, source, **options)
    else:
        with staged_folder(path) as stage:
            for name, items in ((SUPPORT_FILE, _part(patch, True)), (MODULES_FILE, _part(patch, False))):
                if items.weights or name == SUPPORT_FILE:
                    write_patch(items, stage / name)
    return PatchExport(path, patch, sum(file.stat().st_size for file in path.iterdir()))


def _part(patch: Patch, sparse: bool) -> Patch:
    items = tuple(one for one in patch.weights if (one.indices is not None) == sparse)
    digests = {one.name: patch.base_digests[one.name] for one in items if one.name in patch.base_digests}
    return Patch(items, digests, patch.unchanged if sparse else 0)


def _loaded(folder: Path, base: str | os.PathLike | nn.Module | None) -> PeftModel:
    check_adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not isinstance(base, nn.Module):
        named = base or config.get("base_model_name_or_path")
        if not named:
            raise ValueError(f"'{folder}' does not name its base model; pass base=.")
        where = {"revision": config["revision"]} if not base and config.get("revision") else {}
        base = load_base(str(named), config, folder, dtype="auto", **where)
    return PeftModel.from_pretrained(base, str(folder)).eval()
