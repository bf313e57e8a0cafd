"""`--push_to_hub` of the recipe, against a stand-in for the Hub."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Folders instead of repositories."""

    def create_repo(self, repo_id, **kwargs):
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return tmp_path / "hub"


def test_push_to_hub_uploads_adapter_and_card_once_at_the_end(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.syspath_prepend(str(RECIPES))
    for name in ("demo_data", "evaluation", "reporting", "qlora_sparse_lora"):
        sys.modules.pop(name, None)
    import qlora_sparse_lora

    options = ["--max_steps", "8", "--train_examples", "64", "--test_examples", "10", "--disable_tqdm", "true"]
    push = ["--push_to_hub", "true", "--hub_model_id", "me/my-sparse-adapter"]
    with pytest.raises(ValueError, match=r"is a path of this machine.*base_model='owner/name'"):
        qlora_sparse_lora.main([*options, *push, "--output_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none" / "adapter").exists()
    push += ["--base_model", "me/demo-base"]
    qlora_sparse_lora.main([*options, *push, "--output_dir", str(tmp_path / "run")])
    uploaded = {path.name for path in (hub / "me" / "my-sparse-adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= uploaded
    assert "import hf_sparse_peft" in (hub / "me" / "my-sparse-adapter" / "README.md").read_text()
