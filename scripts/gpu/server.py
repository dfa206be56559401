"""The tiny model through a real ComfyUI, under the flags that change how memory is used."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
from PIL import Image

from bench.measure import Bench
from bench.presets import Preset

from .. import host
from ..client import Client, Prompt, PromptError
from ..demo import TINY, set_inputs
from ..environment import ROOT, Host
from . import COMFYUI, PAGE
from .report import Report

MEMORY_PACK = Path(__file__).parent / "memory_pack"
WORKFLOWS = ROOT / "workflows" / "api"
PROMPT = "a red circle on the left, yellow background, the text 'HELLO' at the bottom"
FLAVOURS = {
    "default": (),
    "float32": ("--force-fp32",),
    "lowvram": ("--lowvram",),
    "novram": ("--novram",),
    "other allocator": ("--disable-cuda-malloc",),
}
CPU = ("--cpu", "--use-pytorch-cross-attention")
TOLERANCE = {"float32": 0.01}
"""Mean difference from the CPU's picture, of 1; in bf16 other tokens may be drawn."""
FLAT = 0.02
"""The standard deviation of a picture that shows nothing."""
FULL = 10
BARELY_ANY, ALL = 2**20, 2**50
"""Bytes of the device that a server may use."""


def measure(preset: Preset, bench: Bench, report: Report) -> None:
    side, steps = (64, 1) if bench.on_cpu else (256, 8)
    small = {"width": side, "height": side, "steps": steps}
    flavours = {"default": ()} if bench.on_cpu else FLAVOURS
    expected: dict[str, np.ndarray] = {}
    if not bench.on_cpu:
        with report.attempt("the CPU's pictures"), serving("cpu", *CPU) as client:
            expected = Pictures(client, small, report).all(["text to image", "edit, store gpu"])
    for name, flags in flavours.items():
        with report.attempt(name), serving(name.replace(" ", "-"), *flags) as client:
            pictures = Pictures(client, small, report, f"{name}: ")
            found = pictures.all(_chosen(name, expected, bench.on_cpu))
            for case, picture in expected.items():
                difference = float(np.abs(found[case] - picture).mean())
                within = difference <= TOLERANCE.get(name, 1.0)
                report.require(f"{name}: {case}, as on the CPU", within, f"(by {difference:.4f})")
            if name == "default":
                pictures.interrupted()
                if not bench.on_cpu:
                    pictures.full(FULL)


def _chosen(flavour: str, expected: dict, on_cpu: bool) -> list[str] | None:
    """The cases of a flavour, None for all. A CPU only tells whether they run; a few do."""
    if on_cpu:
        return ["text to image", "redo region", "edit, store cpu", "int4"]
    return None if flavour == "default" else list(expected)


def folder(name: str) -> Path:
    """A server's base folder, with the pack that tells its memory."""
    base = host.make_base(Path(os.environ["GPU_WORK"]) / name)
    pack = base / "custom_nodes" / MEMORY_PACK.name
    pack.unlink(missing_ok=True)
    pack.symlink_to(MEMORY_PACK)
    return base


@contextmanager
def serving(name: str, *flags: str) -> Iterator[Client]:
    """A server of the ComfyUI in `.gpu/`, with no page and with the tiny model."""
    base = folder(name)
    host.add_model(base, TINY, "GLM-Image")
    flags = ("--front-end-root", str(PAGE), "--disable-api-nodes", *flags)
    with host.serve(Host(COMFYUI, Path(sys.executable)), base, *flags, threads=1) as address:
        yield Client(address, timeout_s=60)


class Pictures:
    """Cases by name, each a prompt that must give a picture."""

    def __init__(self, client: Client, settings: dict, report: Report, before: str = "") -> None:
        self.client, self.report, self.before = client, report, before
        self.settings = settings | {"temperature": 0.0}  # no draw tells apart what rounding does

    def cases(self) -> dict[str, Callable[[], Prompt]]:
        def case(workflow: str, **inputs) -> Callable[[], Prompt]:
            return lambda: self.prompt(workflow, **inputs)

        return {
            "text to image": case("text_to_image"),
            "locked layout": case("lock_layout_change_prompt"),
            "redo region": case("redo_region"),
            **{f"edit, store {s}": case("edit_image", store=s) for s in ("gpu", "cpu", "auto")},
            **{d: case("text_to_image", weight_dtype=d) for d in ("fp8_e4m3fn", "int8", "int4")},
        }

    def prompt(self, workflow: str, **inputs) -> Prompt:
        prompt = json.loads((WORKFLOWS / f"{workflow}.json").read_text())
        set_inputs(prompt, {"prompt": PROMPT, **self.settings, **inputs})
        return prompt

    def all(self, chosen: list[str] | None = None) -> dict[str, np.ndarray]:
        found = {}
        for name, make in self.cases().items():
            if chosen is not None and name not in chosen:
                continue
            with self.report.attempt(self.before + name):
                found[name] = self.picture(make())
                spread = float(found[name].std())
                self.report.require(self.before + name, spread > FLAT, f"(spread {spread:.3f})")
        return found

    def picture(self, prompt: Prompt) -> np.ndarray:
        """float32 [H, W, 3], 0 to 1, of the last node that saves one."""
        run = self.client.run(prompt)
        saving = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
        (image,) = self.client.images(run, saving[-1])
        with Image.open(io.BytesIO(image)) as opened:
            return np.asarray(opened.convert("RGB"), dtype=np.float32) / 255

    def interrupted(self) -> None:
        """Interrupts the AR model in the middle; the next prompt must give the same picture."""
        name = f"{self.before}after an interrupt"
        with self.report.attempt(name):
            prompt, stopped = self.prompt("text_to_image", seed=3), []
            before = self.picture(deepcopy(prompt))

            def stop(event: dict) -> None:
                if event["type"] == "progress" and not stopped:
                    stopped.append(event)
                    self.client.interrupt()

            set_inputs(prompt, {"seed": 4})
            run = self.client.run(prompt, stop)
            set_inputs(prompt, {"seed": 3, "filename_prefix": "again"})
            same = np.array_equal(self.picture(prompt), before)
            self.report.require(name, same and run.interrupted_at is not None)

    def full(self, times: int) -> None:
        """Runs out of memory again and again; the next prompt must give the same picture."""
        name = f"{self.before}out of memory {times} times"
        with self.report.attempt(name):
            before = self.picture(self.prompt("text_to_image", seed=5))
            sentences = []
            for seed in range(times):
                self.client.post("/free", {"unload_models": True})
                self.client.post("/memory", [BARELY_ANY])
                try:
                    self.client.run(self.prompt("text_to_image", seed=100 + seed))
                except PromptError as error:
                    sentences.append(str(error))
            self.client.post("/memory", [ALL])
            self.report.row(name, f"{len(sentences)} sentences, as {sentences[:1]}")
            again = self.prompt("text_to_image", seed=5, filename_prefix="again")
            same = np.array_equal(self.picture(again), before)
            self.report.require(f"{name}: the next picture is the same", same)
