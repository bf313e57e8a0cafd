"""`SpectralLoraModel`: injects and checks spectral adapters, and ties what their layers share."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...ops.seeded import GENERATOR
from ..shared.base_weight import dense_weight
from ..shared.file_check import AdapterFile, file_being_loaded
from ..shared.model import AdapterModel, AdapterPlan
from ..shared.pieces import Piece
from ..shared.quantised import backend_of
from ..shared.sharing import check_same_sharings, check_sharing_modules, link_owners, sharings
from .config import SpectralLoraConfig
from .factors import Factors
from .layer import SpectralLoraLayer, SpectralLoraLinear
from .names import SHAPE


class SpectralLoraModel(AdapterModel):
    r"""Spectral adapters, :math:`\Delta W = s\,B\,C\,A`, on dense and quantised linears.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = SpectralLoraLayer
    linear_cls = SpectralLoraLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the adapter, then show each layer the one that has what it shares."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        sizes = self.peft_config[adapter_name].sizes
        link_owners(spectral_layers(model), sizes, adapter_name, "spectral_lora_owner")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype and file_being_loaded() is None:
            for layer in spectral_layers(self.model):  # rounded to the base's dtype, it starts at other numbers
                if adapter_name in layer.adapter_configs:
                    layer.fix_residual(adapter_name)

    def plan(self, peft_config: SpectralLoraConfig, model: nn.Module, targets: dict[str, nn.Module]) -> AdapterPlan:
        """Which modules share bases, written into `sizes`; ranks that follow from weights, into `rank_pattern`.

        Raises:
            ValueError: the file that is being loaded has its modules share otherwise than this base has them.
        """
        if peft_config.bases.drawn or peft_config.bases.recomputed:
            peft_config.generator = GENERATOR
        if peft_config.bases.rank_choice is not None and file_being_loaded() is None:
            peft_config.rank_pattern = _ranks(peft_config, targets)
        found = sharings(targets, peft_config.group) if peft_config.bases.shared else {}
        check_same_sharings(peft_config.sizes, found)
        peft_config.sizes = found
        if file_being_loaded() is not None or not targets:
            return AdapterPlan()
        sites = {}
        for name, base in targets.items():
            cols, rows = _get_in_out_features(base)
            sites[name] = peft_config.site(name, rows, cols)
        peft_config.bases, first = peft_config.bases.planned(sites)
        return AdapterPlan(first=first)

    def config_of_pieces(self, like: SpectralLoraConfig, pieces: dict[str, list[Piece]]) -> SpectralLoraConfig:
        """Config of the adapter with `Factors` whose update is `pieces`, one `LowRank` a module."""
        config, ranks = copy.deepcopy(like), {name: found[0].A.shape[0] for name, found in pieces.items()}
        config.bases, config.core, config.use_dora = Factors(), None, False
        config.schedule, config.sizes, config.generator = [], {}, None
        config.r, config.lora_alpha = max(ranks.values()), None  # scalings are folded in
        config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items()}
        return config

    @classmethod
    def check_file(cls, file: AdapterFile) -> None:
        """Check that the file has all modules that share bases, or have trained entries of B.

        Raises:
            ValueError: names the tensor.
        """
        entries = getattr(file.config.bases, "entries", {})
        check_sharing_modules(file, (name for name, count in entries.items() if count), SHAPE)


def spectral_layers(model: nn.Module) -> list[SpectralLoraLayer]:
    """All layers of `model` with a spectral adapter, in model order."""
    return [module for module in model.modules() if isinstance(module, SpectralLoraLayer)]


def _ranks(config: SpectralLoraConfig, targets: dict[str, nn.Module]) -> dict[str, int]:
    """`rank_pattern` with the components that follow from the weights."""
    sites, weights = {}, {}
    known = {name: base for name, base in targets.items() if not base.weight.is_meta}
    with tqdm(total=len(known), desc="Choosing ranks", delay=3) as progress:

        def weight_of(base: nn.Module) -> Tensor:
            progress.update()
            return dense_weight(base, backend_of(base)).float()

        for name, base in known.items():
            cols, rows = _get_in_out_features(base)
            sites[name], weights[name] = config.site(name, rows, cols), partial(weight_of, base)
        found = config.bases.rank_choice.ranks(weights, sites)
    return {f"^{name}": rank for name, rank in found.items()}
