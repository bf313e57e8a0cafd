"""An adapter's way to the Hub."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel

from ..tuners.shared.config import AdapterConfig
from ..utils.file_writing import whole_file
from .card import GENERATED, adapter_card, is_repo_id
from .saving import save_adapter


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    adapter_name: str = "default",
    base_model: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str = "Upload adapter",
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **card_arguments: Any,
) -> CommitInfo:
    """Upload an adapter and its card (`card_arguments` as `adapter_card` takes them) to the Hub repo `repo_id`.

    `base_model` is the Hub id of the base, for config and card; without it the one that the config has. The repo is
    made if it is not there; `private=None` leaves that to the account's default. Nothing is uploaded before all files
    are written. Returns what `HfApi.upload_folder` returns.

    Raises:
        ValueError: `model` is no PeftModel with an adapter of this package of that name, or its base is named by a path
            of this machine, where nobody else finds it.
    """
    check_base_name(model, adapter_name, base_model)
    api = HfApi(token=token, library_name="hf-sparse-peft")
    with tempfile.TemporaryDirectory() as folder:
        # The card is rendered before the repo exists: a mistake in its arguments leaves no empty repo behind.
        saved = save_adapter(
            model,
            Path(folder) / "adapter",
            adapter_name=adapter_name,
            base_model=base_model,
            **{"repo_id": repo_id, **card_arguments},
        )
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=str(saved),
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def check_base_name(model: PeftModel, adapter_name: str = "default", base_model: str | None = None) -> None:
    """Refuse to name the base of a pushed adapter by a path, here or before a run whose end is a push.

    Raises:
        ValueError: neither `base_model` nor the adapter's config has a Hub id, and one of them has a path.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    named = base_model or getattr(config, "base_model_name_or_path", None)
    if named is None or (is_repo_id(named) and (base_model or not os.path.exists(named))):
        return
    where = "base_model" if base_model else "base_model_name_or_path"
    raise ValueError(
        f"{where}={named!r} is a path of this machine, and nobody who downloads the adapter finds its base there. Pass "
        "the Hub id of the base: push_to_hub(..., base_model='owner/name')."
    )


def register_cards() -> None:
    """Let `PeftModel.save_pretrained` and `PeftModel.push_to_hub` write our card for adapters of this package.

    Without it both leave upstream's empty card, which says neither what the adapter is nor that this package is needed
    to load it. A README.md that somebody wrote stays. Models with other adapters, or several, keep upstream's ways; the
    second call does nothing.
    """
    original_card, original_push = PeftModel.create_or_update_model_card, PeftModel.push_to_hub
    if getattr(original_card, "_sparse_cards", False):
        return

    @functools.wraps(original_card)
    def create_or_update_model_card(self, output_dir: str) -> None:
        if not any(isinstance(config, AdapterConfig) for config in self.peft_config.values()):
            original_card(self, output_dir)
            return
        try:
            _write_card(self, Path(output_dir), original_card)
        except Exception as error:  # a card is no reason to lose the adapter that is saved with it
            warnings.warn(
                f"No card was written: {type(error).__name__}: {error}. The adapter is saved without; delete or mend "
                "the README.md that is there, or call hf_sparse_peft.hub.save_adapter afterwards.",
                stacklevel=3,
            )

    @functools.wraps(original_push)
    def push(self, repo_id: str, *, max_shard_size: Any = None, tags: list[str] | None = None, **kwargs: Any):
        name = _only_adapter(self)
        if name is None:
            sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            return original_push(self, repo_id, tags=tags, **sizes, **kwargs)
        if kwargs.get("commit_message", "") is None:
            del kwargs["commit_message"]
        return push_to_hub(self, repo_id, adapter_name=name, tags=tags, **kwargs)

    create_or_update_model_card._sparse_cards = True
    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel.push_to_hub = push


def _write_card(model: PeftModel, folder: Path, upstream: Callable) -> None:
    readme, name = folder / "README.md", _only_adapter(model)
    if name is None or (readme.exists() and GENERATED not in readme.read_text(encoding="utf-8")):
        upstream(model, str(folder))
        return
    with whole_file(readme) as file:
        adapter_card(model, adapter_name=name, generated=True).save(file)


def _only_adapter(model: PeftModel) -> str | None:
    """Name of the model's one adapter; None where it has several or the one is upstream's."""
    (name, config), *others = model.peft_config.items()
    return name if not others and isinstance(config, AdapterConfig) else None
