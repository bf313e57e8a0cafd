"""A checkpoint that is not whole is found before anything is loaded from it, and names the one before."""

import json
import shutil
import warnings

import pytest
import tiny
import torch
import torch.distributed.checkpoint
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_sparse_peft import Regrow, SparseLoraConfig, trainer_options
from hf_sparse_peft.training import whole_checkpoints
from hf_sparse_peft.training.whole_checkpoints import checkpoints_of, whole_checkpoint, why_torn

STEPS, SAVED = 6, (2, 4, 6)


def trainer_of(out, config=None, **options) -> Trainer:
    torch.manual_seed(0)
    config = config or SparseLoraConfig(
        r=2, density=0.1, target_modules=["q_proj"], schedule=[Regrow(every=2, grow="gradient", fraction=0.5)]
    )
    model = get_peft_model(tiny.llama(layers=1), config)
    steps = options.pop("max_steps", STEPS)
    args = tiny.arguments(out, steps, **{"save_strategy": "steps", "save_steps": 2, **options})
    found = {"args": args} if isinstance(config, LoraConfig) else trainer_options(model, args)
    return Trainer(model=model, train_dataset=tiny.TokenData(32), **found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    trainer = trainer_of(out)
    trainer.train()
    return out, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "out")


def cut(file, size: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * size)])


TORN = {
    "empty folder": (lambda c: [f.unlink() for f in c.iterdir()], r"has no trainer_state\.json"),
    "no state": (
        lambda c: (c / "trainer_state.json").unlink(),
        r"has no trainer_state\.json, which Trainer writes last",
    ),
    "half a state": (lambda c: cut(c / "trainer_state.json"), r"has a trainer_state\.json that is not whole"),
    "half an adapter": (lambda c: cut(c / "adapter_model.safetensors"), r"adapter_model\.safetensors' is truncated"),
    "half an optimizer": (lambda c: cut(c / "optimizer.pt"), r"has its optimizer\.pt cut off"),
    "empty scheduler": (lambda c: cut(c / "scheduler.pt", 0), r"has its scheduler\.pt cut off"),
    "half random states": (lambda c: cut(c / "rng_state.pth", 0.9), r"has its rng_state\.pth cut off"),
    "half a config": (lambda c: cut(c / "adapter_config.json"), r"has an adapter_config\.json that is not whole"),
    "no adapter": (lambda c: (c / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "has no optimizer beside the rest of its state"),
    "no scheduler": (lambda c: (c / "scheduler.pt").unlink(), "has no scheduler beside the rest of its state"),
    "no random states": (lambda c: (c / "rng_state.pth").unlink(), "has no random states beside the rest"),
}


@pytest.mark.parametrize("how", TORN)
def test_a_torn_newest_checkpoint_names_itself_and_the_one_before(how, out):
    tear, what = TORN[how]
    assert [int(one.name[11:]) for one in checkpoints_of(out)] == [*reversed(SAVED)]
    assert why_torn(out / "checkpoint-6") is None
    tear(out / "checkpoint-6")
    trainer = trainer_of(out)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"checkpoint-6' .*{what}.*'.*checkpoint-4': resume from that"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-6"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_resuming_from_the_newest_goes_on_from_the_newest_whole_one_with_the_same_bits(out, trained):
    cut(out / "checkpoint-6" / "optimizer.pt")
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    (out / "checkpoint-final").mkdir()
    trainer = trainer_of(out)
    with pytest.warns(UserWarning, match=r"checkpoint-6' has its optimizer\.pt cut off.*goes on from '.*checkpoint-2'"):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trainer.model.state_dict().items())
    assert why_torn(out / "checkpoint-6") is None


def test_without_any_whole_checkpoint_the_mend_is_said(out):
    for step in SAVED:
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint-6' .*No checkpoint before it is whole\. Train from the start"):
        trainer_of(out).train(resume_from_checkpoint=True)
    trainer_of(out).train()
    assert all(why_torn(out / f"checkpoint-{step}") is None for step in SAVED)


def test_a_checkpoint_that_is_written_again_is_torn_until_it_is_whole_so_that_no_mixture_resumes(out, monkeypatch):
    trainer = trainer_of(out, seed=5)  # other data order: its files do not go with those that are there

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "has no trainer_state.json" in why_torn(out / "checkpoint-2")


@pytest.fixture
def sharded(out):
    """As FSDP2 leaves it, of one rank: weights and optimizer in shards."""
    folder = out / "checkpoint-6"
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        state = {"a": torch.zeros(64), "b": torch.ones(3, 5), "c": 1}
        torch.distributed.checkpoint.save(state, checkpoint_id=folder / name, no_dist=True)
    (folder / "optimizer.pt").unlink()
    assert why_torn(folder) is None
    return folder


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_shards_that_are_cut_off_or_lost_are_named(name, sharded):
    shard, metadata = sharded / name / "__0_0.distcp", sharded / name / ".metadata"
    contents = {file: file.read_bytes() for file in (shard, metadata)}
    for part in (0.0, 0.3, 0.6, 0.99):
        cut(shard, part)
        assert why_torn(sharded) == f"has its {name}/__0_0.distcp cut off"
    shard.unlink()
    (sharded / name / "__1_0.distcp").write_bytes(contents[shard])
    assert why_torn(sharded) == f"has no {name}/__0_0.distcp"
    shard.write_bytes(contents[shard])
    cut(metadata)
    assert why_torn(sharded) == f"has no whole {name}/.metadata"
    metadata.unlink()
    assert why_torn(sharded) == f"has no whole {name}/.metadata"
    metadata.write_bytes(contents[metadata])
    assert why_torn(sharded) is None


@pytest.fixture
def other_rank(monkeypatch):
    """A second rank that finds checkpoints of these steps whole."""

    def finds(*steps):
        def both(step, device):
            # What it answers: the largest of its steps that is not above what was told last.
            found = max((one for one in steps if one <= told[-1]), default=-1)
            told.append(min(step, found))
            return [step, found]

        told = [10**9]
        monkeypatch.setattr(whole_checkpoints, "_steps_of_ranks", both)

    return finds


@pytest.mark.parametrize(("steps", "expected"), [((2, 4), 4), ((2, 6), 6), ((2, 5), 2), ((2, 4, 6, 8), 6)])
def test_ranks_take_the_newest_checkpoint_that_all_find_whole(steps, expected, out, other_rank):
    other_rank(*steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = whole_checkpoint(True, str(out))
    assert found == str(out / f"checkpoint-{expected}")
    said = [str(one.message) for one in caught]
    assert (expected == 6) == (not said)
    assert all("checkpoint-6' is not whole, or not there, on another rank" in text for text in said)


def test_ranks_without_a_checkpoint_in_common_all_say_so(out, tmp_path, other_rank):
    other_rank(3, 5)
    with pytest.raises(ValueError, match=r"on another rank.*No checkpoint before it is whole\. Train from the start"):
        whole_checkpoint(True, str(out))
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        whole_checkpoint(True, str(tmp_path / "missing"))


def test_a_checkpoint_asked_for_by_path_that_another_rank_finds_torn_is_refused_on_all(out, monkeypatch):
    answers = iter([[1, 0], [4, 2], [2, 2]])
    monkeypatch.setattr(whole_checkpoints, "_steps_of_ranks", lambda step, device: next(answers))
    with pytest.raises(ValueError, match=r"checkpoint-6' is not whole.*on another rank.*checkpoint-2': resume from"):
        whole_checkpoint(str(out / "checkpoint-6"), str(out))


def test_a_checkpoint_counts_as_whole_when_every_rank_has_written_its_part(out, monkeypatch):
    trainer, seen = trainer_of(out), []

    def wait(waiting):
        folder = out / f"checkpoint-{waiting.state.global_step}"
        seen.append(((folder / "trainer_state.json").exists(), (folder / "rng_state.pth").stat().st_mtime_ns))

    monkeypatch.setattr(whole_checkpoints, "_wait_for_ranks", wait)
    trainer.train()
    assert [there for there, _ in seen] == [False] * 2 * len(SAVED)
    assert all(before < after for (_, before), (_, after) in zip(seen[::2], seen[1::2], strict=True))


def test_a_run_that_died_behind_its_last_step_makes_no_further_one(out, trained):
    trainer = trainer_of(out)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert not (out / f"checkpoint-{STEPS + 1}").exists()
    held, expected = trainer.model.state_dict(), trained[1]
    assert held.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())
    longer = trainer_of(out, max_steps=STEPS + 2)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == STEPS + 2


def test_whole_checkpoints_and_other_peoples_trainings_are_left_to_the_trainer(out, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The checkpoint")
        trainer_of(out).train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="No valid checkpoint found"):
            trainer_of(tmp_path / "new").train(resume_from_checkpoint=True)
    plain = LoraConfig(target_modules=["q_proj"])
    trainer_of(tmp_path / "lora", plain).train()
    state = tmp_path / "lora" / "checkpoint-6" / "trainer_state.json"
    assert json.loads(state.read_text())["global_step"] == 6
    state.unlink()
    with pytest.raises(FileNotFoundError):
        trainer_of(tmp_path / "lora", plain).train(resume_from_checkpoint=True)
