"""The job scripts that users submit, submitted to a real Slurm of several nodes on this machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.records import records, timeless
from tests.hollow import write_hollow_weights
from tests.ranks import train
from tests.slurm import private_cluster, warm_python

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 16  # more than a run can take between being asked to stop and stopping
FEW = 4  # for a run that nothing happens to
SMALL = ["minibatch_size=8", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4",
         "rollout.max_response_tokens=24", "value_pretraining.max_steps=1", "evaluation.problems=8",
         "actor.optimizer.warmup_steps=3", "checkpoint.every=0", f"steps={STEPS}"]  # fmt: skip


WHY_NOT = private_cluster.missing()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets need a short path
    with private_cluster.Cluster(folder / "c") as cluster:
        yield cluster
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen2", intermediate_size=64)  # SGLang on CPU pads others


def write_python(path: Path, service: str, before: str = "") -> None:
    """Write a Python that spares its imports: all but torchrun itself is forked by a service (warm_python.py)."""
    client = Path(warm_python.__file__)
    path.write_text(
        f'#!/bin/bash\n{before}if [ "$1 $2" = "-m torch.distributed.run" ]; then\n'
        f'    exec "{sys.executable}" -m tests.slurm.warm_torchrun "{service}" "${{@:3}}"\nfi\n'
        f'exec "{sys.executable}" -IS "{client}" "{service}" "$@"\n'
    )
    path.chmod(0o755)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[str]:
    with warm_python.service(tmp_path / "warm") as path:
        yield path


@pytest.fixture
def user(cluster, tmp_path: Path, service: str) -> Iterator[User]:
    yield User(cluster, tmp_path, service)
    cluster.end_jobs()


class User:
    """Somebody with the repository, who submits from a folder of it."""

    def __init__(self, cluster, folder: Path, service: str) -> None:
        self.cluster, self.folder = cluster, folder
        for name in ("slurm", "recipes", "tools", "megatron_vapo", "tests", "benchmarks"):
            (folder / name).symlink_to(REPOSITORY / name)
        write_python(folder / "python", service)
        self.environment = {"VAPO_PYTHON": str(folder / "python"), "PYTHONPATH": f"{folder}:{REPOSITORY}"}
        self.site: dict[str, object] = {}

    def sbatch(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", "-c", 'cd "$0" && exec sbatch --parsable "$@"', self.folder, *arguments]
        return self.cluster.run(*command, **self.environment, **environment)

    def submit(self, *arguments: object, **environment: str) -> Job:
        result = self.sbatch(*arguments, **environment)
        assert result.returncode == 0, result.stderr
        return Job(self, result.stdout.split(";")[0].strip())


class Job:
    def __init__(self, user: User, number: str) -> None:
        self.user, self.number = user, number
        self.hastened: set[str] = set()

    def show(self, key: str) -> str:
        found = self.user.cluster.run("scontrol", "show", "job", self.number).stdout
        match = re.search(rf"\b{key}=(\S*)", found)
        return match[1] if match else ""

    @property
    def state(self) -> str:
        return self.show("JobState")

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.user.folder.glob(f"*-{self.number}.log"))

    def outputs(self) -> str:
        """For messages: the log, and what nodes said."""
        files = sorted(self.user.folder.glob(f"logs/*-{self.number}/*/node*.log"))
        return self.log + "".join(f"\n== {path}\n{path.read_text()[-3000:]}" for path in files)

    def wait_for(self, *states: str, seconds: float = 300, requeued: bool = False) -> None:
        """Until the job is in one of these states; a requeued job is not made to wait two minutes."""
        wanted = lambda: self.state in states  # noqa: E731
        wait(
            wanted, seconds, lambda: f"job is {self.state}: {self.outputs()}", every=self._hasten if requeued else None
        )

    def _hasten(self) -> None:
        """Not at once: for a second, nodes refuse the job as the one that they have just ended."""
        if self.state == "PENDING" and self.show("Restarts") not in self.hastened:
            self.hastened.add(self.show("Restarts"))
            self.user.cluster.run("scontrol", "update", f"jobid={self.number}", "StartTime=now+5")


def wait(condition: Callable[[], bool], seconds: float, message: Callable[[], str], every=None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message()
        if every:
            every()
        time.sleep(0.3)


def train_steps(run: Path) -> int:
    return len(records(run, "train"))


@pytest.fixture(scope="module")
def settings(checkpoint: Path, tiny_problems: Path) -> list[str]:
    return [f"model.path={checkpoint}", f"data.train={tiny_problems}", f"evaluation.data={tiny_problems}", *SMALL]


@pytest.fixture(scope="module")
def local(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The same run without Slurm, never interrupted."""
    folder = tmp_path_factory.mktemp("local")
    train(4, folder / "log", *settings, f"run_dir={folder / 'run'}", seconds=400)
    return timeless(folder / "run")


def assert_begins_as(run: Path, local: list[dict]) -> None:
    """A run of `FEW` steps is the beginning of the local one, but for when policies in training are evaluated."""
    found, expected = (
        [row for row in rows if row["kind"] != "evaluate" or row["step"] == 0] for rows in (timeless(run), local)
    )
    assert found[-1]["step"] == FEW and found == expected[: len(found)]


@pytest.mark.slow
def test_a_run_over_two_nodes_is_the_local_run(user: User, settings: list[str], local: list[dict]) -> None:
    user.environment["VAPO_PYTHON"] = sys.executable  # all as users have it
    run = user.folder / "run"
    job = user.submit("slurm/vapo_tiny.sh", *settings, f"run_dir={run}", f"steps={FEW}")
    job.wait_for("COMPLETED", "FAILED")
    assert job.state == "COMPLETED", job.outputs()
    assert_begins_as(run, local)
    assert job.log.splitlines()[-1] == "done"
    ranks = sorted(user.folder.glob(f"logs/vapo_tiny-{job.number}/0/node*/*/attempt_0/*/stdout.log"))
    assert len(ranks) == 4


@pytest.mark.slow
def test_a_pre_empted_run_goes_on_where_it_was(user: User, settings: list[str], local: list[dict]) -> None:
    """Pre-emption sends SIGTERM to the steps; with Slurm's default process tracking no rank hears it."""
    run = user.folder / "run"
    job = user.submit("--partition=low", "slurm/vapo_tiny.sh", *settings, f"run_dir={run}")
    wait(lambda: train_steps(run) >= 1, 300, job.outputs)
    other = user.submit("--nodes=2", "--exclusive", "--output=other.log", "--wrap", "true")
    other.wait_for("COMPLETED")
    assert 1 <= train_steps(run) < STEPS
    job.wait_for("COMPLETED", "FAILED", requeued=True)
    assert job.state == "COMPLETED", job.outputs()
    assert job.show("Restarts") == "1" and "stopped with a checkpoint" in job.log
    assert timeless(run) == local


@pytest.mark.slow
def test_the_time_limit_requeues_with_a_checkpoint(user: User, settings: list[str], forking_sglang_python: str) -> None:
    """Slurm looks at time limits twice a minute; here its signal comes at once, and to all processes of the step.

    So do those that a user sends. They are the run's to answer: its rollout server goes on until the run has stopped.
    """
    user.environment["VAPO_PYTHON"] = sys.executable  # all processes are the step's
    run = user.folder / "run"
    script = (REPOSITORY / "slurm" / "vapo_tiny.sh").read_text().replace("recipes/tiny.yaml 2", "recipes/tiny.yaml 1")
    (user.folder / "one_process.sh").write_text(script)
    engine = ["rollout.engine=sglang", f"rollout.sglang.python={forking_sglang_python}"]
    job = user.submit("--nodes=1", "one_process.sh", *settings, *engine, f"run_dir={run}")
    wait(lambda: train_steps(run) >= 1, 300, job.outputs)
    with user.cluster.signals_to_all_processes():
        user.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
        for number in ("USR1", "TERM"):
            user.cluster.run("scancel", f"--signal={number}", job.number)
        wait(lambda: "requeued to go on" in job.log, 120, job.outputs)
    stopped = train_steps(run)
    assert 1 <= stopped < STEPS and list((run / "checkpoints").glob("step_*"))
    said = (run / "logs" / "rollout_0.log").read_text()
    assert said.count("server_args=") == 1 and "SIGTERM" not in said
    job.wait_for("COMPLETED", "FAILED", requeued=True)
    assert job.state == "COMPLETED", job.outputs()
    assert "time limit is near" in job.log and job.show("Restarts") == "1"
    steps = records(run, "train")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(record["rollout/restarts"] == 0 for record in steps)


@pytest.mark.slow
def test_a_lost_node_requeues_the_job(user: User, settings: list[str], local: list[dict]) -> None:
    """The lost node stays away, as on a real cluster. Slurm tries for minutes to end the first start's step on it, and
    would end the second start's, which has the same number, were that on the same node."""
    run = user.folder / "run"
    job = user.submit("--partition=spared", "slurm/vapo_tiny.sh", *settings, f"run_dir={run}", "checkpoint.every=1")
    wait(lambda: (run / "checkpoints" / "step_000001").is_dir() and train_steps(run) >= 1, 300, job.outputs)
    with user.cluster.lost("node2"):
        wait(lambda: job.show("Restarts") == "1", 120, job.outputs)
        assert 1 <= train_steps(run) < STEPS
        job.wait_for("COMPLETED", "FAILED", requeued=True, seconds=400)
    assert job.state == "COMPLETED", job.outputs()
    assert "start 0: 2 nodes (node[1-2])" in job.log and "start 1: 2 nodes (node1,spare)" in job.log, job.log
    second = (user.folder / "logs" / f"vapo_tiny-{job.number}" / "1" / "node0.log").read_text()
    assert re.search(rf"resumed from {run}/checkpoints/step_\d+", second), second
    assert timeless(run) == local


@pytest.mark.slow
def test_a_cancelled_job_leaves_nothing_running(user: User, settings: list[str]) -> None:
    user.environment["VAPO_PYTHON"] = sys.executable  # all processes are the step's
    run = user.folder / "run"
    job = user.submit("slurm/vapo_tiny.sh", *settings, f"run_dir={run}")
    wait(lambda: train_steps(run) >= 1, 300, job.outputs)
    user.cluster.run("scancel", job.number)
    job.wait_for("CANCELLED")
    assert "requeued to go on" not in job.log, job.outputs()

    def left() -> list[str]:
        """Whatever runs on the nodes but their daemons."""
        pids = [pid for node in ("node1", "node2") for pid in _pids(node)]
        commands = [subprocess.run(["ps", "-o", "args=", pid], capture_output=True, text=True).stdout for pid in pids]
        return [command for command in commands if command and not command.startswith("slurmd ")]

    wait(lambda: not left(), 60, lambda: str(left()))


def _pids(node: str) -> list[str]:
    return subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split()


@pytest.mark.slow
def test_an_exception_of_a_rank_is_in_the_log(user: User, settings: list[str]) -> None:
    missing = user.folder / "rollouts_of_nobody"
    job = user.submit("slurm/vapo_tiny.sh", *settings, f"run_dir={user.folder / 'run'}", f"rollout.replay={missing}")
    job.wait_for("FAILED", "COMPLETED", seconds=200)
    assert job.state == "FAILED"
    lines = job.log.splitlines()
    assert len(lines) < 60, job.log
    position = next(i for i, line in enumerate(lines) if re.match(r"failed first: node[01], process [01]", line))
    assert str(missing) in lines[position + 1], job.log


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_at_once_and_is_named(user: User, settings: list[str]) -> None:
    """As the kernel kills a process that takes too much memory."""
    (user.folder / "deadly_reward.py").write_text(
        "import os, signal\n\n"
        "def reward(response: str, answer: str) -> float:\n"
        "    if os.environ.get('RANK') == '3':\n"
        "        os.kill(os.getppid(), signal.SIGKILL)  # rewards run beside the rank\n"
        "    return 1.0\n"
    )
    settings = [*settings, f"run_dir={user.folder / 'run'}", "reward.name=deadly_reward:reward"]
    job = user.submit("slurm/vapo_tiny.sh", *settings)
    job.wait_for("FAILED", "COMPLETED", seconds=200)
    assert job.state == "FAILED"
    said = job.log
    assert "killed first: a process of node1: Signal 9 (SIGKILL)" in said, job.outputs()
    assert len(said.splitlines()) < 13


@pytest.mark.slow
def test_the_whole_pipeline(user: User, settings: list[str], checkpoint: Path) -> None:
    run = user.folder / "run"
    command = ["bash", user.folder / "slurm" / "pipeline.sh", "slurm/vapo_tiny.sh", checkpoint, run]
    inside = ["sh", "-c", 'cd "$0" && exec "$@"', user.folder, *command, *settings, "steps=1"]
    result = user.cluster.run(*inside, **user.environment)
    assert result.returncode == 0, result.stderr
    numbers = dict(re.findall(r"(\w+) (\d+)", result.stdout))
    jobs = {name: Job(user, number) for name, number in numbers.items()}
    assert list(jobs) == ["convert", "train", "export", "evaluate"]
    assert jobs["train"].show("Dependency").startswith(f"afterok:{numbers['convert']}")
    jobs["evaluate"].wait_for("COMPLETED", "FAILED", "CANCELLED", seconds=500)
    assert jobs["evaluate"].state == "COMPLETED", [job.outputs() for job in jobs.values()]
    assert "avg@" in jobs["evaluate"].log
    assert (user.folder / "run-export" / "config.json").is_file()


LAUNCHER = os.environ.get("VAPO_LAUNCH_PYTHON", sys.executable)


def launch(user: User, settings: list[str], *options: object, **environment: str) -> Path:
    """Submit the tiny run by NeMo-Run; the folder of the run, once it is done."""
    if subprocess.run([LAUNCHER, "-c", "import nemo_run"], capture_output=True).returncode:
        pytest.skip("no NeMo-Run (VAPO_LAUNCH_PYTHON)")
    run = user.folder / "run"
    result = user.cluster.run(
        LAUNCHER, REPOSITORY / "tools" / "launch.py", "recipes/tiny.yaml", "--executor", "slurm", "--nodes", 2,
        "--processes", 2, "--gpus-per-node", 0, "--cpus-per-task", 2, "--partition", "batch", "--time", "00:30:00",
        "--python", user.folder / "python", "--repository", user.folder, *options,
        *settings, f"run_dir={run}", f"steps={FEW}",
        timeout=120, NEMORUN_HOME=str(user.folder / "home"), PYTHONPATH=str(REPOSITORY), **environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr

    def outputs() -> str:
        return result.stdout + "".join(path.read_text() for path in user.folder.rglob("*.out"))

    wait(lambda: (run / "summary.json").is_file(), 300, outputs)
    return run


@pytest.mark.slow
def test_nemo_run_submits_the_same_run(user: User, settings: list[str], local: list[dict]) -> None:
    assert_begins_as(launch(user, settings), local)


@pytest.fixture
def login_node(user: User) -> Iterator[dict[str, str]]:
    """An SSH server of this test's own, and the environment of somebody whose ~/.ssh/config knows it as `login`."""
    missing = [
        name for name in ("sshd", "ssh-keygen", "rsync") if not shutil.which(name, path=private_cluster.program_path())
    ]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (tests/slurm/install.sh)")
    folder = user.folder / "ssh"
    (folder / ".ssh").mkdir(parents=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / ".ssh" / "config").write_text(
        f"Host login 127.0.0.1\nHostName 127.0.0.1\nPort {port}\nUser root\nIdentityFile {folder}/user\n"
        f"UserKnownHostsFile {folder}/known_hosts\nStrictHostKeyChecking yes\n"
    )
    ssh = folder / "ssh"  # OpenSSH's own home is that of the system's user, whatever HOME says
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/.ssh/config "$@"\n')
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    with subprocess.Popen(
        [shutil.which("sshd", path=private_cluster.program_path()), "-D", "-f", folder / "sshd_config"]
    ) as server:
        try:
            wait(lambda: _listens(port), 20, lambda: "no sshd")
            yield {"HOME": str(folder), "PATH": f"{folder}:{private_cluster.program_path()}"}
        finally:
            server.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_nemo_run_submits_over_ssh(
    user: User, login_node: dict[str, str], settings: list[str], local: list[dict]
) -> None:
    """As from a laptop, which has no Slurm of its own."""
    before = f"export SLURM_CONF={user.cluster.environment['SLURM_CONF']}"
    options = ("--host", "login", "--job-dir", user.folder / "jobs", "--before", before)
    assert_begins_as(launch(user, settings, *options, **login_node, SLURM_CONF="/nowhere"), local)
    assert list((user.folder / "jobs").rglob("*_sbatch.sh")) and list((user.folder / "jobs").rglob("*.out"))


# In a container: a stand-in for pyxis shows of /tmp, where all of these tests lies, only what is mounted.


@pytest.fixture
def pyxis(cluster) -> Iterator[None]:
    if not Path("/usr/include/slurm/spank.h").is_file() or shutil.which("gcc") is None:
        pytest.skip("no Slurm headers or no gcc (tests/slurm/install.sh)")
    with cluster.plugin(Path(__file__).with_name("pyxis_stand_in.c")):
        yield


@pytest.fixture
def contained(pyxis: None, user: User, service: str, checkpoint: Path, tiny_problems: Path) -> User:
    """A user whose site.env names an image, whose Python tells what each node's container is."""
    (user.folder / "slurm").unlink()
    shutil.copytree(REPOSITORY / "slurm", user.folder / "slurm")
    (user.folder / "image.sqsh").touch()
    (user.folder / "seen").mkdir()
    python = user.folder / "python"
    seen = f"{user.folder}/seen/$SLURM_NODEID-$SLURM_STEP_ID"
    write_python(python, service, f"(env | grep ^STAND_IN; echo PWD=$PWD) > {seen}\n")
    outside = [f"{folder}:{folder}" for folder in (REPOSITORY, sys.prefix, tiny_problems.parent)]
    user.site = {
        "VAPO_CONTAINER": user.folder / "image.sqsh",
        "VAPO_PYTHON": python,
        "VAPO_MODELS": checkpoint.parent,
        "VAPO_RUNS": user.folder / "storage" / "runs",
        "VAPO_MOUNTS": ",".join(outside),
    }
    del user.environment["VAPO_PYTHON"]
    return user


def write_site(user: User) -> None:
    lines = (f"export {name}={value}\n" for name, value in user.site.items())
    (user.folder / "slurm" / "site.env").write_text("".join(lines))


@pytest.mark.slow
def test_a_run_in_containers_is_the_local_run(contained: User, settings: list[str], local: list[dict]) -> None:
    write_site(contained)
    run = contained.site["VAPO_RUNS"] / "run"
    job = contained.submit("slurm/vapo_tiny.sh", *settings, f"run_dir={run}", f"steps={FEW}")
    job.wait_for("COMPLETED", "FAILED")
    assert job.state == "COMPLETED", job.outputs()
    assert_begins_as(run, local)
    home, site = contained.folder, contained.site
    mounts = [f"{home}:{home}", site["VAPO_MOUNTS"]]
    mounts += [f"{folder}:{folder}" for folder in (site["VAPO_MODELS"], site["VAPO_RUNS"])]
    seen = {path.name: path.read_text().splitlines() for path in (home / "seen").iterdir()}
    assert {name.split("-")[0] for name in seen} == {"0", "1"}
    for lines in seen.values():
        assert f"STAND_IN_IMAGE={home}/image.sqsh" in lines and f"STAND_IN_WORKDIR={home}" in lines
        assert f"STAND_IN_MOUNTS={','.join(map(str, mounts))}" in lines and f"PWD={home}" in lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"VAPO_MODELS": ""}, "no such checkpoint folder"),  # it is there, but not mounted
        ({"VAPO_MODELS": "/nowhere/models"}, "/nowhere/models: no such folder; the container is to see it"),
        ({"VAPO_CONTAINER": "/nowhere/image.sqsh"}, "/nowhere/image.sqsh: no such image"),
        ({"VAPO_PYTHON": ""}, "set VAPO_PYTHON (slurm/site.env) to its python"),
    ],
    ids=["not mounted", "no folder", "no image", "no python"],
)
def test_a_container_that_cannot_work_is_refused(
    contained: User, settings: list[str], change: dict[str, str], words: str
) -> None:
    contained.site |= change
    write_site(contained)
    job = contained.submit("slurm/vapo_tiny.sh", *settings)
    job.wait_for("FAILED", "COMPLETED", seconds=200)
    assert job.state == "FAILED"
    assert words in "\n".join(job.log.splitlines()[:5]), job.outputs()


@pytest.mark.slow
def test_an_error_in_a_container_is_in_the_log(contained: User, settings: list[str]) -> None:
    write_site(contained)
    job = contained.submit("slurm/vapo_tiny.sh", *settings, "rollout.replay=rollouts_of_nobody")
    job.wait_for("FAILED", "COMPLETED", seconds=200)
    assert job.state == "FAILED"
    assert re.search(r"^failed first: node[01], process [01]", job.log, re.MULTILINE), job.outputs()


# What is refused, and when.


def test_what_slurm_refuses_at_once(user: User) -> None:
    partition = user.sbatch("--partition=nowhere", "slurm/vapo_tiny.sh")
    assert partition.returncode and "invalid partition specified: nowhere" in partition.stderr
    nodes = user.sbatch("--nodes=40", "slurm/vapo_tiny.sh")
    assert nodes.returncode and "requested than permitted" in nodes.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["model.path=nowhere"], {}, "megatron-vapo: nowhere: no such checkpoint folder"),
        (["stepz=3"], {}, "unknown key stepz (did you mean steps?)"),
        (["data.train=nowhere.jsonl"], {}, "nowhere.jsonl does not exist"),
        (["actor.tensor_parallel=3"], {}, "does not divide the 4 processes"),
        (["critic.init=reward_model", "critic.reward_model=nowhere"], {}, "nowhere: no such checkpoint folder"),
        ([], {"VAPO_CONTAINER": "/images/vapo.sqsh"}, "this Slurm has no pyxis plugin"),
        ([], {"VAPO_PYTHON": "/nowhere/python"}, "/nowhere/python: no such Python"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_mistake_is_in_the_first_lines_of_the_log(
    user: User, settings: list[str], arguments: list[str], environment: dict[str, str], words: str
) -> None:
    user.environment |= environment
    job = user.submit("slurm/vapo_tiny.sh", *settings, f"run_dir={user.folder / 'run'}", *arguments)
    job.wait_for("FAILED", "COMPLETED", seconds=200)
    assert job.state == "FAILED"
    assert words in "\n".join(job.log.splitlines()[:5]), job.outputs()
    assert not (user.folder / "run").exists()


# The jobs of real size, on pretended nodes.


@pytest.fixture
def recorder(user: User, service: str) -> Path:
    """A Python that checks recipes like any other, and writes down what it would have launched on each node."""
    calls = user.folder / "calls"
    calls.mkdir()
    write_python(user.folder / "warm_python", service)
    script = user.folder / "recorder"
    script.write_text(
        f"""#!/bin/bash
if [ "$2" = torch.distributed.run ]; then
    printf '%s\\n' "$@" "OMP=$OMP_NUM_THREADS" "GPUS=$CUDA_VISIBLE_DEVICES" > {calls}/$SLURM_JOB_ID-$SLURM_NODEID
elif [ "$1" = -c ]; then
    exit 0
elif [ "$3" = plan ] && [ -n "$CUDA_VISIBLE_DEVICES" ]; then
    echo "the plan is given GPUs"
    exit 1
else
    exec {user.folder}/warm_python "$@"
fi
"""
    )
    script.chmod(0o755)
    user.environment["VAPO_PYTHON"] = str(script)
    return calls


@pytest.fixture
def qwen_32b(tmp_path: Path, checkpoint: Path) -> Path:
    """A folder of the right names and shapes whose 65 GB of weights are holes in files."""
    folder = tmp_path / "models" / "Qwen2.5-32B"
    shutil.copytree(REPOSITORY / "recipes" / "shapes" / "Qwen2.5-32B", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder)
    write_hollow_weights(folder)
    return folder


@pytest.fixture
def run_32b(user: User, recorder: Path, qwen_32b: Path, tiny_problems: Path) -> Callable[..., Job]:
    """Submit the 32B script, with the reward and data that this machine has."""
    settings = ["critic.init=actor", "critic.reward_model=null", f"data.train={tiny_problems}", "reward.workers=1",
                "reward.name=chained_arithmetic", f"evaluation.data={tiny_problems}",
                f"rollout.sglang.python={user.environment['VAPO_PYTHON']}"]  # fmt: skip

    def submit(*options: str, overrides: Sequence[str] = (), **environment: str) -> Job:
        environment |= {"VAPO_MODELS": str(qwen_32b.parent), "VAPO_INTERFACE": "eth0", "OMP_NUM_THREADS": ""}
        return user.submit("--partition=h100", *options, "slurm/vapo_32b.sh", *settings, *overrides, **environment)

    return submit


@pytest.mark.slow
def test_the_32b_script_is_accepted_and_launches_16_nodes(
    user: User, recorder: Path, run_32b: Callable[..., Job]
) -> None:
    tested = user.sbatch("--test-only", "--partition=h100", "slurm/vapo_32b.sh")
    assert tested.returncode == 0 and "1536 processors" in tested.stderr, tested.stderr
    job = run_32b(VAPO_GPU="h100-80")
    job.wait_for("COMPLETED", "FAILED", seconds=200)
    assert job.state == "COMPLETED", job.outputs()
    lines = job.log.splitlines()
    assert "16 nodes (gpu[1-16]) x 8 processes" in lines[0] and "megatron-vapo train recipes/vapo_32b.yaml" in lines[1]
    verdict = next(i for i, line in enumerate(lines) if line.startswith("It fits, with "))
    assert lines[verdict + 1].startswith("follow it: tail -f ") and job.number in lines[verdict + 2], job.log
    said = " ".join(job.log.split())
    assert "hidden 5120" in said and "128 process(es): ready to run" in said, said
    launched = {path.name.split("-")[1]: path.read_text().splitlines() for path in recorder.iterdir()}
    assert sorted(map(int, launched)) == list(range(16))
    for number, words in launched.items():
        assert {"--nnodes=16", "--nproc-per-node=8", f"--node-rank={number}", "--master-addr=gpu1"} <= set(words)
        assert words[words.index("slurm/rank.py") + 1 :][:2] == ["train", "recipes/vapo_32b.yaml"]
        assert "GPUS=0,1,2,3,4,5,6,7" in words and "OMP=12" in words
    assert len({next(w for w in words if w.startswith("--master-port=")) for words in launched.values()}) == 1


@pytest.mark.slow
def test_a_recipe_that_does_not_fit_by_plan_is_not_started(recorder: Path, run_32b: Callable[..., Job]) -> None:
    kinds = ("parameters", "gradients", "main_parameters", "optimizer")
    stay = [f"{role}.offload.{kind}=false" for role in ("actor", "critic") for kind in kinds]
    job = run_32b("--nodes=2", overrides=stay, VAPO_GPU="h100-80")
    job.wait_for("COMPLETED", "FAILED", seconds=200)
    assert job.state == "FAILED" and job.show("ExitCode") == "5:0", job.outputs()
    said = " ".join(job.log.split())  # the plan's lines are folded
    assert re.search(r"It does not fit: rollout misses .* the fewest nodes are \d", said), job.log
    assert "error: not started" in job.log.splitlines()[-1] and not list(recorder.iterdir())


def test_gpus_that_nobody_knows_are_refused(user: User, recorder: Path, settings: list[str]) -> None:
    job = user.submit("slurm/vapo_tiny.sh", *settings, f"run_dir={user.folder / 'run'}", VAPO_GPU="h900")
    job.wait_for("COMPLETED", "FAILED", seconds=200)
    assert job.state == "FAILED" and "invalid choice: 'h900'" in job.log and not list(recorder.iterdir())


def test_fewer_nodes_are_enough_to_change_the_scale(user: User, recorder: Path, settings: list[str]) -> None:
    job = user.submit("--nodes=1", "slurm/vapo_tiny.sh", *settings, f"run_dir={user.folder / 'run'}")
    job.wait_for("COMPLETED", "FAILED", seconds=200)
    assert job.state == "COMPLETED", job.outputs()
    assert [path.name.split("-")[1] for path in recorder.iterdir()] == ["0"]
    assert "--nnodes=1" in next(recorder.iterdir()).read_text()


def test_an_array_trains_one_seed_each(user: User, recorder: Path, settings: list[str]) -> None:
    user.submit("--array=0-2", "--nodes=1", "slurm/vapo_tiny.sh", *settings)
    wait(lambda: len(list(recorder.iterdir())) == 3, 90, lambda: str(list(user.folder.glob("*.log"))))
    said = [path.read_text() for path in recorder.iterdir()]
    for seed in range(3):
        assert any(f"\nseed={seed}\nname=tiny_seed{seed}\n" in words for words in said)
    ports = {re.search(r"--master-port=(\d+)", words)[1] for words in said}
    assert len(ports) == 3
