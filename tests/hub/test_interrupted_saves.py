"""A process that is killed while it saves tears no file, hides none, and the next save puts everything right."""

import errno
import json
import os
import shutil
import sys
from contextlib import suppress

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig, hub, save_support
from hf_sparse_peft.utils.file_writing import whole_file

CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def adapted(value: float, config=None, **options):
    config = config or SparseLoraConfig(r=2, target_modules=["q_proj"], density=0.1, granularity="row", **options)
    model = get_peft_model(tiny.llama(layers=1), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
    return model


def killed(action, folder, at: int, torn=None) -> bool:
    """Run `action` in a copy of this process that dies at its `at`-th change of a file; whether it came so far."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = [at]

    def audit(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(folder) in str(args[0]):
            if not left[0]:
                os._exit(9)
            left[0] -= 1

    sys.addaudithook(audit)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if torn is not None:
        torn(lambda: os._exit(9))
    try:
        action()
    finally:
        os._exit(0)


def tensors(folder) -> float:
    """The one value that all trained tensors of the file have; a torn file raises."""
    found = load_file(folder / "adapter_model.safetensors")
    values = {float(t.flatten()[0]) for k, t in found.items() if k.endswith(("_A", "_B", "_values", "_P", "_Q"))}
    assert len(values) == 1
    return values.pop()


def no_leftovers(folder):
    return not [path for path in folder.rglob("*") if ".writing-" in path.name]


SAVES = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "save_adapter": lambda model, folder: hub.save_adapter(model, folder),
    "export_lora": lambda model, folder: hub.export_lora(model, folder),
}


@pytest.mark.parametrize("how", ["save_pretrained", "export_lora"])
def test_a_kill_at_any_file_operation_leaves_whole_files_and_the_next_save_heals(how, tmp_path):
    save, folder = SAVES[how], tmp_path / "out" / "adapter"
    one, two = adapted(0.25), adapted(0.5)
    save(one, folder)
    mine = {"tokenizer.json": b"{}", "checkpoint-3/optimizer.pt": b"state", "other/adapter_config.json": b"{}"}
    for name, content in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    seen, at = set(), 0
    while killed(lambda: save(two, folder), tmp_path, at):
        assert {name: (folder / name).read_bytes() for name in mine} == mine
        json.loads((folder / "adapter_config.json").read_text())
        seen.add(tensors(folder) if how != "export_lora" else len(load_file(folder / "adapter_model.safetensors")))
        save(one, folder)
        assert no_leftovers(tmp_path)
        assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]
        at += 4  # not every one: a fork takes its time
    assert at > 4
    if how != "export_lora":
        assert seen == {0.25, 0.5}  # some died before the new weights were in place, some behind


@pytest.mark.parametrize("how", [*SAVES, "merge_to_dense", "save_support"])
def test_a_kill_while_a_new_folder_is_written_does_not_block_the_next_save(how, tmp_path):
    saves = SAVES | {
        "merge_to_dense": lambda model, folder: hub.merge_to_dense(model, folder),
        "save_support": lambda model, folder: save_support(model, folder / "support.safetensors"),
    }
    model, step = adapted(0.5), 0
    saves[how](model, tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    while True:
        place = tmp_path / "out" / str(step)
        if not killed(lambda place=place: saves[how](model, place), tmp_path, step):
            break
        if how != "merge_to_dense" or not place.exists():  # a dense model is there whole, or not at all
            saves[how](model, place)
        assert {path.name for path in place.iterdir()} == names
        step += 7
    assert step > 0
    assert no_leftovers(tmp_path / "out")


def test_weights_that_were_half_written_never_get_the_file_name(tmp_path):
    one, two = adapted(0.25), adapted(0.5)
    one.save_pretrained(tmp_path)

    def tear(die):
        import peft.peft_model

        def half(tensors, path, metadata=None):
            with open(path, "wb") as file:
                file.write(b"x" * 50)
            die()

        peft.peft_model.safe_save_file = half

    assert killed(lambda: two.save_pretrained(tmp_path), tmp_path, 10**6, tear)
    assert tensors(tmp_path) == 0.25
    two.save_pretrained(tmp_path)
    assert tensors(tmp_path) == 0.5
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("left", ["weights without config", "cut config"])
def test_what_a_plain_writer_left_half_done_is_replaced(left, tmp_path):
    model, place = adapted(0.5), tmp_path / "adapter"
    hub.save_adapter(model, place)
    config = place / "adapter_config.json"
    if left == "cut config":
        config.write_text(config.read_text()[:40])
    else:
        config.unlink()
    hub.save_adapter(model, place)
    PeftModel.from_pretrained(tiny.llama(layers=1), place)


def test_an_interrupt_between_two_files_brings_the_old_ones_back(tmp_path, monkeypatch):
    one, two = adapted(0.25), adapted(0.5, config=SparseLoraConfig(r=3, density=0, target_modules=["q_proj"]))
    one.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = os.replace

    def replace(source, target):
        if str(target) == str(tmp_path / "adapter_model.safetensors") and ".before" not in str(source):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        two.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_several_adapters_and_a_kernel_adapter_are_saved_as_upstream_lays_them_out(tmp_path):
    model = adapted(0.5, config=KernelLoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("other", KernelLoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "other",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert tensors(tmp_path) == 0.5


def test_a_refused_save_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="lacks"):
        adapted(0.5).save_pretrained(tmp_path / "new", state_dict={"x": torch.zeros(1)})
    assert not (tmp_path / "new").exists()


def test_a_card_that_cannot_be_written_costs_the_card_alone(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_bytes(b"---\n: [\xff\n---\n")
    model = adapted(0.5)
    with pytest.warns(UserWarning, match="No card was written"):
        model.save_pretrained(tmp_path)
    assert tensors(tmp_path) == 0.5
    assert (tmp_path / "README.md").read_bytes() == b"---\n: [\xff\n---\n"

    def full(self, path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.ModelCard.save", full)
    with pytest.warns(UserWarning, match="no card"):
        hub.save_adapter(model, tmp_path / "again")
    assert tensors(tmp_path / "again") == 0.5


def test_a_whole_file_is_the_old_one_until_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "a.json"
    with whole_file(target) as file:
        file.write_text("old")
    with suppress(KeyError), whole_file(target) as file:
        file.write_text("half")
        assert target.read_text() == "old"
        assert file.suffix == ".json"
        raise KeyError
    assert target.read_text() == "old"
    assert no_leftovers(tmp_path)


def test_a_half_written_save_in_a_checkpoint_is_no_further_adapter(tmp_path):
    config = SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"])
    tiny.train(get_peft_model(tiny.llama(layers=1), config), tmp_path, 2, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    fails = lambda: get_peft_model(tiny.llama(layers=1), config).save_pretrained(checkpoint)  # noqa: E731
    assert killed(fails, tmp_path, 10**6, lambda die: setattr(shutil, "rmtree", lambda *a, **k: die()))
    left = [path for path in checkpoint.iterdir() if ".writing-" in path.name]
    assert left
    shutil.copyfile(checkpoint / "adapter_model.safetensors", left[0] / "new" / "adapter_model.safetensors")
    model = get_peft_model(tiny.llama(layers=1), config)
    tiny.train(model, tmp_path, 2, resume=str(checkpoint))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", ["sparse", "kernel"])
def test_pickled_weights_are_refused_before_a_folder_appears(kind, tmp_path):
    options = {"target_modules": ["q_proj"]}
    configs = {
        "sparse": SparseLoraConfig(r=2, density=0.1, **options),
        "kernel": KernelLoraConfig(r=4, sparsity=0.5, **options),
    }
    model = get_peft_model(tiny.llama(layers=1), configs[kind])
    with pytest.raises(ValueError, match=r"safe_serialization=False.*pickled"):
        model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert not (tmp_path / "adapter").exists()
