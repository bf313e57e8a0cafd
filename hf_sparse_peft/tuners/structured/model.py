"""`StructuredModel`: who shares tensors with whom, and what is left of an adapter without its model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..shared.file_check import AdapterFile, file_being_loaded
from ..shared.merge import warn_of_biases
from ..shared.model import AdapterModel, AdapterPlan
from ..shared.sharing import check_same_sharings, check_sharing_modules, link_owners, sharings
from .config import StructuredConfig
from .form import Form
from .layer import SHAPE, StructuredLayer, StructuredLinear


class StructuredModel(AdapterModel):
    r"""Structured adapters on dense and quantised linears: updates, maps of input and output, modules behind layers.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = StructuredLayer
    linear_cls = StructuredLinear
    _copying: bool = False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the adapter, then show each layer the one that has what it shares."""
        given = self.peft_config[adapter_name]
        self._copying = any(own is given for name, own in self.peft_config.items() if name != adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        sizes = self.peft_config[adapter_name].sizes
        link_owners(structured_layers(model), sizes, adapter_name, "structured_owner")
        for layer in structured_layers(model):
            if (owner := layer.structured_owner.get(adapter_name)) is not None:
                users = owner.structured_users.setdefault(adapter_name, [])
                users += [layer] if all(layer is not user for user in users) else []
        if given.form.reads_mask and _hand_down_mask not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(_hand_down_mask, with_kwargs=True)

    # Tasks

    def set_task(self, task: str, adapter_name: str | None = None) -> None:
        """Name the task of the passes that follow, until another is named.

        Args:
            task: one of the adapter's.
            adapter_name: of an adapter of several tasks; None: all active ones that have tasks.

        Raises:
            ValueError: no such adapter has tasks, or one has no task of that name.
        """
        names = self._with_tasks([adapter_name] if adapter_name is not None else self.active_adapters)
        if not names:
            named = self.active_adapters if adapter_name is None else [adapter_name]
            raise ValueError(f"task={task!r}, and the adapters {named} have no tasks: their forms have none.")
        for name in names:
            self.peft_config[name].form.task_number(task)
        for layer in structured_layers(self.model):
            layer.structured_tasks.update((name, task) for name in names if layer.holds(name))

    def _with_tasks(self, names: list[str]) -> list[str]:
        forms = {name: getattr(self.peft_config.get(name), "form", None) for name in names}
        return [name for name, form in forms.items() if isinstance(form, Form) and form.tasks]

    def _take_task(self, kwargs: dict[str, Any]) -> None:
        """Read the argument `task` of a pass, unless no adapter has tasks, where it is the base model's."""
        if "task" not in kwargs or not self._with_tasks(list(self.peft_config)):
            return
        task = kwargs.pop("task")
        tasks = {task} if isinstance(task, str) else set(task or ())
        if len(tasks) > 1:
            raise ValueError(f"task={sorted(tasks)}: a pass is of one task. Give each batch examples of one.")
        if tasks:
            self.set_task(tasks.pop())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's pass; `task` names the task of adapters that have several.

        Raises:
            ValueError: there is no such task.
        """
        self._take_task(kwargs)
        return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's; `task` as in `forward`."""
        self._take_task(kwargs)
        return self.model.generate(*args, **kwargs)

    def plan(self, peft_config: StructuredConfig, model: nn.Module, targets: dict[str, nn.Module]) -> AdapterPlan:
        """Which modules share tensors, written into `sizes`.

        Raises:
            ValueError: the file that is being loaded has its modules share otherwise than this base has them, or the
                form is one that a trained adapter is packed into.
        """
        given = file_being_loaded() is not None or self._targets_of_state_dict is not None or self._copying
        if peft_config.form.made_by is not None and not given:
            raise ValueError(
                f"form={peft_config.form} is made of a trained adapter: train one of Quantised matrices, and call "
                f"model.base_model.{peft_config.form.made_by}()."
            )
        found = sharings(targets, peft_config.group) if peft_config.form.shared else {}
        check_same_sharings(peft_config.sizes, found)
        peft_config.form.check_sharing(found)
        peft_config.sizes = found
        return AdapterPlan()

    @classmethod
    def check_file(cls, file: AdapterFile) -> None:
        """Check that the file has all modules that share tensors.

        Raises:
            ValueError: names the tensor.
        """
        check_sharing_modules(file, (), SHAPE)

    def pack(self, adapter_name: str | None = None) -> None:
        """Give an adapter of quantised matrices the form that is shipped, of the same output to the bit: their codes,
        at `Quantised.bits` bits a number, in place of fp32 numbers. `save_pretrained` then writes the small file.

        Packed matrices train no more, and the adapter's rules are dropped from its config: save a checkpoint before.
        All layers are packed, or none.

        Raises:
            ValueError: the adapter has no such matrices, several are active, or it is merged.
        """
        names = [adapter_name] if adapter_name else list(self.active_adapters)
        layers = [layer for layer in self.adapted_layers() if any(layer.holds(name) for name in names)]
        if len(names) != 1 or not layers:
            raise ValueError(f"adapter_name={adapter_name!r} of {names}: name one structured adapter.")
        merged = next((layer for layer in layers if layer.merged), None)
        if merged is not None:
            raise ValueError(f"{merged.merged_adapters} is merged; call unmerge_adapter() first.")
        name, found = names[0], {}
        for layer in layers:
            try:
                found[layer] = layer.form(name).packed(layer.form_tensors(name), layer.site(name))
            except ValueError as error:
                raise ValueError(f"'{layer.module_name}' cannot be packed: {error}") from error
        config = copy.deepcopy(self.peft_config[name])  # another model may have the same
        config.form, config.schedule = next(iter(found.values()))[0], []
        config.sizes = config.sizes if config.form.shared else {}
        self.peft_config[name] = config
        for layer, (_, tensors) in found.items():
            layer.replace_form(name, config, None, tensors)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        unbiased = {layer for layer in self.adapted_layers() if getattr(layer.get_base_layer(), "bias", None) is None}
        unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for key in [key for key, hook in unloaded._forward_pre_hooks.items() if hook is _hand_down_mask]:
            del unloaded._forward_pre_hooks[key], unloaded._forward_pre_hooks_with_kwargs[key]
        added = [layer.module_name for layer in unbiased if getattr(layer.get_base_layer(), "bias", None) is not None]
        warn_of_biases(added, StructuredLayer.without_biases)
        return unloaded


def structured_layers(model: nn.Module) -> list[StructuredLayer]:
    """All layers of `model` with a structured adapter, in model order."""
    return [module for module in model.modules() if isinstance(module, StructuredLayer)]


def _hand_down_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell all layers which tokens the batch's mask hides: those of an encoder-decoder's decoder by its own mask. A
    backward pass that repeats a forward pass (checkpointing) comes before the next one, whose mask would be used."""
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    for layer in structured_layers(model):
        inside = decodes and "decoder" in layer.module_name.split(".")
        mask = kwargs.get("decoder_attention_mask" if inside else "attention_mask")
        layer.token_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
