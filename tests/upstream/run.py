"""peft's own test suite, from its source distribution, on the tuners of this package.

    pip download --no-deps --no-binary :all: peft==0.21.2
    python tests/upstream/run.py --sdist peft-0.21.2.tar.gz
    python tests/upstream/run.py --sdist peft-0.21.2.tar.gz --tuner kernel_lora --suite custom -- -k merge -x

The distribution is unpacked into a temporary folder, and pytest runs its test functions with configs of ours in the
place of peft's (`plugin.py`) on tiny models made here (`hub_models.py`); no network. One tuner after the other, one
process at a time. Prints a table of passed, failed and skipped tests, then each failure and the reasons of skips;
exit code 1 if a test failed that `known.py` does not explain, or if one passes that it says fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import pytest  # noqa: E402
from cases import SUITES, TUNERS  # noqa: E402
from known import why  # noqa: E402


def main() -> int:
    """Run what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sdist", type=Path, required=True, help="peft-X.Y.Z.tar.gz, of the installed version")
    parser.add_argument("--tuner", nargs="+", choices=sorted(TUNERS), default=sorted(TUNERS))
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), default=sorted(SUITES))
    parser.add_argument("--json", type=Path, help="write every outcome there")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peft-tests-") as folder:
        root = unpack(options.sdist, Path(folder))
        outcomes = {tuner: run(root, tuner, options.suite, options.pytest) for tuner in options.tuner}
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1))
    return report(outcomes)


def unpack(sdist: Path, folder: Path) -> Path:
    """The tests of the distribution as the package `peft_tests`, in a folder that is returned.

    Raises:
        SystemExit: it is not the distribution of the installed peft.
    """
    due = f"peft-{metadata.version('peft')}"
    with tarfile.open(sdist) as archive:
        members = [one for one in archive.getmembers() if one.name.startswith(f"{due}/tests/") and one.isfile()]
        if not members:
            raise SystemExit(f"'{sdist}' has no {due}/tests, and that version is installed. Download peft=={due[5:]}.")
        archive.extractall(folder, members=members, filter="data")
    (folder / due / "tests").rename(folder / "peft_tests")
    (folder / "peft_tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    single_gpu_tests\n    multi_gpu_tests\n    bitsandbytes\n"
    )
    return folder


def run(root: Path, tuner: str, suites: list[str], extra: list[str]) -> dict[str, dict[str, str]]:
    """Outcome of each test of one tuner, by its name; pytest runs in a fork of this process, which has imported what
    takes most of its time. Its last line goes to the terminal."""
    result, log = root / f"{tuner}.json", root / f"{tuner}.txt"
    environment = {
        "UPSTREAM_TUNER": tuner, "UPSTREAM_RESULT": str(result), "UPSTREAM_MODELS": str(root / "models"),
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # without it peft skips the file `test_torch_compile`
    }  # fmt: skip
    files = [f"peft_tests/{SUITES[suite].file}.py" for suite in suites]
    options = ["-q", "-p", "plugin", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore"]
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.update(environment)
            os.chdir(root)
            sys.path.insert(0, str(root))
            code = pytest.main([*options, "--continue-on-collection-errors", *files, *extra])
        finally:
            os._exit(int(code))
    os.waitpid(child, 0)
    if not result.is_file():
        raise SystemExit(f"pytest did not finish:\n{log.read_text()[-5000:]}")
    if extra:
        print(log.read_text())
    print(f"{tuner}: {log.read_text().strip().splitlines()[-1]}; {time.perf_counter() - begin:.0f} s", flush=True)
    return json.loads(result.read_text())


def report(outcomes: dict[str, dict[str, dict[str, str]]]) -> int:
    """Print the table, failures and skips; 1 where something is not explained."""
    print(f"\n{'tuner':<15}{'passed':>8}{'failed':>8}{'skipped':>9}{'left out':>10}")
    for tuner, found in outcomes.items():
        counts = Counter(one["outcome"] for one in found.values())
        print(f"{tuner:<15}{counts['passed']:>8}{counts['failed']:>8}{counts['skipped']:>9}{counts['left out']:>10}")
    unexplained = 0
    for tuner, found in outcomes.items():
        reasons = Counter()
        for name, one in found.items():
            known, function = why(tuner, name), name.rpartition("::")[2].partition("[")[0]
            if one["outcome"] == "failed":
                unexplained += known is None
                reasons[f"failed: {function}: {known}" if known else f"FAILED: {name}: {one['reason']}"] += 1
            elif one["outcome"] == "passed" and known is not None:
                unexplained += 1
                reasons[f"PASSES, and known.py says otherwise: {name}"] += 1
            elif one["outcome"] == "skipped":
                reasons[f"skipped: {one['reason']}"] += 1
        print(f"\n{tuner}")
        for reason, count in sorted(reasons.items()):
            print(f"  {count:>4} {reason}")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
