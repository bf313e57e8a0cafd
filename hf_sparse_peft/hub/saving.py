"""`PeftModel.save_pretrained` for adapters of this package: every file whole, whatever happens in between."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..tuners.shared.config import AdapterConfig
from .folders import staged_files


def register_saving() -> None:
    """Let `PeftModel.save_pretrained` write adapters of this package into a temporary folder first and rename file by
    file: peft writes weights and config in place, and a run that is killed meanwhile leaves half a file in its newest
    checkpoint. Pickled weights (`safe_serialization=False`) are refused with a ValueError. Other adapters are saved as
    before; the second call does nothing."""
    original = PeftModel.save_pretrained
    if getattr(original, "_whole_files", False):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        selected = given.get("selected_adapters") or list(self.peft_config)
        ours = any(isinstance(self.peft_config.get(name), AdapterConfig) for name in selected)
        if ours and not given.get("safe_serialization", True):
            raise ValueError(
                "safe_serialization=False writes adapter_model.bin, which is pickled: no loader of this package reads "
                "it, because reading it runs what is in it. Leave safe_serialization at True."
            )
        if not ours or not given.get("is_main_process", True) or os.path.isfile(save_directory):
            original(self, save_directory, *args, **kwargs)
            return
        with staged_files(Path(save_directory)) as stage:
            card = Path(save_directory) / "README.md"
            if card.is_file():
                shutil.copyfile(card, stage / card.name)
            original(self, str(stage), *args, **kwargs)

    save_pretrained._whole_files = True
    PeftModel.save_pretrained = save_pretrained
