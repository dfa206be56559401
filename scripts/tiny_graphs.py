"""The editor's graphs in a server's workflows sidebar and templates, as `make serve` offers them.

For the model `tiny/` they get prompts, a size and a picture that it understands. A graph that its
user has changed in the sidebar is never written again: a list of checksums, beside the graphs'
folder, says what this module wrote, and only files that still have theirs are replaced.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from training.render import render
from training.scene import Scene, place_item

from .editor_graph import CONTROLS
from .workflow_texts import WORKFLOWS, graph_file

TINY_VALUES = {"width": 512, "height": 512, "steps": 20}
PICTURE = "glm_image_shapes.png"
WRITTEN = "glm_image_graphs.json"


def write_graphs(base: Path, tiny: bool) -> Path:
    """The folder of the sidebar's workflows, after writing those that no user has changed."""
    folder = base / "user" / "default" / "workflows"
    folder.mkdir(parents=True, exist_ok=True)
    (base / "input").mkdir(exist_ok=True)
    if tiny:
        draw_picture(base / "input" / PICTURE)
    record = folder.parent / WRITTEN
    written = json.loads(record.read_text()) if record.is_file() else {}
    for source, text in _graphs(tiny):
        file = folder / source.name
        if not file.exists() or _checksum(file.read_text()) == written.get(file.name):
            file.write_text(text)
            written[file.name] = _checksum(text)
    record.write_text(json.dumps(written, indent=2))
    return folder


def write_templates(folder: Path) -> Path:
    """A folder for the template browser: the graphs for `tiny/` and their pictures."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for source, text in _graphs(tiny=True):
        (folder / source.name).write_text(text)
        picture = source.with_suffix(".jpg")
        (folder / picture.name).write_bytes(picture.read_bytes())
    return folder


def _graphs(tiny: bool) -> Iterator[tuple[Path, str]]:
    """The pack's graphs: each file, and the text that is offered of it."""
    for name in (name for name in WORKFLOWS if WORKFLOWS[name].suits_tiny or not tiny):
        graph = json.loads(graph_file(name).read_text())
        if tiny:
            suit_tiny(graph, name)
        yield graph_file(name), json.dumps(graph)


def suit_tiny(graph: dict, name: str) -> None:
    """Gives a graph in the page's format what the tiny model understands, in place."""
    for node in graph["nodes"]:
        title = node.get("title")
        values = TINY_VALUES if node["type"].startswith(("GLMImage", "KSampler")) else {}
        if node["type"] == "LoadImage":
            values = {"image": PICTURE}
        if node["type"] == "PrimitiveStringMultiline":
            values = {"value": WORKFLOWS[name].tiny[title]}
        if node["type"] == "PrimitiveInt" and title.lower() in TINY_VALUES:
            values = {"value": TINY_VALUES[title.lower()]}
        places = widget_places(node)
        for widget in values.keys() & places.keys():
            node["widgets_values"][places[widget]] = values[widget]


def widget_places(node: dict) -> dict[str, int]:
    """Where the value of each widget stands among a node's `widgets_values`.

    They are in the order of the inputs that have widgets; a seed is followed by what becomes of it
    after a run.
    """
    places, values = {}, node.get("widgets_values", [])
    names = [slot["widget"]["name"] for slot in node["inputs"] if "widget" in slot]
    for place, value in enumerate(values):
        if names and value not in CONTROLS:
            places[names.pop(0)] = place
    return places


def draw_picture(file: Path) -> None:
    """The picture for the workflows that load one: a blue circle and an orange diamond."""
    empty = Scene(512, 512, "white", (), ())
    things = (("circle", "blue", "left"), ("diamond", "orange", "right"))
    items = (place_item(empty, shape, colour, "medium", place) for shape, colour, place in things)
    Image.fromarray(render(replace(empty, items=tuple(items)))).save(file)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
