"""Damaged files of every kind through every reader of the package, in counts.

    python tests/fuzz/damaged_files.py --inputs 200000 --json /tmp/fuzz.json
    python tests/fuzz/damaged_files.py --kinds "patch vllm" --first 4711 --inputs 1   # a finding again

Of each input: the reading ends within 10 s of CPU time, by an answer or a `ValueError` that names the file, a tensor or
an option; the process survives, takes at most 256 MiB more than before, runs nothing, and opens nothing outside the
folder; models are as they were after a refusal; a file that is read means what it meant before it was damaged, unless
checksums were forged with it. Every `--deep`-th input, a tenth of that of those that are read, and all forged ones that
are read go through all other ways to read them too, which have to agree. Exit code 1 if an input fails.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
for place in (HERE, HERE.parent, HERE.parents[1]):
    sys.path.insert(0, str(place))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kinds as kinds_module  # noqa: E402
import torch  # noqa: E402
from kinds import BASE_NAMES, Kind, kinds, state  # noqa: E402
from mutations import HEADED, Damage, damage  # noqa: E402

SECONDS, MEMORY = 10, 256 * 2**20
NOISE = 8 * 2**20
"""What allocators and the interpreter take beside a file."""
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pickle.find_class",
        "ctypes.dlopen")  # fmt: skip
_PLACES = {os.path.realpath(one) for one in (sys.prefix, sys.base_prefix, HERE.parents[1])}
_ALLOWED = (*_PLACES, "/proc/", "/dev/null")


@dataclass
class Tally:
    """Counts of one kind."""

    inputs: int = 0
    refused: int = 0
    read: int = 0
    forged: int = 0
    """Of those read: with another content under checksums that fit it."""
    deep: int = 0
    faults: list[str] = field(default_factory=list)


class Watch:
    """Notes what a reading runs and opens."""

    def __init__(self) -> None:
        self.folder, self.seen = None, []
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in ("exec", "compile"):
            code = arguments[0] if event == "exec" else arguments[1]
            file = os.path.realpath(os.fsdecode(getattr(code, "co_filename", code) or "?"))
            if not file.startswith(_ALLOWED):  # modules of the standard library that are imported late
                self.seen.append(f"{event} {file[:100]}")
        elif event in RUNS:
            self.seen.append(f"{event} {str(arguments)[:100]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((self.folder, *_ALLOWED)):
                self.seen.append(f"open {path[:100]}")


class Unwatched:
    """In the place of `Watch`, whose hook slows down all that a process does after it."""

    folder, seen = None, ()


class Late(BaseException):
    """A reading took too long."""


def _alarm(*_: object) -> None:
    raise Late


@contextmanager
def late_raises() -> Iterator[None]:
    """Within the block, `at_most` stops what takes too long."""
    before = {one: signal.signal(one, _alarm) for one in (signal.SIGPROF, signal.SIGALRM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise `Late` after as many seconds of CPU time, or ten times as many on the clock: a machine may be busy."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(10 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


class Fuzz:
    """One kind's valid files, and the reading of damaged ones."""

    def __init__(self, kind: Kind, root: Path, watch: Watch | Unwatched, every: int, measures: bool = False) -> None:
        self.kind, self.root, self.watch, self.every, self.measures = kind, root, watch, every, measures
        self.valid = root / "valid"
        self.valid.mkdir(parents=True)
        kind.build(self.valid)
        self.files = sorted(str(file.relative_to(self.valid)) for file in self.valid.rglob("*") if file.is_file())
        self.content = {name: (self.valid / name).read_bytes() for name in self.files}
        self.meaning = kind.read(self.valid)  # imports what readers import
        kind.deep(self.valid, self.meaning)
        self.before = [state(model) for model in kind.models()]
        self.names = set(self.files) | set(kind.names) | {"damaged'"}
        for name, content in self.content.items():
            if name.endswith(HEADED):
                header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
                self.names |= {part for key in header for part in (key, key.rpartition(".")[0]) if len(part) > 3}
        self.folder = root / "damaged"
        self.folder.mkdir()
        self.tally = Tally()

    def run(self, seed: int) -> None:
        """Damage the files by `seed`, and read them."""
        for name, content in self.content.items():
            (self.folder / name).write_bytes(content)
        done = damage(self.folder, seed, self.files, BASE_NAMES)
        if any((self.folder / name).read_bytes() != content for name, content in self.content.items()):
            self.check(seed, done)

    def check(self, seed: int, done: Damage) -> None:
        """Read the files as they are, which were damaged so."""
        self.tally.inputs += 1
        fault = self._read(seed, done)
        if fault:
            self.tally.faults.append(f"{self.kind.name} {seed}: {', '.join(done.steps)}: {fault}")

    def _read(self, seed: int, done: Damage) -> str | None:
        meaning, error = None, None
        self.watch.folder, self.watch.seen = str(self.root), []
        held = _reset_peak() if self.measures else 0
        try:
            with at_most(SECONDS):
                meaning = self.kind.read(self.folder)
        except ValueError as caught:
            error = str(caught)
        except Late:
            return f"took longer than {SECONDS} s"
        except Exception as caught:
            return f"{type(caught).__name__}: {str(caught)[:200]}"
        finally:
            self.watch.folder = None
        size = sum((self.folder / name).stat().st_size for name in self.files)
        if self.measures and _peak() - held > 4 * size + NOISE:
            return f"took {(_peak() - held) / 2**20:.0f} MiB for {size / 2**20:.1f} MiB"
        if self.watch.seen:
            return f"did {self.watch.seen[:3]}"
        if [state(model) for model in self.kind.models()] != self.before:
            return f"left a model changed, and said {error}"
        if self.kind.never_refuses:
            self.tally.read += 1
            return None if error is None else f"a diagnostic stopped: {error[:200]}"
        if error is not None:
            self.tally.refused += 1
            if not self._names_something(error):
                return f"the refusal names nothing: {error[:300]}"
        else:
            self.tally.read += 1
            if meaning != self.meaning:
                if not done.forged:
                    return "was read with another content"
                self.tally.forged += 1
        often = self.every if meaning is None else 1 if done.forged else max(self.every // 10, 1)
        if seed % often == 0:
            return self._deep(meaning)
        return None

    def _deep(self, meaning: str | None) -> str | None:
        self.tally.deep += 1
        try:
            with at_most(6 * SECONDS):
                self.kind.deep(self.folder, meaning)
        except Late:
            return f"another way took longer than {6 * SECONDS} s"
        except Exception as caught:
            return f"another way: {type(caught).__name__}: {str(caught)[:300]}"
        return None

    def _names_something(self, error: str) -> bool:
        return any(name in error for name in self.names)


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Most memory that the process has held since the last reset, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def work(
    chosen: list[Kind], first: int, inputs: int, every: int, note: Path, measures: bool = False
) -> dict[str, Tally]:
    """Read `inputs` damaged inputs, the kinds in turn; `note` holds the number of the one under way."""
    warnings.simplefilter("ignore")
    watch, found = Watch(), {}
    with late_raises(), tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
        fuzzes = [Fuzz(kind, Path(root, str(at)), watch, every, measures) for at, kind in enumerate(chosen)]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for seed in range(first, first + inputs):
            note.write_text(str(seed))
            fuzzes[seed % len(fuzzes)].run(seed)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        found = {fuzz.kind.name: fuzz.tally for fuzz in fuzzes}
    return found


def main() -> int:
    """Run what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--kinds", nargs="+", help="names of kinds; default: all")
    parser.add_argument("--deep", type=int, default=200, help="every how many inputs go through all ways")
    parser.add_argument("--batch", type=int, default=20_000, help="inputs of one process")
    parser.add_argument(
        "--hidden", type=int, default=16, help="width of the base; above 16, readers are held to 4 times the file"
    )
    parser.add_argument("--json", type=Path, help="write the counts and findings there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds_module.HIDDEN = options.hidden
    chosen = [kind for kind in kinds() if options.kinds is None or kind.name in options.kinds]
    total: dict[str, Tally] = {kind.name: Tally() for kind in chosen}
    begin, crashes = time.time(), []
    scratch = Path(tempfile.mkdtemp())
    first, last = options.first, options.first + options.inputs
    while first < last:
        count = min(options.batch, last - first)
        crashed = _in_a_process(chosen, first, count, options.deep, scratch, total, options.hidden > 16)
        if crashed is not None:
            crashes.append(f"the interpreter died at input {crashed}")
            count = crashed + 1 - first
        first += count
        print(f"{first - options.first} inputs, {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
    shutil.rmtree(scratch)
    return report(total, crashes, time.time() - begin, options.json)


def _in_a_process(
    chosen: list[Kind], first: int, count: int, every: int, scratch: Path, total: dict[str, Tally], measures: bool
) -> int | None:
    """Counts of a forked process are added to `total`; the input at which it died, if it did."""
    note, result = scratch / "note", scratch / "result"
    result.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            found = work(chosen, first, count, every, note, measures)
            result.write_text(json.dumps({name: vars(tally) for name, tally in found.items()}))
            code = 0
        except BaseException as error:
            import traceback

            traceback.print_exception(error)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code > 0:
        raise SystemExit("The run itself failed, not a reader; see above.")
    if not result.is_file():
        return int(note.read_text()) if note.is_file() else first + count - 1
    for name, counts in json.loads(result.read_text()).items():
        for key, value in counts.items():
            setattr(total[name], key, getattr(total[name], key) + value)
    return None


def report(total: dict[str, Tally], crashes: list[str], seconds: float, file: Path | None) -> int:
    """Print the table and the findings; 1 if there are any."""
    columns = ("inputs", "refused", "read", "forged", "deep")
    print(f"{'kind':<30}" + "".join(f"{name:>9}" for name in columns) + f"{'faults':>8}")
    rows = {**total, "all": Tally(*(sum(getattr(one, name) for one in total.values()) for name in columns))}
    faults = crashes + [fault for tally in total.values() for fault in tally.faults]
    for name, tally in rows.items():
        shown = len(faults) if name == "all" else len(tally.faults)
        print(f"{name:<30}" + "".join(f"{getattr(tally, one):>9}" for one in columns) + f"{shown:>8}")
    print(f"{seconds:.0f} s; forged: read with other content under checksums that were made to fit")
    kept = Counter()
    for fault in faults:
        group = fault.rpartition(": ")[2][:60]
        kept[group] += 1
        if kept[group] <= 3:
            print(fault)
    if file:
        file.write_text(json.dumps({"counts": {n: vars(t) for n, t in total.items()}, "crashes": crashes}, indent=1))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
