"""A service in processes of its own, and a client of it."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

from glm_core.ar import protocol
from glm_core.ar.requests import SampleRequest, Written
from scripts import environment

KEY = "open sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}
START_SECONDS = 300
CODEBOOK = 2048  # of the tiny model


class Fleet:
    """A running service."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self._process = psutil.Process(process.pid)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.metrics = f"http://127.0.0.1:{port + 1}/metrics"

    def replicas(self) -> list[psutil.Process]:
        """The processes that run a model."""
        children = self._process.children(recursive=True)
        return [child for child in children if "ServeReplica" in " ".join(_words(child))]

    def ray_address(self) -> str:
        """Of Ray's control store, which a process has to reach in order to join."""
        words = [word for child in self._process.children(recursive=True) for word in _words(child)]
        found = [word for word in words if word.startswith("--gcs-address=")]
        return found[0].partition("=")[2]

    def get(self, path: str, **more: Any) -> requests.Response:
        return requests.get(self.url + path, **{"headers": HEADERS, "timeout": 60, **more})

    def post(self, path: str, body: Any, **more: Any) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        options = {"headers": HEADERS, "timeout": 60, "stream": True, **more}
        return requests.post(self.url + path, data, **options)

    def write(
        self, asked: list[SampleRequest], progress: Callable[[], None] = lambda: None
    ) -> list[Written]:
        """Samples of one request; raises an OSError if the stream breaks.

        Args:
            progress: called for each event.
        """
        results = {}
        with self.post("/v1/samples", body_of(asked)) as response:
            if response.status_code >= 500:
                raise ConnectionError(response.text)
            assert response.status_code == 200, response.text
            for name, data in events(response):
                progress()
                assert name != "error", data
                if name == "result":
                    results[data["sample"]] = data["file"]
        if len(results) < len(asked):
            raise ConnectionError("the stream ended early")
        return [
            protocol.written_from_text(results[i], request, CODEBOOK)
            for i, request in enumerate(asked)
        ]


def _words(process: psutil.Process) -> list[str]:
    """Its command line; none if it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def body_of(asked: list[SampleRequest]) -> dict:
    return {"samples": [protocol.sample_to_json(one, CODEBOOK) for one in asked]}


def events(response: requests.Response) -> Iterator[tuple[str, dict]]:
    """The name and data of each event, until the stream ends."""
    name = ""
    for line in response.iter_lines():
        key, _, value = line.decode().partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, json.loads(value)


def result_of(response: requests.Response) -> str:
    """The file of a stream with one result."""
    assert response.status_code == 200, response.text
    (data,) = [data for name, data in events(response) if name == "result"]
    return data["file"]


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Fleet]:
    """`python -m service ARGUMENTS` with a key, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(environment.service_python()), "-m", "service", *arguments, "--port", str(port)]
    variables = {**os.environ, "GLM_IMAGE_SERVICE_KEY": KEY, "OMP_NUM_THREADS": "1"}
    log = folder / "service.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=environment.ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_for(process, log)
            yield Fleet(process, port)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait_for(process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "The service listens" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"The service did not start; its log says:\n{log.read_text()}")
        time.sleep(0.2)
