"""The life of a server's processes: who may see its key, what ends it, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_vapo.errors import RolloutError
from megatron_vapo.rollout.sglang import server as server_module
from megatron_vapo.rollout.sglang import server_main, supervisor
from megatron_vapo.rollout.sglang.server import Address, Server, ServerSettings, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
GONE_S = 60
"""Limit for processes to end; a test does not wait longer than they take."""

FAKE_LAUNCH_SERVER = '''
"""Stands for sglang.launch_server: the same arguments, and children as unruly as can be."""
import argparse, json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import resource_tracker

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--config")
parser.add_argument("--report")
parser.add_argument("--mode", default="serve")
parser.add_argument("--flag", action="store_true")
arguments = parser.parse_args()
signal.signal(signal.SIGTERM, lambda *_: os._exit(4))  # SGLang has a handler of its own too
resource_tracker.ensure_running()  # as multiprocessing does before the first process that it spawns
with open(arguments.config) as config:
    key = config.read().split('"')[1]
readable_by_others = os.stat(arguments.config).st_mode & 0o077
print(f"server_args=ServerArgs(api_key='{key}', port={arguments.port})", flush=True)
print(f"twice {key} {key}", file=sys.stderr, flush=True)

SLEEP = [sys.executable, "-c", "import signal; signal.pause()"]
children = [
    subprocess.Popen(SLEEP),
    subprocess.Popen(SLEEP, start_new_session=True),
    # A daemon: an orphan with a session and output of its own.
    subprocess.Popen(["setsid", "--fork", *SLEEP], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
]
children[2].wait()

if arguments.mode == "end at once":
    print("torch.OutOfMemoryError: CUDA out of memory", flush=True)
    sys.exit(3)
if arguments.mode == "never answer":
    signal.pause()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/end":
            os._exit(0)
        self.send_response(200 if self.headers["Authorization"] == f"Bearer {key}" else 401)
        self.end_headers()
        self.wfile.write(b"up")

    def log_message(self, *_):
        pass


try:
    server = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
except OSError as error:
    print(error, *["of a thread that hears of it later"] * 100, sep="\\n", flush=True)
    sys.exit(3)
report = {"environment": dict(os.environ), "arguments": sys.argv[1:], "public": readable_by_others}
with open(arguments.report + ".part", "w") as file:
    json.dump(report, file)
os.rename(arguments.report + ".part", arguments.report)
server.serve_forever()
'''


def answers(address: Address) -> bool:
    """As the engine asks, with the key."""
    asked = urllib.request.Request(f"{address.url}/health", headers={"Authorization": f"Bearer {address.key}"})
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with a module sglang.launch_server."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "sglang").mkdir()
    (folder / "sglang" / "launch_server.py").write_text(FAKE_LAUNCH_SERVER)
    return folder


@pytest.fixture
def settings(package: Path, tmp_path: Path) -> ServerSettings:
    return ServerSettings(
        python=sys.executable,
        arguments={"report": str(tmp_path / "report.json"), "flag": True},
        environment={"PYTHONPATH": str(package), "ADDED": "yes"},
        log=tmp_path / "server.log",
        start_seconds=120.0,
    )


@pytest.fixture
def start(settings: ServerSettings) -> Iterator[Callable[..., Server]]:
    """Start a server; it is stopped after the test."""
    started: list[Server] = []

    def start(**changes: object) -> Server:
        started.append(Server(replace(settings, **changes), answers))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def in_mode(settings: ServerSettings, mode: str) -> ServerSettings:
    return replace(settings, arguments=dict(settings.arguments) | {"mode": mode})


EARLIER: set[psutil.Process] = set()
"""Children that this process had before the test, such as the workers of torch's compiler."""


@pytest.fixture(autouse=True)
def _note_earlier_children() -> None:
    EARLIER.clear()
    EARLIER.update(psutil.Process().children(recursive=True))


def tree(owner: int) -> list[psutil.Process]:
    """Supervisor, server, the server's three children and multiprocessing's resource tracker."""
    return [process for process in psutil.Process(owner).children(recursive=True) if process not in EARLIER]


def server_process(processes: list[psutil.Process]) -> psutil.Process:
    (server,) = [p for p in processes if server_main.__file__ in p.cmdline() and supervisor.__file__ not in p.cmdline()]
    return server


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_S)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_server_starts_and_stops_with_all_its_processes(start: Callable[..., Server]) -> None:
    server = start()
    assert server.running and answers(server.address)
    processes = tree(os.getpid())
    assert len(processes) == 6 and len({os.getsid(process.pid) for process in processes}) >= 3
    assert server.resident_bytes() > 2**20
    server.stop()
    assert not server.running
    assert not any(process.is_running() for process in processes), "they are gone when stop returns"
    server.stop()


def test_signals_to_the_whole_job_leave_a_server_alone(start: Callable[..., Server]) -> None:
    """Slurm with proctrack/linuxproc sends time limits and pre-emption to all processes; the trainer answers them."""
    server = start()
    processes = tree(os.getpid())
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        for process in processes:
            process.send_signal(number)
    assert answers(server.address) and server.running
    assert all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_a_signal_from_before_the_server_began_is_lost(tmp_path: Path) -> None:
    """It waits, blocked by the supervisor, until multiprocessing unblocks it."""

    def wait_for_me() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "launch_server.py").write_text("raise SystemExit(7)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, server_main.__file__], env=environment, preexec_fn=wait_for_me)
    assert ended.returncode == 7


def test_the_key_is_seen_by_nobody(start: Callable[..., Server], settings: ServerSettings, tmp_path: Path) -> None:
    """Not in a process list, an environment, the log or what is shown of it, nor in a file for others to read."""
    server = start()
    key = server.address.key
    assert len(key) >= 32
    assert not answers(Address(server.address.url, "another"))
    for process in tree(os.getpid()):
        assert key not in " ".join(process.cmdline())
        assert key not in " ".join(process.environ().values())
    log = settings.log.read_text()
    assert key not in log and "api_key='***'" in log and "twice *** ***" in log
    assert key not in server.last_lines() and "twice" in server.last_lines()
    assert json.loads((tmp_path / "report.json").read_text())["public"] == 0


def test_every_start_has_a_key_and_a_place_of_its_own(start: Callable[..., Server]) -> None:
    first, second = start().address, start().address
    assert first.key != second.key and first.url != second.url


def test_arguments_and_environment(
    start: Callable[..., Server], settings: ServerSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torchrun tells the trainer's ranks would make a server wait for them."""
    torchrun = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"]
    torchrun += [
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    ]
    for name in (*torchrun, "PYTHONHASHSEED", "KEPT"):
        monkeypatch.setenv(name, "7")
    server = start()
    report = json.loads((tmp_path / "report.json").read_text())
    assert not set(torchrun) & set(report["environment"]) and "PYTHONHASHSEED" not in report["environment"]
    assert (report["environment"]["KEPT"], report["environment"]["ADDED"]) == ("7", "yes")
    port = server.address.url.rpartition(":")[2]
    assert report["arguments"][:4] == ["--host", "127.0.0.1", "--port", port]
    assert report["arguments"][4:7] == ["--report", str(tmp_path / "report.json"), "--flag"]


def test_a_server_that_ends_takes_its_processes_along(start: Callable[..., Server]) -> None:
    server = start()
    processes = tree(os.getpid())
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"{server.address.url}/end", timeout=60)
    assert_gone(processes)
    assert not server.running


@pytest.mark.parametrize("stopped", [False, True])
def test_a_server_that_is_killed_takes_its_processes_along(start: Callable[..., Server], stopped: bool) -> None:
    """Also while they are stopped, as by SIGSTOP."""
    start()
    processes = tree(os.getpid())
    server = server_process(processes)
    if stopped:
        for process in [server, *server.children(recursive=True)]:
            process.suspend()
    server.kill()
    assert_gone(processes)


def test_a_stopped_server_ends_too(start: Callable[..., Server]) -> None:
    server = start()
    processes = tree(os.getpid())
    child = server_process(processes)
    for process in [child, *child.children(recursive=True)]:
        process.suspend()
    server.stop()
    assert_gone(processes)


OWNER = """
import json, signal, sys
from pathlib import Path
from megatron_vapo.rollout.sglang.server import Server, ServerSettings
from test_sglang_server import answers

given = json.loads(sys.argv[1])
server = Server(ServerSettings(**{**given, "log": Path(given["log"])}), answers)
print("up", flush=True)
signal.pause()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "stopped"), [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, False)])
def test_nothing_outlives_its_owner(settings: ServerSettings, how: signal.Signals, stopped: bool) -> None:
    """Whatever ended the trainer, and whether the server was stopped or not."""
    content = {name: getattr(settings, name) for name in ("python", "arguments", "environment", "start_seconds")}
    given = json.dumps(content | {"log": str(settings.log)})
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    command = [sys.executable, "-c", OWNER, given]
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout.readline() == b"up\n"
        processes = tree(owner.pid)
        assert len(processes) == 6
        if stopped:
            server = server_process(processes)
            for process in [server, *server.children(recursive=True)]:
                process.suspend()
        owner.send_signal(how)
    assert_gone(processes)


def test_a_signal_to_the_trainer_s_group_does_not_reach_the_server(start: Callable[..., Server]) -> None:
    """Ctrl-C goes to all processes of the terminal's foreground group; the trainer still asks its server then."""
    start()
    assert all(os.getpgid(process.pid) != os.getpgid(0) for process in tree(os.getpid()))


def test_a_server_that_does_not_end_is_not_waited_for_for_ever(
    start: Callable[..., Server], settings: ServerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process that hangs in a driver, its supervisor is stopped."""
    server = start()
    hanging = psutil.Process(server._supervisor.pid)
    hanging.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(server_module, "_END_S", 0.2)
        with pytest.raises(RolloutError, match=f"within 0.2 s.*{re.escape(str(settings.log))}"):
            server.stop()
    hanging.resume()
    server.stop()
    assert not server.running


def test_a_port_that_is_taken_is_replaced(settings: ServerSettings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1], free_port()]
        choices = iter(ports)
        server = Server(settings, lambda address: str(ports[1]) in address.url and answers(address), choices.__next__)
        try:
            assert server.address.url == f"http://127.0.0.1:{ports[1]}" and server.running
            assert "already in use" in settings.log.read_text()
        finally:
            server.stop()
    assert next(choices, None) is None
    assert tree(os.getpid()) == []


def test_ports_that_are_all_taken(settings: ServerSettings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asked: list[int] = []

        def choose() -> int:
            asked.append(taken.getsockname()[1])
            return asked[-1]

        with pytest.raises(RolloutError, match="already in use"):
            Server(settings, lambda address: False, choose)
    assert 2 <= len(asked) <= 10
    assert tree(os.getpid()) == []


def test_a_server_that_ends_at_its_start(settings: ServerSettings) -> None:
    """Its last lines are the message, those of an earlier start are not."""
    settings.log.write_text("something of an earlier start\n")
    with pytest.raises(RolloutError) as caught:
        Server(in_mode(settings, "end at once"), answers)
    text = str(caught.value)
    assert "torch.OutOfMemoryError: CUDA out of memory" in text and str(settings.log) in text
    assert "earlier start" not in text and settings.log.read_text().startswith("something of an earlier start\n")
    assert tree(os.getpid()) == []


def test_a_server_that_is_not_up_in_time(settings: ServerSettings) -> None:
    with pytest.raises(RolloutError, match="did not start"):
        Server(in_mode(replace(settings, start_seconds=2.0), "never answer"), answers)
    assert tree(os.getpid()) == []
