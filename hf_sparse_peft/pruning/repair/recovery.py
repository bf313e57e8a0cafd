"""LoRAM: an adapter that was trained on a smaller base, as one for the full base (Zhang et al., 2025)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ...hub.export import fill_entries
from ...hub.folders import ADAPTER_FILES, staged_folder
from ...hub.loading import adapter_folder, read_config
from ...sparsity import stream_seed
from ...utils.file_length import read_safetensors
from ...utils.file_writing import temporary_folder
from ..units.kept_axes import FullShape, KeptAxes, full_model, kept_axes, linear_shapes
from ..units.kept_units import KeptUnits
from ..units.sliced_files import find_kept

PREFIX = "base_model.model."
_FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".shira_weight": "values",
    ".shira_indices": "positions",
}
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")


@torch.no_grad()
def recover_adapter(
    adapter: str | os.PathLike | PeftModel,
    path: str | os.PathLike,
    full: str | os.PathLike | PreTrainedConfig | nn.Module,
    *,
    kept: KeptUnits | None = None,
    missing: Literal["zeros", "normal"] = "zeros",
    seed: int = 0,
) -> Path:
    r"""Write an adapter that was trained on a sliced base as one for the full base, which peft loads alone.

    With the kept outputs :math:`K_o` and inputs :math:`K_i` of a weight `[m, n]`,

    .. math:: B_{full}[K_o, :] = B, \quad A_{full}[:, K_i] = A, \quad \text{0 elsewhere},

    so that :math:`\Delta W_{full}` is the small update scattered into zeros. Modules that were not cut keep their
    tensors, and so do all where the base was pruned by zeros instead of slices (no `kept`): recovery is the identity
    there, and the update of what was zero is kept as well. Optimizer state is not carried over.

    Args:
        adapter: folder or Hub repo of a plain LoRA or SHiRA of upstream peft, or the model that has it. Adapters of
            this package become one by `hub.export_lora` or `hub.export_shira` first.
        path: the folder to write.
        full: the full base, its config, or what `from_pretrained` takes to find that; its name goes into the file.
        kept: what the sliced base keeps; None: what lies beside the adapter (`save_kept`), or the model's own.
        missing: the columns of A that were cut: 0 (the official code's zeroA), or draws of
            :math:`\mathcal N(0, 1/r^2)` (its normA), by which :math:`\Delta W` is no longer 0 there.
        seed: of these draws.

    Returns: `path`.

    Raises:
        ValueError: an adapter of another type, or one that is more than factors (DoRA, copies of weights that were
            cut, starts that changed the base); shapes that do not fit `kept` and `full`; a damaged file; a `path` that
            holds something else.
    """
    if missing not in ("zeros", "normal"):
        raise ValueError(f"missing={missing!r} is unknown; choose 'zeros' (zeroA) or 'normal' (normA).")
    with _folder_of(adapter, path) as folder:
        config, (tensors, _) = read_config(folder), read_safetensors(folder / ADAPTER_FILES[1])
        kept = find_kept(adapter, folder) if kept is None else kept
    _refuse_other_adapters(config)
    model, name = full_model(full)
    axes = {} if kept is None else kept_axes(model, kept)
    recovered = recover_tensors(tensors, axes, linear_shapes(model), missing=missing, seed=seed)
    config = {**config, "base_model_name_or_path": name or config.get("base_model_name_or_path"), "revision": None}
    with staged_folder(path, config["peft_type"]) as stage:
        (stage / ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        save_file(recovered, stage / ADAPTER_FILES[1], metadata={"format": "pt"})
    return Path(path)


def recover_tensors(
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, KeptAxes],
    shapes: Mapping[str, FullShape],
    *,
    missing: Literal["zeros", "normal"] = "zeros",
    seed: int = 0,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by key, for the full base; see `recover_adapter`.

    Args:
        tensors: `lora_A.weight` `[r, in]`, `lora_B.weight` `[out, r]`, `lora_B.bias` `[out]`, `shira_weight`
            `[1, n]`, `shira_indices` `[2, n]` of each module, and tensors of modules that were not cut.
        axes: kept outputs and inputs of the modules that were cut.
        shapes: `(out, in)` of every linear layer of the full base.

    Raises:
        ValueError: a tensor of a module that was cut which is none of these, or does not have the kept shape.
    """
    found = {}
    for key, tensor in tensors.items():
        module, kind = _split(key)
        axis = axes.get(module, KeptAxes())
        if kind is None:
            cut = next((name for name in axes if key.startswith(f"{PREFIX}{name}.")), None)
            if cut is not None:
                raise ValueError(
                    f"'{key}' belongs to '{cut}', which was cut, and holds more than factors: what the full base has "
                    "elsewhere is not in it. Train without DoRA, biases and modules_to_save there."
                )
            found[key] = tensor
            continue
        shape = shapes.get(module)
        if shape is None and not axis.is_whole:
            raise ValueError(f"'{module}' was cut, and the full base has no such linear layer. Pass the base it had.")
        if shape is None:  # an embedding: never cut
            found[key] = tensor
            continue
        _check(key, tensor, kind, axis, shape)
        if kind == "A":
            found[key] = _scattered(tensor, axis.cols, 1, shape[1], _noise(missing, seed, module, len(tensor)))
        elif kind in ("B", "bias"):
            found[key] = _scattered(tensor, axis.rows, 0, shape[0])
        else:
            found[key] = tensor
    return _recover_entries(found, axes, shapes)


def _scattered(tensor: Tensor, kept: Tensor | None, axis: int, size: int, noise: Any = None) -> Tensor:
    """`tensor` at `kept` along `axis` of a tensor of `size` there; elsewhere 0 or `noise(shape)`."""
    if kept is None:
        return tensor.contiguous()
    shape = [size if at == axis else length for at, length in enumerate(tensor.shape)]
    full = tensor.new_zeros(shape) if noise is None else noise(shape).to(tensor)
    return full.index_copy_(axis, kept.to(tensor.device), tensor)


def _noise(missing: str, seed: int, module: str, rank: int) -> Any:
    if missing == "zeros":
        return None
    generator = torch.Generator().manual_seed(stream_seed(seed, "missing columns", module))
    return lambda shape: torch.randn(shape, generator=generator) / rank


def _recover_entries(
    tensors: dict[str, Tensor], axes: Mapping[str, KeptAxes], shapes: Mapping[str, FullShape]
) -> dict[str, Tensor]:
    """SHiRA's entries at their places in the full weight; filled up with zeros, as peft wants r (out + in) of them."""
    for key in [key for key in tensors if key.endswith(".shira_indices")]:
        module, values = _split(key)[0], key.replace(".shira_indices", ".shira_weight")
        axis, (rows, cols) = axes.get(module, KeptAxes()), shapes[module]
        if axis.is_whole:
            continue
        at = tensors[key].long()
        places = [at[0] if axis.rows is None else axis.rows[at[0]], at[1] if axis.cols is None else axis.cols[at[1]]]
        small = (rows if axis.rows is None else len(axis.rows)) + (cols if axis.cols is None else len(axis.cols))
        flat, order = (places[0] * cols + places[1]).sort()
        count = at.shape[1] // small * (rows + cols)
        flat, filled = fill_entries(flat, tensors[values].flatten()[order], count)
        tensors[key] = torch.stack((flat // cols, flat % cols)).to(tensors[key].dtype)
        tensors[values] = filled.view(1, -1) if tensors[values].ndim == 2 else filled
    return tensors


def _split(key: str) -> tuple[str, str | None]:
    """Module and kind of factor; None for what is none."""
    for ending, kind in _FACTORS.items():
        if key.startswith(PREFIX) and key.endswith(ending):
            return key.removeprefix(PREFIX).removesuffix(ending), kind
    return key.removeprefix(PREFIX).rpartition(".")[0], None


def _check(key: str, tensor: Tensor, kind: str, axis: KeptAxes, shape: FullShape) -> None:
    rows = shape[0] if axis.rows is None else len(axis.rows)
    cols = shape[1] if axis.cols is None else len(axis.cols)
    if kind == "positions":
        fits = tensor.ndim == 2 and len(tensor) == 2 and bool((tensor >= 0).all())
        fits = fits and bool((tensor[0] < rows).all()) and bool((tensor[1] < cols).all())
        fits = fits and tensor.shape[1] % (rows + cols) == 0
    else:
        along = {"A": (1, cols), "B": (0, rows), "bias": (0, rows)}.get(kind)
        fits = along is None or (tensor.ndim > along[0] and tensor.shape[along[0]] == along[1])
    if not fits or not torch.isfinite(tensor.float()).all():
        raise ValueError(
            f"'{key}' of shape {tuple(tensor.shape)} does not fit a weight of which {rows} x {cols} of "
            f"{shape[0]} x {shape[1]} were kept, or is not finite. Pass the kept units of the base that it was trained "
            "on, and the full base that this was cut from."
        )


def _refuse_other_adapters(config: dict[str, Any]) -> None:
    kind, init = config.get("peft_type"), str(config.get("init_lora_weights", True)).lower()
    if kind not in ("LORA", "SHIRA"):
        raise ValueError(
            f"The adapter is a {kind}, and LORA and SHIRA can be recovered. Write it as one first: hub.export_lora for "
            "factors, rows and columns, hub.export_shira for entries."
        )
    if config.get("use_dora") or init.startswith(_BASE_CHANGED):
        what = "use_dora=True" if config.get("use_dora") else f"init_lora_weights={init!r}"
        raise ValueError(f"{what} depends on the weights of the small base. Train a plain LoRA there.")


@contextmanager
def _folder_of(adapter: str | os.PathLike | PeftModel, path: str | os.PathLike) -> Iterator[Path]:
    if not isinstance(adapter, PeftModel):
        yield adapter_folder(adapter)
        return
    name = adapter.active_adapter
    with temporary_folder(Path(path).expanduser().resolve().parent, f"{Path(path).name}-small") as folder:
        adapter.save_pretrained(str(folder), selected_adapters=[name])
        yield folder if name == "default" else folder / name
