"""`RecordLog`: a run's records as lines of JSON, on a disk that may be full and in a file that may be damaged."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.file_writing import whole_file
from ..utils.json_text import read_json_text


class RecordLog:
    """Reads and writes one file of records; a diagnostic, so nothing here stops a run. Each trouble is warned about
    once."""

    def __init__(self, path: Path, is_record: Callable[[Any], bool]) -> None:
        self.path, self._is_record = path, is_record
        self._warned: set[str] = set()
        self._behind = True

    def read(self, last_step: int) -> list[dict]:
        """The records up to `last_step`, in the order of their steps. Lines that are cut, damaged or of another run
        are left out."""
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            self.warn(f"could not be read ({error}); records begin anew")
            return []
        records, damaged, lines = [], 0, content.split(b"\n")
        # A run that was killed may have left half a line at the end, which has no newline yet.
        for line in lines[:-1]:
            record = _parsed(line)
            if not self._is_record(record) or (records and record["step"] <= records[-1]["step"]):
                damaged += 1
            elif record["step"] <= last_step:
                records.append(record)
        if damaged:
            self.warn(f"has {damaged} lines that are damaged or of another run; {len(records)} records are kept")
        return records

    def begin(self, records: list[dict]) -> None:
        """Make the file hold these records."""
        self._behind = True
        self.add(records)

    def add(self, records: list[dict]) -> None:
        """Append the last of `records`, all of the run's; the whole file is written where an earlier one is missing."""
        try:
            if self._behind:
                with whole_file(self.path) as file:
                    file.write_text("".join(map(_line, records)), encoding="utf-8")
                self._behind = False
                return
            self._behind = True  # a disk that fills up takes half a line
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(records[-1]))
            self._behind = False
        except OSError as error:
            self.warn(f"could not be written ({error}); training goes on, and so do the attempts")

    def warn(self, trouble: str) -> None:
        """Say what is wrong with the file, once for each kind of trouble."""
        kind = trouble.partition("(")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"'{self.path}' {trouble}.", stacklevel=3)


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _parsed(line: bytes) -> Any:
    try:
        return read_json_text(line)
    except ValueError:
        return None
