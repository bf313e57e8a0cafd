"""A sample of kills, failing disks and a long run; the whole are commands, `kills.py` and `long_run.py` here."""

import random
import signal

import pytest
from endurance import file_faults, kills, long_run, rank_kills
from endurance.file_faults import FileFaults
from endurance.kills import WORKS
from endurance.work import SMALL, Work, whole_files

pytestmark = pytest.mark.slow  # by themselves: a run of the suite with them hung once


@pytest.mark.parametrize("name", SMALL)
def test_a_kill_at_a_file_operation_loses_no_bit(name):
    work = WORKS[name]
    whole = kills.undisturbed(work)
    tally = kills.at_operations(work, stride=whole.operations // 2, whole=whole)
    assert (tally.survived, tally.failures) == (tally.tried, [])
    assert tally.tried >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_every_work_survives_kills_and_bad_disks(name):
    work, found = WORKS[name], []
    whole = kills.undisturbed(work)
    found.append(kills.at_operations(work, stride=max(whole.operations // 6, 1), whole=whole))
    found.append(kills.at_random(work, 2, random.Random(0), whole))
    found.append(kills.on_bad_disks(work, stride=max(whole.operations // 2, 1), whole=whole))
    assert [failure for tally in found for failure in tally.failures] == []


def test_the_harness_sees_what_a_plain_writer_tears(tmp_path):
    def write(folder) -> str:
        (folder / "one.json").write_text('{"a": 1}')
        (folder / "two.json").write_text("{}")
        return "done"

    work = Work(write, lambda folder: (folder / "one.json").write_text("{}"), whole_files)
    whole = kills.undisturbed(work)
    assert whole.operations == 4  # two opened, two half written
    tally = kills.at_operations(work, whole=whole)
    assert (tally.tried, tally.survived) == (4, 2)
    assert all("torn" in failure for failure in tally.failures)


def test_a_work_that_ends_with_other_bits_is_counted(tmp_path):
    def forgets(folder) -> str:
        begun = (folder / "begun").exists()
        (folder / "begun").write_text("")
        (folder / "end").write_text("")
        return "other" if begun else "right"

    tally = kills.at_operations(Work(forgets))
    assert (tally.tried, tally.survived) == (4, 1)
    assert "other bits" in tally.failures[0]


def test_a_full_disk_raises_and_frees_and_a_kill_is_a_kill(tmp_path):
    def write() -> str:
        (tmp_path / "a").write_text("abcd")
        return "done"

    full = kills.in_a_process(write, lambda: FileFaults(tmp_path, 1, file_faults.full_disk, onwards=True))
    assert "No space left on device" in full.error
    assert (tmp_path / "a").read_text() == "ab"
    killed = kills.in_a_process(write, lambda: FileFaults(tmp_path, 1, file_faults.kill))
    assert (killed.signal, killed.error) == (signal.SIGKILL, "")


def test_a_run_of_sixty_steps_is_measured_in_parts_and_its_log_can_be_read(tmp_path):
    parts, moves = long_run.run(tmp_path, 60, 10, parts=3)
    assert moves >= 5
    assert [(part.first, part.last) for part in parts] == [(0, 20), (20, 40), (40, 60)]
    assert all(part.memory > 2**20 and part.step > 0 for part in parts)


@pytest.mark.parametrize("name", rank_kills.RUNS)
def test_ranks_that_die_go_on_to_the_same_supports_and_values(name):
    expected = rank_kills.undisturbed(name, operations=True)
    found = [
        rank_kills.at_random(name, 3, random.Random(1), expected),
        rank_kills.at_operations(name, max(one.operations for one in expected.ended) // 2, expected),
    ]
    assert [failure for tries in found for failure in tries.failures] == []
    assert sum(tries.tried for tries in found) >= 5


@pytest.mark.parametrize("name", rank_kills.RUNS)
def test_every_file_of_the_newest_checkpoint_of_several_ranks_is_missed_where_it_is_torn(name):
    tries = rank_kills.torn(name, rank_kills.undisturbed(name))
    assert tries.failures == []
    assert tries.places["named, with the one before"] >= 12
