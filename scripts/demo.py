"""`make demo`: one text-to-image run through a real server, with each stage's time.

The environment's PROMPT, WIDTH, HEIGHT, STEPS, SEED and MODEL (a name under the demo's models, or
the path of a hub snapshot) replace what `workflows/api/text_to_image.json` says.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from . import environment, host
from .client import Client, Event, Prompt, PromptError

BASE = environment.CACHE / "demo"
MODELS = BASE / "models" / "glm_image"
OUTPUT = environment.ROOT / "output"
WORKFLOW = environment.ROOT / "workflows" / "api" / "text_to_image.json"
RANDOM_MODEL = "random-small"


def main() -> None:
    comfyui = environment.host()
    prompt = json.loads(WORKFLOW.read_text())
    model = prepare_model(os.environ.get("MODEL"))
    override(prompt, os.environ, model)
    started = time.perf_counter()
    with demo_server(comfyui, model) as address:
        _print_stage("Start ComfyUI", time.perf_counter() - started)
        run = Client(address).run(prompt, StagePrinter(prompt))
    for outputs in run.outputs.values():
        for image in outputs.get("images", []):
            print(OUTPUT / image["subfolder"] / image["filename"])


def demo_server(
    comfyui: environment.Host, model: str, port: int | None = None
) -> AbstractContextManager[str]:
    """The demo's server; on a busy machine the random model's threads would wait for each other."""
    threads = 1 if model == RANDOM_MODEL else None
    base = host.make_base(BASE)
    return host.serve(comfyui, base, "--output-directory", str(OUTPUT), port=port, threads=threads)


def prepare_model(model: str | None) -> str:
    """The model's name in the demo's models, after putting it there."""
    if model and Path(model).expanduser().is_dir():
        snapshot = Path(model).expanduser().resolve()
        MODELS.mkdir(parents=True, exist_ok=True)
        link = MODELS / snapshot.name
        link.unlink(missing_ok=True)
        link.symlink_to(snapshot)
        return snapshot.name
    if model:
        return model
    make_random_model(MODELS / RANDOM_MODEL)
    return RANDOM_MODEL


def make_random_model(folder: Path) -> None:
    """Writes the random checkpoint, unless the same script has done so before."""
    script = (environment.ROOT / "scripts" / "random_checkpoint.py").read_text()
    made_by = folder / "made_by.py"
    if made_by.is_file() and made_by.read_text() == script:
        return
    print(f"making a small random checkpoint in {folder.relative_to(environment.ROOT)}")
    command = [sys.executable, "-m", "scripts.random_checkpoint", str(folder)]
    subprocess.run(command, check=True, cwd=environment.ROOT)
    made_by.write_text(script)


def override(prompt: Prompt, wanted: Mapping[str, str], model: str) -> None:
    """Puts the model and the wanted values into every node input of that name."""
    values = {"model_name": model}
    for variable, name, kind in (
        ("WIDTH", "width", int),
        ("HEIGHT", "height", int),
        ("STEPS", "steps", int),
        ("SEED", "seed", int),
        ("PROMPT", "value", str),
    ):
        if wanted.get(variable):
            values[name] = kind(wanted[variable])
    set_inputs(prompt, values)


def set_inputs(prompt: Prompt, values: Mapping[str, object]) -> None:
    """Puts values into every node input of their names that is no link.

    Masks keep their size: they are stretched over the picture, whatever its size.
    """
    for node in (node for node in prompt.values() if node["class_type"] != "SolidMask"):
        for name in values.keys() & node["inputs"].keys():
            if not isinstance(node["inputs"][name], list):
                node["inputs"][name] = values[name]


class StagePrinter:
    """Prints a line when a node ends, with the time it took."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.running: str | None = None
        self.since = 0.0

    def __call__(self, event: Event) -> None:
        if event["type"] in ("execution_error", "execution_interrupted"):
            self.running = None
        if event["type"] != "executing":
            return
        now = time.perf_counter()
        if self.running:
            node = self.prompt[self.running]
            title = node.get("_meta", {}).get("title", node["class_type"])
            _print_stage(title, now - self.since)
        self.running, self.since = event["data"]["node"], now


def _print_stage(title: str, seconds: float) -> None:
    print(f"{title:<28} {seconds:7.2f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (PromptError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
