"""An AR service in a process of its own, and the file in which a server's user names it."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from glm_image.scripts import environment
from glm_image.scripts.client import Prompt
from graphs import the

KEY = "open-sesame"
ROOT = Path(__file__).resolve().parents[2]


class RemoteService:
    """It is started and killed any number of times on one port."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self.log = folder / "service.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns at once; a node waits for it."""
        script, port = Path(__file__).parent / "service_app.py", self.address.rpartition(":")[2]
        self._process = subprocess.Popen(
            [str(environment.service_python()), str(script), str(self._model), port, KEY],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://{self.address}/health", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.2)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits for its model, and nothing runs."""
        request = urllib.request.Request(f"http://{self.address}/counts")
        request.add_header("Authorization", f"Bearer {KEY}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer) == [0, 0]

    @property
    def asked(self) -> int:
        """How many requests for samples it has accepted."""
        return self.log.read_text().count('"POST /v1/samples HTTP/1.1" 200')


def name_services(base: Path, address: str) -> None:
    """Writes the file, with entries that work and that do not."""
    folder = base / "user" / "__glm_image"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "glm_image_services.yaml").write_text(
        f"""
studio: {{address: "http://{address}", key: {KEY}, time_limit: 60}}
no ahead: {{address: "http://{address}", key: {KEY}, time_limit: 60, ahead: 0}}
wrong key: {{address: "http://{address}", key: guessed}}
away: {{address: "http://127.0.0.1:9", key: {KEY}, time_limit: 1}}
"""
    )


def remote(prompt: Prompt, service: str = "studio") -> Prompt:
    """A prompt with the AR model of a service in place of its own."""
    prompt[the(prompt, "GLMImageLoadAR")] = {
        "class_type": "GLMImageRemoteAR",
        "inputs": {"service": service},
    }
    return prompt
