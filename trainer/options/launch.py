"""Options of how the processes are started; a choice of the group is a target of `python -m launch`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.options.field import option


@dataclass
class Launch:
    """How `python -m launch` starts the processes; each option is one of its flags too."""

    nproc: int = option(1, low=1)  # processes a machine


@dataclass
class LocalLaunch(Launch):
    """Processes on this machine, by torchrun."""


@dataclass
class TorchrunLaunch(Launch):
    """One torchrun a machine: the same command is started on each of them."""

    nodes: str = "1"  # machines, or MIN:MAX of them: after one is lost the run goes on with those that are left
    endpoint: str = ""  # HOST:PORT of the machine where they meet; needed for more than one
    job: str = "${run.name}"  # machines meet under this name
    restarts: int = option(3, low=0)  # times that processes are started again after a failure, where nodes may be lost
    log_dir: str = "${run.dir}/logs"  # what every process prints, beside the terminal


@dataclass
class DeepspeedLaunch(Launch):
    """The `deepspeed` launcher."""

    hostfile: str = ""  # its list of machines and slots; empty: nproc processes here
    port: int = option(0, low=0, high=65535)  # where they meet; 0: any on this machine, 29500 with a hostfile


@dataclass
class AccelerateLaunch(Launch):
    """`accelerate launch`."""

    config_file: str = ""  # its configuration; empty: nproc processes here
    port: int = option(0, low=0, high=65535)  # where they meet; 0: any


@dataclass
class SlurmLaunch(Launch):
    """A job of SLURM, which goes on after preemptions, time limits and lost machines."""

    nodes: str = "1"  # machines, or MIN-MAX of them
    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""  # such as 8:00:00; the job is requeued when it is over
    gpus: int = option(0, low=0)  # a machine (--gres=gpu:N)
    cpus: int = option(0, low=0)  # a machine (--cpus-per-task); 0: SLURM's default
    mem: str = ""  # a machine, such as 200G
    exclude: str = ""  # machines that are not wanted
    dependency: str = ""  # such as afterok:1234
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch, such as --constraint=a100
    srun: list[str] = field(default_factory=list)  # and of srun, such as --container-image=IMAGE
    setup: list[str] = field(default_factory=list)  # lines of the script before anything runs, such as module load cuda
    health: str = ""  # a command that a healthy machine ends with status 0, beside the checks of our own
    warn_s: int = option(120, low=10)  # from the warning before the time limit to the end
    max_requeues: int = option(3, low=0)  # in a row without a new committed step, before the job gives up
    parallel_points: int = option(0, low=0)  # of a sweep, jobs that run at a time; 0: all


# Options whose values may be secret, such as `export HF_TOKEN=...`: they go into no record of a run, wherever it lies.
SECRET = ("launch.setup",)


def is_secret(override: str) -> bool:
    """Whether an override sets an option whose value may be secret."""
    return override.lstrip("+~").partition("=")[0] in SECRET
