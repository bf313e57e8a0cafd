"""`StructuredModel`: who shares tensors with whom, and what is left of an adapter without its model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..shared.file_check import AdapterFile
from ..shared.merge import warn_of_biases
from ..shared.model import AdapterModel, AdapterPlan
from ..shared.sharing import check_same_sharings, check_sharing_modules, link_owners, sharings
from .config import StructuredConfig
from .layer import SHAPE, StructuredLayer, StructuredLinear


class StructuredModel(AdapterModel):
    r"""Structured adapters on dense and quantised linears: updates, maps of input and output, modules behind layers.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = StructuredLayer
    linear_cls = StructuredLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the adapter, then show each layer the one that has what it shares."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        sizes = self.peft_config[adapter_name].sizes
        link_owners(structured_layers(model), sizes, adapter_name, "structured_owner")

    def plan(self, peft_config: StructuredConfig, model: nn.Module, targets: dict[str, nn.Module]) -> AdapterPlan:
        """Which modules share tensors, written into `sizes`.

        Raises:
            ValueError: the file that is being loaded has its modules share otherwise than this base has them.
        """
        found = sharings(targets, peft_config.group) if peft_config.form.shared else {}
        check_same_sharings(peft_config.sizes, found)
        peft_config.sizes = found
        return AdapterPlan()

    @classmethod
    def check_file(cls, file: AdapterFile) -> None:
        """Check that the file has all modules that share tensors.

        Raises:
            ValueError: names the tensor.
        """
        check_sharing_modules(file, (), SHAPE)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        unbiased = {layer for layer in self.adapted_layers() if getattr(layer.get_base_layer(), "bias", None) is None}
        unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        added = [layer.module_name for layer in unbiased if getattr(layer.get_base_layer(), "bias", None) is not None]
        warn_of_biases(added, StructuredLayer.without_biases)
        return unloaded


def structured_layers(model: nn.Module) -> list[StructuredLayer]:
    """All layers of `model` with a structured adapter, in model order."""
    return [module for module in model.modules() if isinstance(module, StructuredLayer)]
