"""Trainings on several processes of which one, or all, die: others end, a resumed run ends where a whole one does.

    python tests/endurance/rank_kills.py --kills 60                    # kill -9 at random moments, DDP and FSDP2
    python tests/endurance/rank_kills.py --operations --stride 4       # one rank, at its file operations
    python tests/endurance/rank_kills.py --disks --stride 40           # one rank's disk is full from an operation on
    python tests/endurance/rank_kills.py --torn                        # each file of the newest checkpoint, cut

Killed are the first rank, which writes checkpoints, the second, and both, in turn. Survived is a try after which the
rank that was left ended by itself within `BOUND`, and the same script, run again on what lies there with
`resume_from_checkpoint=True` alone, ended with the same supports on all ranks as an undisturbed run, and with its
values, optimizer and shipped adapter to fp32 rounding. Two gloo processes, on Linux.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", OMP_NUM_THREADS="1")
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import fsdp_on_cpu
import torch
from endurance import file_faults
from endurance.file_faults import FileFaults
from endurance.forks import LIMIT, Ended, Fork
from endurance.kills import Tally
from endurance.work import STEPS, moving, readable_log, train_or_go_on, trainer_of, whole_files

from hf_sparse_peft.training.whole_checkpoints import checkpoints_of, why_torn
from hf_sparse_peft.utils.file_length import read_safetensors

WORLD = 2
TIMEOUT = 20
"""Seconds of the group. Started here: with `use_cpu` Trainer hands on no `ddp_timeout`, and waits 30 minutes."""
BOUND = 4.0 * TIMEOUT
"""Seconds within which a rank ends after another was killed. Where the first died before its store was there, torch
tries to reach it for 1.4 to 2.5 x the timeout, as drawn; all else ends at once."""
ROUNDING = 1e-5


def _fsdp(kind: str) -> dict:
    options = copy.deepcopy(fsdp_on_cpu.OPTIONS)
    options["fsdp_config"]["state_dict_type"] = kind
    return options


RUNS: dict[str, Callable[[], dict]] = {
    "DDP": dict,
    "FSDP2": lambda: _fsdp("FULL_STATE_DICT"),
    "FSDP2, sharded checkpoints": lambda: _fsdp("SHARDED_STATE_DICT"),
}


def rank_of(name: str, folder: Path, told: Path, number: int) -> str:
    """What a rank runs: begins or goes on; writes its tensors to `told`."""
    fsdp_on_cpu.allow()
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    options = {"save_total_limit": 3, **RUNS[name]()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train_or_go_on(lambda: trainer_of(moving, folder / "run", STEPS, **copy.deepcopy(options)))
    said = " ".join(str(one.message) for one in caught if "Training goes on from" in str(one.message))
    assert trainer.state.global_step == STEPS
    model, optimizer = trainer.accelerator.unwrap_model(trainer.model), trainer.optimizer.optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "sparse_lora" in name}
    for parameter, held in optimizer.state.items():
        state |= {f"optimizer.{names[parameter]}.{key}": torch.as_tensor(value) for key, value in held.items()}
    if "sharded" not in name:
        trainer.save_model(str(folder / "shipped"))
    elif not number:  # Trainer writes none of its own there
        model.save_pretrained(str(folder / "shipped"))
    if not number:
        readable_log(folder / "run" / "support_log.jsonl", STEPS)
        state |= {
            f"shipped.{name}": t
            for name, t in read_safetensors(folder / "shipped/adapter_model.safetensors")[0].items()
        }
    torch.save(state, told / f"{number}.pt")
    return said


@dataclass
class Group:
    """Ranks that ran."""

    ended: list[Ended]
    tensors: list[dict[str, torch.Tensor] | None]
    slowest: float = 0.0
    """Seconds from the end of the first to the end of the last."""

    @property
    def trouble(self) -> str | None:
        """Why a run that nothing happened to did not end."""
        for rank, one in enumerate(self.ended):
            if one.error or one.signal:
                return f"rank {rank}: {one.error.strip().splitlines()[-1] if one.error else f'signal {one.signal}'}"
        return None


def run(
    name: str, folder: Path, killed: tuple[int, ...] = (), moment: float = 0.0,
    before: dict[int, Callable[[], FileFaults]] | None = None,
) -> Group:  # fmt: skip
    """One run of all ranks. `killed` are killed `moment` seconds after the beginning; `before` is called on a rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    told = Path(tempfile.mkdtemp(prefix="ranks-"))
    group = {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    forks = [
        Fork(
            lambda rank=rank: rank_of(name, folder, told, rank), (before or {}).get(rank, lambda: None),
            {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    if killed:
        time.sleep(max(0.0, forks[0].began + moment - time.monotonic()))
        for rank in killed:
            forks[rank].kill()
    slowest = _wait(forks)
    ended = [fork.end() for fork in forks]
    tensors = [torch.load(file) if (file := told / f"{rank}.pt").exists() else None for rank in range(WORLD)]
    shutil.rmtree(told)
    return Group(ended, tensors, slowest)


def _wait(forks: list[Fork]) -> float:
    """Until all have ended, or `BOUND` after one died, or `LIMIT`; returns how long the last outlived a dead one."""
    died, began = None, time.monotonic()
    while True:
        over = [fork.is_over() for fork in forks]
        if all(over):
            break
        now = time.monotonic()
        if died is None and any(over):
            died = now
        if now > began + LIMIT or (died is not None and now > died + BOUND):
            for fork in forks:
                fork.kill()
            return float("inf")
        time.sleep(0.005)
    return 0.0 if died is None else time.monotonic() - died


def difference(found: Group, expected: Group) -> tuple[str | None, bool]:
    """What of a run that went on is not as it is in the undisturbed one; and whether every bit is the same."""
    same = True
    for rank, (one, other) in enumerate(zip(found.tensors, expected.tensors, strict=True)):
        if one is None or one.keys() != other.keys():
            return f"rank {rank} has other tensors", False
        for name, tensor in other.items():
            if torch.equal(one[name], tensor):
                continue
            same = False
            if not tensor.is_floating_point() or one[name].shape != tensor.shape:
                return f"rank {rank}: other units in {name}", False
            away = float((one[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-30))
            if not away <= ROUNDING:
                return f"rank {rank}: {name} is {away:.1e} of its largest value away", False
    first, *others = found.tensors
    for other in others:
        for name, tensor in other.items():
            if not torch.equal(tensor, first[name]):
                return f"{name} differs between ranks", same
    return None, same


@dataclass
class Tries(Tally):
    """Of one kind of run."""

    exact: int = 0
    slowest: float = 0.0

    def judge(self, what: str, broken: Group, name: str, place: Path, expected: Group) -> None:
        """Look at what is left, go on, compare."""
        self.slowest = max(self.slowest, broken.slowest)
        if broken.slowest == float("inf"):
            self.add(what, f"a rank did not end within {BOUND:.0f} s")
            return
        for rank, one in enumerate(broken.ended):
            if one.signal or one.error:
                self.places["killed" if one.signal else "raised"] += 1
            elif difference(Group([one], [broken.tensors[rank]]), Group([], [expected.tensors[rank]]))[0]:
                self.add(what, f"rank {rank} ended without an error and with another result")
                return
            else:
                self.places["had ended"] += 1
        try:
            whole_files(place / "shipped")
        except Exception as error:
            self.add(what, f"left something torn: {error!r}")
            return
        again = run(name, place)
        if again.trouble:
            self.add(what, f"did not go on: {again.trouble}")
            return
        trouble, same = difference(again, expected)
        self.exact += same
        self.add(what, trouble)


@contextmanager
def _folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="endurance-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def undisturbed(name: str, operations: bool = False) -> Group:
    """Nothing happens to it.

    Raises:
        AssertionError: a rank fails by itself, or ranks differ.
    """
    with _folder() as place:
        watch = {rank: lambda: FileFaults(place, -1, file_faults.kill) for rank in range(WORLD)} if operations else {}
        whole = run(name, place, before=watch)
    assert whole.trouble is None, whole.trouble + str([one.error for one in whole.ended])
    assert difference(whole, whole) == (None, True)
    return whole


def at_random(name: str, kills: int, draws: random.Random, expected: Group) -> Tries:
    """The first rank, the second and both in turn, at moments drawn evenly over the run. Runs that had ended before the
    moment, where others use the machine less than before, are no try."""
    tries, seconds = Tries(), max(one.seconds for one in expected.ended)
    while tries.tried < kills:
        killed = ((0,), (1,), (0, 1))[tries.tried % 3]
        with _folder() as place:
            moment = draws.uniform(0, seconds)
            broken = run(name, place, killed, moment)
            if any(one.signal for one in broken.ended):
                tries.judge(f"ranks {killed} after {moment:.2f} of {seconds:.2f} s", broken, name, place, expected)
            else:
                seconds = max(one.seconds for one in broken.ended)
    return tries


def at_operations(name: str, stride: int, expected: Group, full_disk: bool = False) -> Tries:
    """A rank is killed at every `stride`-th of its file operations, or its disk is full from there on."""
    tries, act = Tries(), file_faults.full_disk if full_disk else file_faults.kill
    for rank in range(WORLD):
        for at in range(0, expected.ended[rank].operations, stride):
            with _folder() as place:
                spoil = lambda at=at, place=place: FileFaults(place, at, act, onwards=full_disk)  # noqa: E731
                broken, what = run(name, place, before={rank: spoil}), f"rank {rank} at operation {at}"
                if not full_disk and broken.ended[rank].signal != signal.SIGKILL:
                    tries.add(what, f"was not reached: {broken.trouble}")
                    continue
                tries.judge(what, broken, name, place, expected)
    return tries


def torn(name: str, expected: Group) -> Tries:
    """Each file of the newest checkpoint that a resumed run reads, cut or lost: it names itself and the one before, and
    is written anew; or, where the file is lost, every bit is there without it."""
    tries = Tries()
    with _folder() as whole:
        run(name, whole)
        newest, before = checkpoints_of(whole / "run")[1:3]
        shutil.rmtree(whole / "run" / f"checkpoint-{STEPS}")
        files = sorted(file.relative_to(whole) for file in newest.rglob("*") if file.is_file() and _is_read(file))
        for file in files:
            for how in ("cut", "lost"):
                with _folder() as parent:
                    place = shutil.copytree(whole, parent / "copy")
                    if how == "lost":
                        (place / file).unlink()
                    else:
                        content = (place / file).read_bytes()
                        (place / file).write_bytes(content[: len(content) // 2])
                    again, what = run(name, place), f"{file.name} {how}"
                    trouble, same = (again.trouble, False) if again.trouble else difference(again, expected)
                    said = [one.digest for one in again.ended]
                    named = all(newest.name in one and before.name in one for one in said)
                    tries.places["named, with the one before" if named else "not needed"] += 1
                    if trouble is None and not named and not (same and not any(said) and how == "lost"):
                        trouble = f"said {said}"
                    tries.exact += same
                    tries.add(what, trouble or (named and why_torn(place / newest.relative_to(whole))) or None)
    return tries


def _is_read(file: Path) -> bool:
    return file.name not in ("training_args.bin", "README.md", "support_telemetry.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="kills at random moments, over all runs together")
    parser.add_argument("--operations", action="store_true", help="kill one rank at its file operations")
    parser.add_argument("--disks", action="store_true", help="the disk of one rank is full from an operation on")
    parser.add_argument("--torn", action="store_true", help="cut or remove files of the newest checkpoint")
    parser.add_argument("--stride", type=int, default=1, help="of --operations and --disks: every how many")
    parser.add_argument("--runs", default="", help="only runs whose name begins with this")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = [name for name in RUNS if name.startswith(asked.runs)]
    draws, failed = random.Random(asked.seed), 0
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all these objects
    for number, name in enumerate(runs):
        expected = undisturbed(name, asked.operations or asked.disks)
        share = asked.kills // len(runs) + (number < asked.kills % len(runs))
        ways = {
            "kills": share and (lambda name=name, n=share, e=expected: at_random(name, n, draws, e)),
            "operations": asked.operations and (lambda name=name, e=expected: at_operations(name, asked.stride, e)),
            "disks": asked.disks
            and (lambda name=name, e=expected: at_operations(name, asked.stride, e, full_disk=True)),
            "torn": asked.torn and (lambda name=name, e=expected: torn(name, e)),
        }
        for way, tried in ways.items():
            if not tried:
                continue
            began = time.monotonic()
            tries = tried()
            more = ", ".join(f"{count} {what}" for what, count in tries.places.items())
            print(
                f"{way:10} {name:28} {tries.survived}/{tries.tried}, {tries.exact} to the bit; {more}; the slowest end "
                f"{tries.slowest:.2f} s after a kill; {time.monotonic() - began:.0f} s", flush=True,
            )  # fmt: skip
            for failure in tries.failures:
                print(f"    {failure}", flush=True)
            failed += tries.tried - tries.survived
    return int(failed > 0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without the end of an interpreter, of which triton's bindings complain at length
