"""Trained tensors that several modules share: they belong to the first of these in model order, registered, counted and
saved once, there. And the shape of the weight, which a file whose tensors do not tell it holds beside them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...utils.tensors import TensorSpec
from .file_check import CONFIG_FILE, AdapterFile, file_being_loaded, tensor_key
from .layer import AdapterLayer
from .tensor_checks import side


class Sharing(NamedTuple):
    """The modules that share tensors with one."""

    owner: str
    """The first of them in model order, which has the tensors."""
    users: int
    """How many they are."""
    position: int
    """Which of them this one is, from 0."""


Sharings = dict[str, list[str | int]]
"""Module name -> a `Sharing`, as files have it."""


def sharings(targets: Mapping[str, nn.Module], group: Callable[[str, int, int], Hashable]) -> Sharings:
    """Owner, users and position of each module; those of one `group(name, rows, cols)` share."""
    groups: dict[Hashable, list[str]] = {}
    for name, base in targets.items():
        cols, rows = _get_in_out_features(base)
        groups.setdefault(group(name, rows, cols), []).append(name)
    found = {name: [names[0], len(names), at] for names in groups.values() for at, name in enumerate(names)}
    return {name: found[name] for name in targets}


def check_sharings(given: Sharings) -> None:
    """Refuse a config's `sizes` that are none.

    Raises:
        ValueError: names the module.
    """
    for name, found in given.items():
        if [type(one) for one in found] != [str, int, int] or not 0 <= found[2] < found[1]:
            raise ValueError(f"sizes[{name!r}]={found} is not [owner, users, position]. Load the adapter's own config.")


def check_same_sharings(given: Sharings, found: Sharings) -> None:
    """While a file is loaded: do the modules of this base share as the file's do?

    Raises:
        ValueError: names the first that does not.
    """
    if file_being_loaded() is None or given == found:
        return
    wrong = next(name for name in [*found, *given] if found.get(name) != given.get(name))
    raise ValueError(
        f"sizes[{wrong!r}]={given.get(wrong)} in {CONFIG_FILE}, and in this base it is {found.get(wrong)}. Load the "
        "adapter on the base that it was trained on."
    )


def link_owners(layers: Iterable[AdapterLayer], shared: Sharings, adapter_name: str, held: str) -> None:
    """Show each layer the one that has what it shares, in its attribute `held`, by adapter."""
    by_name = {layer.module_name: layer for layer in layers if adapter_name in layer.adapter_configs}
    for name, (owner, _, _) in shared.items():
        if name in by_name and owner != name:
            getattr(by_name[name], held)[adapter_name] = by_name[owner]


def tensor_of(owner: AdapterLayer, user: AdapterLayer, name: str, adapter_name: str, device: torch.device) -> Tensor:
    """A tensor that `user` shares of `owner`, on `device`.

    Raises:
        ValueError: it is not whole: sharded or offloaded; names both layers.
    """
    tensor = getattr(owner, name)[adapter_name]
    if isinstance(tensor, DTensor) or not tensor.numel() or (tensor.is_meta and device.type != "meta"):
        raise ValueError(
            f"'{user.module_name}' shares '{name}' of '{owner.module_name}', which is sharded (FSDP, ZeRO-3) or "
            "offloaded, so that it is whole only while that layer runs. Train what is shared on whole weights (DDP)."
        )
    return tensor.to(device)


def check_sharing_modules(file: AdapterFile, names: Iterable[str], kind: str) -> None:
    """Check that a file has all modules that share, and others that its config says it has.

    Args:
        file: the file.
        names: modules that it must have beside those that share.
        kind: a tensor that every module has.

    Raises:
        ValueError: names the tensor.
    """
    named = {name for name, (owner, _, _) in file.config.sizes.items() for name in (name, owner)} | set(names)
    absent = sorted(named - set(file.modules))
    if absent:
        raise ValueError(
            f"'{tensor_key(absent[0], kind)}' is missing from '{file.path}': {CONFIG_FILE} has '{absent[0]}'. The file "
            "is incomplete."
        )


def shape_spec(name: str, rows: int, cols: int) -> TensorSpec:
    """int64 `[2]`, rows and columns of the weight."""

    def check(tensor: Tensor, key: str) -> None:
        if tensor.dtype != torch.int64 or tensor.tolist() != [rows, cols]:
            raise ValueError(
                f"'{key}' is {tensor.tolist()} ({tensor.dtype}), and the weight is {[rows, cols]} (int64). The file is "
                "damaged or belongs to another base model."
            )

    return TensorSpec(name, (2,), torch.int64, "saved", start=lambda _: torch.tensor([rows, cols]), check=check)


def read_shape(held: Mapping[str, Tensor], name: str, module_name: str) -> tuple[int, int]:
    """Rows and columns as the file says; every other tensor is checked against them.

    Raises:
        ValueError: the tensor that says so is missing or damaged.
    """
    key = f"{module_name}.{name}"
    if side(held, name, 0, 1, key) != 2 or held[name].dtype != torch.int64 or int(held[name].min()) < 1:
        raise ValueError(f"'{key}' is {held[name].tolist()}, no shape of a weight; the file is damaged.")
    rows, cols = held[name].tolist()
    return rows, cols


def linear_shapes(targets: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns of each weight."""
    return {name: tuple(reversed(_get_in_out_features(base))) for name, base in targets.items()}
