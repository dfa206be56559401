"""`make fleet-demo`: an AR service and two ComfyUI workers on this machine paint eight pictures.

Each worker has two prompts in its queue: one that it paints, and one whose tokens the service
writes meanwhile. `overlap` as argument measures what that saves, on one core for each side.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from . import environment, fleet, host
from .client import Client, Prompt, PromptError
from .demo import OUTPUT, TINY

BASE = environment.CACHE / "fleet"
WORKERS = 2
AT_ONCE = 2  # prompts in a worker's queue
PROMPTS = (
    "a red circle on the left, a blue star on the right, yellow background",
    "a green square in the middle, white background, the text 'ONE' at the bottom",
    "an orange diamond on the right, a purple circle on the left, white background",
    "a blue triangle in the middle, yellow background, the text 'TWO' at the top",
    "a yellow star on the left, a red square on the right, blue background",
    "a purple heart in the middle, white background, the text 'THREE' at the bottom",
    "a red triangle on the left, a green circle on the right, white background",
    "a blue square in the middle, orange background, the text 'FOUR' at the top",
)
SIZE = {"width": 512, "height": 512, "steps": 20, "model_name": TINY.name}
MEASURED = {**SIZE, "width": 256, "height": 256, "steps": 24}
"""Tokens and painting take about as long so."""


@dataclass(frozen=True)
class Painted:
    """One picture: which worker made it, and seconds since the first prompt was queued.

    waited: for its tokens, once its turn came.
    """

    number: int
    worker: int
    queued: float
    begun: float
    waited: float
    painting: float
    ended: float
    file: str


def main(arguments: Sequence[str]) -> None:
    measure = list(arguments) == ["overlap"]
    comfyui, python = environment.host(), environment.service_python()
    OUTPUT.mkdir(exist_ok=True)
    if measure:
        measure_overlap(comfyui, python)
    else:
        demonstrate(comfyui, python)


def demonstrate(comfyui: environment.Host, python: Path) -> None:
    bases = [_base(i) for i in range(WORKERS)]
    _say(f"Starting one AR service and {WORKERS} ComfyUI workers ...")
    with fleet.service(python, TINY, BASE / "service.log", "--rows", "4") as address:
        for base in bases:
            fleet.name_service(base, address)
        with fleet.workers(comfyui, bases, OUTPUT) as addresses:
            painted = paint(addresses, PROMPTS, SIZE)
    _print_table(painted)


def paint(
    addresses: Sequence[str], prompts: Sequence[str], values: dict[str, object], seed: int = 1
) -> list[Painted]:
    """Paints prompts on workers; each takes the next when it has less than `AT_ONCE`.

    A worker gets its prompts one after the other, since of two that are sent at the same time
    either may arrive first.
    """
    numbers = iter(range(len(prompts)))
    since, lock = time.perf_counter(), threading.Lock()
    turns = [threading.Lock() for _ in addresses]
    painted: list[Painted] = []
    errors: list[Exception] = []

    def next_number() -> int | None:
        with lock:
            return None if errors else next(numbers, None)

    def paint_next(worker: int) -> bool:
        with ExitStack() as turn:
            turn.enter_context(turns[worker])
            number = next_number()
            if number is None:
                return False
            graph = fleet.remote_graph({**values, "prompt": prompts[number], "seed": seed + number})
            client = Client(addresses[worker])
            painted.append(_paint_one(client, worker, number, graph, since, turn.close))
            return True

    def work(worker: int) -> None:
        try:
            while paint_next(worker):
                pass
        except Exception as error:  # raised below, in the caller's thread
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(i,), daemon=True)
        for _ in range(AT_ONCE)
        for i in range(len(addresses))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sorted(painted, key=lambda one: one.number)


def _paint_one(
    client: Client,
    worker: int,
    number: int,
    graph: Prompt,
    since: float,
    on_queued: Callable[[], None],
) -> Painted:
    begun = 0.0

    def on_event(event: dict) -> None:
        nonlocal begun
        if event["type"] == "execution_start":
            begun = time.perf_counter() - since

    queued = time.perf_counter() - since
    run = client.run(graph, on_event, on_queued=on_queued)
    waited = run.seconds.get(fleet.node_of(graph, "GLMImageSampleTokens"), 0.0)
    (image,) = run.outputs[fleet.node_of(graph, "SaveImage")]["images"]
    ended = time.perf_counter() - since
    painting = sum(run.seconds.values()) - waited
    return Painted(number, worker, queued, begun, waited, painting, ended, image["filename"])


def measure_overlap(comfyui: environment.Host, python: Path) -> None:
    """Eight pictures with and without asking ahead, the service on one core and one worker on
    another.

    The tokens of the pictures take about half of the time of one after the other.
    """
    base = _base(0)
    _say("Starting one AR service and one ComfyUI worker, on one core each ...")
    with fleet.service(python, TINY, BASE / "service.log", "--rows", "1", core=0) as address:
        fleet.name_service(base, address, ahead=0)
        with fleet.workers(comfyui, [base], OUTPUT, core=1) as addresses:
            paint(addresses, PROMPTS[:1], MEASURED, seed=100)  # loads the models
            walls, pictures = {}, {}
            for name, ahead, seed in (("one after the other", 0, 200), ("ahead", 4, 300)):
                fleet.name_service(base, address, ahead=ahead)
                pictures[name] = paint(addresses, PROMPTS, MEASURED, seed)
                walls[name] = max(one.ended for one in pictures[name])
                _say(f"\n{name}:")
                _print_table(pictures[name])
    one_by_one, ahead = walls.values()
    share = sum(one.waited for one in pictures["one after the other"]) / one_by_one
    _say(
        f"\n{MEASURED['width']}x{MEASURED['height']}, {MEASURED['steps']} steps: tokens are "
        f"{share:.0%} of the time one after the other.\nWall time ahead / one after the other: "
        f"{ahead:.1f} s / {one_by_one:.1f} s = {ahead / one_by_one:.2f}"
    )


def _base(number: int) -> Path:
    base = host.make_base(BASE / f"worker-{number + 1}")
    host.add_model(base, TINY)
    return base


def _print_table(painted: Sequence[Painted]) -> None:
    heads = ("picture", "worker", "queued", "begun", "waited for tokens", "painted in", "done")
    _say("  ".join(heads) + "  file in output/")
    for one in painted:
        times = (one.queued, one.begun, one.waited, one.painting, one.ended)
        cells = [str(one.number + 1), str(one.worker + 1), *(f"{t:.1f} s" for t in times)]
        row = (cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True))
        _say("  ".join(row) + f"  {one.file}")
    wall = max(one.ended for one in painted)
    _say(f"{len(painted)} pictures in {wall:.1f} s")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (PromptError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
