"""What a tuner model does when its adapters are merged and unmerged: all layers or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .heads import check_active_heads, head_owners, use_heads
from .idle_layers import stop_watching
from .layer import AdapterLayer
from .merge import embeddings_tied, refuse_shared_modules, untie_embeddings
from .rollback import unchanged_on_error, uninterrupted
from .sparsity_report import SparsityReport, sparsity_report


class ModelMerging:
    """The part of `AdapterModel` that merges; beside `BaseTuner`, before it."""

    _unloaded_layers: list[AdapterLayer] | None = None

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (default: the active ones) into all layers or, where it ends early, into none; see
        `MergeMixin.merge`.

        Raises:
            ValueError: an adapter has heads of its own that are not the active ones, or a layer is used under a second
                name without the adapter.
        """
        check_active_heads(self.model, self.active_adapters if adapter_names is None else adapter_names)
        with self._all_or_nothing():
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of all layers, bit for bit, or, where it ends early, out of none."""
        with self._all_or_nothing():
            super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers, tied = self.adapted_layers(), embeddings_tied(self.model)
        with self._all_or_nothing():
            stop_watching(self.model)
            if merge and adapter_names is not None:
                use_heads(self.model, head_owners(self.model, adapter_names))
            unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if tied and not embeddings_tied(unloaded):
            untie_embeddings(unloaded)
        self._unloaded_layers = layers  # merge_errors() is asked afterwards
        return unloaded

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Bring weights, layers and modules back to what they are now if the block ends early, by Ctrl-C too."""
        states = [(layer, layer.merge_state()) for layer in self.adapted_layers()]
        with unchanged_on_error(self.model):
            try:
                yield
            except BaseException:
                with uninterrupted():
                    for layer, state in states:
                        layer.restore_merge_state(state)
                raise

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        refuse_shared_modules(self.model)

    def sparsity_report(self) -> SparsityReport:
        """The zeros of every linear weight, counted before and as merged; see `sparsity_report`."""
        return sparsity_report(self.model)

    def merge_errors(self) -> dict[str, float]:
        """Relative Frobenius error of each merged quantised weight, by module name: what re-rounding lost."""
        layers = self._unloaded_layers or self.adapted_layers()
        return {layer.module_name: layer.merge_error for layer in layers if layer.merge_error is not None}
