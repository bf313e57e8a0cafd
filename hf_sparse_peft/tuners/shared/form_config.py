"""Configs whose `form` says what an adapter's tensors mean."""

from __future__ import annotations

from typing import Any

from ...utils.parts import UnknownPart, load_part_by_name


class FormConfig:
    """For a config with a `form`, a registered part with `unit_kinds`; before `AdapterConfig` among the bases."""

    form: Any

    def _make_form(self, kind: type) -> None:
        """Make the form of its dict.

        Raises:
            ValueError: nobody here has registered it.
        """
        self.form = load_part_by_name(kind, self.form, "form")
        if isinstance(self.form, UnknownPart):
            raise ValueError(
                f"form={self.form.data} cannot be used here: {self.form.reason}, and without it nobody knows what the "
                "adapter's tensors mean. Import the package that registers it, or update hf-sparse-peft."
            )

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Kinds of units that the form has, and modules."""
        return self.form.unit_kinds | {"module"}

    @property
    def possible_kinds(self) -> frozenset[str]:
        """The same: the form is known."""
        return self.unit_kinds
