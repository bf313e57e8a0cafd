"""Starts of upstream's adapters that need data: EVA's directions and ranks, LoRA-GA's first gradient."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, initialize_lora_eva_weights, preprocess_loraga
from peft.tuners.lora import LoraLayer
from peft.utils.other import transpose
from torch import nn
from transformers import TrainerCallback

from ..optim import innermost
from ..rules.calibration_data import CalibrationData
from ..rules.probing import loss_of, modes_kept, random_state_kept
from ..tuners.upstream import upstream_configs, upstream_layers
from ..utils.file_length import read_safetensors
from .trainer_checks import sharding_switched_on

INITIAL_ADAPTER = "initial_adapter"
_KINDS = ("eva", "lora_ga")
_PASSES = 50
"""Passes over the data after which EVA is told to have failed: upstream itself would go on for ever."""


def initialize_upstream(
    model: nn.Module,
    dataloader: Iterable,
    adapter_name: str = "default",
    *,
    optimizer: Any = None,
    batches: int = 8,
    show_progress: bool = True,
) -> None:
    """Give an upstream LoRA with `init_lora_weights="eva"` or `"lora_ga"` its start from data.

    EVA: upstream's `initialize_lora_eva_weights`, with ranks shared out anew. LoRA-GA: upstream's `preprocess_loraga`
    on the base weights under the adapter, then its own initialisation, which subtracts the start from the base weights.
    Neither the global random states nor a DataLoader's sampler move, and every module gets its mode back.
    `UpstreamStartCallback` does it in a Trainer.

    Args:
        model: has the adapter, fresh and active.
        dataloader: batches as mappings of the model's arguments, labels included; a DataLoader or a list.
        adapter_name: which adapter.
        optimizer: made for the adapter before; what EVA replaces by parameters of another rank is replaced there too.
        batches: batches whose mean gradient LoRA-GA takes.
        show_progress: whether EVA's bar shows on stderr.

    Raises:
        ValueError: the adapter needs no data, EVA's directions do not stand still, a quantised base under LoRA-GA.
    """
    config = upstream_configs(model).get(adapter_name)
    kind = getattr(config, "init_lora_weights", None)
    if kind not in _KINDS:
        raise ValueError(
            f"Adapter '{adapter_name}' has init_lora_weights={kind!r}; only 'eva' and 'lora_ga' need data."
        )
    with random_state_kept(), _same_parameters(model, optimizer):
        data = CalibrationData(dataloader, next(model.parameters()).device)
        if kind == "eva":
            with modes_kept(model, training=False):
                batches_of = _Batches(data, config)
                initialize_lora_eva_weights(
                    model, batches_of, adapter_name=adapter_name, show_progress_bar=show_progress
                )
        else:
            _initialize_lora_ga(model, config, adapter_name, data, batches)


def waits_for_start(model: nn.Module) -> list[str]:
    """Active adapters of upstream peft that need data and have not had their start: B is 0, and with EVA the rows of A
    are not orthonormal."""
    found = []
    for name, config in upstream_configs(model).items():
        kind = getattr(config, "init_lora_weights", None)
        layers = [layer for layer in _lora_layers(model).values() if name in layer.lora_A]
        if kind not in _KINDS or config.inference_mode or not layers:
            continue
        if any(layer.lora_B[name].weight.any() for layer in layers):
            continue
        if kind == "lora_ga" or not all(_orthogonal_rows(layer.lora_A[name].weight) for layer in layers):
            found.append(name)
    return found


class UpstreamStartCallback(TrainerCallback):
    """Calls `initialize_upstream` at the start of training, with the Trainer's own data, for the adapters that wait.

    LoRA-GA writes its start into the base weights. It is saved as `initial_adapter` in the output folder, where
    `save_pretrained(..., path_initial_model_for_weight_conversion=...)` finds it to write a plain LoRA of twice the
    rank, and a resumed run to change the base as before. A run with EVA that is resumed needs the model loaded from its
    checkpoint (`PeftModel.from_pretrained(base, checkpoint, is_trainable=True)`): ranks are other than the config's.

    Args:
        batches: batches whose mean gradient LoRA-GA takes.
    """

    def __init__(self, batches: int = 8) -> None:
        self.batches = batches

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, optimizer=None, **kwargs) -> None:
        """Give what waits its start.

        Raises:
            ValueError: no dataloader, several processes, or a resumed run without its `initial_adapter`.
        """
        model = extract_model_from_parallel(model)
        folder = Path(args.output_dir) / INITIAL_ADAPTER
        if state.global_step:
            for name, config in upstream_configs(model).items():
                if getattr(config, "init_lora_weights", None) == "lora_ga" and not config.inference_mode:
                    _subtract_start(model, name, folder)
            return
        for name in waits_for_start(model):
            _check_can_start(name, args.world_size, train_dataloader, "creating the Trainer", args)
            show = not args.disable_tqdm
            initialize_upstream(
                model, train_dataloader, name, optimizer=optimizer, batches=self.batches, show_progress=show
            )
            if upstream_configs(model)[name].init_lora_weights == "lora_ga":
                model.save_pretrained(str(folder), selected_adapters=[name])


def start_in_loop(model: nn.Module, optimizer: Any, dataloader: Iterable | None, resumed: bool, show: bool) -> None:
    """Give upstream's adapters that wait for data their start from a loop's own data.

    Raises:
        ValueError: no dataloader, or several processes.
    """
    model = extract_model_from_parallel(model)
    if resumed:
        kinds = {name: getattr(one, "init_lora_weights", None) for name, one in upstream_configs(model).items()}
        changed = [name for name, kind in kinds.items() if kind == "lora_ga"]
        if changed:
            warnings.warn(
                f"LoRA-GA's start changed the base weights under adapter '{changed[0]}': this run goes on right only "
                "on the base as it was then. Save its state beside the adapter, and load both.",
                stacklevel=3,
            )
        return
    for name in waits_for_start(model):
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        _check_can_start(name, world, dataloader, "creating the Controller, or pass Controller(dataloader=...)")
        initialize_upstream(model, dataloader, name, optimizer=optimizer, show_progress=show)


def _check_can_start(name: str, processes: int, dataloader: Any, before: str, args: Any = None) -> None:
    mend = f"Call hf_sparse_peft.training.initialize_upstream(model, dataloader) before {before}"
    if args is not None and (sharded := sharding_switched_on(args)):
        raise ValueError(f"Adapter '{name}' needs data, and {sharded[0]} has sharded the weights. {mend}.")
    if processes > 1:
        raise ValueError(
            f"Adapter '{name}' needs data for its ranks and weights, and {processes} processes have wrapped "
            f"the model already. {mend}, on every rank with the same data."
        )
    if dataloader is None:
        raise ValueError(f"Adapter '{name}' needs data, and was handed none. {mend}.")


class _Batches:
    """What EVA iterates: the batches as dicts, pass after pass, with an end to its search."""

    def __init__(self, data: CalibrationData, config: LoraConfig) -> None:
        self.data, self.config = data, config

    def __len__(self) -> int:
        return 1  # EVA asks whether there is anything

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(_PASSES):
            yield from map(dict, self.data.batches())
        eva = self.config.eva_config
        raise ValueError(
            f"EVA's directions did not stand still in {_PASSES} passes over the data. Batches must have more tokens "
            f"than rho * r = {eva.rho * self.config.r:g}; else lower tau={eva.tau}."
        )


def _initialize_lora_ga(
    model: nn.Module, config: LoraConfig, adapter_name: str, data: CalibrationData, batches: int
) -> None:
    layers = {name: layer for name, layer in _lora_layers(model).items() if adapter_name in layer.lora_A}
    bases = copy.copy(config)
    bases.target_modules = "|".join(re.escape(f"{name}.base_layer") for name in _full_names(model, layers))
    bases.exclude_modules = bases.layers_to_transform = bases.layers_pattern = None

    def step() -> None:
        for number, batch in enumerate(data.batches()):
            if number == batches:
                break
            loss_of(model, batch).backward()

    with modes_kept(model, training=True):
        preprocess_loraga(model, bases, step)
    for name, layer in layers.items():
        if not hasattr(layer.get_base_layer(), "_peft_loraga_grad"):
            raise ValueError(
                f"No batch reached '{name}': LoRA-GA has no gradient for it. Leave it out of target_modules."
            )
        layer.lora_ga_init(adapter_name, config.lora_ga_config)


@torch.no_grad()
def _subtract_start(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Change the base weights as LoRA-GA's start did, in the same operations."""
    folder = folder if adapter_name == "default" else folder / adapter_name
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(
            f"A resumed run of LoRA-GA changes the base weights as its start did, and '{file}' is not there. Keep the "
            "output folder of the run, or start afresh."
        )
    start, _ = read_safetensors(file)
    layers = {name: layer for name, layer in _lora_layers(model).items() if adapter_name in layer.lora_A}
    for name, layer in layers.items():  # all of them, before the first weight changes
        for factor, held in (("A", layer.lora_A), ("B", layer.lora_B)):
            key, due = f"base_model.model.{name}.lora_{factor}.weight", held[adapter_name].weight.shape
            if key not in start or start[key].shape != due or not start[key].isfinite().all():
                raise ValueError(
                    f"'{key}' in '{file}' is not what LoRA-GA's start wrote, finite numbers of shape {tuple(due)}. "
                    "Keep the output folder of the run as it was, or start afresh."
                )
    for name, layer in layers.items():
        A, B = (start[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        weight = layer.get_base_layer().weight
        offset = layer.scaling[adapter_name] * (B.to(weight.device).float() @ A.to(weight.device).float())
        changed = transpose(weight.data.float(), layer.fan_in_fan_out) - offset
        weight.data = transpose(changed.to(weight.dtype), layer.fan_in_fan_out)


@contextmanager
def _same_parameters(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Keep the dtype of parameters that are replaced, and put their successors where the optimizer had them."""
    before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    dtypes = {name: parameter.dtype for name, parameter in before.items()}
    yield
    after = dict(model.named_parameters())
    for name, dtype in dtypes.items():
        if name in after and after[name].dtype != dtype:
            after[name].data = after[name].data.to(dtype)
    names = {id(parameter): name for name, parameter in before.items()}
    for group in innermost(optimizer).param_groups if optimizer is not None else ():
        found = [after.get(names[id(p)]) if id(p) in names else p for p in group["params"]]
        group["params"] = [parameter for parameter in found if parameter is not None]


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in upstream_layers(model) if isinstance(layer, LoraLayer)}


def _full_names(model: nn.Module, layers: dict[str, LoraLayer]) -> list[str]:
    wanted = {id(layer) for layer in layers.values()}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def _orthogonal_rows(A: torch.Tensor) -> bool:
    gram = A.detach().float() @ A.detach().float().T
    return bool((gram - torch.diag(gram.diagonal())).abs().max() <= 1e-3 * gram.diagonal().max().clamp_min(1e-12))
