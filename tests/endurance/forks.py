"""Processes that run an action, may be killed at it, and tell how they ended: forks of one that has all imports."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from endurance.file_faults import FileFaults

LIMIT = 120.0
"""Seconds after which a process counts as hung."""


@dataclass
class Ended:
    """A process of its own that ran a work."""

    signal: int = 0
    digest: str = ""
    error: str = ""
    operations: int = 0
    seconds: float = 0.0


class Fork:
    """A process that is under way.

    Args:
        action: what it does; its result is the digest.
        before: called first, which may spoil files there.
        environment: of it, beside this process's.
    """

    def __init__(
        self, action: Callable[[], str], before: Callable[[], FileFaults | None] = lambda: None,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._told = Path(tempfile.mkstemp(prefix="told-")[1])
        self.began, self._status, self._ended = time.monotonic(), None, 0.0
        self.pid = os.fork()
        if not self.pid:
            self._child(action, before, environment or {})

    def _child(self, action, before, environment) -> None:
        try:
            with self._told.open("w") as out:  # opened before files are watched
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1), os.dup2(null, 2)
                os.environ.update(environment)
                faults, found = None, {}
                try:
                    faults = before()
                    found["digest"] = action()
                except BaseException:
                    found["error"] = traceback.format_exc()[-4000:]
                found["operations"] = 0 if faults is None else faults.count
                out.write(json.dumps(found))
                out.flush()
        finally:
            os._exit(0)

    def is_over(self) -> bool:
        """Whether it has ended."""
        if self._status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._status, self._ended = status, time.monotonic()
        return self._status is not None

    def wait(self, seconds: float) -> bool:
        """Wait until it ends, `seconds` from its beginning at most; whether it has."""
        while not self.is_over() and time.monotonic() < self.began + seconds:
            time.sleep(0.002)
        return self._status is not None

    def kill(self) -> None:
        """`kill -9`; nothing where it has ended."""
        if not self.is_over():
            os.kill(self.pid, signal.SIGKILL)
            self._status, self._ended = os.waitpid(self.pid, 0)[1], time.monotonic()

    def end(self) -> Ended:
        """What it told; it must be over."""
        found = json.loads(self._told.read_text() or "{}")
        self._told.unlink()
        seconds = self._ended - self.began
        return Ended(signal=max(0, -os.waitstatus_to_exitcode(self._status)), seconds=seconds, **found)


def in_a_process(
    action: Callable[[], str], before: Callable[[], FileFaults | None] = lambda: None, kill_after: float | None = None
) -> Ended:
    """Run `action` in a process of its own to its end, or until it is killed `kill_after` seconds later."""
    fork = Fork(action, before)
    hung = not fork.wait(LIMIT if kill_after is None else kill_after) and kill_after is None
    fork.kill()
    ended = fork.end()
    if hung:
        ended.error = f"hung for {LIMIT} s"
    return ended
