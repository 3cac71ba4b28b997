"""`python -m launch.port NUMBER`: a port of this machine that is free, the same one for a number where it can be."""

from __future__ import annotations

import socket
import sys

FIRST, SIZE = 20_000, 10_000  # below the ports that systems give away by themselves


def port_for(number: int) -> int:
    for offset in range(SIZE):
        port = FIRST + (number + offset) % SIZE
        if is_free(port):
            return port
    raise OSError(f"no port from {FIRST} to {FIRST + SIZE - 1} is free")


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


if __name__ == "__main__":
    print(port_for(int(sys.argv[1])))
