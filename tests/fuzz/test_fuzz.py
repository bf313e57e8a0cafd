"""A few damaged files of each kind through every reader; `python tests/fuzz/damaged_files.py` is the long run."""

import subprocess
import sys
from pathlib import Path

import pytest
from damaged_files import Fuzz, Unwatched, late_raises
from kinds import MESSAGES, bitdelta, compeft, kept_units, kinds, reconstruction, support, walk

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow  # by themselves: a run of the suite with them hung once


@pytest.mark.parametrize("make", [support, kept_units, walk, reconstruction, compeft, bitdelta, *MESSAGES])
@pytest.mark.filterwarnings("ignore")
def test_damaged_file_is_whole_or_refused_by_name_and_changes_nothing(tmp_path, make):
    fuzz = Fuzz(make(), tmp_path, Unwatched(), every=20)
    with late_raises():
        for seed in range(60):
            fuzz.run(seed)
    assert fuzz.tally.faults == []
    assert fuzz.tally.refused > 30


@pytest.mark.slow
def test_every_kind_in_a_process_that_watches_what_is_run_opened_and_allocated(tmp_path):
    command = [sys.executable, str(HERE / "damaged_files.py"), "--inputs", "2000", "--first", "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert all(kind.name in done.stdout for kind in kinds())


@pytest.mark.slow
def test_no_reader_takes_more_than_four_times_the_file(tmp_path):
    command = [sys.executable, str(HERE / "damaged_files.py"), "--inputs", "190", "--hidden", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_damage_that_coverage_guides_finds_nothing(tmp_path):
    pytest.importorskip("atheris")
    command = [
        sys.executable,
        str(HERE / "coverage_guided.py"),
        "--seconds",
        "60",
        "--faults",
        str(tmp_path / "faults"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
