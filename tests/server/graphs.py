"""Prompts for the server: the pack's API workflows at a small size, and changes to them."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from glm_image.scripts.client import Prompt
from glm_image.scripts.demo import set_inputs

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
MODEL = "GLM-Image"
LOADERS = ("GLMImageLoadAR", "GLMImageLoadDecoder", "GLMImageLoadGlyphEncoder", "GLMImageLoadVAE")
PLAN = {
    "model_name": MODEL,
    "weight_dtype": "default",
    "width": 96,
    "height": 64,
    "batch_size": 1,
    "references": 0,
    "strategy": "auto",
    "ar": "auto",
    "decoder": "auto",
    "glyph": "auto",
    "vae": "auto",
    "ar_split": "",
    "decoder_split": "",
    "reserve_gb": 1.0,
}
_fresh = itertools.count(1000)


def workflow(name: str = "text_to_image", *, steps: int = 2, **inputs) -> Prompt:
    """A stored workflow at 96x64 (width x height) and few steps, with `inputs` set everywhere."""
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text())
    return changed(prompt, **{"width": 96, "height": 64, "steps": steps, **inputs})


def fresh(name: str = "text_to_image", **inputs) -> Prompt:
    """A workflow with seeds that no prompt of this session used, so that every stage runs."""
    return workflow(name, seed=next(_fresh), **inputs)


def changed(prompt: Prompt, /, **inputs) -> Prompt:
    """Sets every input of these names, at its primitive if it is linked to one.

    Raises:
        KeyError: no node has such an input.
    """
    if missing := inputs.keys() - set_inputs(prompt, inputs):
        raise KeyError(*missing)
    return prompt


def the(prompt: Prompt, class_type: str) -> str:
    """The id of the only node of a type."""
    (node_id,) = (key for key, node in prompt.items() if node["class_type"] == class_type)
    return node_id


def add(prompt: Prompt, class_type: str, **inputs) -> str:
    """Adds a node and returns its id."""
    node_id = str(max(map(int, prompt)) + 1)
    prompt[node_id] = {"class_type": class_type, "inputs": inputs}
    return node_id


def relink(prompt: Prompt, old: tuple[str, int], new: tuple[str, int]) -> None:
    """Links the inputs that are linked to `old` to `new` instead, except in the node of `new`."""
    for node_id, node in prompt.items():
        for name, value in node["inputs"].items():
            if value == list(old) and node_id != new[0]:
                node["inputs"][name] = list(new)


def upstream(prompt: Prompt, node_id: str) -> Iterator[str]:
    """A node and all that it depends on."""
    yield node_id
    for value in prompt[node_id]["inputs"].values():
        if isinstance(value, list):
            yield from upstream(prompt, value[0])


def planned(prompt: dict, **asked) -> str:
    """Connects a plan to the loaders; returns the id of the node that shows its table."""
    plan = add(prompt, "GLMImageDevicePlan", **PLAN | asked)
    for node in prompt.values():
        if node["class_type"] in LOADERS:
            node["inputs"]["device_plan"] = [plan, 0]
    return add(prompt, "PreviewAny", source=[plan, 1])
