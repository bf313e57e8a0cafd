"""Damage that goes on from inputs that reached new lines: the damages of `mutations.py`, guided by atheris.

    pip install atheris
    python tests/fuzz/coverage_guided.py --seconds 300 --json /tmp/guided.json

atheris counts the branches of `hf_sparse_peft` that an input takes; one that takes a new one is kept, and damaged
further. So an input may be the tenth damage of one file, or past checksums that were made to fit. Each is held to what
`damaged_files.py` asks for. Inputs that fail are written to `--faults`; exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import atheris

HERE = Path(__file__).parent
for place in (HERE, HERE.parent, HERE.parents[1]):
    sys.path.insert(0, str(place))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

with atheris.instrument_imports(include=["hf_sparse_peft"], enable_loader_override=False):
    import kinds as kinds_module
from damaged_files import Fuzz, Tally, Watch, late_raises  # noqa: E402
from mutations import Damage, damage  # noqa: E402

LONGEST = 2**18
"""Bytes of an input: what is longer is given up."""


class Guided:
    """All kinds' valid files, as inputs of one fuzzer: kind, whether checksums were forged, and the files."""

    def __init__(self, root: Path, result: Path, faults: Path, names: list[str] | None) -> None:
        self.result, self.faults, self.written, self.inputs = result, faults, time.time(), 0
        chosen = [kind for kind in kinds_module.kinds() if names is None or kind.name in names]
        watch = Watch()
        self.fuzzes = [Fuzz(kind, root / str(at), watch, every=10**9) for at, kind in enumerate(chosen)]
        self.scratch = root / "scratch"
        self.scratch.mkdir()

    def packed(self, at: int, forged: bool, folder: Path) -> bytes:
        """An input: the files that lie in the folder."""
        parts = [(folder / name).read_bytes() for name in self.fuzzes[at].files]
        return bytes((at, forged)) + b"".join(struct.pack("<I", len(part)) + part for part in parts)

    def unpack(self, data: bytes, folder: Path) -> tuple[int, bool] | None:
        """Write an input's files into the folder; its kind and whether it was forged, None if it is no input."""
        if len(data) < 2 or data[0] >= len(self.fuzzes):
            return None
        place, left = self.fuzzes[data[0]], data[2:]
        for name in place.files:
            length = int.from_bytes(left[:4], "little")
            if len(left) < 4 + length:
                return None
            (folder / name).write_bytes(left[4 : 4 + length])
            left = left[4 + length :]
        return data[0], bool(data[1])

    def mutate(self, data: bytes, longest: int, seed: int) -> bytes:
        """One more damage: of `mutations.py`, or one of the fuzzer's own to a file's bytes."""
        found = self.unpack(data, self.scratch)
        if found is None:
            return data
        (at, forged), draw = found, random.Random(seed)
        files = self.fuzzes[at].files
        if draw.random() < 0.3:
            file = self.scratch / draw.choice(files)
            content = file.read_bytes()
            file.write_bytes(atheris.Mutate(content, len(content) + 64) if content else b"\0")
        else:
            forged |= damage(self.scratch, seed, files, kinds_module.BASE_NAMES).forged
        new = self.packed(at, forged, self.scratch)
        return new if len(new) <= longest else data

    def test(self, data: bytes) -> None:
        """Read one input as all readers of its kind do."""
        found = self.unpack(data, self.scratch)
        if found is None:
            return
        fuzz, self.inputs = self.fuzzes[found[0]], self.inputs + 1
        for name in fuzz.files:
            (self.scratch / name).replace(fuzz.folder / name)
        before = len(fuzz.tally.faults)
        fuzz.check(self.inputs, Damage(["guided"], forged=found[1]))
        if len(fuzz.tally.faults) > before:
            (self.faults / f"{fuzz.kind.name} {self.inputs}".replace(" ", "_")).write_bytes(data)
            print(f"FAULT {fuzz.tally.faults[-1]}", file=sys.stderr, flush=True)
        if time.time() > self.written + 2 or len(fuzz.tally.faults) > before:  # libFuzzer ends without a word
            self.written = time.time()
            self.result.write_text(json.dumps({one.kind.name: vars(one.tally) for one in self.fuzzes}))


def guide(options: argparse.Namespace, root: Path, result: Path) -> None:
    """Run the fuzzer; it ends the process."""
    warnings.simplefilter("ignore")
    guided = Guided(root, result, options.faults, options.kinds)
    corpus = root / "corpus"
    corpus.mkdir()
    for at, fuzz in enumerate(guided.fuzzes):
        (corpus / str(at)).write_bytes(guided.packed(at, False, fuzz.valid))
    flags = {"max_total_time": options.seconds, "max_len": LONGEST, "len_control": 0, "rss_limit_mb": 0, "timeout": 0,
             "seed": options.seed, "print_final_stats": 1, "artifact_prefix": f"{options.faults}/"}  # fmt: skip
    command = [sys.argv[0], *(f"-{name}={value}" for name, value in flags.items()), str(corpus)]
    with late_raises():
        atheris.Setup(command, guided.test, custom_mutator=guided.mutate)
        atheris.Fuzz()


def main() -> int:
    """Run what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", help="names of kinds; default: all")
    parser.add_argument("--faults", type=Path, default=Path("fuzz-faults"), help="where inputs that fail are written")
    parser.add_argument("--json", type=Path, help="write the counts and findings there")
    options = parser.parse_args()
    options.faults.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
        result, log = Path(root, "result.json"), Path(root, "log")
        child = os.fork()
        if child == 0:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 2)
            try:
                guide(options, Path(root), result)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = log.read_text(errors="replace").splitlines()
        if code != 0 or not any(" cov: " in line for line in lines):
            print("\n".join(lines[-30:]))
            return 1
        counts = {name: Tally(**one) for name, one in json.loads(result.read_text()).items()}
    return report(counts, lines, options.json)


def report(counts: dict[str, Tally], lines: list[str], file: Path | None) -> int:
    """Print the counts, what was covered at the start and the end, and the findings; 1 if there are any."""
    covered = [line for line in lines if " cov: " in line]
    faults = [fault for tally in counts.values() for fault in tally.faults]
    totals = {
        name: sum(getattr(one, name) for one in counts.values()) for name in ("inputs", "refused", "read", "forged")
    }
    print(", ".join(f"{value} {name}" for name, value in totals.items()), f"; {len(faults)} faults")
    print(
        "first:", next((line for line in covered if "INITED" in line), "?"), "\nlast: ", covered[-1] if covered else "?"
    )
    print("\n".join(faults[:20]))
    if file:
        file.write_text(json.dumps({"counts": {name: vars(one) for name, one in counts.items()}, "last": covered[-1:]}))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
