"""A ComfyUI server: its base folder with the pack linked in, its start and its stop."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .environment import ROOT, Host

PACK = "ComfyUI-GLM-Image"
START_TIMEOUT_S = 300


def make_base(folder: Path, templates: Path | None = None) -> Path:
    """A base folder for ComfyUI with this checkout as its only custom node pack.

    Args:
        templates: a folder of graphs that the page's template browser lists in place of those in
            `workflows/`. The pack is then a folder of links, one to each part of the checkout.
    """
    for name in ("custom_nodes", "input", "models/glm_image", "models/loras"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pack = folder / "custom_nodes" / PACK
    if pack.is_dir() and not pack.is_symlink():
        for link in pack.iterdir():
            link.unlink()
        pack.rmdir()
    pack.unlink(missing_ok=True)
    if templates is None:
        pack.symlink_to(ROOT)
        return folder
    pack.mkdir()
    for part in (part for part in ROOT.iterdir() if not part.name.startswith(".")):
        (pack / part.name).symlink_to(templates if part.name == "workflows" else part)
    return folder


def add_model(base: Path, snapshot: Path, name: str | None = None) -> str:
    """The model's name, after linking a snapshot's folder into the models of a base folder."""
    link = base / "models" / "glm_image" / (name or snapshot.name)
    if link.is_dir() and not link.is_symlink():
        raise SystemExit(f"{link} is another model: rename {snapshot}, or give that model's name.")
    link.unlink(missing_ok=True)
    link.symlink_to(snapshot)
    return link.name


@contextmanager
def serve(
    host: Host,
    base: Path,
    *flags: str,
    port: int | None = None,
    threads: int | None = None,
    accelerator: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Runs a server on `base` and yields its address; its log is `base/server.log`.

    The server stops when the block ends, also by SIGTERM.

    Args:
        threads: CPU threads of the server. Small networks are fastest with one, above all if
            other work runs at the same time.
        accelerator: environment variables that give the server an accelerator. Without them it
            uses what torch finds, or the CPU.
    """
    port = port or _free_port()
    _require_free(port)
    log = base / "server.log"
    command = [str(host.python), "main.py", "--base-directory", str(base), "--port", str(port)]
    command += ["--database-url", f"sqlite:///{base}/comfyui.db", "--disable-auto-launch"]
    command += [*([] if accelerator else _device_flags()), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(accelerator or {})}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    _copy_example_picture(host, base)
    with _exit_on_sigterm(), log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=host.path, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            address = f"127.0.0.1:{port}"
            _wait_for(address, server, log)
            _require_pack(log)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that the block ends and its server is stopped."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _copy_example_picture(host: Host, base: Path) -> None:
    """Copies `example.png`, which every ComfyUI has as an input; the workflows name it."""
    shutil.copy(host.path / "input" / "example.png", base / "input")


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://{address}/system_stats", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    tail = "\n".join(log.read_text().splitlines()[-30:])
    raise RuntimeError(f"ComfyUI did not start; its log {log} ends with:\n{tail}")


def _require_pack(log: Path) -> None:
    lines = log.read_text().splitlines()
    if any("IMPORT FAILED" in line and line.endswith(PACK) for line in lines):
        about = "\n".join(line for line in lines if PACK in line)
        raise RuntimeError(f"ComfyUI could not import the pack; see its log {log}:\n{about}")


def _device_flags() -> list[str]:
    import torch  # here, so that making a base folder does not have to import it

    if torch.accelerator.is_available():
        return []
    return ["--cpu", "--use-pytorch-cross-attention"]


def _require_free(port: int) -> None:
    """Raises SystemExit if the port is taken: another program would answer for the server."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise SystemExit(
            f"Port {port} is not free ({os.strerror(error.errno)}): stop the program that uses it, "
            "or choose another port with PORT=."
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
