"""How somebody who has only an adapter gets this package."""

from __future__ import annotations

import importlib.metadata

_REPOSITORY = ("repository", "source", "source code", "homepage")
"""Names of the project's links that lead to its repository, as `pyproject.toml` may give them."""


def install_command() -> str:
    """One line for a shell: from the repository that the project's metadata names, otherwise from a clone."""
    url = repository_url()
    return f"pip install git+{url}" if url else "pip install -e ."


def install_phrase() -> str:
    """The same as part of a sentence."""
    return install_command() if repository_url() else f"from a clone: {install_command()}"


def repository_url() -> str | None:
    """The repository that the metadata of the installed package names, if any."""
    try:
        entries = importlib.metadata.metadata("hf-sparse-peft").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    links = {name.strip().lower(): url.strip() for name, _, url in (entry.partition(",") for entry in entries)}
    return next((links[name] for name in _REPOSITORY if name in links), None)
