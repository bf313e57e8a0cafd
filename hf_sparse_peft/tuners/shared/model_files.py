"""What a tuner model does with files: all of an adapter is written, and a file is checked before anything changes."""

from __future__ import annotations

from functools import partial
from typing import Any

from .base_overrides import recorded_overrides
from .config import AdapterConfig
from .file_check import AdapterFile, file_being_loaded, tensor_key
from .layer import restore_fp32
from .state_dict import SelectedTensors, check_complete, check_layer, check_others, fit_training_state
from .tensor_checks import check_shapes
from .wrapped_names import plain_name, rename_to_modules


class ModelFiles:
    """The part of `AdapterModel` that upstream asks when it saves and loads; beside `BaseTuner`, before it."""

    @classmethod
    def check_file(cls, file: AdapterFile) -> None:
        """Check what concerns the file as a whole; the tensors of each of its modules were checked.

        Raises:
            ValueError: names the tensor.
        """

    def _check_file_fits(self, config: AdapterConfig, module_name: str, rows: int, cols: int, sizes: Any) -> None:
        """Before a layer is allocated for a file that is being loaded: does it ask for what the file holds?"""
        file = file_being_loaded()
        if file is None or file.renamed:
            return
        held = file.modules.get(module_name, {})
        sizes = self.tuner_layer_cls.sizes_to_load(config, module_name, sizes, held)
        specs = self.tuner_layer_cls.tensor_specs(config, module_name, rows, cols, sizes)
        check_shapes(held, specs, partial(tensor_key, module_name), file.path)

    def _check_surplus(self, adapter_name: str) -> None:
        file = file_being_loaded()
        if file is None or file.renamed:
            return
        made = {layer.module_name for layer in self.adapted_layers() if adapter_name in layer.adapter_configs}
        surplus = sorted(set(file.modules) - made)
        if surplus:
            kind = next(iter(file.modules[surplus[0]]))
            raise ValueError(
                f"'{tensor_key(surplus[0], kind)}' in '{file.path}' has no place in this base: '{surplus[0]}' "
                f"({len(surplus)} such modules) is not there or not targeted. Load the adapter on the base that it was "
                "trained on."
            )

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        rename_to_modules(state_dict, model)  # peft takes the heads from this dict afterwards
        check_complete(state_dict, model, adapter_name)
        for layer in model.modules():
            if isinstance(layer, cls.tuner_layer_cls) and adapter_name in layer.adapter_configs:
                layer.choose_units(adapter_name, "save")
        config.base_overrides = recorded_overrides(model, config)
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return SelectedTensors(selected, config)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Name the file's tensors as the model does, all of them checked before any reaches a layer.

        State of running schedules is dropped where the adapter does not train, allocated again where a finished run
        freed it, and starts anew where a file has none.
        """
        restore_fp32(model)  # a resumed run must not round what it reads to a dtype that somebody cast to meanwhile
        found = dict(super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict))
        layers = [
            (f"{name}." if name else "", module)
            for name, module in model.named_modules()
            if isinstance(module, cls.tuner_layer_cls)
        ]
        sizes = {prefix: check_layer(found, prefix, layer, adapter_name) for prefix, layer in layers}
        biases = partial(cls._get_learnable_bias_state_dict, model, config=config)
        check_others(found, model, config, adapter_name, cls.tuner_layer_cls, biases)
        if config.calibrates_sizes:
            for prefix, layer in layers:
                if adapter_name in layer.sizes and layer.sizes[adapter_name] != sizes[prefix]:
                    layer.resize(adapter_name, sizes[prefix])
            cls.note_sizes(config, model, adapter_name)
        for prefix, layer in layers:
            fit_training_state(found, prefix, layer, adapter_name)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        key = plain_name(super()._remove_adapter_name_from_key(key, adapter_name))
        path, _, kind = key.rpartition(".")
        if not kind.startswith(cls.prefix):
            return key
        while path.endswith(".base_layer"):  # inside of other tuners' layers, in a mixed model
            path = path.removesuffix(".base_layer")
        return f"{path}.{kind}"
