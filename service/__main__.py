"""`python -m service MODEL`: the AR model as a service, until it is interrupted."""

import argparse
import os
import re
import signal
import socket
import sys
import threading
from pathlib import Path

import torch

from glm_core.errors import GLMImageError

from .fleet import KEY, Settings, started
from .model import open_ar


def main() -> None:
    arguments = _parser().parse_args()
    gpu, indices = arguments.device or (torch.cuda.is_available(), "")
    if indices and arguments.address:
        raise SystemExit("A cluster gives replicas their GPUs itself: leave out the number.")
    if indices:  # Ray looks for GPUs when it starts
        os.environ["CUDA_VISIBLE_DEVICES"] = indices
    least, most = arguments.replicas
    if not arguments.address:
        _require_model(arguments.model)
        _require_gpus(most if gpu else 0)
        _require_free(arguments.port, arguments.port + 1)
    settings = Settings(
        model=str(arguments.model.resolve()),
        least=least,
        most=most,
        gpu=gpu,
        rows=arguments.rows,
        queued=max(arguments.queue, arguments.rows),
        cpus=1 if gpu else max(1, (os.cpu_count() or 1) // most),
    )
    stop = threading.Event()
    with started(settings, arguments.port, arguments.address):
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put handlers of its own there
            signal.signal(number, lambda *_: stop.set())
        reach = "all addresses" if os.environ.get(KEY) else f"127.0.0.1 only, without a {KEY}"
        _say(f"The service listens on port {arguments.port} ({reach}).")
        stop.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    parser.add_argument("model", type=Path, help="a snapshot's folder, or a file of the AR model")
    parser.add_argument(
        "--replicas", type=_replicas, default=(1, 1), metavar="N | MIN-MAX", help="one a GPU"
    )
    parser.add_argument(
        "--device",
        type=_device,
        default=None,
        help="gpu, gpu:1, gpu:0,2 or cpu; the first there is",
    )
    parser.add_argument("--rows", type=_count, default=16, help="samples that are written together")
    parser.add_argument("--queue", type=_count, default=32, help="samples that may wait a replica")
    parser.add_argument("--port", type=_port, default=8790, help="the next one has the metrics")
    parser.add_argument("--address", help="of a Ray cluster to join; else Ray starts here")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 to 1024")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65534:
        raise argparse.ArgumentTypeError(f"'{text}' is no port from 1 to 65534")
    return int(text)


def _replicas(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    span = _count(least), _count(most or least)
    if span[0] > span[1]:
        raise argparse.ArgumentTypeError(f"'{text}' counts down: write {span[1]}-{span[0]}")
    return span


def _device(text: str) -> tuple[bool, str]:
    """Whether replicas get GPUs, and the numbers of those that they may have."""
    match = re.fullmatch(r"cpu|gpu(?::(\d+(?:,\d+)*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is none of cpu, gpu, gpu:1, gpu:0,2")
    return text != "cpu", match[1] or ""


def _require_model(model: Path) -> None:
    """A broken checkpoint is a sentence here, before any replica tries to load it."""
    try:
        open_ar(model)
    except GLMImageError as error:
        raise SystemExit(str(error)) from None


def _require_gpus(count: int) -> None:
    """Replicas without one would wait for it forever."""
    found = torch.cuda.device_count() if count else 0
    if found < count:
        raise SystemExit(
            f"Each of {count} replicas needs a GPU and {found} can be used: choose fewer replicas, "
            "other numbers in --device, or --device cpu."
        )


def _require_free(*ports: int) -> None:
    for port in ports:
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            raise SystemExit(
                f"Port {port} is not free ({os.strerror(error.errno)}): choose another --port; the "
                "next one is taken for the metrics."
            ) from None


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
