"""What is left of a layer whose weight was released."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HOW_TO_KEEP = "Add the adapter with FactoredConfig(keep_base=True), or load the base again."


class ReleasedLinear(nn.Linear):
    """The shape, bias, dtype and device of a linear layer, without its weight: a parameter of no rows."""

    def __init__(self, base: nn.Module, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = cols, rows
        self.transposed = type(base).__name__ == "Conv1D"
        """Whether the weight was stored as `[in, out]`."""
        self.weight = nn.Parameter(torch.empty(0, cols, dtype=dtype, device=device), requires_grad=False)
        self.bias = base.bias
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Refused: there is no weight.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "The weight of this layer was released when its factors took its place, so the layer does not run without "
            f"them (a disabled or inactive factored adapter). {HOW_TO_KEEP}"
        )
