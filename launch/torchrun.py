"""torchrun: its command for one machine of one or many, and the exit status that the trainer had."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.command import TRAINER, Command, python, threads
from launch.options import Call, bounds, check_sizes
from launch.supervise import MORE_S, say_how, supervise
from trainer.elastic.preemption import not_ignored, was_warned
from trainer.errors import Refused
from trainer.options.config import Config
from trainer.options.launch import TorchrunLaunch

# A machine that is lost is noticed after three heartbeats; one that comes late is waited for this long.
MEET_S = 60.0  # how long a machine may be out of reach, as one that still boots
PROBE_S = 10.0  # one of us answers at once
ALONE = ("--standalone", "--local-addr=127.0.0.1")  # one machine, whose own name may lead nowhere
RENDEZVOUS = "last_call_timeout=15,keep_alive_interval=3,keep_alive_max_attempt=3"


def check(call: Call) -> None:
    options = call.config.launch
    assert isinstance(options, TorchrunLaunch)
    least, most = bounds(options.nodes, "launch.nodes")
    check_sizes(call.config, [nodes * options.nproc for nodes in range(least, most + 1)])
    if most > 1 and not options.endpoint:
        raise Refused(
            f"launch.nodes={options.nodes} machines have no place to meet. Type --endpoint HOST:PORT, with a host of "
            "them and the same on each."
        )
    if options.endpoint:
        _check_endpoint(options.endpoint)
    if options.restarts and call.config.resume != "auto":
        raise Refused(
            f"resume={call.config.resume} would start there again whenever processes are started again. Type "
            "--restarts 0 with it, or leave it out once the run has saved something."
        )


def _check_endpoint(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise Refused(f"--endpoint {endpoint} is no HOST:PORT. Type one such as node1:29400.")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise Refused(
            f"--endpoint {endpoint}: {host} cannot be found ({error.strerror or error}). Type a host that every "
            "machine can reach."
        ) from None


def plan(call: Call) -> Command:
    options, grace_s = call.config.launch, call.config.elastic.grace_s
    assert isinstance(options, TorchrunLaunch)
    least, most = bounds(options.nodes, "launch.nodes")
    where = list(ALONE)
    if options.endpoint:
        where = ["--rdzv-backend=c10d", f"--rdzv-endpoint={options.endpoint}", f"--rdzv-id={options.job}"]
        join = f"join_timeout={math.ceil(call.config.elastic.join_s)}"
        where += [f"--rdzv-conf={join},{RENDEZVOUS}", f"--nnodes={least}:{most}"]
    rest = [f"--nproc-per-node={options.nproc}", f"--max-restarts={options.restarts}", "--monitor-interval=1"]
    rest += [f"--log-dir={options.log_dir}", "--tee=3"]
    rest += patient(call.config.elastic.signal, grace_s)
    # Shared, its store is told to the first machines only, and one that comes later waits for it in vain.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if options.endpoint else {}
    return command_of([*where, *rest], call.overrides, options.nproc, own_store)


def patient(warning: str, grace_s: float) -> list[str]:
    """The flags by which torchrun, where it is typed by hand, hands signals on and gives trainers time to save.

    Without them SIGUSR1 ends it and leaves its trainers behind.
    """
    known = _flags()
    names = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", f"SIG{warning.upper().removeprefix('SIG')}"]
    signals = dict.fromkeys(number.name for number in not_ignored(signal.Signals[name] for name in names))
    given = {"--signals-to-handle": ",".join(signals), "--shutdown-timeout": f"{int(grace_s + MORE_S)}"}
    return [f"{flag}={value}" for flag, value in given.items() if flag in known]


def _flags() -> set[str]:
    """The flags of the torchrun that is installed."""
    from torch.distributed.run import get_args_parser

    return {flag for action in get_args_parser()._actions for flag in action.option_strings}


def run(call: Call, command: Command) -> int:
    options = call.config.launch
    assert isinstance(options, TorchrunLaunch)
    if options.endpoint and "SLURM_JOB_ID" not in os.environ:  # where the port is the job's own
        _check_way(options.endpoint)
    try:
        Path(options.log_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.log_dir):
            pass
    except OSError as error:
        raise Refused(
            f"--log-dir {options.log_dir} cannot be written: {error.strerror or error}. Make it writable, or type "
            "--log-dir=DIRECTORY with one that can."
        ) from None
    return run_torchrun(command, call.config)


def _check_way(endpoint: str) -> None:
    """Check that the place to meet is within reach, and nothing else is there. Nobody yet is fine: one is first.

    torchrun waits for a stranger on its port without end, and prints the stack of every attempt.
    """
    host, _, port = endpoint.rpartition(":")
    deadline = time.monotonic() + MEET_S
    while not was_warned():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            break
        except ConnectionRefusedError:
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise Refused(
                    f"--endpoint {endpoint} cannot be reached from here ({error.strerror or error}). Start the command "
                    "on that machine too, see that no firewall is between, and try `python -m launch doctor`."
                ) from None
            time.sleep(1)
    if was_warned():
        return
    # Its time begins when torch is imported, which may take minutes on a cold file system.
    probe = (
        "import os, threading; from datetime import timedelta; from torch.distributed import TCPStore; "
        f"threading.Timer({PROBE_S}, os._exit, [1]).start(); "
        f"TCPStore({host!r}, {int(port)}, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)); "
        "os._exit(0)"
    )
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):  # it is still there
            raise Refused(
                f"--endpoint {endpoint} is taken: something listens there that is no torchrun. Type another port, the "
                "same on every machine."
            )


def command_of(
    arguments: Sequence[str], overrides: Sequence[str], num_processes: int, more: Mapping[str, str] | None = None
) -> Command:
    words = python("-m", "torch.distributed.run", *arguments, str(TRAINER), *overrides)
    return Command(words, {**threads(num_processes), **(more or {})})


def run_torchrun(command: Command, config: Config) -> int:
    """Run torchrun in this process; the trainer's status, or 128 + n where signal n ended it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    os.environ.update(command.environment)
    # Its reports of failed children repeat what the children said, at length; the status below is the short form.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = parse_args(list(command.words[3:]))  # type: ignore[no-untyped-call]
    cause = ""

    def start() -> int:
        nonlocal cause
        try:
            run(arguments)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            rank, exitcode = find_cause({rank: failure.exitcode for rank, failure in error.failures.items()})
            cause = f"rank {rank}"
            return exitcode if exitcode > 0 else 128 - exitcode
        return 0

    try:
        status = supervise(start, warning=config.elastic.signal, grace_s=config.elastic.grace_s)
    except (RendezvousError, ConnectionError, TimeoutError) as error:
        print(f"launch: the machines did not meet: {first_line(error)}. {_remedy(arguments)}", file=sys.stderr)
        return 1
    say_how(status, cause)
    return status


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _remedy(arguments: object) -> str:
    endpoint = getattr(arguments, "rdzv_endpoint", "") or "this machine"
    return (
        f"Start the same command on every machine, see that {endpoint} can be reached from each and that its port is "
        "free, and try `python -m launch doctor`."
    )


def find_cause(exitcodes: Mapping[int, int]) -> tuple[int, int]:
    """The rank whose end explains the others', and its exit code (negative: the signal that ended it).

    A rank that loses another in the middle of a step fails of it, often before the launcher sees who was first. So a
    signal from outside explains most, then a refusal, then a failure, and last what the launcher itself terminated.
    """

    def weight(item: tuple[int, int]) -> tuple[int, int]:
        rank, code = item
        order = 3 if code == -signal.SIGTERM else 0 if code < 0 else 1 if code == 2 else 2
        return order, rank

    return min(exitcodes.items(), key=weight)
