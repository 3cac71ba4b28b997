"""Options of checkpoints, and of snapshots in CPU memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.errors import Refused
from trainer.options.field import option, refuse_unprintable


@dataclass
class Memory:
    """Snapshots in CPU memory, kept by a process of their own when the trainer dies."""

    every: int = option(0, low=0)  # steps; 1: every step; 0: none, and what is durable is saved while training waits
    dir: str = ""  # on a tmpfs, of this user alone; empty: a directory of the run under /dev/shm
    keep_s: float = option(3600, low=1)  # seconds that the memory stays when the run does not come back
    start_s: float = option(60, low=1)  # that the process that keeps it may take to start
    flush_rate: float = option(0, low=0)  # bytes a second at most from memory to checkpoint.dir; 0: as fast as it goes
    check_fence: bool = False  # find writes to the state while it is copied, at twice the price of a snapshot


@dataclass
class Checkpoint:
    dir: str = "${run.dir}/checkpoints"
    every: int = option(100, low=0)  # steps; 0: only after the last
    keep: int = option(2, low=1)  # newest generations that stay
    keep_every: int = option(0, low=0)  # and those of every so many steps, for ever; 0: none
    keep_best: int = option(0, low=0)  # and so many of the lowest held-out loss, of those saved where it was evaluated
    fail_after: int = option(0, low=0)  # durable saves that fail in a row and end the run; 0: it goes on without them
    check_replicas: bool = True  # compare what several ranks hold before it becomes durable
    memory: Memory = field(default_factory=Memory)

    def refuse(self) -> None:
        """Refuse a directory's name that is more than a name, and a store that is unknown or keeps nothing."""
        refuse_unprintable("checkpoint.dir", self.dir)
        if "://" in self.dir:
            self._refuse_store()

    def _refuse_store(self) -> None:
        from checkpointing import LayoutError, NotFoundError, open_storage  # no numpy where there is no store

        try:
            open_storage(self.dir)
        except LayoutError as error:
            raise Refused(f"checkpoint.dir={error} Mend that, or type the path of a directory.") from None
        except NotFoundError as error:
            raise Refused(
                f"checkpoint.dir={error} Type --config-dir DIRECTORY with the one that has the store's "
                "checkpoint/NAME.py, or a directory's path."
            ) from None
        if self.dir.startswith("memory://"):
            raise Refused(
                f"checkpoint.dir={self.dir} would be gone with the process, and other processes do not see it. Type "
                "the path of a directory, or checkpoint.memory.every=1 for snapshots in memory."
            )
