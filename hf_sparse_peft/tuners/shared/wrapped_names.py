"""Names of tensors under the wrappers of torch.compile, FSDP, activation checkpointing and DDP."""

from __future__ import annotations

from typing import Any

from torch import nn

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_name(name: str) -> str:
    """The name that a module or tensor has without wrappers around it: `_orig_mod.a.b` -> `a.b`."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def rename_to_modules(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Give the tensors of a state dict the names that peft looks for in `model`, in place, whichever of the two was
    wrapped when the state dict was taken."""
    # peft takes this prefix off by itself; further wrappers inside keep theirs.
    names = [name.removeprefix("_fsdp_wrapped_module.") for name, _ in model.named_modules()]
    by_plain_name = {plain_name(name): name for name in names}
    of_ddp = "module" not in {name.partition(".")[0] for name in by_plain_name}
    renamed = {}
    for key, tensor in state_dict.items():
        plain = plain_name(key)
        if of_ddp:
            plain = plain.removeprefix("module.")
        owner, _, tail = plain.rpartition(".")
        while owner and owner not in by_plain_name:
            owner, _, part = owner.rpartition(".")
            tail = f"{part}.{tail}"
        renamed[f"{by_plain_name[owner]}.{tail}" if owner else plain] = tensor
    if list(renamed) != list(state_dict):
        state_dict.clear()
        state_dict.update(renamed)
