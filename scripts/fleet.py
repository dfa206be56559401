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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from . import environment, host
from .client import Prompt
from .demo import set_inputs

NAME = "fleet"
KEY = "GLM_IMAGE_SERVICE_KEY"
START_TIMEOUT_S = 300
SETTINGS = {
    "OMP_NUM_THREADS": "1",  # small networks are fastest so
    "RAY_worker_niceness": "0",  # Ray's 15 leaves a replica little of a busy machine
    "RAY_raylet_start_wait_time_s": "120",  # on a busy machine Ray takes long to start
}
WORKFLOW = environment.ROOT / "workflows" / "api" / "text_to_image.json"


@contextmanager
def service(
    python: Path, model: Path, log: Path, *flags: str, core: int | None = None
) -> Iterator[str]:
    """Runs an AR service and yields its address; its key is in the environment as `KEY`.

    Args:
        core: the one CPU that all of it runs on, once it has started.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ[KEY] = secrets.token_hex(16)
    command = [str(python), "-m", "service", str(model), "--port", str(port), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=environment.ROOT,
            env={**os.environ, **SETTINGS},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the caller, which stops it in order
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            if core is not None:
                _pin(process.pid, core)
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


def _pin(pid: int, core: int) -> None:
    """Keeps a process, its threads and all that it has started on one CPU.

    Ray does not start on a single one when the machine is busy.
    """
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        with suppress(subprocess.CalledProcessError):  # it has just ended
            command = ["taskset", "--all-tasks", "--cpu-list", "--pid", str(core), str(one.pid)]
            subprocess.run(command, check=True, capture_output=True)


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
