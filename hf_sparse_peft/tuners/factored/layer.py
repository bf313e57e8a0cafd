"""What every factored layer holds, and the linear layer whose weight a form replaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...rules import UnitSpace
from ...sparsity import Statistic
from ...sparsity.selection import stream_seed
from ...utils.tensors import TensorSpec
from ..shared.base_weight import compute_dtype
from ..shared.file_check import file_being_loaded
from ..shared.form_layer import FormLayer
from ..shared.merge import broken
from ..shared.pieces import Piece, Tiles
from ..shared.quantised import base_product
from .config import FactoredConfig
from .form import NAMES, Form, Tensors
from .released import HOW_TO_KEEP, ReleasedLinear

TRAINED, FROZEN = "factored_", "factored_frozen_"


class FactoredLayer(FormLayer):
    """What a layer holds per adapter: the tensors that its form declares, `factored_<name>` where they train (fp32
    masters) and `factored_frozen_<name>` where they do not (in the base's dtype, if they are floats)."""

    prefix: str = TRAINED
    frozen_prefix = FROZEN
    form_names = NAMES
    without_biases = "For a dense model on disk start from OutputFeatures(center=False)."
    factored_seen: dict[str, bool]
    """Whether a form that starts from data was seen to be there."""

    # The declaration

    @classmethod
    def tensor_specs(
        cls, config: FactoredConfig, module_name: str, rows: int, cols: int, sizes: int | None
    ) -> list[TensorSpec]:
        """The form's tensors at the rank `sizes`."""
        if sizes is None:
            sizes = _size_of(config, module_name)[2]
        return cls.named(config.form.specs(rows, cols, sizes))

    @classmethod
    def read_sizes(cls, config: FactoredConfig, module_name: str, held: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """Rows, columns and rank, as the config's `sizes` has them; the tensors are checked against the specs of that.

        Raises:
            ValueError: `sizes` does not name the module.
        """
        rows, cols, rank = _size_of(config, module_name)
        return rows, cols, rank

    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has a form of that adapter; it may have no parameter."""
        return adapter_name in self.adapter_configs

    def form(self, adapter_name: str) -> Form:
        """The adapter's form."""
        return self.adapter_configs[adapter_name].form

    # Start

    def update_layer(self, adapter_name: str, config: FactoredConfig, sizes: int | None = None, **kwargs: Any) -> None:
        """Add an adapter, and release the weight where nobody needs it any more."""
        self.add_containers(self.tensor_specs(config, self.module_name, self.out_features, self.in_features, sizes))
        super().update_layer(adapter_name, config, sizes, **kwargs)
        self._release()

    def allocate(self, adapter_name: str) -> None:
        """Allocate the form's tensors, frozen floats in the base's dtype."""
        super().allocate(adapter_name)
        dtype, kept = self._base_dtype(), self.form(adapter_name).full_precision
        for name in self.buffer_names:
            held = getattr(self, name)
            if name.removeprefix(FROZEN) in kept:
                continue
            if adapter_name in held and held[adapter_name].dtype == torch.float32:
                held[adapter_name] = held[adapter_name].to(dtype)

    def unit_spaces(self, adapter_name: str) -> list[UnitSpace]:
        """The form's units, and the module itself."""
        return [*self.form(adapter_name).spaces(self, adapter_name), *super().unit_spaces(adapter_name)]

    def _base_dtype(self) -> torch.dtype:
        base = self.get_base_layer()
        if self.quantization_backend is None:
            return base.weight.dtype
        state = getattr(base.weight, "quant_state", None)
        return getattr(state, "dtype", torch.float32)

    def _begin(self, adapter_name: str, first: Any) -> None:
        loading = file_being_loaded() is not None or self.released
        if not loading and not self.get_base_layer().weight.is_meta and self.form(adapter_name).statistic is None:
            self._start(adapter_name, None)

    @torch.no_grad()
    def _start(self, adapter_name: str, state: Tensors | None) -> None:
        """Compute the form from the weight."""
        config, weight = self.adapter_configs[adapter_name], self.dense_base_weight()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        bias = getattr(self.get_base_layer(), "bias", None)
        generator = torch.Generator().manual_seed(stream_seed(config.seed, "form", self.module_name))
        rank = self.sizes[adapter_name] or _size_of(config, self.module_name)[2]
        bias = None if bias is None else bias.detach().to(weight.dtype)
        found = config.form.start(weight, rank, state=state, bias=bias, generator=generator)
        held = self.form_tensors(adapter_name)
        if set(found) != set(held):
            raise TypeError(
                f"{type(config.form).__name__}.start returns {sorted(found)}; its specs are {sorted(held)}."
            )
        for name, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{type(config.form).__name__} of '{self.module_name}' is not finite: the weight or the data are "
                    "not. Leave the module out with exclude_modules."
                )
            held[name].data.copy_(tensor)
        self.factored_seen[adapter_name] = True

    def awaits_calibration(self, adapter_name: str) -> bool:
        """Whether the form is still to be found from data."""
        if self.form(adapter_name).statistic is None or self.factored_seen.get(adapter_name):
            return False
        tensors = self.tensors(adapter_name).values()
        if any(tensor.is_meta for tensor in tensors):
            return False
        self.factored_seen[adapter_name] = any(bool(tensor.any()) for tensor in tensors)
        if self.factored_seen[adapter_name]:
            self._release()
        return not self.factored_seen[adapter_name]

    def calibration_statistic(self, adapter_name: str) -> Statistic:
        """What the form reads."""
        return self.form(adapter_name).statistic

    def take_calibration(self, adapter_name: str, state: dict[str, Tensor] | None) -> None:
        """Compute the form, and release the weight."""
        self._start(adapter_name, state)
        self._release()

    # The weight

    @property
    def released(self) -> bool:
        """Whether the base weight is gone."""
        return isinstance(self.get_base_layer(), ReleasedLinear)

    def _release(self) -> None:
        """Let go of the base weight, unless an adapter keeps it or still has to read it."""
        nested = self.get_base_layer() is not self.base_layer
        kept = any(config.keep_base for config in self.adapter_configs.values())
        away = any(tensor.is_meta for name in self.adapter_configs for tensor in self.tensors(name).values())
        if self.released or nested or kept or self.merged or away:
            return
        if any(self.awaits_calibration(name) for name in self.adapter_configs):
            return
        base, device = self.base_layer, self.get_base_layer_device()
        if base.weight.is_meta:  # nothing to let go of, but nothing to go by either: where the form is
            device = next(t.device for name in self.adapter_configs for t in self.tensors(name).values())
        self.base_layer = ReleasedLinear(base, self.out_features, self.in_features, self._base_dtype(), device)
        self.quantization_backend = None

    def dense_base_weight(self) -> Tensor:
        """The base weight as `[out, in]`.

        Raises:
            ValueError: it was released.
        """
        if self.released:
            raise ValueError(
                f"The weight of '{self.module_name}' was released when its factors took its place. {HOW_TO_KEEP}"
            )
        return super().dense_base_weight()

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as `[in, out]`."""
        base = self.get_base_layer()
        return base.transposed if isinstance(base, ReleasedLinear) else super().fan_in_fan_out

    @torch.no_grad()
    def factored_weight(self, adapter_name: str) -> Tensor:
        """F, dense fp32 `[out, in]`."""
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in self.form_tensors(adapter_name).items()}
        return self.form(adapter_name).weight(tensors)

    def pieces(self, adapter_name: str) -> list[Piece]:
        """:math:`F - W`, as one dense tile; none can be made once W is released."""
        if not self.holds(adapter_name) or self.awaits_calibration(adapter_name):
            return []

        def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
            yield slice(None), slice(None), self.factored_weight(adapter_name) - self.dense_base_weight().float()

        return [Tiles((self.out_features, self.in_features), tiles, dense=True)]

    def check_deletion(self, adapter_name: str) -> None:
        """Can the adapter be deleted from this layer?

        Raises:
            ValueError: its form is all that is left of the weight.
        """
        if self.released and set(self.adapter_configs) == {adapter_name}:
            raise ValueError(
                f"Adapter '{adapter_name}' is all that is left of the weight of '{self.module_name}', which was "
                f"released. {HOW_TO_KEEP}"
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter from this layer; see `check_deletion`."""
        self.check_deletion(adapter_name)
        super().delete_adapter(adapter_name)

    @torch.no_grad()
    def _merge(self, names: list[str], safe_merge: bool) -> None:
        if len(names) > 1 or self.quantization_backend is not None:
            self.check_sum(names)
            super()._merge(names, safe_merge)
            return
        if self._merge_backup is not None:
            self._put_back(self._merge_backup)
        held, dense = self._held(), self.dense_layer([(names[0], 1.0)])
        if safe_merge and not torch.isfinite(dense.weight).all():
            raise broken(names[0])
        self._merge_backup = held
        self.base_layer = dense
        self.merged_adapters = names

    @torch.no_grad()
    def dense_layer(self, terms: Sequence[tuple[str, float]]) -> nn.Module:
        """The plain layer that a form makes: F, rounded to the base's dtype, and the layer's own bias or the form's.

        Args:
            terms: names of adapters and their weights in a sum.

        Raises:
            ValueError: they are not one adapter of weight 1, or it waits for data: forms add up as changes of the base.
        """
        if len(terms) != 1 or terms[0][1] != 1:
            told = ", ".join(f"{scale:g} x '{name}'" for name, scale in terms) or "no adapter"
            raise ValueError(
                f"'{self.module_name}' takes {told}: its weight was released, and one form alone, of weight 1, takes "
                f"its place. {HOW_TO_KEEP}"
            )
        name = terms[0][0]
        if self.awaits_calibration(name):
            raise ValueError(self.calibration_message(name))
        base, dtype, weight = self.get_base_layer(), self._base_dtype(), self.factored_weight(name)
        bias = self.form(name).bias(self.form_tensors(name), getattr(base, "bias", None))
        if self.fan_in_fan_out:
            dense = Conv1D(self.out_features, self.in_features)
            weight = weight.t()
        else:
            dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
        if bias is not None:
            own = bias is getattr(base, "bias", None)
            dense.bias = bias if own else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        dense.train(base.training)
        return dense

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the dense F in the weight's place; see `MergeMixin.merge`.

        Raises:
            ValueError: the weight was released and several adapters are to be merged, or one waits for data.
        """
        names = [n for n in (adapter_names or self.active_adapters) if self.holds(n)]
        waiting = next((name for name in names if self.awaits_calibration(name)), None)
        if waiting is not None:
            raise ValueError(self.calibration_message(waiting))
        if self.released and len({*self.merged_adapters, *names}) > 1:
            self._refuse_sum([*self.merged_adapters, *names])
        super().merge(safe_merge, adapter_names)

    def check_sum(self, names: list[str]) -> None:
        """Can forms be added to a kept base as changes of its weight?

        Raises:
            ValueError: one has a bias of its own, which no change of the weight says.
        """
        own = getattr(self.get_base_layer(), "bias", None)
        for name in names:
            if self.form(name).bias(self.form_tensors(name), own) is not own:
                raise ValueError(
                    f"The form of '{name}' gives '{self.module_name}' a bias of its own, which is lost where its "
                    "weight is added to others or rounded into a quantised base. Merge that adapter alone, with weight "
                    "1, by hub.merge_to_dense(model, adapter_names=...), or take OutputFeatures(center=False)."
                )

    def _refuse_sum(self, names: list[str]) -> None:
        raise ValueError(
            f"Adapters {names} of '{self.module_name}' are forms of one weight, and they add up as changes of it, "
            f"which was released. Activate one of them. {HOW_TO_KEEP}"
        )


def _size_of(config: FactoredConfig, module_name: str) -> list[int]:
    if module_name not in config.sizes:
        raise ValueError(f"sizes has no entry for '{module_name}': the config is incomplete, load the adapter's own.")
    return config.sizes[module_name]


class FactoredLinear(FactoredLayer):
    r""":math:`Y = X F^\top + b`; with several adapters over a kept base :math:`X W^\top + b + \sum X (F - W)^\top`."""

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in names if not self.awaits_calibration(name)]
        if len(names) == 1:
            return self._factored(x, names[0])
        if self.released:
            self._refuse_sum(names)
        base = result = base_product(self, x, *args, **kwargs)
        for name in names:
            result = result + (self._factored(x, name) - base)
        return result

    def _factored(self, x: Tensor, name: str) -> Tensor:
        dtype = compute_dtype(self, x, None)
        form, tensors = self.form(name), self.form_tensors(name)
        result = form.product(x, tensors, dtype)
        bias = form.bias(tensors, getattr(self.get_base_layer(), "bias", None))
        return result if bias is None else result + bias.to(result.dtype)
