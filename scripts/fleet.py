"""A fleet on this machine: one AR service, and ComfyUI workers that have no AR model."""

import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from . import environment, host
from .client import Prompt
from .demo import set_inputs

NAME = "fleet"
KEY = "GLM_IMAGE_SERVICE_KEY"
START_TIMEOUT_S = 300
WORKFLOW = environment.ROOT / "workflows" / "api" / "text_to_image.json"


@contextmanager
def service(
    python: Path, model: Path, log: Path, *flags: str, core: int | None = None
) -> Iterator[str]:
    """Runs an AR service and yields its address; its key is in the environment as `KEY`.

    Args:
        core: the one CPU that all of it runs on.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ[KEY] = secrets.token_hex(16)
    command = [str(python), "-m", "service", str(model), "--port", str(port), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*_on(core), *command],
            cwd=environment.ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the caller, which stops it in order
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def workers(
    comfyui: environment.Host, bases: Sequence[Path], output: Path, core: int | None = None
) -> Iterator[list[str]]:
    """Runs a ComfyUI server on each base folder and yields their addresses."""
    with ExitStack() as stack:
        before = os.sched_getaffinity(0)
        if core is not None:
            os.sched_setaffinity(0, {core})  # the servers inherit it
        stack.callback(os.sched_setaffinity, 0, before)
        flags = ("--output-directory", str(output))
        yield [stack.enter_context(host.serve(comfyui, base, *flags, threads=1)) for base in bases]


def name_service(base: Path, address: str, **settings: object) -> None:
    """Writes the user's file of services: one, called `NAME`."""
    folder = base / "user" / "__glm_image"
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"address": address, "key_env": KEY, **settings}
    lines = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in entry.items())
    (folder / "glm_image_services.yaml").write_text(f"{NAME}:\n{lines}")


def remote_graph(values: dict[str, object]) -> Prompt:
    """The text-to-image workflow with the service's AR model, and its values by input."""
    graph = json.loads(WORKFLOW.read_text())
    for node in graph.values():
        if node["class_type"] == "GLMImageLoadAR":
            node |= {"class_type": "GLMImageRemoteAR", "inputs": {"service": NAME}}
    set_inputs(graph, values)
    return graph


def node_of(graph: Prompt, kind: str) -> str:
    (node_id,) = (key for key, node in graph.items() if node["class_type"] == kind)
    return node_id


def _on(core: int | None) -> list[str]:
    return [] if core is None else ["taskset", "-c", str(core)]


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    tail = "\n".join(log.read_text().splitlines()[-30:])
    raise RuntimeError(f"The service did not start; its log {log} ends with:\n{tail}")
