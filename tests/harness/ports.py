"""Ports for process groups on this machine."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

# Each process that asks has a stretch of ports, below those that the kernel gives away by itself: neither another
# test process nor somebody's outgoing connection takes one between its choice and its use.
_STRETCH = 64
_taken = itertools.count()


def free_port() -> int:
    """A port that nobody listens on and that this process did not name lately."""
    below = _first_of_the_kernels()
    stretches = (below - 10_000) // _STRETCH
    first = 10_000 + os.getpid() % stretches * _STRETCH
    for number in itertools.islice(_taken, 4 * _STRETCH):
        port = first + number % _STRETCH
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"none of the ports {first} to {first + _STRETCH - 1} is free")


def _first_of_the_kernels() -> int:
    try:
        return max(12_000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    except (OSError, ValueError):
        return 32_768
