"""A real SLURM of several nodes on this one machine, for tests.

Needs the programs of Debian's slurm-wlm (``apt-get install -y slurm-wlm``; it pulls munge).
Everything runs as the calling user, listens on loopback only, and keeps all its files below
one directory::

    with Cluster.start("/tmp/lab") as cluster:
        subprocess.run(["sbatch", "job.sh"], env=cluster.environment, check=True)
        cluster.kill_node("n2")      # a node crash
        cluster.start_node("n2")     # it comes back, fit for jobs

Processes are recognised by what their environment says (``/proc/PID/environ``), so that a
cluster whose owner was killed can be cleaned up by the next ``start`` in the same directory,
and a watcher process cleans up by itself as soon as the owner is gone.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "slurm-wlm"
DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("munge", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
MARK = "EVERSHARD_LAB_DIRECTORY"  # in the environment of the daemons (slurmstepd inherits it)
MARK_NODE = "EVERSHARD_LAB_NODE"
_FOREIGN = re.compile(r"^(SLURM|SBATCH|SRUN|SALLOC|SCANCEL|SQUEUE|SINFO|SCONTROL|SPRIO|SACCT)")
_SEARCH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


class ClusterError(RuntimeError):
    """The cluster did not do in time what was asked of it."""


def missing_programs() -> list[str]:
    """Programs that are not installed (all come with Debian's ``slurm-wlm``)."""
    return [name for name in DAEMONS + CLIENTS if shutil.which(name, path=_SEARCH) is None]


def why_no_cluster() -> str:
    """What this machine lacks for one; empty where a cluster can be started."""
    if missing := missing_programs():
        return f"{', '.join(missing)} are not installed (Debian's {PACKAGE}; .ci/run installs it as root)"
    try:
        _host()
    except ClusterError as error:
        return str(error)
    return ""


def _program(name: str) -> str:
    found = shutil.which(name, path=_SEARCH)
    if found is None:
        raise ClusterError(f"{name} is not installed: apt-get install -y {PACKAGE}")
    return found


# --------------------------------------------------------------------------- processes


def _environ_of(pid: int) -> dict[str, str]:
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    items = (item.partition(b"=") for item in data.split(b"\0") if b"=" in item)
    return {os.fsdecode(key): os.fsdecode(value) for key, _, value in items}


def _process_table() -> dict[int, int]:
    """Parent of each live process (zombies left out)."""
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state not in "ZX":
                table[int(entry)] = int(parent)
    return table


def _own_line(table: Mapping[int, int]) -> set[int]:
    """This process and its ancestors: never to be killed."""
    line, pid = set(), os.getpid()
    while pid and pid not in line:
        line.add(pid)
        pid = table.get(pid, 0)
    return line


def _processes_of(directory: Path, node: str | None = None, *, jobs_only: bool = False) -> set[int]:
    """Daemons, job steps and job processes of the cluster in `directory` (of one node of it).

    A job process is known by SLURM_CONF and SLURMD_NODENAME, which SLURM gives to each, or by
    an ancestor that is one; only a daemonised process with an emptied environment gets away, as
    it does from SLURM's own proctrack/linuxproc. A client outside a job (sbatch, squeue, srun)
    is the caller's and not counted.
    """
    table = _process_table()
    conf = str(directory / "slurm.conf")
    found = set()
    for pid in table:
        env = _environ_of(pid)
        if env.get(MARK) == str(directory):
            belongs = node is None or env.get(MARK_NODE) == node
            if belongs and not (jobs_only and not _is_stepd(pid)):
                found.add(pid)
        elif env.get("SLURM_CONF") == conf and "SLURMD_NODENAME" in env and node in (None, env["SLURMD_NODENAME"]):
            found.add(pid)
    grown = True
    while grown:
        new = {pid for pid, parent in table.items() if parent in found and pid not in found}
        found |= new
        grown = bool(new)
    return found - _own_line(table)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _is_stepd(pid: int) -> bool:
    return _comm(pid).startswith("slurmstepd")


def _wait(condition: Callable[[], bool], timeout: float, what: Callable[[], str] | str, interval: float = 0.1) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {timeout:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(interval)


def _kill_all(find: Callable[[], set[int]], timeout: float = 20, children: Iterable = ()) -> None:
    """SIGKILL until a look finds no more of them; two empty looks, as a fork may be under way."""
    empty = 0

    def gone() -> bool:
        nonlocal empty
        pids = find()
        # Those who would tell of the others' end first: a crash tells nothing.
        for pid in sorted(pids, key=lambda pid: _comm(pid) not in ("slurmd", "slurmstepd")):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for child in children:
            child.poll()  # reaps it
        empty = 0 if pids else empty + 1
        return empty >= 2

    _wait(gone, timeout, lambda: f"processes live on after SIGKILL: {sorted(find())}", 0.05)


def kill_leftovers(directory: str | os.PathLike) -> None:
    """Kill whatever still runs of a cluster in this directory, whoever started it."""
    path = Path(directory).resolve()
    _kill_all(lambda: _processes_of(path))


# ------------------------------------------------------------------------------ cluster


def _host() -> str:
    """This machine's name; SLURM binds to the address that it means, which is to be loopback."""
    host = socket.gethostname().partition(".")[0]
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        addresses = set()
    if not addresses or not all(address.startswith("127.") for address in addresses):
        raise ClusterError(
            f"the name of this machine, {host}, must mean a loopback address "
            f"(add '127.0.0.1 {host}' to /etc/hosts), not {sorted(addresses)}"
        )
    return host


def _free_ports(count: int) -> list[int]:
    """Loopback ports free now, outside the range that the kernel hands out by itself."""
    low = 32768
    with contextlib.suppress(OSError, ValueError):
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    pool = range(10000, low) if low > 11000 else range(61000, 65500)
    ports: list[int] = []
    for port in random.SystemRandom().sample(pool, min(len(pool), 500)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError("no free loopback ports")


@dataclass
class Cluster:
    directory: Path
    nodes: tuple[str, ...]
    cpus: int
    environment: dict[str, str]
    """What to give to sbatch, squeue, srun...: the caller's environment with SLURM_CONF."""
    ports: dict[str, int]
    _daemons: dict[str, subprocess.Popen] = field(default_factory=dict)
    _started: dict[str, int] = field(default_factory=dict)
    _watcher: subprocess.Popen | None = None

    @classmethod
    def start(
        cls,
        directory: str | os.PathLike,
        nodes: Iterable[str] = ("n1", "n2"),
        cpus: int = 2,
        *,
        memory: int = 4000,
        requeue_delay: int = 5,
        kill_wait: int = 5,
        slurmd_timeout: int = 10,
        min_job_age: int = 300,
        extra: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Cluster:
        """Start the daemons and wait until each node takes jobs.

        An earlier cluster in the same directory is killed and its state thrown away; logs go on.
        `requeue_delay`: a requeued job waits this many seconds and one more (AuthInfo's
        cred_expire, 5 at least; SLURM's default is 120). `kill_wait`: seconds from SIGTERM to
        SIGKILL (default 30). `extra`: lines of slurm.conf, by key, which replace those set here.
        """
        if requeue_delay < 5:
            raise ValueError("SLURM takes 5 or more; for less it goes back to 120 without a word")
        path = Path(directory).resolve()
        nodes = tuple(nodes)
        longest = f"{path}/spool.{max(nodes, key=len)}/{max(nodes, key=len)}_999999.4294967295"
        if len(os.fsencode(longest)) > 100:
            raise ClusterError(f"the path of the directory is too long for UNIX sockets: {path}")
        for name in DAEMONS + CLIENTS:
            _program(name)
        _host()
        path.mkdir(parents=True, exist_ok=True)
        kill_leftovers(path)
        for name in ("state", "munge", *(f"spool.{node}" for node in nodes)):
            shutil.rmtree(path / name, ignore_errors=True)
            (path / name).mkdir()
            (path / name).chmod(0o755)
        (path / "log").mkdir(exist_ok=True)
        names = ("slurmctld", *nodes)
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        environment = {k: v for k, v in os.environ.items() if not _FOREIGN.match(k)}
        environment["SLURM_CONF"] = str(path / "slurm.conf")
        self = cls(path, nodes, cpus, environment, ports)
        self._write_files(memory, requeue_delay, kill_wait, slurmd_timeout, min_job_age, extra or {})
        try:
            self._watch()
            self._start_all(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    # ---- what tests do to it

    def kill_node(self, name: str, *, noticed: bool = False) -> None:
        """A crash of the node: SIGKILL to its slurmd, job steps and job processes, all at once.

        SLURM finds out by itself some 20 to 30 s later (see `wait_down`). `noticed`: tell it at
        once that the node is DOWN, which has the same effects on the node's jobs.
        """
        self._check(name)
        _kill_all(lambda: _processes_of(self.directory, name), children=self._daemons.values())
        self._daemons.pop(name, None)
        if noticed:
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=crash")

    def wait_down(self, name: str, timeout: float = 90) -> None:
        """Wait until SLURM has found a killed node to be DOWN (its jobs fail or are requeued)."""
        self._check(name)
        _wait(lambda: self.node_state(name).startswith("DOWN"), timeout, lambda: f"{name} is {self.node_state(name)}")

    def kill_job_processes(self, name: str) -> None:
        """SIGKILL to the job steps (slurmstepd) and job processes of a node; its slurmd stays."""
        self._check(name)
        _kill_all(lambda: _processes_of(self.directory, name, jobs_only=True))

    def start_node(self, name: str, timeout: float = 60) -> None:
        """Start the node's slurmd, and wait until the node takes jobs (a DOWN state is cleared)."""
        self._check(name)
        running = self._daemons.get(name)
        if running is None or running.poll() is not None:
            self._start_slurmd(name)
        self._wait_nodes((name,), timeout)

    def node_state(self, name: str) -> str:
        """As ``scontrol show node`` says it: IDLE, MIXED, IDLE+COMPLETING, DOWN+NOT_RESPONDING...

        Not sinfo's, which can say mix or alloc of an idle or DOWN node from counts gone stale.
        """
        done = self.run("scontrol", "show", "node", name, check=False)
        found = re.search(r"\bState=(\S+)", done.stdout)
        return found[1].upper().replace("*", "+NOT_RESPONDING") if found else ""

    def run(
        self, *command: str, check: bool = True, timeout: float = 30, **options
    ) -> subprocess.CompletedProcess[str]:
        """Run a client (sbatch, squeue, scontrol...) with this cluster's environment."""
        options = {"env": self.environment, "text": True, "capture_output": True, "stdin": subprocess.DEVNULL} | options
        done = subprocess.run([_program(command[0]), *command[1:]], timeout=timeout, **options)
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip()}")
        return done

    def processes(self) -> set[int]:
        """Daemons, job steps and job processes of this cluster that live now."""
        return _processes_of(self.directory)

    def stop(self) -> None:
        """Kill the daemons and all that runs in jobs; wait until nothing of it lives."""
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            self._watcher.stdin.close()
            self._watcher = None
        _kill_all(lambda: _processes_of(self.directory), children=self._daemons.values())
        for daemon in self._daemons.values():
            daemon.wait(timeout=5)
        self._daemons.clear()

    # ---- how it is done

    def _check(self, name: str) -> None:
        if name not in self.nodes:
            raise ValueError(f"no node {name!r}: {self.nodes}")

    def _write_files(
        self,
        memory: int,
        requeue_delay: int,
        kill_wait: int,
        slurmd_timeout: int,
        min_job_age: int,
        extra: Mapping[str, str],
    ) -> None:
        host = _host()
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        root = self.directory
        settings = {
            "ClusterName": "lab",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": self.ports["slurmctld"],
            "SlurmUser": user,
            "SlurmdUser": user,
            # Each binds to the address that its name means rather than to all: loopback.
            "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            "AuthInfo": f"socket={root}/munge/socket,cred_expire={requeue_delay}",
            "StateSaveLocation": root / "state",
            "SlurmdSpoolDir": f"{root}/spool.%n",
            "SlurmctldPidFile": root / "slurmctld.pid",
            "SlurmdPidFile": f"{root}/slurmd.%n.pid",
            "SlurmctldLogFile": root / "log/slurmctld.log",
            "SlurmdLogFile": f"{root}/log/slurmd.%n.log",
            "PlugStackConfig": root / "plugstack.conf",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "JobCompType": "jobcomp/none",
            "MailProg": "/bin/true",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "bf_interval=1,sched_interval=2,batch_sched_delay=0",
            "SlurmdParameters": "config_overrides",
            "SlurmdTimeout": slurmd_timeout,
            "SlurmctldTimeout": 30,
            "KillWait": kill_wait,
            "MinJobAge": min_job_age,
            "JobRequeue": 1,
            "ReturnToService": 2,
        } | dict(extra)
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.ports[node]} "
            f"Sockets=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory={memory}"
            for node in self.nodes
        ]
        lines += [f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP"]
        (root / "slurm.conf").write_text("\n".join(lines) + "\n")
        (root / "plugstack.conf").write_text("")
        (root / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        key = os.open(root / "munge/key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(key, os.urandom(128))
        os.close(key)

    def _watch(self) -> None:
        # Reads a pipe that this process alone writes to: its end means that this process is gone.
        command = [sys.executable, "-I", str(Path(__file__).resolve()), "--watch", str(self.directory)]
        self._watcher = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def _launch(self, key: str, daemon: str, *arguments: str, node: str = "") -> None:
        env = self.environment | {MARK: str(self.directory), MARK_NODE: node}
        with open(self.directory / "log" / f"{key}.out", "ab") as log:
            self._daemons[key] = subprocess.Popen(
                [_program(daemon), *arguments],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.directory,
            )

    def _start_slurmd(self, node: str) -> None:
        self._started[node] = int(time.time())
        self._launch(node, "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"], node=node)

    def _start_all(self, timeout: float) -> None:
        munge = self.directory / "munge"
        # --force: munged wants its socket reachable by all users; only this one is to use it.
        self._launch(
            "munged",
            "munged",
            "--foreground",
            "--force",
            f"--socket={munge}/socket",
            f"--key-file={munge}/key",
            f"--pid-file={munge}/pid",
            f"--seed-file={munge}/seed",
            f"--log-file={self.directory}/log/munged.log",
        )
        self._wait_up(
            "munged", timeout, lambda: self.run("munge", "-n", f"--socket={munge}/socket", check=False).returncode == 0
        )
        self._launch("slurmctld", "slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"])
        self._wait_up("slurmctld", timeout, lambda: " UP" in self.run("scontrol", "ping", check=False).stdout)
        for node in self.nodes:
            self._start_slurmd(node)
        self._wait_nodes(self.nodes, timeout)

    def _wait_up(self, key: str, timeout: float, answers: Callable[[], bool]) -> None:
        def up() -> bool:
            if self._daemons[key].poll() is not None:
                raise ClusterError(f"{key} ended: {self._tail(key)}")
            return answers()

        _wait(up, timeout, lambda: f"{key} does not answer: {self._tail(key)}")

    def _wait_nodes(self, nodes: Iterable[str], timeout: float) -> None:
        for node in nodes:

            def fit(node: str = node) -> bool:
                if not self._registered(node):
                    return False
                base, *flags = self.node_state(node).split("+")
                if "NOT_RESPONDING" in flags:
                    return False
                if base == "DOWN" or {"DRAIN", "FAIL"} & set(flags):
                    self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
                    return False
                return base in ("IDLE", "MIXED", "ALLOCATED")

            self._wait_up(node, timeout, fit)

    def _registered(self, node: str) -> bool:
        """Whether slurmctld knows of the node's present slurmd, and not only of one before it."""
        done = self.run(
            "scontrol", "show", "node", node, check=False, env=self.environment | {"SLURM_TIME_FORMAT": "%s"}
        )
        found = re.search(r"SlurmdStartTime=(\d+)", done.stdout)
        return found is not None and int(found[1]) >= self._started[node]

    def _tail(self, key: str) -> str:
        text = ""
        for log in (f"{key}.out", f"{key}.log", f"slurmd.{key}.log"):
            with contextlib.suppress(OSError):
                text += (self.directory / "log" / log).read_text(errors="replace")[-1500:]
        return text.strip() or "(nothing in its log)"


def _watch_main(directory: str) -> None:
    while os.read(0, 4096):
        pass
    kill_leftovers(directory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"] and len(sys.argv) == 3:
        _watch_main(sys.argv[2])
    else:
        sys.exit("usage: import this module; see its head")
