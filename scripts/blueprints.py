"""Blueprints: subgraphs that a user places like single nodes, made from the workflows.

ComfyUI's page lists a pack's `subgraphs/*.json` in its node library and search, each under its
file's name. Such a file is a graph of one node; the definition of its type holds the nodes of the
workflow. What only feeds these becomes an input of the one node, what only shows their pictures an
output, and the four loaders become one. The workflows themselves have no subgraphs: they teach by
what each node shows, and a subgraph that is closed shows nothing.
"""

import json
import uuid
from dataclasses import dataclass, field

from . import environment, graph_layout
from .client import Prompt
from .editor_graph import PACK_ID, groups, name_packs
from .page import Page
from .tiny_graphs import widget_places

FOLDER = environment.ROOT / "subgraphs"
WORKFLOWS = environment.ROOT / "workflows" / "api"
INPUTS, OUTPUTS = -10, -20  # the page's ids of a subgraph's two ends
SOURCES = ("PrimitiveStringMultiline", "PrimitiveInt", "LoadImage")
SINKS = ("PreviewImage", "SaveImage")
LOADED = ("GLMImageLoadAR", "GLMImageLoadDecoder", "GLMImageLoadGlyphEncoder", "GLMImageLoadVAE")
"""In the order of the outputs of GLM-Image Load Checkpoint."""
MODEL = {name: ("GLMImageLoadCheckpoint", name) for name in ("model_name", "weight_dtype")}
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
WIDTH, HEIGHT, ROW = 400, 160, 26  # pixels of the one node, which holds a prompt of some lines
END_SIZE, END_GAP = (130, 260), 200


@dataclass(frozen=True)
class Blueprint:
    """What the one node is and has, besides what the workflow's own inputs and pictures give.

    Args:
        widgets: its further inputs, each the name and the input of a node inside; the name is
            the node's title, or its type if it has no title of its own.
        outputs: its further outputs, each the name and the output of a node inside.
    """

    workflow: str
    description: str
    aliases: tuple[str, ...]
    widgets: dict[str, tuple[str, str]]
    outputs: dict[str, tuple[str, int]] = field(default_factory=dict)


PAINTING = {name: ("GLMImageDecode", name) for name in ("steps", "cfg")}
BLUEPRINTS = {
    "Text to Image (GLM-Image)": Blueprint(
        "text_to_image",
        "A picture from a prompt; what stands in quotes is written in it.",
        ("text to image", "text2img", "txt2img", "autoregressive", "text rendering", "文生图"),
        {name: ("GLMImageSampleTokens", name) for name in ("width", "height", "seed")}
        | PAINTING
        | MODEL,
    ),
    "Edit Image (GLM-Image)": Blueprint(
        "edit_image",
        "A picture changed as the prompt says, in its own size.",
        ("edit image", "image edit", "img2img", "reference", "图像编辑"),
        {"seed": ("GLMImageSampleTokens", "seed")} | PAINTING | MODEL,
    ),
    "Layout Sheet (GLM-Image)": Blueprint(
        "layout_contact_sheet",
        "Several layouts of a prompt, as squares and as small pictures, and the large picture of "
        "the one that batch_index names. The large picture is made only if it is connected.",
        ("contact sheet", "composition", "layout", "variations", "布局"),
        {
            "batch_size": ("GLMImageSampleLayout", "batch_size"),
            "batch_index": ("Choose one", "batch_index"),
        }
        | PAINTING
        | MODEL,
        {"layouts": ("Layouts", 0), "layout": ("Choose one", 0)},
    ),
}


def write_blueprint(page: Page, name: str) -> None:
    """Writes `subgraphs/NAME.json` once the page exports the workflow's own prompt from it.

    Raises:
        SystemExit: the page exports another prompt.
    """
    prompt = with_one_loader(
        json.loads((WORKFLOWS / f"{BLUEPRINTS[name].workflow}.json").read_text())
    )
    page.open_api(prompt, name)
    text = json.dumps(wrap(page.serialize(), name), indent=2) + "\n"
    page.open_file(text, f"{name}.json")
    if inside(page.export_prompt()) != without_ends(prompt):
        raise SystemExit(
            f"{name}: its blueprint exports another prompt; compare the nodes' inputs."
        )
    (FOLDER / f"{name}.json").write_text(text)


def with_one_loader(prompt: Prompt) -> Prompt:
    """The prompt with GLM-Image Load Checkpoint in the place of its four loaders."""
    slots = {key: LOADED.index(node["class_type"]) for key, node in prompt.items() if _loads(node)}
    first = min(slots, key=int)
    loader = {
        "class_type": "GLMImageLoadCheckpoint",
        "inputs": {"model_name": "GLM-Image", "weight_dtype": "default"},
        "_meta": {"title": "GLM-Image Load Checkpoint"},
    }
    rest = {key: _relinked(node, slots, first) for key, node in prompt.items() if key not in slots}
    return {first: loader} | rest


def _loads(node: dict) -> bool:
    return node["class_type"] in LOADED


def _relinked(node: dict, slots: dict[str, int], loader: str) -> dict:
    inputs = {
        name: [loader, slots[value[0]]] if isinstance(value, list) and value[0] in slots else value
        for name, value in node["inputs"].items()
    }
    return node | {"inputs": inputs}


def without_ends(prompt: Prompt) -> Prompt:
    """What is inside of a blueprint: values in the place of primitives, no picture to load."""
    rest = {}
    for key, node in prompt.items():
        if node["class_type"] in SOURCES + SINKS:
            continue
        inputs = {}
        for name, value in node["inputs"].items():
            source = prompt[value[0]] if isinstance(value, list) else None
            if source is None or source["class_type"] not in SOURCES:
                inputs[name] = value
            elif source["class_type"] != "LoadImage":
                inputs[name] = source["inputs"]["value"]
        rest[key] = node | {"inputs": inputs}
    return rest


def inside(prompt: Prompt) -> Prompt:
    """A prompt that the page exported from a blueprint, with the ids of the workflow."""

    def short(key: str) -> str:
        return key.split(":")[-1]

    return {
        short(key): node
        | {
            "inputs": {
                name: [short(value[0]), value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
        }
        for key, node in prompt.items()
    }


class Inside:
    """The nodes of a workflow's graph between a subgraph's two ends, and their links."""

    def __init__(self, graph: dict) -> None:
        nodes = {node["id"]: node for node in sorted(graph["nodes"], key=lambda node: node["id"])}
        self.nodes = {i: node for i, node in nodes.items() if node["type"] not in SOURCES + SINKS}
        self.links = [dict(zip(LINK, link, strict=True)) for link in graph["links"]]
        self.inputs: dict[str, list[dict]] = {}  # by name, the links that begin there
        self.outputs: dict[str, list[dict]] = {}
        for i, node in nodes.items():
            if node["type"] in SOURCES:
                links = [x for x in self.links if x["origin_id"] == i]
                for link in links if node["type"] != "LoadImage" else ():
                    target, place = self._widget(link)
                    target["widgets_values"][place] = node["widgets_values"][0]
                self._begin(_end_name(node), links)
            if node["type"] in SINKS:
                self._end(_end_name(node), [x for x in self.links if x["target_id"] == i])

    def between(self) -> dict:
        """The graph without what stood at its ends."""
        inner = [x for x in self.links if {x["origin_id"], x["target_id"]} <= self.nodes.keys()]
        links = [[x[key] for key in LINK] for x in inner]
        return {"nodes": list(self.nodes.values()), "links": links}

    def add_input(self, name: str, node_name: str, widget: str) -> None:
        """Makes a widget of a node an input of the subgraph."""
        node = self._named(node_name)
        slot = next(i for i, slot in enumerate(node["inputs"]) if slot["name"] == widget)
        link = self._link(node["inputs"][slot]["type"])
        link["target_id"], link["target_slot"] = node["id"], slot
        self._begin(name, [link])

    def add_output(self, name: str, node_name: str, slot: int) -> None:
        node = self._named(node_name)
        link = self._link(node["outputs"][slot]["type"])
        link["origin_id"], link["origin_slot"] = node["id"], slot
        self._end(name, [link])

    def finish(self, reroutes: list[dict]) -> None:
        """Writes into the links their last reroute, and into the nodes which links they have."""
        parents = {x["id"]: x["parentId"] for x in graph_layout.extensions(reroutes)}
        for x in self.links:
            if x["id"] in parents:
                x["parentId"] = parents[x["id"]]
        targets = {(x["target_id"], x["target_slot"]): x["id"] for x in self.links}
        origins: dict[tuple[int, int], list[int]] = {}
        for x in self.links:
            origins.setdefault((x["origin_id"], x["origin_slot"]), []).append(x["id"])
        for i, node in self.nodes.items():
            for slot, entry in enumerate(node["inputs"]):
                entry["link"] = targets.get((i, slot))
            for slot, entry in enumerate(node["outputs"]):
                entry["links"] = origins.get((i, slot))

    def value(self, name: str) -> object:
        """The value of an input's first widget; None if it has no widget."""
        node, place = self._widget(self.inputs[name][0])
        return None if place is None else node["widgets_values"][place]

    def _widget(self, link: dict) -> tuple[dict, int | None]:
        """The node at a link's end, and where the value stands in place of which it comes."""
        node = self.nodes[link["target_id"]]
        return node, widget_places(node).get(node["inputs"][link["target_slot"]]["name"])

    def _begin(self, name: str, links: list[dict]) -> None:
        for link in links:
            link["origin_id"], link["origin_slot"] = INPUTS, len(self.inputs)
        self.inputs[name] = links

    def _end(self, name: str, links: list[dict]) -> None:
        for link in links:
            link["target_id"], link["target_slot"] = OUTPUTS, len(self.outputs)
        self.outputs[name] = links

    def _link(self, type_: str) -> dict:
        link = {"id": max(x["id"] for x in self.links) + 1, "type": type_}
        self.links.append(link)
        return link

    def _named(self, name: str) -> dict:
        return next(x for x in self.nodes.values() if x.get("title", x["type"]) == name)


def wrap(graph: dict, name: str) -> dict:
    """A graph of one node that has the workflow's graph, in the page's format, inside."""
    blueprint = BLUEPRINTS[name]
    name_packs(graph["nodes"])
    inner = Inside(graph)
    columns, frames, reroutes = graph_layout.arrange(inner.between(), 0)
    for key, at in blueprint.widgets.items():
        inner.add_input(key, *at)
    for key, at in blueprint.outputs.items():
        inner.add_output(key, *at)
    inner.finish(reroutes)
    definition = {
        "id": _id(name),
        "version": 1,
        "state": {
            "lastGroupId": len(frames),
            "lastNodeId": max(inner.nodes),
            "lastLinkId": max(link["id"] for link in inner.links),
            "lastRerouteId": len(reroutes),
        },
        "revision": 0,
        "config": {},
        "name": name,
        "category": "GLM-Image",
        "description": blueprint.description,
        "inputNode": _end(INPUTS, min(columns.left.values()) - END_GAP - END_SIZE[0]),
        "outputNode": _end(OUTPUTS, max(columns.right.values()) + END_GAP),
        "inputs": _slots(name, inner.inputs),
        "outputs": _slots(name, inner.outputs),
        "widgets": [],
        "nodes": list(inner.nodes.values()),
        "groups": groups(frames),
        "links": inner.links,
        "reroutes": reroutes,
        "extra": {},
    }
    return {
        "id": _id(f"{name}/graph"),
        "revision": 0,
        "last_node_id": max(inner.nodes) + 1,
        "last_link_id": 0,
        "nodes": [_one_node(name, inner)],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [definition]},
        "config": {},
        "extra": {
            "BlueprintDescription": blueprint.description,
            "BlueprintSearchAliases": list(blueprint.aliases),
        },
        "version": 0.4,
    }


def _one_node(name: str, inner: Inside) -> dict:
    inputs, values = [], []
    for key, links in inner.inputs.items():
        slot = {"name": key, "type": links[0]["type"], "link": None}
        if (value := inner.value(key)) is not None:
            slot["widget"] = {"name": key}
            values.append(value)
        inputs.append(slot)
    return {
        "id": max(inner.nodes) + 1,  # one that is also inside would be changed there
        "type": _id(name),
        "pos": [0, 0],
        "size": [WIDTH, HEIGHT + ROW * len(inputs)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": inputs,
        "outputs": [
            {"name": key, "type": links[0]["type"], "links": None}
            for key, links in inner.outputs.items()
        ],
        "title": name,
        "properties": {"cnr_id": PACK_ID},
        "widgets_values": values,
    }


def _end(end: int, left: float) -> dict:
    return {"id": end, "bounding": [left, 0, *END_SIZE]}


def _slots(name: str, ends: dict[str, list[dict]]) -> list[dict]:
    return [
        {
            "id": _id(f"{name}/{key}"),
            "name": key,
            "type": links[0]["type"],
            "linkIds": [link["id"] for link in links],
        }
        for key, links in ends.items()
    ]


def _end_name(node: dict) -> str:
    """An end's name: the title of what stood there, or `image` for a picture loaded or saved."""
    return "image" if node["type"] in ("LoadImage", "SaveImage") else node["title"].lower()


def _id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"glm-image/blueprint/{name}"))
