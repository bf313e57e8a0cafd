"""Tensors as text, for a checkpoint's JSON: numbers that no layer owns, so that no adapter's file could hold them."""

from __future__ import annotations

import base64
import binascii

import numpy as np
import torch
from torch import Tensor


def as_text(values: Tensor) -> str:
    """The fp32 bytes of `values` in base64."""
    return base64.b64encode(values.detach().float().cpu().numpy().tobytes()).decode()


def from_text(text: str, like: Tensor, what: str = "numbers") -> Tensor:
    """fp32, of the shape and on the device of `like`.

    Raises:
        ValueError: text that is not `as_text` of so many numbers, finite ones all of them; names `what`.
    """
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.float32)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"The checkpoint's {what} are damaged ({error}): resume from another one.") from error
    if values.size != like.numel() or not np.isfinite(values).all():
        raise ValueError(
            f"The checkpoint's {what} are {values.size} numbers, and {like.numel()} finite ones are needed: resume the "
            "model and the options that it was saved with, or from another checkpoint."
        )
    return torch.from_numpy(values.copy()).view(like.shape).to(like.device)
