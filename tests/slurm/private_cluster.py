"""A real Slurm of several nodes on one machine, for one user: root, network namespaces, nothing outside a folder.

Each node is a network and UTS namespace on a bridge, so that it has a host name, an address and ports of its own, as on
a cluster. Accelerators are pretended by files. `missing()` says what the machine lacks for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

SUBNET = "10.213.77"
BRIDGE = "vapo-slurm"
SPARE = "spare"
"""A node like those for jobs without GPUs, which only partition `spared` has beside them."""
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "gcc")
HEADER = Path("/usr/include/slurm/slurm.h")
HERE = Path(__file__).parent


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=program_path()) is None]
    absent += [] if HEADER.is_file() else [str(HEADER)]
    if absent:
        return f"{', '.join(absent)} not installed (tests/slurm/install.sh)"
    if os.geteuid() != 0:
        return "a private Slurm needs root, for network namespaces"
    probe = subprocess.run(["ip", "link", "add", f"{BRIDGE}-p", "type", "bridge"], capture_output=True, text=True)
    if probe.returncode:
        return f"no network namespaces can be made here: {probe.stderr.strip()}"
    subprocess.run(["ip", "link", "del", f"{BRIDGE}-p"], check=True)
    return None


def program_path() -> str:
    """Where daemons are looked for too."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


@dataclass
class Cluster:
    """Started by `with`; `folder` must have a short path (sockets)."""

    folder: Path
    cpu_nodes: int = 2
    gpu_nodes: int = 16
    _processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        cpu = [f"node{i + 1}" for i in range(self.cpu_nodes)]
        return [*cpu, SPARE, *(f"gpu{i + 1}" for i in range(self.gpu_nodes))]

    @property
    def environment(self) -> dict[str, str]:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "VAPO"))}
        return keep | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": program_path(), "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> Cluster:
        self._alone = open(f"/tmp/{BRIDGE}.lock", "w")  # until closed: names and addresses are the machine's
        fcntl.flock(self._alone, fcntl.LOCK_EX)
        try:
            self._write_configuration()
            self._make_network()
            self._start_daemons()
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel_jobs()
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        self._remove_network()
        self._alone.close()

    def _remove_network(self) -> None:
        for i, node in enumerate(self.nodes):
            for pid in subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split():
                _kill(int(pid))
            subprocess.run(["ip", "link", "del", f"vs{i}"], capture_output=True)  # namespaces let go of it late
            subprocess.run(["ip", "netns", "del", node], capture_output=True)
            shutil.rmtree(f"/etc/netns/{node}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)

    def run(self, *command: object, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
        """A client of the cluster; `more` are environment variables."""
        return subprocess.run(
            list(map(str, command)), env=self.environment | more, capture_output=True, text=True, timeout=timeout
        )

    def end_jobs(self) -> None:
        """So that a job which hangs is one test's, not all later ones'."""
        self._cancel_jobs()
        _wait(lambda: not self.run("squeue", "--noheader").stdout, 60, "an end of all jobs")

    def _cancel_jobs(self) -> None:
        self.run("scancel", "--user=root", timeout=20)

    @contextlib.contextmanager
    def plugin(self, source: Path) -> Iterator[None]:
        """Jobs that start meanwhile have a SPANK plugin, built from C."""
        library, configuration = self._built(source), self.folder / "plugstack.conf"
        configuration.write_text(f"required {library}\n")
        yield
        configuration.unlink()

    def _built(self, source: Path, *options: object) -> Path:
        library = self.folder / f"{source.stem}.so"
        subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, *options], check=True)
        return library

    def _build_process_tracking(self) -> Path:
        """Build proctrack/task_only from Slurm's own proctrack/linuxproc; return the folder of Slurm's plugins."""
        original = next(Path("/usr/lib").glob("*/slurm-wlm/proctrack_linuxproc.so"))
        where = f'-DWHOLE_TREE="{self.folder}/whole_tree"'
        self._built(HERE / "proctrack_task_only.c", where, original, f"-Wl,-rpath,{original.parent}")
        return original.parent

    @contextlib.contextmanager
    def signals_to_all_processes(self) -> Iterator[None]:
        """Meanwhile signals reach every process of a job, as proctrack/linuxproc sends them, not its tasks alone."""
        mark = self.folder / "whole_tree"
        mark.touch()
        try:
            yield
        finally:
            mark.unlink()

    @contextlib.contextmanager
    def lost(self, node: str) -> Iterator[None]:
        """Meanwhile a node is as one that lost power: its daemon and all processes on it are killed."""
        for pid in subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split():
            _kill(int(pid))
        self._processes[node].wait(timeout=60)
        try:
            yield
        finally:
            self._start_node(node)

    def _start_node(self, node: str) -> None:
        """Start a node's daemon in its namespaces."""
        daemon = ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")]
        inside = ["unshare", "--uts", "sh", "-c", f'hostname {node} && exec "$@"', "sh", *daemon]
        self._processes[node] = self._start(f"slurmd-{node}", ["ip", "netns", "exec", node, *inside])

    def _start(self, name: str, command: list[str]) -> subprocess.Popen:
        with open(self.folder / f"{name}.out", "ab") as out:
            return subprocess.Popen(command, env=self.environment, stdout=out, stderr=out, start_new_session=True)

    def _write_configuration(self) -> None:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        for name in ("state", "devices"):
            (folder / name).mkdir(exist_ok=True)
        for i in range(8):
            (folder / "devices" / f"nvidia{i}").symlink_to("/dev/null")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        plugins = self._build_process_tracking()
        host = socket.gethostname().split(".")[0]
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (folder / "gres.conf").write_text(
            f"NodeName=gpu[1-{self.gpu_nodes}] Name=gpu Type=h100 File={folder}/devices/nvidia[0-7] "
            f"Flags=nvidia_gpu_env\n"
        )
        (folder / "slurm.conf").write_text(
            dedent(f"""\
            ClusterName=private
            SlurmctldHost={host}({SUBNET}.254)
            SlurmUser=root
            AuthType=auth/munge
            AuthInfo=socket={folder}/munge.socket
            CryptoType=crypto/munge
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool-%n
            SlurmctldPidFile={folder}/slurmctld.pid
            SlurmdPidFile={folder}/slurmd-%n.pid
            SlurmctldLogFile={folder}/slurmctld.log
            SlurmdLogFile={folder}/slurmd-%n.log
            SlurmctldPort=16817
            SlurmdPort=16818
            PluginDir={folder}:{plugins}
            ProctrackType=proctrack/task_only
            TaskPlugin=task/none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_CPU_Memory
            DefMemPerCPU=100
            GresTypes=gpu
            SlurmdParameters=config_overrides
            SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
            EnforcePartLimits=ALL
            JobRequeue=1
            ReturnToService=2
            KillWait=3
            MpiDefault=none
            SlurmdTimeout=10
            JobCompType=jobcomp/none
            AccountingStorageType=accounting_storage/none
            PreemptType=preempt/partition_prio
            PreemptMode=REQUEUE
            """)
            + "".join(self._node_lines())
            + f"PartitionName=batch Nodes=node[1-{self.cpu_nodes}] Default=YES PriorityTier=10 MaxTime=1440 State=UP\n"
            + f"PartitionName=spared Nodes=node[1-{self.cpu_nodes}],{SPARE} PriorityTier=10 State=UP\n"
            + f"PartitionName=low Nodes=node[1-{self.cpu_nodes}] PriorityTier=1 GraceTime=120 State=UP\n"
            + f"PartitionName=h100 Nodes=gpu[1-{self.gpu_nodes}] PriorityTier=10 State=UP\n"
        )

    def _node_lines(self) -> list[str]:
        lines = []
        for i, node in enumerate(self.nodes):
            gpus = node.startswith("gpu")
            kind = "CPUs=96 RealMemory=2000000 Gres=gpu:h100:8" if gpus else "CPUs=4 RealMemory=16000"
            weight = 2 if node == SPARE else 1  # the spare comes last
            lines.append(f"NodeName={node} NodeAddr={SUBNET}.{i + 1} {kind} Weight={weight} State=UNKNOWN\n")
        return lines

    def _make_network(self) -> None:
        self._remove_network()  # of a cluster whose tests were killed
        hosts = "127.0.0.1 localhost\n" + "".join(f"{SUBNET}.{i + 1} {n}\n" for i, n in enumerate(self.nodes))
        hosts += f"{SUBNET}.254 {socket.gethostname()}\n"
        _ip(f"link add {BRIDGE} type bridge", f"addr add {SUBNET}.254/24 dev {BRIDGE}", f"link set {BRIDGE} up")
        for i, node in enumerate(self.nodes):
            configuration = Path("/etc/netns", node)
            configuration.mkdir(parents=True, exist_ok=True)
            (configuration / "hosts").write_text(hosts)
            (configuration / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
            _ip(
                f"netns add {node}",
                f"link add vs{i} type veth peer name eth0 netns {node}",
                f"link set vs{i} master {BRIDGE}",
                f"link set vs{i} up",
                f"-n {node} addr add {SUBNET}.{i + 1}/24 dev eth0",
                f"-n {node} link set eth0 up",
                f"-n {node} link set lo up",
            )

    def _start_daemons(self) -> None:
        f = self.folder
        munge = [f"--{name}={f}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._processes["munged"] = self._start(
            "munged", ["munged", "--foreground", "--force", f"--key-file={f}/munge.key", "--num-threads=2", *munge]
        )
        _wait(lambda: (f / "munge.socket").exists(), 60, "munged")
        self._processes["slurmctld"] = self._start("slurmctld", ["slurmctld", "-D", "-f", str(f / "slurm.conf")])
        for node in self.nodes:
            self._start_node(node)

    def _wait_until_idle(self) -> None:
        def idle() -> bool:
            found = self.run("timeout", "5", "sinfo", "-h", "-N", "-t", "idle", "-o", "%N")
            return len(set(found.stdout.split())) == len(self.nodes)

        _wait(idle, 200, "nodes")


def _ip(*commands: str) -> None:
    for command in commands:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, f"ip {command}: {done.stderr}"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
        os.kill(pid, signal.SIGKILL)


def _wait(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} not ready within {seconds} s")
        time.sleep(0.1)
