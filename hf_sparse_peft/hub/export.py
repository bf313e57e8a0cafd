"""Export of adapters to formats that engines without this package load. Reads an adapter's pieces, whatever its tuner.

low-rank pieces, rows, columns   -> plain LoRA, exactly; with a magnitude beside them DoRA
entries, blocks, sparse tiles    -> upstream SHiRA, exactly; or LoRA by SVD, with the error measured
anything                         -> dense model (dense.py)
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

from ..sparsity.decomposition import truncated_svd
from ..tuners import AdapterLayer, adapter_layers
from ..tuners.shared.config import AdapterConfig
from ..tuners.shared.merge import refuse_merged
from ..tuners.shared.parameters import ParameterWeight
from ..tuners.shared.pieces import Decomposed, Entries, LowRank, Nonlinear, Piece, summed_entries
from ..tuners.shared.wrapped_names import plain_name
from ..tuners.upstream import UpstreamLowRank, configs_of, upstream_low_rank
from .card import exported_card
from .folders import staged_folder
from .saving import write_card

_ROUNDING = 1e-5  # relative error up to here is fp32's own


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote."""

    path: Path
    """The folder."""
    ranks: dict[str, int]
    """Rank of each module that the LoRA adapts."""
    errors: dict[str, float]
    """Relative Frobenius error of each module's update; 0 where it is exact."""
    file_bytes: int
    """Size of adapter_model.safetensors."""


@torch.no_grad()
def export_lora(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    uniform_rank: bool | int = False,
    rank: int | None = None,
    only: Literal["low_rank", "support"] | None = None,
) -> LoraExport:
    r"""Write an adapter of any tuner of this package, or an AdaLoRA or LoRA of upstream's, as a plain peft LoRA that
    loads without this package.

    `k` rows are a LoRA of rank k whose `B` has one-hot columns, `k` columns one whose `A` has one-hot rows; gate and
    scaling are multiplied into `B`, components whose gate is 0 are left out. All of this is exact:
    :math:`BA = \Delta W` in fp32. Modules whose update is zero by construction are left out of `target_modules`.
    `rank_pattern` and `alpha_pattern` hold equal numbers, so LoRA's scaling is 1. Updates with a magnitude of their own
    are written with `use_dora`, as exactly.

    Args:
        model: has the adapter; its base may be quantised.
        path: the folder to write.
        adapter_name: which adapter.
        uniform_rank: pad every module with zeros to one rank, for engines that read no `rank_pattern`: True: the
            largest rank of a module; an integer: that rank.
        rank: fit updates whose exact rank is higher or unknown (entries, blocks, kernels) by the SVD of the whole
            update, cut to this rank: the measured errors are returned, and the largest is warned about.
        only: one half of the adapter: the factors ("low_rank") or all other pieces ("support"), which
            `export_shira` writes without loss. None: both.

    Raises:
        ValueError: entries, blocks or kernels without `rank`, `uniform_rank` below a module's rank, an adapter that is
            unknown, changes nothing, biases or no weight (a module behind layers) or is merged, or a `path` that holds
            something else than a LoRA.
    """
    config, layers = _exportable(model, adapter_name)
    for option, value in (("rank", rank), ("uniform_rank", uniform_rank)):
        if value is not None and value is not False and value < 1:
            raise ValueError(f"{option}={value} is no rank; give an integer >= 1, or leave it out.")
    factors, errors, magnitudes = {}, {}, {}
    for layer in layers:
        pieces = _pieces(layer, adapter_name, only)
        if rank is not None:
            pieces = [piece.dense() if isinstance(piece, Decomposed) else piece for piece in pieces]
        magnitudes.update((layer.module_name, one.magnitude) for one in pieces if isinstance(one, Decomposed))
        found = _lora_factors(layer, pieces, rank)
        if found is not None:
            factors[layer.module_name], errors[layer.module_name] = found[:2], found[2]
    if not factors:
        raise ValueError(f"Adapter '{adapter_name}' has no living unit or component; there is nothing to export.")
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    if uniform_rank:
        largest = max(ranks, key=ranks.get)
        padded = ranks[largest] if uniform_rank is True else uniform_rank
        if ranks[largest] > padded:
            raise ValueError(
                f"uniform_rank={padded} is below the rank {ranks[largest]} of '{largest}'. Raise it to "
                f"{ranks[largest]}, or pass rank={padded} to cut updates by SVD."
            )
        factors = {name: _padded(*halves, padded) for name, halves in factors.items()}
        ranks = dict.fromkeys(ranks, padded)
    default = Counter(ranks.values()).most_common(1)[0][0]
    pattern, bias = rank_pattern_of(ranks, default), getattr(config, "bias", "none")
    lora = LoraConfig(
        r=default,
        lora_alpha=default,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_target_modules(model, set(ranks)),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers if layer.module_name in ranks),
        use_dora=bool(magnitudes),
        bias="lora_only" if bias.endswith("_only") else bias,
        **_shared_options(config),
    )
    tensors = _other_tensors(model, adapter_name, layers, set(ranks))
    for name, (A, B) in factors.items():
        tensors[f"{_prefix(name)}lora_A.weight"] = A.contiguous().cpu()
        tensors[f"{_prefix(name)}lora_B.weight"] = B.contiguous().cpu()
    for name, magnitude in magnitudes.items():
        tensors[f"{_prefix(name)}lora_magnitude_vector"] = magnitude.float().contiguous().cpu()
    size = _write(path, lora, tensors, config)
    worst = max(errors, key=errors.get)
    if errors[worst] > _ROUNDING:
        warnings.warn(
            f"export_lora cut updates to rank {rank} by SVD: relative error {errors[worst]:.3g} in '{worst}', "
            f"{sum(errors.values()) / len(errors):.3g} on average. LoraExport.errors has every module's; export_shira "
            "and merge_to_dense lose nothing.",
            stacklevel=3,  # no_grad is a caller too
        )
    return LoraExport(Path(path), ranks, errors, size)


@torch.no_grad()
def export_shira(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    only: Literal["support"] | None = None,
) -> int:
    """Write an adapter without low-rank pieces, or with `only="support"` all but those of one that has them, in
    upstream peft's SHiRA format, without loss. Returns SHiRA's `r`.

    SHiRA's loader wants `r * (rows + cols)` entries in every module, of one `r` for the whole model: the smallest `r`
    that fits is taken, and zeros at free places fill up. Blocks, rows and columns are written as their entries, kernels
    as the entries that are not zero. Read it with `PeftModel.from_pretrained`: transformers' own `load_adapter` ignores
    SHiRA's indices, so the config names a mask type that makes it fail there instead of running with random ones.

    Raises:
        ValueError: the adapter has low-rank pieces or trains biases, adapts Conv1D layers, is too dense for any `r`, is
            unknown, changes nothing or is merged, or `path` holds something else than a SHiRA adapter.
    """
    config, layers = _exportable(model, adapter_name)
    pieces = {layer.module_name: _pieces(layer, adapter_name, only) for layer in layers}
    for name, found in pieces.items():
        for piece in found:
            if isinstance(piece, LowRank):
                raise ValueError(
                    f"SHiRA has no low-rank half, and '{name}' has rank {piece.A.shape[0]}. Use merge_to_dense, "
                    "export_lora with rank=, or only='support' here and only='low_rank' in export_lora."
                )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"SHiRA saves no biases, and this adapter has bias='{config.bias}'. Use merge_to_dense.")
    entries = {name: summed_entries(found) for name, found in pieces.items()}
    entries = {name: found for name, found in entries.items() if found is not None}
    layers = [layer for layer in layers if layer.module_name in entries]
    if not layers:
        raise ValueError(f"Adapter '{adapter_name}' has no living unit; there is nothing to export.")
    transposed = [layer.module_name for layer in layers if layer.fan_in_fan_out]
    if transposed:
        raise ValueError(f"SHiRA adapts no Conv1D layers, and '{transposed[0]}' is one. Use merge_to_dense.")
    needed = {
        layer.module_name: -(-entries[layer.module_name][0].numel() // (layer.out_features + layer.in_features))
        for layer in layers
    }
    r = max(needed.values())
    for layer in layers:
        places, total = r * (layer.out_features + layer.in_features), layer.out_features * layer.in_features
        if places > total:
            worst = max(needed, key=needed.get)
            raise ValueError(
                f"SHiRA holds r * (rows + cols) entries in every module, of one r. '{worst}' needs r={r}, which is "
                f"{places} entries in '{layer.module_name}', whose weight has {total}. Use merge_to_dense."
            )
    shira = ShiraConfig(
        r=r,
        mask_type="from_file",
        target_modules=_target_modules(model, set(entries)),
        **_shared_options(config),
    )
    tensors = _other_tensors(model, adapter_name, layers, set(entries))
    for layer in layers:
        positions, values = entries[layer.module_name]
        count = r * (layer.out_features + layer.in_features)
        positions, values = fill_entries(positions, values, count)
        indices = torch.stack((positions // layer.in_features, positions % layer.in_features)).to(torch.int32)
        tensors[f"{_prefix(layer.module_name)}shira_weight"] = values.cpu()
        tensors[f"{_prefix(layer.module_name)}shira_indices"] = indices.cpu()
    _write(path, shira, tensors, config)
    return r


# What both formats share


def _exportable(model: nn.Module, adapter_name: str) -> tuple[PeftConfig, list[AdapterLayer | UpstreamLowRank]]:
    """Config and layers of an adapter that may be read out.

    Raises:
        ValueError: `model` has no such adapter, or something is merged into its base weights.
    """
    upstream = upstream_low_rank(model, adapter_name)
    layers = upstream or adapter_layers(model, adapter_name=adapter_name)
    refuse_merged(layers)
    if upstream:
        return configs_of(model)[adapter_name], upstream
    parameters = [layer.module_name for layer in layers if isinstance(layer.get_base_layer(), ParameterWeight)]
    if parameters:
        raise ValueError(
            f"'{parameters[0]}' ({len(parameters)} such) is a parameter of experts, and peft's formats have no matrix "
            "over all of them. Use merge_to_dense, or export_patch, which vLLM and SGLang load."
        )
    return layers[0].adapter_configs[adapter_name], layers


def _pieces(layer: AdapterLayer, adapter_name: str, only: str | None) -> list[Piece]:
    if only not in (None, "low_rank", "support"):
        raise ValueError(f"only={only!r} is no half of an adapter; choose 'low_rank', 'support' or None for both.")
    pieces = layer.pieces(adapter_name)
    refuse_nonlinear(pieces)
    if isinstance(layer, AdapterLayer) and layer.bias_change(adapter_name) is not None:
        raise ValueError(
            f"Adapter '{adapter_name}' changes the bias of '{layer.module_name}' beside its weight, and peft's formats "
            "of updates have no bias. Use merge_to_dense, which loses nothing."
        )
    return [piece for piece in pieces if only is None or isinstance(piece, LowRank) == (only == "low_rank")]


def refuse_nonlinear(pieces: list[Piece]) -> None:
    """Refuse what is no update of a weight.

    Raises:
        ValueError: a piece is none; names the form and the module.
    """
    for piece in pieces:
        if isinstance(piece, Nonlinear):
            raise piece.refusal()


def _shared_options(config: AdapterConfig) -> dict:
    return {
        "task_type": config.task_type,
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "modules_to_save": config.modules_to_save,
        "inference_mode": True,
    }


def _prefix(name: str) -> str:
    return f"base_model.model.{name}."


def _other_tensors(
    model: nn.Module, adapter_name: str, layers: list[AdapterLayer], adapted: set[str]
) -> dict[str, torch.Tensor]:
    """Biases and modules_to_save under the names that the exported adapter gives them."""
    owned = {layer.module_name for layer in layers}
    found = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        key = f"base_model.model.{plain_name(key).removeprefix('base_model.model.')}"
        owner, inside, name = key.partition(".base_layer.")
        place = key.removeprefix("base_model.model.")
        while place and place not in owned:
            place = place.rpartition(".")[0]
        if place and not inside:
            continue  # a tensor of the adapter itself
        if inside and owner.removeprefix("base_model.model.") not in adapted:
            key = f"{owner}.{name}"  # nothing wraps that module any more
        found[key] = tensor.detach().clone().contiguous().cpu()
    return found


def _target_modules(model: nn.Module, adapted: set[str]) -> list[str] | str:
    """The shortest way to name exactly `adapted`: last parts of names, whole names, or else a regex."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inside = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, BaseTunerLayer))
    everything = [name for name, _ in base.named_modules() if name and not name.startswith(inside)]
    for names in ({name.rpartition(".")[2] for name in adapted}, adapted):
        endings = tuple(f".{name}" for name in names)
        if {name for name in everything if name in names or name.endswith(endings)} == adapted:
            return sorted(names)
    return "|".join(re.escape(name) for name in sorted(adapted))


def _write(
    path: str | os.PathLike,
    config: LoraConfig | ShiraConfig,
    tensors: dict[str, torch.Tensor],
    source: AdapterConfig,
) -> int:
    with staged_folder(path, config.peft_type.value) as stage:
        config.save_pretrained(str(stage))
        save_file(tensors, stage / "adapter_model.safetensors", metadata={"format": "pt"})
        write_card(exported_card(config, source), stage)
        return (stage / "adapter_model.safetensors").stat().st_size


# LoRA


def _lora_factors(
    layer: AdapterLayer, pieces: list[Piece], rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """`A` `[r, in]`, `B` `[out, r]`, both fp32, and the relative error of `BA`; None for an update that is zero."""
    inexact = [piece for piece in pieces if piece.exact_rank is None]
    if inexact and rank is None:
        also = "; only='low_rank' exports the factors alone" if len(inexact) < len(pieces) else ""
        raise ValueError(
            f"'{layer.module_name}' has {_described(inexact[0])}, which has no exact low-rank form. Pass rank= to fit "
            "a LoRA by SVD (its error is measured), or use export_shira or merge_to_dense, which lose nothing"
            f"{also}."
        )
    exact = sum(piece.exact_rank or 0 for piece in pieces)
    if not inexact and exact == 0:
        return None
    if not inexact and (rank is None or exact <= rank):
        factors = [piece.factors() for piece in pieces if piece.exact_rank]
        return torch.cat([A for A, _ in factors]), torch.cat([B for _, B in factors], dim=1), 0.0
    delta = torch.zeros(layer.out_features, layer.in_features, device=layer.get_base_layer_device())
    for piece in pieces:
        piece.add_(delta)
    return _svd_factors(delta, rank)


def _described(piece: Piece) -> str:
    if isinstance(piece, Entries):
        return f"a support of {piece.grid.unit_name} units"
    return "a dense update"


def _svd_factors(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    norm = delta.norm()
    if norm == 0:
        return None
    U, S, Vh = truncated_svd(delta, rank)
    root = S.sqrt()
    A, B = root[:, None] * Vh, U * root
    return A, B, float((delta - B @ A).norm() / norm)


def _padded(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = rank - A.shape[0]
    return nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))


def rank_pattern_of(ranks: dict[str, int], default: int) -> dict[str, int]:
    """peft takes the first key that matches the end of a module's name, as a regex: longer names go first."""
    longest_first = sorted(ranks, key=lambda name: (-len(name), name))
    pattern = {name: ranks[name] for name in longest_first if ranks[name] != default}
    if all(pattern.get(get_pattern_key(pattern.keys(), name), default) == r for name, r in ranks.items()):
        return pattern
    return {f"^{re.escape(name)}": ranks[name] for name in longest_first}  # these whole names only


# SHiRA


def fill_entries(positions: torch.Tensor, values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` entries: the given ones, and zeros at the first places that are free."""
    first = torch.arange(count, device=positions.device)
    free = first[~torch.isin(first, positions)][: count - positions.numel()]
    positions, order = torch.cat((positions, free)).sort()
    return positions, torch.cat((values, values.new_zeros(free.numel())))[order].contiguous()
