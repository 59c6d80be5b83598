"""Ranks for tests: processes of their own that talk to each other, started anew or forked from one that is warm.

Imports are most of a small run's CPU time. Where a test is about what ranks compute, not about how they start,
`fork=True` spares them: multiprocessing's fork server imports tests/preload.py once and forks every rank, which then is
`python ARGUMENTS` in all but its imports: environment, folder, output, exit code. What is read while modules are
imported (TRITON_INTERPRET) or differs between interpreters (the seed of hashes) needs a start anew, and so does what
tests look for in torchrun's output and processes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.distributed import TCPStore

PRELOADED = "tests.preload"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([PRELOADED])


class Forked:
    """The fork server's `python ARGUMENTS` in a session of its own, with what is needed of subprocess.Popen.

    Args:
        errors: None: to `output` too.
        folder: to run in; None: this process's.
        beside: a process whose network, host name and mounts it is to have.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        errors: Path | None = None,
        folder: str | None = None,
        beside: int | None = None,
    ) -> None:
        become = (arguments, dict(environment), folder or os.getcwd(), output, errors, beside)
        self._process = _context.Process(target=_become, args=become)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.poll()

    def kill(self) -> None:
        self._process.kill()


def run_ranks(
    world: int,
    arguments: Sequence[str | Path],
    log: Path,
    seconds: float = 300,
    fork: bool = False,
    python: str | Path = sys.executable,
    **environment: str,
) -> None:
    """Run `python arguments` once a rank, with RANK and WORLD_SIZE, until all have ended well; they write "LOG RANK".

    Raises:
        AssertionError: a rank failed, which ends the others, or took longer; with the end of every rank's output.
    """
    variables = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)} | environment
    words = [str(word) for word in arguments]
    logs = [log.with_name(f"{log.name} {rank}") for rank in range(world)]
    ranks: list[Forked | subprocess.Popen] = []
    try:
        for rank, output in enumerate(logs):
            own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(Forked(words, own, output) if fork else _start([str(python), *words], own, output))
        codes = _wait(ranks, seconds)
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(out.read_text()[-3000:] for out in logs)


def train(world: int, log: Path, *overrides: str, seconds: float = 300) -> str:
    """Run `megatron-vapo train recipes/tiny.yaml` on forked ranks, as torchrun would; returns rank 0's output."""
    return run_world(world, ["-m", "megatron_vapo", "train", "recipes/tiny.yaml", *overrides], log, seconds)


def run_world(world: int, arguments: Sequence[str | Path], log: Path, seconds: float = 300) -> str:
    """Run `python arguments` on forked ranks with torchrun's variables; returns rank 0's output."""
    # As torchrun does: the store is there before the ranks are, at a port that nobody else can take.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run_ranks(
        world,
        arguments,
        log,
        seconds,
        fork=True,
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    return log.with_name(f"{log.name} 0").read_text()


def _start(command: list[str], environment: Mapping[str, str], output: Path) -> subprocess.Popen:
    with output.open("w") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)


def _wait(ranks: Sequence[Forked | subprocess.Popen], seconds: float) -> list[int | None]:
    """Exit codes once all have ended, one has failed, or the time is over (None: still running)."""
    deadline = time.monotonic() + seconds
    while True:
        codes = [rank.poll() for rank in ranks]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(0.05)


def _become(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    output: Path,
    errors: Path | None,
    beside: int | None,
) -> None:
    """Go on in a forked process as `python ARGUMENTS` would."""
    if PRELOADED not in sys.modules:
        raise ImportError(f"the fork server could not import {PRELOADED}, started in {folder}")
    os.setsid()
    if beside is not None:
        _join_namespaces(beside)
    with output.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if errors is not None:
        with errors.open("wb") as out:
            os.dup2(out.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    searched = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[1:1] = [path for path in searched if path not in sys.path]
    multiprocessing.set_start_method(None, force=True)
    torch.seed(), np.random.seed()  # as new processes do; Python's own generator does so after each fork
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], folder
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def _join_namespaces(pid: int) -> None:
    """Have the network, host name and mounts of another process. (os.setns is Python 3.12's.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(open(f"/proc/{pid}/ns/{kind}")) for kind in ("net", "uts", "mnt")]
        for file in opened:
            if libc.setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {file.name}")
