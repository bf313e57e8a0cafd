"""Python processes of their own for tests, without the seconds that importing torch, transformers and peft takes each.

One server has imported them, and nothing of this project; it forks for each process that a test asks for. What such a
process runs, and how it ends, is a new interpreter's, except for these modules. A test of how a new interpreter starts
(noise, environment variables read by these modules, the seed of `hash`) uses `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

IMPORTED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors.torch")
NAMES = {"transformers": ("Trainer", "LlamaForCausalLM", "AutoTokenizer", "BitsAndBytesConfig"), "peft": ("PeftModel",)}
"""What transformers and peft import when it is first asked for."""


class Server:
    """The process that forks; started at first use."""

    def __init__(self) -> None:
        # Another seed of `hash` than this process has, so that an order that depends on it differs.
        environment = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        atexit.register(self.stop)

    def ask(self, **request) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"tests/processes.py ended with {self.process.wait()}; its error is above.")
        return int(answer)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


_server: Server | None = None


class Started:
    """A process under way."""

    def __init__(self, *arguments, cwd=None, env: dict[str, str] | None = None) -> None:
        global _server
        _server = _server or Server()
        self.arguments = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")]
        self._pid = _server.ask(
            arguments=self.arguments, cwd=str(cwd or Path.cwd()), env={**os.environ, **(env or {})}, files=self._files
        )

    def wait(self, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Waits until it ends, `timeout` seconds at most; then it is killed."""
        status = _server.ask(pid=self._pid, timeout=timeout)
        out, err = (Path(file).read_text() for file in self._files)
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, status, out, err)


def python(*arguments, check: bool = False, cwd=None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`python *arguments` (a file, `-c code` or `-m module`, then its arguments), waited for; `env` is added to the
    environment; `check` fails the test, with what was printed, unless it ends with 0."""
    done = Started(*arguments, cwd=cwd, env=env).wait()
    assert not check or done.returncode == 0, f"{done.args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def ranks(count: int, *arguments, timeout: float = 1200.0, env: dict[str, str] | None = None) -> None:
    """`count` processes of one group, as torchrun starts them, waited for; each must end with 0."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        Started(*arguments, env={**(env or {}), **group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    for done in [process.wait(timeout) for process in running]:
        assert done.returncode == 0, f"{done.args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"


def in_a_group_of_one(test):
    """A test whose body is one rank of a gloo group, in a process of its own that ends without destroying the group.

    Where such groups came and went in the suite's own processes, two runs of the whole suite hung in one of these
    tests, which by themselves do not in thousands of rounds. Arguments are those whose `repr` makes them again."""

    @functools.wraps(test)
    def call(**arguments):
        code = f"import {__name__}, {test.__module__} as tests; from pathlib import *; {__name__}._call_as_rank"
        code += f"(tests.{test.__name__}, {arguments!r})"
        python("-c", code, check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)})

    return call


def _call_as_rank(test, arguments: dict) -> None:
    import torch

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    test.__wrapped__(**arguments)
    os._exit(0)


# The server


def _serve() -> dict:
    """Answers requests in the parent; returns the request in a child that has forked to carry it out."""
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            answer = _end_of(request["pid"], request["timeout"])
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(answer, flush=True)
    os._exit(0)


def _end_of(pid: int, timeout: float) -> int:
    until = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _run(arguments: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    for number, path in enumerate((os.devnull, *files)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    del sys.path[0]  # this file's folder
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    first, *rest = arguments
    if first in ("-c", "-m"):
        what, rest = rest[0], rest[1:]
        sys.path[:0] = [cwd, *paths]
        sys.argv = [first, *rest]
        if first == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
            return
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
        return
    sys.path[:0] = [str(Path(first).parent), *paths]
    sys.argv = [first, *rest]
    runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for module in IMPORTED:
        __import__(module)
    for module, names in NAMES.items():
        for name in names:
            getattr(sys.modules[module], name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection, at the latest at its end, would make each fork copy all these objects
    _run(**_serve())
