"""Jobs in processes of their own: forked from the test's, which has imported everything, or launched as a user would."""

from __future__ import annotations

import inspect
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from tiny_runs import environment, import_before_forks

LONGEST = 1200
"""Seconds after which a job is ended."""


def apart(job: Callable[..., Any], *arguments: Any) -> str:
    """What `job` prints in a process that may be killed or left with other names; fails as the job does.

    Where there is a GPU, whose threads no fork survives, in a fresh interpreter; arguments are then handed over as text.
    """
    (told,) = _told([{}], job, *arguments)
    return told


def two_processes(job: Callable[..., Any], *arguments: Any) -> list[str]:
    """What each of two ranks prints that know of each other as torchrun tells its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return _told([{"RANK": rank, "LOCAL_RANK": rank, **both} for rank in "01"], job, *arguments)


def _told(environments: list[Mapping[str, str]], job: Callable[..., Any], *arguments: Any) -> list[str]:
    start = _fresh if torch.cuda.is_available() else _forked
    import_before_forks()
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder, f"{rank}.{kind}") for kind in ("out", "err")] for rank in range(len(environments))]
        waits = [
            start(out.open("w"), err.open("w"), env, job, arguments)
            for (out, err), env in zip(files, environments, strict=True)
        ]
        left = [wait() for wait in waits]
        told = [[file.read_text() for file in pair] for pair in files]
    for status, (out, err) in zip(left, told, strict=True):
        assert status == 0, f"{job.__name__} left with {status}\n{out[-2000:]}\n{err[-4000:]}"
    return [out for out, _ in told]


def _forked(
    out: IO[str], err: IO[str], env: Mapping[str, str], job: Callable[..., Any], arguments: tuple[Any, ...]
) -> Callable[[], int]:
    pid = os.fork()
    if pid:
        return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        signal.alarm(LONGEST)
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        # Line by line, so that a further fork has nothing left to write a second time.
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
        os.environ.update(env)
        _forget_processes()
        job(*arguments)
        status = 0
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        status = code if isinstance(code, int) else 1
        if status:
            traceback.print_exc()
    finally:
        os._exit(status)


def _forget_processes() -> None:
    """What accelerate remembers of the processes that earlier tests have run in."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def _fresh(
    out: IO[str], err: IO[str], env: Mapping[str, str], job: Callable[..., Any], arguments: tuple[Any, ...]
) -> Callable[[], int]:
    command = [sys.executable, __file__, inspect.getfile(job), job.__name__, *map(str, arguments)]
    child = subprocess.Popen(command, stdout=out, stderr=err, env=environment() | env)
    return lambda: child.wait(LONGEST)


if __name__ == "__main__":
    file, name, *rest = sys.argv[1:]
    runpy.run_path(file)[name](*rest)
