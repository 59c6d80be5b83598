"""A forked rank is `python SCRIPT` in all but its imports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

SCRIPT = """
import atexit, json, multiprocessing, os, random, signal, sys, threading
import numpy, torch
if sys.argv[1] == "fail" and os.environ["RANK"] == "1":
    sys.exit(3)
if sys.argv[1] == "fail":
    signal.pause()
facts = {
    "argv": sys.argv,
    "name": __name__,
    "folder": os.getcwd(),
    "searched first": sys.path[0],
    "environment": {name: value for name, value in os.environ.items() if name != "LC_CTYPE"},
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "threads": [threading.active_count(), torch.get_num_threads(), len(os.listdir("/proc/self/task"))],
    "start method": multiprocessing.get_start_method(),
    "initialised": torch.distributed.is_initialized(),
}
print(json.dumps(facts, sort_keys=True), flush=True)
print("draws", random.random(), numpy.random.random(), torch.rand(()).item())
atexit.register(print, "at exit")
os.system("echo a child >&2")
"""


def test_a_forked_rank_is_as_one_started_anew(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    outputs: dict[str, list[list[str]]] = {}
    for name in ("anew", "forked"):
        run_ranks(2, [script, "all"], tmp_path / name, fork=name == "forked", ONLY_HERE="1")
        outputs[name] = [(tmp_path / f"{name} {rank}").read_text().splitlines() for rank in range(2)]
    draws = [ranks.pop(1) for both in outputs.values() for ranks in both]
    assert outputs["forked"] == outputs["anew"] and '"RANK": "1"' in outputs["forked"][1][0]
    for drawn in zip(*(line.split()[1:] for line in draws), strict=True):
        assert len(set(drawn)) == 4, "no generator is shared"


@pytest.mark.parametrize("fork", [True, False])
def test_a_failed_rank_ends_the_others(fork: bool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with pytest.raises(AssertionError, match=r"exit codes \[None, 3\]"):
        run_ranks(2, [script, "fail"], tmp_path / "log", fork=fork)
