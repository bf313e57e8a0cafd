"""Supports that come from elsewhere: written to a model, saved to a file of their own, loaded from it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from ...rules.collectives import rank
from ...sparsity import UnitGrid, codes_length, decode_support, encode_support
from ...tuners import adapter_layers
from ...tuners.sparse_lora import SparseLoraConfig, SparseLoraLayer
from ...utils.checksums import CHECKSUMS, save_checked
from ...utils.file_length import read_safetensors
from ...utils.file_writing import whole_file
from ...utils.json_text import read_json_text

FORMAT, VERSION = "hf_sparse_peft.support", "1"


def write_supports(model: nn.Module, units: dict[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Make `units` (module name -> sorted distinct units) the supports of an adapter, all values at zero.

    Where the config leaves sizes to data (`criterion="given"`, or a criterion by data with `budget=Global(...)` or
    structures of `scope="model"`), any number of units of a module is taken, none included, and `sizes` is
    written.

    Raises:
        ValueError: modules that are not the adapter's, or a number of units that the config does not allow; names them.
            Trained values, which a new support would throw away.
    """
    layers, config = layers_with_support(model, adapter_name)
    _check_untrained(layers, adapter_name)
    by_name = {layer.module_name: layer for layer in layers}
    odd = sorted(set(units) ^ set(by_name))
    if odd:
        raise ValueError(f"The units are of other modules than adapter '{adapter_name}': {odd[:3]} ({len(odd)}).")
    if not any(chosen.numel() for chosen in units.values()):
        raise ValueError("No module has a unit: there is nothing to train.")
    open_sizes = config.calibrates_sizes
    for name, layer in by_name.items() if config.known_pattern is not None else ():
        config.known_pattern.check_units(units[name], layer.sparse_lora_grid[adapter_name], name)
    for name, layer in by_name.items():
        size, given = _size(layer, adapter_name), units[name].numel()
        if not open_sizes and given != size:
            raise ValueError(
                f"'{name}' is given {given} units and its support has {size}. Sizes can change only before training, "
                "with criterion='given', or a criterion by data with budget=Global(...) or structures of "
                "scope='model', and empty sizes."
            )
    for name, layer in by_name.items():
        chosen = units[name].to(layer.get_base_layer_device())
        if chosen.numel() != _size(layer, adapter_name):
            layer.resize_support(adapter_name, chosen.numel())
        if chosen.numel():
            layer.write_support(adapter_name, chosen)
            layer.sparse_lora_values[adapter_name].data.zero_()
    if open_sizes:
        adapted = [layer for layer in adapter_layers(model, SparseLoraLayer) if adapter_name in layer.sizes]
        config.sizes = {layer.module_name: layer.sizes[adapter_name].as_list() for layer in adapted}


def save_support(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter's supports, without values, to a safetensors file that `load_support` reads.

    Raises:
        ValueError: a support has not been chosen yet.
    """
    layers, config = layers_with_support(model, adapter_name)
    waiting = [layer.module_name for layer in layers if layer.awaits_calibration(adapter_name)]
    if waiting:
        raise ValueError(f"Nothing to save: the support of '{waiting[0]}' has not been chosen yet.")
    if rank() > 0:
        return
    none = torch.empty(0, dtype=torch.int32)
    units = {layer.module_name: layer.units(adapter_name) if _size(layer, adapter_name) else none for layer in layers}
    about = {"criterion": config.criterion.to_dict()}
    write_support_file(path, units, _grids(layers, adapter_name), about)


def load_support(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Start from the supports in a file of `initialize_support(..., save_to=path)`; values are zeroed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, of another format, made for another model (the message names the module), or
            its sizes are not the config's.
    """
    layers, _ = layers_with_support(model, adapter_name)
    check_fresh(layers, adapter_name)
    units, _ = read_support_file(path, _grids(layers, adapter_name))
    write_supports(model, units, adapter_name)


def _size(layer: SparseLoraLayer, adapter_name: str) -> int:
    return layer.sizes[adapter_name].units if adapter_name in layer.sparse_lora_values else 0


def _grids(layers: list[SparseLoraLayer], adapter_name: str) -> dict[str, UnitGrid]:
    return {layer.module_name: layer.sparse_lora_grid[adapter_name] for layer in layers}


def layers_with_support(model: nn.Module, adapter_name: str) -> tuple[list[SparseLoraLayer], SparseLoraConfig]:
    layers = [layer for layer in adapter_layers(model, SparseLoraLayer) if adapter_name in layer.sparse_lora_grid]
    if not layers:
        known = sorted({name for layer in adapter_layers(model, SparseLoraLayer) for name in layer.sparse_lora_grid})
        raise ValueError(
            f"The model has no adapter '{adapter_name}' with a support; adapters that have one: {known or 'none'}. "
            "Call get_peft_model with a SparseLoraConfig of density > 0 first."
        )
    config = layers[0].adapter_configs[adapter_name]
    if config.awaits_start:
        raise ValueError(
            f"start={config.start} of adapter '{adapter_name}' sizes and starts both halves together, and has not been "
            "found yet. Call hf_sparse_peft.calibrate(model, dataloader), or set start=None to choose the support."
        )
    return layers, config


def check_fresh(layers: list[SparseLoraLayer], adapter_name: str) -> None:
    for layer in layers:
        values = layer.sparse_lora_values.get(adapter_name, None)
        if values is None:
            continue
        if adapter_name not in layer.active_adapters or layer.merged or layer.disable_adapters:
            raise ValueError(
                f"Adapter '{adapter_name}' is inactive, disabled or merged; call model.set_adapter('{adapter_name}')."
            )
        if not values.requires_grad:
            raise ValueError(f"Adapter '{adapter_name}' is frozen; load it with is_trainable=True.")
    _check_untrained(layers, adapter_name)


def _check_untrained(layers: list[SparseLoraLayer], adapter_name: str) -> None:
    for layer in layers:
        if adapter_name in layer.sparse_lora_values and not layer.has_first_values(adapter_name):
            raise ValueError(
                f"Adapter '{adapter_name}' has trained values in '{layer.module_name}', which a new support would "
                "throw away. Choose the support before training."
            )


def write_support_file(
    path: str | Path, units: dict[str, torch.Tensor], grids: dict[str, UnitGrid], about: dict[str, object]
) -> None:
    """Write the units of each module, coded as in adapter files, and what they were chosen by."""
    codes = {name: encode_support(u, grids[name], u.numel()).cpu().contiguous() for name, u in units.items()}
    with whole_file(path) as file:
        save_checked(codes, file, metadata={"format": FORMAT, "version": VERSION, "about": json.dumps(about)})


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
    if CHECKSUMS not in about:
        raise ValueError(f"'{path}' has no checksums ('{CHECKSUMS}' in its metadata). Fetch or write it again.")
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
        found = read_json_text(about.get("about", ""))
    except ValueError as error:
        raise ValueError(f"'{path}' does not say what its units were chosen by: {error}. Write it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' says {found!r} where an object of what its units were chosen by is due.")
    return found
