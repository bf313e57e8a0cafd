"""The tokenizer or processor that leaves with a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

_FILES = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json", "vocab.txt")


def load_processor(given: Any, base: str | None) -> Any | None:
    """What `given` says: an object with `save_pretrained`, a folder or Hub id of one, None, or "base" for what stands
    beside the model `base`; None if there is none.

    A repo of the base that cannot be reached is warned about: the model is good without it.

    Raises:
        ValueError: `given` is none of these, or names a place that has none.
    """
    if given is None or hasattr(given, "save_pretrained"):
        return given
    if not isinstance(given, (str, Path)):
        raise ValueError(
            f"tokenizer={given!r} is a {type(given).__name__}; give a tokenizer or processor, the folder or Hub id of "
            "one, 'base' for the base model's own, or None."
        )
    if given == "base" and (not base or (Path(base).is_dir() and not has_processor(base))):
        return None  # a model of its own making, or one that was saved without
    try:
        return AutoProcessor.from_pretrained(base if given == "base" else str(given))
    except (OSError, ValueError) as error:
        if given != "base":
            raise ValueError(f"tokenizer={str(given)!r} could not be loaded: {error}") from error
        warnings.warn(
            f"The model is written without a tokenizer: that of its base '{base}' could not be loaded "
            f"({type(error).__name__}: {error}). Pass tokenizer=.",
            stacklevel=4,
        )
        return None


def has_processor(folder: str | Path) -> bool:
    """Whether a folder has files of a tokenizer or processor."""
    return any(Path(folder, name).is_file() for name in _FILES)
