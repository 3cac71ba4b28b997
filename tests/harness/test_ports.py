"""Ports that nobody takes between their choice and their use."""

from __future__ import annotations

import socket

from tests.harness.ports import _first_of_the_kernels, free_port


def test_ports_differ_and_are_not_the_kernels_to_give_away() -> None:
    found = [free_port() for _ in range(20)]
    assert len(set(found)) == 20 and all(10_000 <= port < _first_of_the_kernels() for port in found)


def test_one_that_is_taken_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        assert taken.getsockname()[1] not in [free_port() for _ in range(63)]
