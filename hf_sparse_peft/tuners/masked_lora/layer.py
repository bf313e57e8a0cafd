"""What every adapted layer holds of masked adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ...ops import DenseSource, Source
from ...rules import ModuleSpace, UnitSpace
from ...rules.gradient_readers import SharedReader
from ...sparsity import Statistic, UnitGrid, pack_bits, unpack_bits
from ...utils.tensors import TensorSpec
from ..shared.layer import AdapterLayer
from ..shared.pieces import BaseMask, Piece, Tiles
from ..shared.tensor_checks import weight_sides
from .config import MaskedLoraConfig
from .one_shot import MaskStart
from .spaces import MaskSpace
from .stored_mask import StoredMask
from .updates import PREFIX, tell_of_tensors
from .weight import MaskedWeight, masked

MASK, COUNT = PREFIX + "mask", PREFIX + "count"
SHIPPED = "shipped"


class MaskedLoraLayer(AdapterLayer):
    """What every adapted layer holds per adapter, keyed by adapter name: the tensors of its update (`updates`) and
    masking (`masking`), fp32 masters, under `masked_lora_` and their own names, and the mask."""

    prefix: str = PREFIX
    masked_lora_mask: BufferDict
    """uint8 `[ceil(out * in / 8)]`, the bits of M, row-major, or fewer, its N:M codes (`n_of_m`); all 0 until they are
    known."""
    masked_lora_count: BufferDict
    """int64 `[1]`, in place of the bits where the masking computes its mask: how many entries live."""
    masked_lora_known: dict[str, bool]
    """Whether the adapter's mask was seen to be there."""
    masked_lora_numbers: dict[str, dict[str, float]]
    """Numbers that rules set for the passes of a step, by name."""
    masked_lora_input_mask: dict[str, Tensor]
    """Bits of another mask for the gradient of the input, while a rule sets one."""
    masked_lora_readers: dict[str, list[Callable[[Tensor], None]]]
    """Readers of the dense gradient."""

    # Tensors

    @classmethod
    def tensor_specs(
        cls, config: MaskedLoraConfig, module_name: str, rows: int, cols: int, sizes: str | None = None
    ) -> list[TensorSpec]:
        """Those of the update and of the masking, and the mask; `sizes=SHIPPED`: without what only training needs."""

        def check_count(tensor: Tensor, key: str) -> None:
            if tensor.dtype != torch.int64 or not 0 <= int(tensor) <= rows * cols:
                raise ValueError(
                    f"'{key}' is {tensor.tolist()}, no count of the {rows * cols} entries of its weight. The file is "
                    "damaged or belongs to another base model."
                )

        found = [
            replace(spec, name=PREFIX + spec.name)
            for part in (config.update, config.masking)
            for spec in part.specs(config, rows, cols)
            if sizes != SHIPPED or spec.name not in part.for_training
        ]
        if config.masking.computes_mask:
            start = torch.tensor([rows * cols])
            return [*found, TensorSpec(COUNT, (1,), torch.int64, "saved", start=lambda _: start, check=check_count)]
        return [*found, StoredMask(rows * cols, config.n_of_m).spec(MASK)]

    @classmethod
    def read_sizes(
        cls, config: MaskedLoraConfig, module_name: str, held: Mapping[str, Tensor]
    ) -> tuple[int, int, str | None]:
        """Rows and columns by the tensors that have these sides, or by `shape`; and whether it is without what only
        training needs."""
        for_training = config.masking.for_training
        sizes = SHIPPED if for_training and not any(PREFIX + name in held for name in for_training) else None
        shape = held.get(PREFIX + "shape")
        if shape is not None and shape.dtype == torch.int64 and shape.shape == (2,):
            return int(shape[0]), int(shape[1]), sizes
        return *weight_sides(lambda rows, cols: cls.tensor_specs(config, module_name, rows, cols, sizes), held), sizes

    @classmethod
    def sizes_to_load(
        cls, config: MaskedLoraConfig, module_name: str, sizes: str | None, held: Mapping[str, Tensor]
    ) -> str | None:
        """Whether the file is without what only training needs."""
        for_training = config.masking.for_training
        return SHIPPED if for_training and not any(PREFIX + name in held for name in for_training) else None

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has a part of that adapter."""
        return adapter_name in self.masked_lora_mask or adapter_name in self.masked_lora_count

    def _begin(self, adapter_name: str, first: Any) -> None:
        config = self.adapter_configs[adapter_name]
        self.masked_lora_numbers[adapter_name] = {}
        if config.masking.computes_mask or self.get_base_layer().weight.is_meta:
            return
        if config.mask == "all":
            self.masked_lora_mask[adapter_name].fill_(255)
            self.masked_lora_known[adapter_name] = True
        elif isinstance(config.mask, MaskStart):
            if config.mask.statistic is None:
                self.take_calibration(adapter_name, None)
        elif config.mask == "zeros" and self.quantization_backend is None:
            stored = self._stored_mask(adapter_name).stored(self.dense_base_weight() != 0, self.module_name)
            self.masked_lora_mask[adapter_name] = stored.cpu()
            self.masked_lora_known[adapter_name] = True

    # A mask that is chosen in one shot

    def awaits_calibration(self, adapter_name: str) -> bool:
        """Whether the mask is still to be chosen with data."""
        waits = self.adapter_configs[adapter_name].needs_calibration and adapter_name in self.masked_lora_mask
        return waits and not self.masked_lora_mask[adapter_name].is_meta and not self.knows_mask(adapter_name)

    def calibration_statistic(self, adapter_name: str) -> Statistic:
        """What the criterion reads."""
        return self.adapter_configs[adapter_name].mask.statistic

    @torch.no_grad()
    def take_calibration(self, adapter_name: str, state: dict[str, Tensor] | None) -> None:
        """Choose the mask."""
        start = self.adapter_configs[adapter_name].mask
        self.keep(adapter_name, pack_bits(start.kept(self.dense_base_weight(), state, self.module_name)))

    # The mask

    def keep(self, adapter_name: str, kept: Tensor) -> None:
        """Let these entries live and no others: `kept` are bits as `pack_bits` gives them.

        Raises:
            ValueError: the adapter's masks are N:M codes, and these do not keep so many of every group.
        """
        if self.adapter_configs[adapter_name].n_of_m is not None:
            kept = unpack_bits(kept, self.out_features * self.in_features)
            kept = self._stored_mask(adapter_name).stored(kept, self.module_name)
        self.masked_lora_mask[adapter_name].copy_(kept)
        self.masked_lora_known[adapter_name] = True

    def mask_bits(self, adapter_name: str, held: Tensor | None = None) -> Tensor:
        """The bits of M, of `held` or of what is stored: the same memory where bits are, decoded from N:M codes."""
        held = self.masked_lora_mask[adapter_name] if held is None else held
        return self._stored_mask(adapter_name).bits(held, known=held.is_meta or self.knows_mask(adapter_name))

    def _stored_mask(self, adapter_name: str) -> StoredMask:
        return StoredMask(self.out_features * self.in_features, self.adapter_configs[adapter_name].n_of_m)

    @torch.no_grad()
    def kept(self, adapter_name: str) -> Tensor:
        """M as bool `[out, in]`, whatever rules set for the passes of a step."""
        of = replace(self.masked_weight(adapter_name), numbers={})
        return of.kept if of.bits is not None else of.config.masking.mask(of)

    @torch.no_grad()
    def mask(self, adapter_name: str) -> Tensor:
        """M of a forward pass at this step `[out, in]`, bool or numbers."""
        return self.adapter_configs[adapter_name].masking.mask(self.masked_weight(adapter_name))

    def knows_mask(self, adapter_name: str) -> bool:
        """Whether anything is known to be kept; looked up on the device until it is."""
        if adapter_name not in self.masked_lora_mask:
            return True
        if not self.masked_lora_known.get(adapter_name):
            self.masked_lora_known[adapter_name] = bool(self.masked_lora_mask[adapter_name].any())
        return self.masked_lora_known[adapter_name]

    def check_mask(self, adapter_name: str) -> None:
        """Can the mask be applied to the base?

        Raises:
            ValueError: nobody has said yet what it keeps.
        """
        if self.awaits_calibration(adapter_name):
            raise ValueError(self.calibration_message(adapter_name))
        given = self.adapter_configs[adapter_name].mask == "given" and adapter_name in self.masked_lora_mask
        if given and not self.masked_lora_mask[adapter_name].is_meta and not self.knows_mask(adapter_name):
            raise ValueError(
                f"Adapter '{adapter_name}' has mask='given' and does not know yet what '{self.module_name}' keeps. "
                "Call hf_sparse_peft.set_masks(model, report.masks) with what prune_model returned."
            )

    def unit_spaces(self, adapter_name: str) -> list[UnitSpace]:
        """The mask, and the module itself."""
        return [MaskSpace(self, adapter_name), ModuleSpace(self, adapter_name)]

    # The weight

    def own_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The tensors of the adapter's update and masking, by their own names, and the mask's bits or count."""
        held = self.tensors(adapter_name)
        return {name.removeprefix(PREFIX): tensor for name, tensor in held.items()}

    def masked_weight(
        self,
        adapter_name: str,
        tensors: Mapping[str, Tensor] | None = None,
        source: Source | None = None,
    ) -> MaskedWeight:
        """The weight under that adapter, of `tensors` (`own_tensors`) and the base that `source` has; None: as they
        are. While adapters are merged, the base is the merged one."""

        def read(dtype: torch.dtype) -> Tensor:
            if source is None:
                return self.dense_base_weight().detach().to(dtype)
            # A dense weight is not rounded on the way.
            return source.read(source.weight.dtype).to(dtype) if isinstance(source, DenseSource) else source.read(dtype)

        tensors = dict(self.own_tensors(adapter_name) if tensors is None else tensors)
        bits, count = tensors.pop("mask", None), tensors.pop("count", None)
        bits = None if bits is None else self.mask_bits(adapter_name, bits)
        return MaskedWeight(
            config=self.adapter_configs[adapter_name],
            name=self.module_name,
            shape=(self.out_features, self.in_features),
            tensors=tensors,
            bits=bits,
            input_bits=self.masked_lora_input_mask.get(adapter_name),
            read=read,
            # On the meta device all live: memory is followed there before a run (preflight).
            count=None if count is None else self.out_features * self.in_features if count.is_meta else int(count),
            numbers=self.masked_lora_numbers.get(adapter_name, {}),
        )

    def masks_base(self, adapter_name: str) -> bool:
        """Whether the base may hold weights where the adapter's mask has none."""
        return bool(self.adapter_configs[adapter_name].masks_base)

    @torch.no_grad()
    def pieces(self, adapter_name: str) -> list[Piece]:
        """What the mask takes from the base, if the base has it, and the masked update as one dense tile.

        Raises:
            ValueError: the mask is not known yet.
        """
        if not self.holds(adapter_name):
            return []
        self.check_mask(adapter_name)
        shape, found = (self.out_features, self.in_features), []
        if self.masks_base(adapter_name):
            stored = adapter_name in self.masked_lora_mask
            bits = self.mask_bits(adapter_name) if stored else pack_bits(self.kept(adapter_name))
            found.append(BaseMask(bits, shape, self.dense_base_weight))

        def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
            update = masked(self.masked_weight(adapter_name).delta, self.kept(adapter_name))
            yield slice(None), slice(None), update.detach()

        if self.adapter_configs[adapter_name].update.trained:
            found.append(Tiles(shape, tiles))
        return found

    # Dense gradients

    def add_gradient_reader(self, adapter_name: str, reader: Callable[[Tensor], None]) -> None:
        """Show `reader` the dense gradient `[out, in]` of the weight, masked by nothing, in every backward pass until
        it is removed."""
        readers = self.masked_lora_readers.setdefault(adapter_name, [])
        if not any(known is reader for known in readers):
            readers.append(reader)

    def remove_gradient_reader(self, adapter_name: str, reader: Callable[[Tensor], None]) -> None:
        """Show it no more."""
        left = [known for known in self.masked_lora_readers.pop(adapter_name, []) if known is not reader]
        if left:
            self.masked_lora_readers[adapter_name] = left

    def _shared_reader(self, names: list[str]) -> SharedReader | None:
        grid = UnitGrid(self.out_features, self.in_features, "entry")
        readers = [(reader, grid) for name in names for reader in self.masked_lora_readers.get(name, ())]
        return SharedReader(readers, "entry", 0) if readers else None

    # Training

    def _before_training(self, active: list[str]) -> None:
        for name in active:
            if not self.awaits_calibration(name):  # else the runner says so, or reads the data
                self.check_mask(name)
        super()._before_training(active)


tell_of_tensors(MaskedLoraLayer.declare)
