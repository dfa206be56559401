"""`make workflows`: draws the editor's graphs from the API prompts.

`workflows/api/NAME.json` is the source. ComfyUI's page opens it, and `graph_layout` places its
nodes and leads its links around them. The page then opens the result and exports it; if the export
is the same prompt and nothing overlaps, the graph is written to `workflows/NAME.json`.
`ARGS="NAME ..."` draws only those. `make pictures` makes their thumbnails.
"""

import json
import sys
import tempfile
import uuid
from pathlib import Path

from . import environment, graph_layout, host
from .page import Page, open_page
from .tiny_graphs import CONTROLS
from .workflow_texts import MODEL_NOTE, WORKFLOWS

FOLDER = environment.ROOT / "workflows"
PACK_ID, CORE_ID = "glm-image-native", "comfy-core"  # in ComfyUI's registry
NOTE_WIDTH, NOTE_HEIGHT, GAP = 700, 290, 40


def main(names: list[str]) -> None:
    files = [FOLDER / "api" / f"{name}.json" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        base = host.make_base(Path(folder))
        with host.serve(environment.host(), base) as address, open_page(address) as page:
            for file in files or sorted((FOLDER / "api").glob("*.json")):
                write_workflow(page, file)


def write_workflow(page: Page, file: Path) -> None:
    prompt = json.loads(file.read_text())
    page.open_api(prompt, file.stem)
    graph = arrange(page.serialize(), file.stem)
    page.open_file(json.dumps(graph), file.name)
    if page.export_prompt() != prompt:
        raise SystemExit(f"{file}: its graph exports another prompt; compare the nodes' inputs.")
    if found := page.overlaps():
        raise SystemExit(f"{file}: {'; '.join(found)}.")
    (FOLDER / file.name).write_text(json.dumps(graph, indent=2) + "\n")


def arrange(graph: dict, name: str) -> dict:
    """The graph with its stages in frames and its notes above them.

    Raises:
        SystemExit: the workflow or one of its nodes is not known.
    """
    if name not in WORKFLOWS:
        raise SystemExit(f"{name} has no title; add it to WORKFLOWS.")
    _, frames, reroutes = graph_layout.arrange(graph, NOTE_HEIGHT + GAP)
    for node in graph["nodes"]:
        ours = node["type"].startswith("GLMImage")
        node["properties"]["cnr_id"] = PACK_ID if ours else CORE_ID
        values = node.get("widgets_values", [])
        node["widgets_values"] = ["fixed" if value in CONTROLS else value for value in values]
    last = graph["last_node_id"]
    notes = [
        _note(last + 1, 0, "About this graph", WORKFLOWS[name].note),
        _note(last + 2, NOTE_WIDTH + GAP, "The model", MODEL_NOTE),
    ]
    groups = [
        {"id": i, "title": title, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}}
        for i, (title, box) in enumerate(frames, 1)
    ]
    return graph | {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"glm-image/{name}")),
        "last_node_id": last + len(notes),
        "nodes": [*sorted(graph["nodes"], key=lambda node: node["id"]), *notes],
        "groups": groups,
        "extra": {
            "reroutes": reroutes,
            "linkExtensions": graph_layout.extensions(reroutes),
        },
    }


def _note(node_id: int, left: float, title: str, text: str) -> dict:
    return {
        "id": node_id,
        "type": "MarkdownNote",
        "pos": [left, 0],
        "size": [NOTE_WIDTH, NOTE_HEIGHT],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": title,
        "properties": {},
        "widgets_values": [text],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
