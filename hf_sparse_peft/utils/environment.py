"""What a run was made with: versions of packages, Python, the machine's kind."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

_PACKAGES = ("hf-sparse-peft", "peft", "transformers", "torch", "bitsandbytes")


def package_versions() -> dict[str, str]:
    """Versions of this package and of what it stands on, as far as installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """The versions, Python's, and what computed: the GPU by name, or the kind of CPU and the threads it had."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {**package_versions(), "Python": platform.python_version(), "device": device}
