"""What is said about targets before a layer is replaced: what no adapter can work on, and what is left out."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, _maybe_include_all_linear_layers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from .module_patterns import pattern_key
from .parameters import ParameterWeight

_PATTERNS = ("rank_pattern", "alpha_pattern", "granularity_pattern")
_STATE_SPACE_READS = ("dt_proj", "out_proj")
# Names that released configs give the parts of an expert, today's fused parameters among them.
_EXPERT_NAMES = ("experts", "gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "wi", "wo")


def target_layers(config: PeftConfig, model: nn.Module, matches: Callable) -> dict[str, nn.Module]:
    """Base layers of the modules that `config` targets in `model`, by module name, in model order."""
    config = _maybe_include_all_linear_layers(config, model)
    found = {}
    for name, module in _own_modules(model):
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), ParameterWeight):
            continue  # its name is a parameter's
        if name and matches(config, name):
            found[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return found


def _own_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of `model` without what adapters brought in."""
    wrapped = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [(name, module) for name, module in model.named_modules() if not name.startswith(wrapped or ("\0",))]


# Refused


def refuse_unworkable(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Refuse targets whose weights are read elsewhere than in their own forward, or are not there.

    Raises:
        ValueError: `nn.MultiheadAttention.out_proj`, a state-space mixer's `dt_proj` or `out_proj`, an offloaded layer,
            or one that tensor parallelism has split; the message names all of that kind.
    """
    read = [name for name in targets if _is_only_read(model, name)]
    if read:
        raise ValueError(
            f"target_modules matches {_some(read)}: the forward of these layers never runs, their parent "
            f"({type(model.get_submodule(read[0].rpartition('.')[0])).__name__}) reads their weight in a fused "
            "function, so an adapter there would have neither effect nor gradient. Leave them out: "
            f"exclude_modules={sorted({name.rpartition('.')[2] for name in read})}, or their full names."
        )
    away = [name for name, base in targets.items() if _is_offloaded(base)]
    if away:
        raise ValueError(
            f"target_modules matches {_some(away)}, whose weights are offloaded (accelerate's device_map, cpu_offload "
            "or disk_offload): they are on no device that an adapter could be allocated on. Load the base without "
            "offload: device_map={'': 0} with a 4-bit base where memory is short, or leave these layers out with "
            "exclude_modules."
        )
    split = [name for name, base in targets.items() if isinstance(getattr(base, "weight", None), DTensor)]
    if split and not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            f"target_modules matches {_some(split)}, of whose weights each rank holds a part and computes a part of "
            "the output (tp_plan, DistributedConfig(tp_size=...), expert parallelism), where an update of the whole "
            "weight cannot be added. Load the base without: DDP or FSDP2 share the work too."
        )


def _is_only_read(model: nn.Module, name: str) -> bool:
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention):
        return True
    # Mamba, Mamba-2 and the hybrids made of them: their kernels take these weights as arguments.
    return child in _STATE_SPACE_READS and hasattr(parent, "A_log") and hasattr(parent, "conv1d")


def _is_offloaded(base: nn.Module) -> bool:
    hook = getattr(base, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def keep_forward(model: nn.Module, name: str) -> None:
    """Let the adapted layer of that name run in evaluation too, where its parent would only read its weight.

    `nn.TransformerEncoderLayer` has a fused path for evaluation that it leaves alone as soon as a submodule has a hook.
    """
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, nn.TransformerEncoderLayer) and not getattr(parent, child)._forward_pre_hooks:
        getattr(parent, child).register_forward_pre_hook(_no_change)


def _no_change(module: nn.Module, args: Any) -> None:
    return None


# Named


def name_left_out(config: PeftConfig, asked: Any, model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Warn of what the user's options ask for and the model does not have or no adapter here can reach.

    `asked` is `target_modules` as the user gave it; None and "all-linear" ask for no module by name.
    """
    modules = _own_modules(model)
    names = [name for name, _ in modules if name]
    for option, given in (("target_modules", asked), ("exclude_modules", config.exclude_modules)):
        entries = [] if given is None or isinstance(given, str) else sorted(given)
        missing = [one for one in entries if not any(name == one or name.endswith(f".{one}") for name in names)]
        if missing:
            _warn(f"{option} has {_some(missing)}, which no module of {type(model).__name__} is called", names, missing)
    parameters = [name for name, base in targets.items() if isinstance(base, ParameterWeight)]
    wanted = getattr(config, "target_parameters", None) or ()
    missing = sorted(one for one in wanted if not any(f".{name}".endswith(f".{one}") for name in parameters))
    if missing:
        known = [name.replace(".base_layer", "") for name, p in model.named_parameters() if p.ndim == 3]
        _warn(f"target_parameters has {_some(missing)}, which is no parameter of the model", known, missing)
    for option in _PATTERNS:
        pattern = getattr(config, option, None) or {}
        missing = sorted(set(pattern) - {pattern_key(pattern, name, option) for name in targets})
        if missing:
            _warn(f"{option} has {_some(missing)}, which matches none of the targeted modules", list(targets), missing)
    missing = _missing_layers(config, targets)
    if missing:
        _warn(f"layers_to_transform has {missing}, and no targeted module is in a layer of that number", [], [])
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if asked == "all-linear":
        _name_attention(model)
    _name_experts(config, asked, [(name, module) for name, module in modules if module is not head], parameters)


def _name_attention(model: nn.Module) -> None:
    found = [name for name, one in model.named_modules() if isinstance(one, nn.MultiheadAttention)]
    if found:
        warnings.warn(
            f"target_modules='all-linear' leaves the attention of {_some(found)} out: nn.MultiheadAttention keeps its "
            "query, key and value weights in parameters of its own, which are no linear layers. They stay as they are.",
            stacklevel=2,
        )


def _missing_layers(config: PeftConfig, targets: Iterable[str]) -> list[int]:
    given, patterns = config.layers_to_transform, config.layers_pattern
    if given is None:
        return []
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    found = {
        int(number) for name in targets for one in patterns for number in re.findall(rf"(?:^|\.){one}\.(\d+)\.", name)
    }
    return sorted({given} - found if isinstance(given, int) else set(given) - found)


def _name_experts(config: PeftConfig, asked: Any, modules: list[tuple[str, nn.Module]], adapted: list[str]) -> None:
    experts = {
        f"{name}.{own}".replace(".base_layer.", "."): tensor
        for name, module in modules
        for own, tensor in expert_parameters(name, module)
    }
    experts = {name: tensor for name, tensor in experts.items() if name not in adapted}
    if not experts or not _asks_for_experts(config.target_modules if asked is None else asked, experts):
        return
    sizes = [_weight_size(module) for _, module in modules]
    left_out = sum(tensor.numel() for tensor in experts.values())
    fraction = left_out / (left_out + sum(sizes))
    name, tensor = next(iter(experts.items()))
    warnings.warn(
        f"The experts of this model are left out: {len(experts)} parameters with the matrices of all experts, such as "
        f"'{name}' {tuple(tensor.shape)}, hold {fraction:.0%} of the layers' weights and stay as they are. "
        f"SparseLoraConfig(target_parameters=['{'.'.join(name.split('.')[-2:])}']) adapts such parameters; "
        "target_modules reaches linear layers only.",
        stacklevel=2,
    )


def expert_parameters(module_name: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of one module that hold a matrix per expert, with their own names."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, Conv1D, parametrize.ParametrizationList)):
        return []  # the last: the parts of some layer's weight, such as norm and direction of a convolution's
    # One matrix per expert, or (DBRX) all of them below each other. Position embeddings begin with a dimension of 1.
    named = "expert" in f"{module_name}.{type(module).__name__}".lower()
    own = module.named_parameters(recurse=False)
    return [(name, p) for name, p in own if (p.ndim == 3 or (named and p.ndim == 2)) and min(p.shape) > 1]


def _asks_for_experts(asked: Any, experts: dict[str, nn.Parameter]) -> bool:
    words = {*_EXPERT_NAMES, *(name.rpartition(".")[2] for name in experts)}
    if isinstance(asked, str):
        return asked.lower() == "all-linear" or bool(words & set(re.findall(r"[A-Za-z0-9_]+", asked)))
    return any(bool(words & set(one.split("."))) for one in asked or ())


def _weight_size(module: nn.Module) -> int:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(base, (nn.Linear, Conv1D)):
        return 0
    return math.prod(size or 0 for size in _get_in_out_features(base))


def _warn(what: str, names: list[str], missing: list[str]) -> None:
    known = sorted({part for name in names for part in (name, name.rpartition(".")[2])})
    close = sorted({hit for one in missing for hit in difflib.get_close_matches(one, known, n=2)})
    hint = f" Close to it: {_some(close)}." if close else ""
    warnings.warn(f"{what}: it has no effect.{hint}", stacklevel=2)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
