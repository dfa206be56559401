"""The server of the scripts: it stops with its script and refuses a taken port."""

import signal
import socket
import subprocess
import sys

import pytest
from glm_image.scripts import environment, host

SERVE = """
import sys, time
from pathlib import Path
from scripts import environment, host
with host.serve(environment.host(), host.make_base(Path(sys.argv[1])), threads=1) as address:
    print(address, flush=True)
    time.sleep(600)
"""


def _listens(address: str) -> bool:
    name, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((name, int(port))) == 0


def test_sigterm_stops_the_server_too(tmp_path):
    script = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path)],
        cwd=environment.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with script:
        address = script.stdout.readline().strip()
        assert _listens(address)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 128 + signal.SIGTERM
    assert not _listens(address)


def test_a_taken_port_is_named_before_anything_starts(tmp_path):
    base = host.make_base(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(SystemExit, match=f"Port {port} is not free .*PORT="),
            host.serve(environment.host(), base, port=port),
        ):
            pass
    assert not (base / "server.log").exists()
