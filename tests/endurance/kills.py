"""Processes that die and disks that fail, in counts: every work of `work.py` ends with the bits of an undisturbed one.

    python tests/endurance/kills.py --operations           # kill -9 at every file operation of every work
    python tests/endurance/kills.py --kills 100             # kill -9 at random moments, all works in turn
    python tests/endurance/kills.py --disks                 # full, failing and read-only disks
    python tests/endurance/kills.py --operations --works "export" --stride 3

After each, the same script runs again in a new process, on what lies there, with `resume_from_checkpoint=True` alone
where it trains. Survived is what then has every bit of the undisturbed run. Linux; `--disks` mounts small tmpfs where
it may, and limits the size of files (RLIMIT_FSIZE) anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", OMP_NUM_THREADS="1")
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from endurance import file_faults, pages_and_logs
from endurance.file_faults import FileFaults
from endurance.forks import Ended, in_a_process
from endurance.work import WORKS as FIRST_WORKS
from endurance.work import Work

WORKS: dict[str, Work] = {**FIRST_WORKS, **pages_and_logs.WORKS}


@dataclass
class Tally:
    """What became of the tries of one work."""

    tried: int = 0
    survived: int = 0
    places: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, what: str, trouble: str | None) -> None:
        """One try; `trouble` None: survived."""
        self.tried += 1
        self.survived += trouble is None
        if trouble is not None:
            self.failures.append(f"{what}: {trouble}")


@contextlib.contextmanager
def _folder(work: Work) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="endurance-"))
    try:
        prepared = in_a_process(lambda: str(work.prepare(place)))
        assert not prepared.error, prepared.error
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def undisturbed(work: Work) -> Ended:
    """Digest, seconds and number of file operations of a run that nothing happens to.

    Raises:
        AssertionError: it fails by itself, or watching its files changes its bits.
    """
    with _folder(work) as place:
        plain = in_a_process(lambda: work.run(place))
    with _folder(work) as place:
        watched = in_a_process(lambda: work.run(place), lambda: FileFaults(place, -1, file_faults.kill))
    assert not plain.error + watched.error, plain.error + watched.error
    assert plain.digest == watched.digest, "two undisturbed runs differ"
    return Ended(digest=plain.digest, operations=watched.operations, seconds=plain.seconds)


def trouble_after(work: Work, place: Path, expected: str) -> str | None:
    """Look at what a broken run left, run again, and compare; None where every bit is right."""
    try:
        work.look(place)
    except Exception as error:
        return f"left something torn: {error!r}"
    again = in_a_process(lambda: work.run(place))
    if again.error or again.signal:
        return f"did not go on: {again.error.strip().splitlines()[-1] if again.error else again.signal}"
    return None if again.digest == expected else "other bits"


def _kill_at(place: Path, at: int) -> Callable[[], FileFaults]:
    return lambda: FileFaults(place, at, file_faults.kill)


def at_operations(work: Work, stride: int = 1, whole: Ended | None = None) -> Tally:
    """`kill -9` at every `stride`-th file operation."""
    tally, whole = Tally(), whole or undisturbed(work)
    for at in range(0, whole.operations, stride):
        with _folder(work) as place:
            ended = in_a_process(lambda: work.run(place), _kill_at(place, at))
            if ended.signal != signal.SIGKILL:
                tally.add(f"operation {at}", f"was not reached: {ended.error[-300:]}")
                continue
            tally.add(f"operation {at}", trouble_after(work, place, whole.digest))
    return tally


def at_random(work: Work, kills: int, draws: random.Random, whole: Ended | None = None) -> Tally:
    """`kill -9` at moments drawn evenly over the run; every third try is killed a second time while it goes on."""
    tally, whole = Tally(), whole or undisturbed(work)
    for number in range(kills):
        with _folder(work) as place:
            moments = [draws.uniform(0, whole.seconds) for _ in range(2 if number % 3 == 2 else 1)]
            for moment in moments:
                ended = in_a_process(lambda: work.run(place), kill_after=moment)
                if ended.error:
                    break
            what = f"after {', '.join(f'{m:.2f}' for m in moments)} of {whole.seconds:.2f} s"
            tally.places["killed" if ended.signal else "had ended"] += 1
            tally.add(what, ended.error or trouble_after(work, place, whole.digest))
    return tally


# Disks

FAULTS = {
    "full disk": (file_faults.full_disk, True),
    "a write fails": (file_faults.broken_disk, False),
    "read-only folder": (file_faults.read_only, True),
}


def on_bad_disks(work: Work, stride: int = 1, whole: Ended | None = None) -> Tally:
    """Errors of the disk at every `stride`-th operation, once and from there on; it says so, or does without the file,
    and with a good disk the same script ends with the same bits."""
    tally, whole = Tally(), whole or undisturbed(work)
    for name, (act, onwards) in FAULTS.items():
        for at in range(0, 1 if name == "read-only folder" else whole.operations, stride):
            with _folder(work) as place:
                spoil = lambda at=at, act=act, on=onwards, place=place: FileFaults(place, at, act, on)  # noqa: E731
                ended = in_a_process(lambda place=place: work.run(place), spoil)
                _judge(tally, f"{name} from operation {at}", work, place, ended, whole.digest)
    for share in (0.02, 0.2, 0.5, 0.8, 0.97):
        _on_small_disk(tally, work, whole.digest, share)
    _under_file_limit(tally, work, whole.digest)
    return tally


def _judge(tally: Tally, what: str, work: Work, place: Path, ended: Ended, expected: str) -> None:
    if ended.signal:
        tally.add(what, f"died of signal {ended.signal}")
        return
    tally.places["raised" if ended.error else "did without"] += 1
    without_cards = [one.partition("|")[0] for one in (ended.digest, expected)]
    if not ended.error and without_cards[0] != without_cards[1]:
        tally.add(what, "ended with other bits and no error")
        return
    tally.add(what, trouble_after(work, place, expected))


def _on_small_disk(tally: Tally, work: Work, expected: str, share: float) -> None:
    """A tmpfs with room for a share of what the work writes, then with room enough."""
    with _folder(work) as place:
        in_a_process(lambda: work.run(place))
        needed = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    place = Path(tempfile.mkdtemp(prefix="endurance-"))
    size = max(int(needed * share) // 4096 * 4096, 8192)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        tally.places["tmpfs not allowed"] += 1
        place.rmdir()
        return
    try:
        in_a_process(lambda: str(work.prepare(place)))
        size += sum(file.stat().st_size + 4096 for file in place.rglob("*") if file.is_file())
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
        ended = in_a_process(lambda: work.run(place))
        subprocess.run(["mount", "-o", "remount,size=256m", str(place)], check=True)
        _judge(tally, f"tmpfs of {size} bytes", work, place, ended, expected)
    finally:
        subprocess.run(["umount", str(place)], check=False)
        place.rmdir()


def _under_file_limit(tally: Tally, work: Work, expected: str) -> None:
    for limit in (100, 3000, 20000):
        with _folder(work) as place:

            def spoil(limit=limit) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            def run(place=place) -> str:
                try:
                    return work.run(place)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

            ended = in_a_process(run, spoil)
            _judge(tally, f"files of {limit} bytes at most", work, place, ended, expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="kills at random moments, over all works together")
    parser.add_argument("--operations", action="store_true", help="kill at every file operation")
    parser.add_argument("--disks", action="store_true", help="full, failing and read-only disks")
    parser.add_argument("--stride", type=int, default=1, help="of --operations and --disks: every how many operations")
    parser.add_argument("--works", default="", help="only works whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    works = {name: work for name, work in WORKS.items() if asked.works in name}
    draws, began, failed = random.Random(asked.seed), time.monotonic(), 0
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all these objects
    for way in ("operations", "kills", "disks"):
        if not getattr(asked, way):
            continue
        totals = Tally()
        for number, (name, work) in enumerate(works.items()):
            start = time.monotonic()
            if way == "operations":
                tally = at_operations(work, asked.stride)
            elif way == "disks":
                tally = on_bad_disks(work, asked.stride)
            else:
                share = asked.kills // len(works) + (number < asked.kills % len(works))
                tally = at_random(work, share, draws) if share else Tally()
            totals.tried, totals.survived = totals.tried + tally.tried, totals.survived + tally.survived
            more = ", ".join(f"{count} {what}" for what, count in tally.places.items())
            seconds = f"{time.monotonic() - start:.0f} s"
            print(f"{way:10} {name:34} {tally.survived}/{tally.tried}  {seconds:>6}  {more}", flush=True)
            for failure in tally.failures:
                print(f"    {failure}", flush=True)
        failed += totals.tried - totals.survived
        print(f"{way}: survived {totals.survived} of {totals.tried}, {time.monotonic() - began:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without the end of an interpreter, of which triton's bindings complain at length
