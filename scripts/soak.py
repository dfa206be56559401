"""`make soak`: fifty prompts of many kinds through one server, whose memory must not grow.

A fresh server first makes each kind's picture; every later picture of the kind must be the same.
After the first two rounds of all kinds, the server's memory may grow by at most 64 MiB.
"""

import json
import sys
import tempfile
from contextlib import AbstractContextManager
from io import BytesIO

import psutil
from PIL import Image

from . import environment, host
from .client import Client, Prompt
from .demo import BASE, TINY, override, prepare_model

MODEL = TINY.name
ROUNDS = 25
MAX_GROWTH = 64 * 2**20  # bytes
WORKFLOWS = environment.ROOT / "workflows" / "api"
PLAN = {
    "model_name": MODEL, "weight_dtype": "default", "width": 128, "height": 96,
    "batch_size": 1, "references": 0, "strategy": "auto", "ar": "auto", "decoder": "auto",
    "glyph": "auto", "vae": "auto", "ar_split": "", "decoder_split": "", "reserve_gb": 1.0,
}  # fmt: skip
SPLITS = {"ar_split": "cpu=0-2,cpu=3-5", "decoder_split": "cpu=0-1,cpu=2-4"}


def main() -> None:
    prepare_model(None)
    with tempfile.TemporaryDirectory() as output:
        soak(output)


def soak(output: str) -> None:
    def server() -> AbstractContextManager[str]:
        flags = ("--output-directory", output)
        return host.serve(environment.host(), host.make_base(BASE), *flags, threads=1)

    kinds = {
        "text to image": workflow("text_to_image", 128, 96),
        "another size": workflow("text_to_image", 96, 160),
        "a locked layout": workflow("lock_layout_change_prompt", 128, 96),
        "a region": workflow("redo_region", 128, 96),
        "two references": workflow("two_references", 128, 96),
        "a plan": planned(workflow("text_to_image", 128, 96), strategy="least memory"),
        "split models": planned(workflow("text_to_image", 128, 96), **SPLITS),
    }
    expected = {}
    for name, prompt in kinds.items():
        with server() as address:
            expected[name] = pictures(Client(address), prompt, seed=7)
        _say(f"{name}: made by a fresh server")
    with server() as address:
        client, process = Client(address), psutil.Process().children()[0]
        sizes = []
        for i in range(ROUNDS):
            name = list(kinds)[i % len(kinds)]
            # Another seed first, so that the server does not answer from its cache.
            pictures(client, kinds[name], seed=1000 + i)
            if pictures(client, kinds[name], seed=7) != expected[name]:
                raise SystemExit(f"Round {i}, {name}, differs from a fresh server's picture.")
            sizes.append(process.memory_info().rss)
            _say(f"{i + 1:3} {name:<18} {sizes[-1] / 2**20:7.0f} MB")
    growth = sizes[-1] - max(sizes[: 2 * len(kinds)])
    if growth > MAX_GROWTH:
        raise SystemExit(f"The server grew by {growth / 2**20:.0f} MB after its first rounds.")
    _say(f"{2 * ROUNDS} prompts, all equal; growth {growth / 2**20:.0f} MB")


def workflow(name: str, width: int, height: int) -> Prompt:
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text())
    override(prompt, {"WIDTH": str(width), "HEIGHT": str(height), "STEPS": "2"}, MODEL)
    return prompt


def planned(prompt: Prompt, **settings) -> Prompt:
    """The prompt with a device plan connected to every loader."""
    for node in prompt.values():
        if node["class_type"].startswith("GLMImageLoad"):
            node["inputs"]["device_plan"] = ["plan", 0]
    prompt["plan"] = {"class_type": "GLMImageDevicePlan", "inputs": PLAN | settings}
    return prompt


def pictures(client: Client, prompt: Prompt, seed: int) -> list[bytes]:
    """The pixels of all pictures of a run with `seed` as every seed in the graph."""
    for node in prompt.values():
        if isinstance(node["inputs"].get("seed"), int):
            node["inputs"]["seed"] = seed
    run = client.run(prompt)
    saved = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    return [pixels(picture) for key in saved for picture in client.images(run, key)]


def pixels(png: bytes) -> bytes:
    """A picture's bytes, without the prompt that ComfyUI writes into the file."""
    return Image.open(BytesIO(png)).tobytes()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
