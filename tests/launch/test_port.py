"""A port of a job's own, unless it is taken."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from launch.port import FIRST, SIZE, is_free, port_for
from tests.harness.processes import ROOT


def test_the_same_number_gives_the_same_port_and_a_taken_one_is_passed_over() -> None:
    port = port_for(4711)
    assert FIRST <= port < FIRST + SIZE and port_for(4711) == port and port_for(4711 + SIZE) == port
    with socket.create_server(("", port)):
        assert not is_free(port) and port_for(4711) != port
    assert is_free(port)


@pytest.mark.usefixtures("processes")
def test_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "launch.port", "7"], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) >= FIRST + 7
