"""Reports as JSON: dataclasses, paths, dtypes and tensors as dicts, strings and lists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from os import PathLike, fspath
from typing import Any

import torch


def plain_data(content: Any) -> Any:
    """`content` as what JSON has. Numbers that are not finite become None, which JSON has no number for.

    Raises:
        TypeError: something inside has no such form.
    """
    if content is None or isinstance(content, (str, bool, int)):
        return content.value if isinstance(content, Enum) else content
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Enum):
        return plain_data(content.value)
    if isinstance(content, torch.dtype):
        return str(content).removeprefix("torch.")
    if isinstance(content, torch.Tensor):
        return plain_data(content.tolist())
    if isinstance(content, PathLike):
        return fspath(content)
    if hasattr(content, "to_dict"):  # configs
        return plain_data(content.to_dict())
    if is_dataclass(content) and not isinstance(content, type):
        return {field.name: plain_data(getattr(content, field.name)) for field in fields(content)}
    if isinstance(content, Mapping):
        return {str(key): plain_data(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain_data(value) for value in content]
    if isinstance(content, (set, frozenset)):
        return [plain_data(value) for value in sorted(content)]
    raise TypeError(f"{type(content).__name__} has no form in JSON.")
