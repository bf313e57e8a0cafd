"""Telling masked LoRAs what was removed from the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...sparsity import check_n_of_m, decode_n_of_m, encode_n_of_m, pack_bits, unpack_bits
from ...utils.checksums import save_checked
from ...utils.file_length import read_safetensors
from ...utils.file_writing import whole_file
from ..shared.layer import adapter_layers
from .layer import MaskedLoraLayer


@torch.no_grad()
def set_masks(model: nn.Module, removed: Mapping[str, Tensor] | str | Path, adapter_name: str = "default") -> None:
    """Let an adapter with `mask="given"` leave alone what was removed from the base, in all of its layers or in none.

    Args:
        model: the adapted model, dense or quantised.
        removed: by module name the bits of what is gone, as `PruningReport.masks` has them, or a file of them
            (`save_masks`). Names of a model without a head, or inside of one, are understood.
        adapter_name: which adapter.

    Raises:
        ValueError: no such adapter, one whose mask is computed, a layer that `removed` does not name, bits of another
            weight, or, unless the adapter masks the base too (`masks_base`), a base that is not 0 where something was
            removed: it is not the one that was pruned.
        TypeError: `removed` is no mapping.
    """
    layers = adapter_layers(model, MaskedLoraLayer, adapter_name)
    masks = RemovedWeights(removed)
    masking = layers[0].adapter_configs[adapter_name].masking
    if masking.computes_mask:
        raise ValueError(f"Adapter '{adapter_name}' computes its mask ({type(masking).__name__}), and none can be set.")
    found = {}
    for layer in layers:
        gone = masks.of(layer.module_name, layer.out_features, layer.in_features, layer.get_base_layer_device())
        if not layer.masks_base(adapter_name) and bool(layer.dense_base_weight()[gone].any()):
            raise ValueError(
                f"'{layer.module_name}' is not 0 where weights were removed: this base is not the one that was pruned. "
                "Load that, prune and quantise again, or set masks_base=True in the config to mask this base too."
            )
        found[layer] = pack_bits(~gone)  # a bit an entry: these are all layers'
    for layer, kept in found.items():
        layer.keep(adapter_name, kept)


class RemovedWeights:
    """What was removed from a model's weights, of a report's masks or of a file of them."""

    def __init__(self, removed: Mapping[str, Tensor] | str | Path) -> None:
        self.groups = None
        if isinstance(removed, (str, Path)):
            removed, self.groups = _read(Path(removed))
        if not isinstance(removed, Mapping):
            raise TypeError(f"removed is a {type(removed).__name__}; it takes the report's masks, bits by module name.")
        self.masks = removed

    def of(self, name: str, rows: int, cols: int, device: torch.device) -> Tensor:
        """bool `[rows, cols]`, True where it was removed from the module's weight.

        Raises:
            ValueError: nothing is said about the module, or of a weight of another size.
        """
        numel, bits = rows * cols, self.bits_of(name)
        if self.groups is not None and bits is not None:
            bits = _decoded(bits, numel, self.groups, name)
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != ((numel + 7) // 8,):
            what = "nothing" if bits is None else f"a {type(bits).__name__}"
            what = f"{bits.numel()} bytes of {bits.dtype}" if isinstance(bits, Tensor) else what
            raise ValueError(
                f"removed has {what} for '{name}', a weight of {numel} entries, which takes {(numel + 7) // 8} bytes "
                "of uint8. Pass the masks of the walk that pruned this base."
            )
        return unpack_bits(bits.to(device), numel).view(rows, cols)

    def bits_of(self, name: str) -> Tensor | None:
        """The packed bits of a module, also by its name in a model without a head, or inside of another."""
        if name in self.masks:
            return self.masks[name]
        close = [b for other, b in self.masks.items() if name.endswith(f".{other}") or other.endswith(f".{name}")]
        return close[0] if len(close) == 1 else None


def save_masks(removed: Mapping[str, Tensor], file: str | Path, n_of_m: tuple[int, int] | None = None) -> None:
    """Write masks to a safetensors file, for `set_masks` to read: a bit an entry, or with `n_of_m`, `(2, 4)` for masks
    that keep 2 of every 4, 2/3 of one.

    Args:
        removed: by module name the bits of what is gone, as `PruningReport.masks` has them.
        file: is replaced whole.
        n_of_m: what of every few neighbours is kept, in every group alike.

    Raises:
        ValueError: a mask does not keep `n_of_m`; names the module, and nothing is written.
    """
    tensors = {name: bits.cpu().contiguous() for name, bits in removed.items()}
    if n_of_m is not None:
        for name, bits in tensors.items():
            try:
                tensors[name] = encode_n_of_m(_without_padding(bits, n_of_m[1]), *n_of_m)
            except ValueError as error:
                raise ValueError(f"n_of_m={n_of_m}: of '{name}' {error}") from error
    about = {_FORMAT: "bits" if n_of_m is None else f"{n_of_m[0]}:{n_of_m[1]}"}
    with whole_file(Path(file)) as temporary:
        save_checked(tensors, temporary, metadata=about)


def _without_padding(removed: Tensor, of: int) -> Tensor:
    """The kept entries, without what fills the last byte: groups that keep everything, as no group of a mask does."""
    kept = ~unpack_bits(removed, removed.numel() * 8 // of * of)
    while kept.numel() > removed.numel() * 8 - 8 + of - 1 and bool(kept[-of:].all()):
        kept = kept[:-of]
    return kept


def _read(file: Path) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """The tensors of a file of masks, and the groups that they are coded in."""
    if not file.is_file():
        raise ValueError(f"removed='{file}' is no file; write one with save_masks(report.masks, file).")
    tensors, about = read_safetensors(file, checked=True)
    found = (about or {}).get(_FORMAT)
    if found == "bits":
        return tensors, None
    keep, _, of = str(found).partition(":")
    if not (keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of)):
        raise ValueError(f"'{file}' says {_FORMAT}={found!r}: it is no file of masks. Write one with save_masks.")
    return tensors, (int(keep), int(of))


def _decoded(codes: Tensor, numel: int, groups: tuple[int, int], name: str) -> Tensor:
    try:
        check_n_of_m(codes, numel, *groups)
        return pack_bits(~decode_n_of_m(codes, numel, *groups))
    except ValueError as error:
        raise ValueError(f"The mask of '{name}': {error}") from error


_FORMAT = "hf_sparse_peft.masks"
