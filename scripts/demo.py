"""`make demo`: one text-to-image run through a real server, with the time of each node.

The model is `tiny/`, which draws shapes and short texts. The environment variables PROMPT, WIDTH,
HEIGHT, STEPS, SEED and MODEL (a name under the demo's models, or the path of a hub snapshot)
override the tiny model's defaults, and those override `workflows/api/text_to_image.json`.
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from . import environment, host
from .client import Client, Event, Prompt, PromptError

BASE = environment.CACHE / "demo"
OUTPUT = environment.ROOT / "output"
WORKFLOW = environment.ROOT / "workflows" / "api" / "text_to_image.json"
TINY = environment.ROOT / "tiny"
TINY_SETTINGS = {"WIDTH": "512", "HEIGHT": "512", "STEPS": "20"}
TINY_PROMPT = (
    "a red circle on the left, a blue star on the right, yellow background, "
    "the text 'HELLO' at the bottom"
)


def main() -> None:
    comfyui = environment.host()
    prompt = json.loads(WORKFLOW.read_text())
    model = prepare_model(os.environ.get("MODEL"))
    defaults = {"PROMPT": TINY_PROMPT, **TINY_SETTINGS} if model == TINY.name else {}
    override(prompt, defaults | os.environ, model)
    started = time.perf_counter()
    with demo_server(comfyui, model) as address:
        _print_stage("Start ComfyUI", time.perf_counter() - started)
        run = Client(address).run(prompt, StagePrinter(prompt))
    for outputs in run.outputs.values():
        for image in outputs.get("images", []):
            print(OUTPUT / image["subfolder"] / image["filename"])


def demo_server(
    comfyui: environment.Host,
    model: str,
    *flags: str,
    port: int | None = None,
    templates: Path | None = None,
) -> AbstractContextManager[str]:
    """A server with the demo's models; it saves pictures to `output/`.

    `templates` are graphs for its template browser, in place of the pack's.
    """
    flags = ("--output-directory", str(OUTPUT), *flags)
    threads = 1 if model == TINY.name else None
    base = host.make_base(BASE, templates)
    return host.serve(comfyui, base, *flags, port=port, threads=threads)


def prepare_model(model: str | None) -> str:
    """The model's name, after linking it into the demo's models; `tiny/` if none is given."""
    snapshot = Path(model).expanduser().resolve() if model else TINY
    if snapshot.is_dir():
        return host.add_model(host.make_base(BASE), snapshot)
    if not model:
        raise SystemExit(f"{snapshot} is missing: run make train-tiny, or set MODEL= to another.")
    return model


def override(prompt: Prompt, settings: Mapping[str, str], model: str) -> None:
    """Puts the model and the settings (by variable name) into every node input they stand for."""
    values = {"model_name": model}
    for variable, name, kind in (
        ("WIDTH", "width", int),
        ("HEIGHT", "height", int),
        ("STEPS", "steps", int),
        ("SEED", "seed", int),
        ("PROMPT", "prompt", str),
    ):
        if settings.get(variable):
            values[name] = kind(settings[variable])
    set_inputs(prompt, values)


def set_inputs(prompt: Prompt, values: Mapping[str, object]) -> set[str]:
    """The names found, after setting every node input of such a name.

    An input that is linked to a primitive is set there; other links stay. Masks keep their size:
    they are stretched over the picture anyway.
    """
    found = set()
    for node in [node for node in prompt.values() if node["class_type"] != "SolidMask"]:
        for name in values.keys() & node["inputs"].keys():
            if not isinstance(node["inputs"][name], list):
                node["inputs"][name] = values[name]
            elif (source := prompt[node["inputs"][name][0]])["class_type"].startswith("Primitive"):
                source["inputs"]["value"] = values[name]
            else:
                continue
            found.add(name)
    return found


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
