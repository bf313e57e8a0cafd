import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_toolbox import adapted, logits, tiny_base
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model

from hf_sparse_peft import hub
from hf_sparse_peft.hub import push as push_module


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A Hub that is a folder: what HfApi would send lands in `tmp_path/hub/<repo>`; calls are noted."""
    root, calls = tmp_path / "hub", []

    def create_repo(self, repo_id, **kwargs):
        calls.append(("create_repo", repo_id, kwargs))
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        calls.append(("upload_folder", repo_id, {**kwargs, "token": self.token}))
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"local/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        calls.append(("create_commit", repo_id, kwargs))
        for operation in operations:
            target = root / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, target)
        return SimpleNamespace(commit_url=f"local/{repo_id}")

    def load(cls, name, **kwargs):
        if not Path(name).exists():
            raise EntryNotFoundError("no card")
        return original(name, **kwargs)

    original = ModelCard.load
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, *a, **k: calls.append(("create_branch", a, k)))
    monkeypatch.setattr(ModelCard, "load", classmethod(load))
    return SimpleNamespace(root=root, calls=calls)


@pytest.fixture
def upstream_peft(monkeypatch):
    """peft as it is without `register_cards`, put back afterwards."""
    card, push = PeftModel.create_or_update_model_card, PeftModel.__dict__.get("push_to_hub")
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", getattr(card, "__wrapped__", card))
    if push is not None:
        monkeypatch.delattr(PeftModel, "push_to_hub")
    return monkeypatch


@pytest.fixture
def registered(upstream_peft):
    upstream_peft.setattr(PeftModel, "push_to_hub", PeftModel.push_to_hub, raising=False)
    hub.register_cards()


def test_push_sends_a_whole_adapter_with_its_card(stand_in):
    model = adapted(r=2)
    info = hub.push_to_hub(
        model, "me/x", private=True, token="t", commit_message="first", create_pr=True, metrics={"accuracy": 0.5}
    )
    assert info.commit_url == "local/me/x"
    place = stand_in.root / "me/x"
    assert sorted(p.name for p in place.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = (place / "README.md").read_text()
    assert '.from_pretrained("me/x")' in card
    assert "| accuracy | 0.5 |" in card
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), place)), logits(model))
    (_, _, created), (_, _, sent) = stand_in.calls
    assert created == {"private": True, "exist_ok": True}
    assert (sent["commit_message"], sent["create_pr"], sent["token"]) == ("first", True, "t")


def test_mistake_in_card_arguments_makes_no_repo(stand_in):
    with pytest.raises(ValueError, match="metrics"):
        hub.push_to_hub(adapted(), "me/x", metrics=3)
    assert stand_in.calls == []


def test_plain_push_without_registration_ships_a_loadable_adapter(stand_in, upstream_peft):
    model = adapted(r=2)
    model.push_to_hub("me/x")
    place = stand_in.root / "me/x"
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), place)), logits(model))


@pytest.mark.usefixtures("registered")
def test_plain_push_ships_our_card(stand_in):
    model = adapted(r=2)
    model.push_to_hub("me/x", commit_message="hello", tags=["mine"], private=True)
    place = stand_in.root / "me/x"
    card = ModelCard.load(place / "README.md")
    assert "import hf_sparse_peft" in card.text
    assert "mine" in card.data.tags
    assert stand_in.calls[-1][2]["commit_message"] == "hello"
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), place)), logits(model))


@pytest.mark.usefixtures("registered")
def test_plain_save_writes_our_card_and_keeps_one_that_was_edited(tmp_path):
    model = adapted(r=2)
    model.save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    assert "KeyError: 'SPARSE_LORA'" in readme.read_text()
    assert push_module.GENERATED in readme.read_text()
    readme.write_text(readme.read_text().replace(push_module.GENERATED, "Written by me."))
    model.save_pretrained(tmp_path)
    assert "Written by me." in readme.read_text()


@pytest.mark.usefixtures("registered")
def test_registration_leaves_other_adapters_to_upstream(stand_in, tmp_path):
    lora = get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"]))
    lora.push_to_hub("me/lora")
    lora.save_pretrained(tmp_path / "lora")
    for place in (stand_in.root / "me/lora", tmp_path / "lora"):
        assert "hf_sparse_peft" not in (place / "README.md").read_text()
    before = PeftModel.push_to_hub
    hub.register_cards()
    assert PeftModel.push_to_hub is before
