"""A real Slurm on this machine: one node, two faked GPUs, all state in a temporary folder, on free ports.

By hand, as root on Debian or Ubuntu (Slurm's packages are installed where they are missing):

    python tests/slurm/cluster.py                   a shell in which snakemake --profile slurm has a cluster
    python tests/slurm/cluster.py sinfo             one command instead of the shell
    python tests/slurm/cluster.py --accounting      with sacct, which needs MariaDB

Slurm's own tools read /etc/slurm/slurm.conf, so one cluster lives at a time, and a configuration that this file did not
write is never touched. A cluster beside another one, or beside a real Slurm:

    unshare --mount sh -c 'mount -t tmpfs none /etc/slurm && python tests/slurm/cluster.py'
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SETTINGS = Path("/etc/slurm")
MARK = "# Written by tests/slurm/cluster.py\n"
PACKAGES = {
    "munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client",
    "slurmdbd": "slurmdbd", "mariadbd": "mariadb-server",
}  # fmt: skip
ONLY_ACCOUNTING = ("slurmdbd", "mariadbd")
GPUS = 2
FOLDERS = "espalier-slurm-"  # what the names of clusters' folders begin with, before the process that made them
PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"

SLURM = """\
ClusterName=espalier
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
# A job that goes back to the queue waits as long as its credential is valid.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
# Memory is watched instead of enforced by cgroups, which a container may not have.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=3600
KillWait=3
InactiveLimit=0
GresTypes=gpu
{accounting}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} Gres=gpu:{gpu}:{gpus} Feature={gpu},fast
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=gpu Nodes={host} MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes={host} MaxTime=INFINITE PriorityTier=100
"""

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database_daemon_port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
"""

DATABASE_DAEMON = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={database_daemon_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""


class Unavailable(Exception):
    """No cluster can be had on this machine; the sentence says why."""


class Cluster:
    """A running cluster, as a context. It is the machine's only one, because /etc/slurm is.

    Partitions: cpu (default), gpu, and urgent, whose jobs send jobs of the others back to the queue. `enforce` is
    Slurm's AccountingStorageEnforce, such as "associations"; the account that root may use is "espalier".
    """

    def __init__(
        self, *, cpus: int = 32, memory_mb: int = 256000, gpu: str = "a100", accounting: bool = False, enforce: str = ""
    ):
        self.sizes = {"cpus": cpus, "memory_mb": memory_mb, "gpu": gpu, "gpus": GPUS}
        self.accounting, self.enforce = accounting, enforce
        self.node = socket.gethostname().split(".")[0]
        self.daemons: dict[str, subprocess.Popen] = {}
        self.written: list[Path] = []

    def __enter__(self) -> Cluster:
        install(self.accounting)
        self.lock = _only_one()
        _clear_up()
        # Not in a folder of pytest's: the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDERS}{os.getpid()}-", dir="/tmp"))
        self.folder.chmod(0o755)
        try:
            self._configure()
            self._start("munged", "--foreground", "--force", *self._munge_files())
            self._until("munge", lambda: (self.folder / "munge.socket").exists())
            if self.accounting:
                self._start_accounting()
            self.start_controller()
            if self.accounting:
                self._add_account()
            self.start_node()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every job and every process of the cluster, and remove its folder and its configuration."""
        for name in ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged"):
            if process := self.daemons.pop(name, None):
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                process.wait()
        _end_processes(self.folder)
        for path in self.written:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        os.close(self.lock)

    def run(self, *command: str) -> str:
        """Run a command of Slurm's and return what it prints; raises CalledProcessError."""
        finished = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        if finished.returncode:
            raise subprocess.CalledProcessError(finished.returncode, command, finished.stdout, finished.stderr)
        return finished.stdout

    def environment(self) -> dict[str, str]:
        """Return the environment in which Slurm's commands find this cluster, and by which its jobs are known."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "PATH": PATH, "ESPALIER_CLUSTER": str(self.folder)}

    def jobs(self) -> list[dict[str, str]]:
        """Return the jobs that the controller knows, ended ones too, by Slurm's own names of what it knows of each."""
        lines = [line for line in self.run("scontrol", "--oneliner", "show", "job").splitlines() if "JobId=" in line]
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def start_controller(self) -> None:
        """Start slurmctld, which finds its jobs again in its state; return when it answers."""
        self._start("slurmctld", "-D")
        self._until("slurmctld", lambda: "UP" in self.run("scontrol", "ping"))

    def kill_controller(self) -> None:
        """Kill slurmctld with SIGKILL, once it has written down what runs, which it does every five seconds."""
        time.sleep(6)
        process = self.daemons.pop("slurmctld")
        process.kill()
        process.wait()

    def start_node(self) -> None:
        """Start slurmd; return when the node takes jobs."""
        self._start("slurmd", "-D", "-N", self.node)
        states = ("sinfo", "--noheader", "--format=%T")
        self._until("slurmd", lambda: set(self.run(*states).split()) & {"idle", "mixed", "allocated"})

    def drain(self) -> None:
        """Have the node start no further job; those that run go on."""
        self.run("scontrol", "update", f"nodename={self.node}", "state=drain", "reason=test")

    def resume(self) -> None:
        """Give a drained node back."""
        self.run("scontrol", "update", f"nodename={self.node}", "state=resume")

    def preempt(self, *, seconds: int = 2) -> str:
        """Submit an urgent job that needs all GPUs, so that jobs which have one go back to the queue; return its id."""
        wrap = f"sleep {seconds}"
        options = ("--partition=urgent", f"--gres=gpu:{GPUS}", "--cpus-per-task=1", "--mem=100", "--time=5")
        return self.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", wrap).strip()

    def _configure(self) -> None:
        """Write the configuration, the key of munge and the devices of the GPUs."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(1024))
        for number in range(GPUS):
            os.mknod(self.folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # /dev/null once more
        names = ("controller_port", "node_port", "database_daemon_port", "database_port")
        self.values = {
            **self.sizes,
            **dict(zip(names, _free_ports(len(names)), strict=True)),
            "host": self.node, "folder": self.folder, "password": secrets.token_hex(8),
        }  # fmt: skip
        accounting = ACCOUNTING.format(**self.values) if self.accounting else ""
        if self.enforce:
            accounting += f"AccountingStorageEnforce={self.enforce}\n"
        self._write("slurm.conf", SLURM.format(**self.values, accounting=accounting))
        gpus = f"{self.folder}/gpu[0-{GPUS - 1}]"
        self._write("gres.conf", f"NodeName={self.node} Name=gpu Type={self.sizes['gpu']} File={gpus}\n")
        self._write("cgroup.conf", "CgroupAutomount=no\n")

    def _write(self, name: str, text: str) -> None:
        path = SETTINGS / name
        path.write_text(MARK + text, encoding="utf-8")
        self.written.append(path)

    def _munge_files(self) -> list[str]:
        names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
        return [f"--{key}={self.folder / name}" for key, name in names.items()] + [f"--seed-file={self.folder}/seed"]

    def _start_accounting(self) -> None:
        """Start a MariaDB of the cluster's own, and slurmdbd."""
        data, sock, port = self.folder / "database", self.folder / "mariadb.socket", self.values["database_port"]
        options = ["--no-defaults", f"--datadir={data}", "--user=root"]
        self.run("mariadb-install-db", *options, "--skip-test-db", "--auth-root-authentication-method=normal")
        self._start(
            "mariadbd", *options, f"--socket={sock}", f"--port={port}", "--bind-address=127.0.0.1",
            f"--pid-file={self.folder}/mariadbd.pid", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        client = ("mariadb", "--no-defaults", f"--socket={sock}", "--user=root", "--execute")
        self._until("mariadbd", lambda: self.run(*client, "select 1"))
        user = "'slurm'@'127.0.0.1'"
        self.run(
            *client,
            f"create database slurm_acct_db; create user {user} identified by '{self.values['password']}';"
            f" grant all on slurm_acct_db.* to {user}",
        )
        self._write("slurmdbd.conf", DATABASE_DAEMON.format(**self.values))
        (SETTINGS / "slurmdbd.conf").chmod(0o600)  # or slurmdbd refuses it
        self._start("slurmdbd", "-D")
        self._until("slurmdbd", lambda: self.run("sacctmgr", "--noheader", "show", "cluster") is not None)

    def _add_account(self) -> None:
        self._until("slurmdbd", lambda: "espalier" in self.run("sacctmgr", "--noheader", "show", "cluster"))
        self.run("sacctmgr", "--immediate", "add", "account", "espalier")
        self.run("sacctmgr", "--immediate", "add", "user", "root", "account=espalier")

    def _start(self, name: str, *arguments: str) -> None:
        """Start a daemon as a child of this process; in a session of its own, so that Ctrl+C does not end it first."""
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(name, path=PATH), *arguments],
                env=self.environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def _until(self, name: str, ready: Callable[[], object], seconds: float = 20) -> None:
        """Wait until a daemon is ready; raises RuntimeError with the end of its log."""
        end, last = time.monotonic() + seconds, ""
        while time.monotonic() < end and all(process.poll() is None for process in self.daemons.values()):
            try:
                if ready():
                    return
            except subprocess.CalledProcessError as error:
                last = error.stderr
            time.sleep(0.1)
        logs = sorted(self.folder.glob(f"{name}*.log")) + sorted(self.folder.glob(f"{name}*.out"))
        last += "\n".join(path.read_text(errors="replace")[-2000:] for path in logs)
        raise RuntimeError(f"{name} did not start:\n{last}")


def install(accounting: bool) -> None:
    """Install the packages that are missing; raises Unavailable."""
    if os.geteuid():
        raise Unavailable("A Slurm cluster for tests is started by root only.")
    needed = [name for name in PACKAGES if accounting or name not in ONLY_ACCOUNTING]
    missing = [PACKAGES[name] for name in needed if not shutil.which(name, path=PATH)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise Unavailable(f"Without apt-get, install {', '.join(missing)} by hand.")
    print(f"installing {', '.join(missing)} …", file=sys.stderr, flush=True)
    for action in (["update"], ["install", "--no-install-recommends", *missing]):
        command = ["apt-get", "--yes", "--quiet=2", *action]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise Unavailable(f"apt-get does not install {', '.join(missing)}: {finished.stderr.strip()[-500:]}")


def _only_one() -> int:
    """Return the descriptor of a lock on /etc/slurm; raises Unavailable if a cluster is or may be in use here."""
    SETTINGS.mkdir(exist_ok=True)
    lock = os.open(SETTINGS / ".espalier.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Unavailable("A cluster of tests/slurm/cluster.py is running already.") from None
    for name in ("slurm.conf", "gres.conf", "cgroup.conf", "slurmdbd.conf"):
        path = SETTINGS / name
        if path.exists() and not path.read_text(encoding="utf-8").startswith(MARK):
            raise Unavailable(f"{path} was not written by tests/slurm/cluster.py and is left alone.")
    return lock


def _clear_up() -> None:
    """Remove what clusters left whose process was killed."""
    for folder in Path("/tmp").glob(f"{FOLDERS}*-*"):
        if not psutil.pid_exists(int(folder.name.removeprefix(FOLDERS).partition("-")[0])):
            _end_processes(folder)
            shutil.rmtree(folder)


def _end_processes(folder: Path) -> None:
    """Kill a cluster's processes: those that have its files open, what they started, and what is left of jobs."""
    for _ in range(50):
        left = [process for process in psutil.process_iter() if _belongs(process, folder)]
        for process in [*left, *itertools.chain(*map(_descendants, left))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if not left:
            return
        time.sleep(0.1)
    raise RuntimeError(f"Processes of the cluster do not end: {left}")


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _belongs(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        variables = process.environ()
        if "SLURM_JOB_ID" in variables and variables.get("ESPALIER_CLUSTER") == str(folder):
            return True
        return any(file.path.startswith(f"{folder}/") for file in process.open_files())
    return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus", type=int, default=32, help="CPUs that the node claims to have (32)")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd, so that sacct answers")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run on the cluster (a shell)")
    arguments = parser.parse_args()
    try:
        with Cluster(cpus=arguments.cpus, accounting=arguments.accounting) as cluster:
            print(cluster.run("sinfo"), "Leave the shell to take the cluster down.", sep="\n", file=sys.stderr)
            command = arguments.command or [os.environ.get("SHELL", "/bin/sh")]
            status = subprocess.run(command, env=cluster.environment(), check=False).returncode
    except Unavailable as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
