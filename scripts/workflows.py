"""`make workflows`: draws the editor's graphs from the API prompts.

`workflows/api/NAME.json` is the source. ComfyUI's page opens it, and `graph_layout` places its
nodes and leads its links around them. The page then opens the result and exports it; if the export
is the same prompt and nothing overlaps, the graph is written to `workflows/` under its title. The
blueprints in `subgraphs/` are made of some of these prompts, by `blueprints`. `ARGS="NAME ..."`
draws only those. `make pictures` makes their thumbnails. Graphs whose titles or numbers have
changed get their new names.
"""

import json
import sys
import tempfile
import uuid
from pathlib import Path

from . import environment, graph_layout, host
from .blueprints import BLUEPRINTS, write_blueprint
from .editor_graph import GAP, NOTE_HEIGHT, NOTE_WIDTH, groups, name_packs, note, view
from .page import Page, open_page
from .workflow_texts import FOLDER, MODEL_NOTE, WORKFLOWS, graph_file


def main(names: list[str]) -> None:
    rename_graphs()
    names = names or [*WORKFLOWS, *BLUEPRINTS]
    with tempfile.TemporaryDirectory() as folder:
        base = host.make_base(Path(folder))
        with host.serve(environment.host(), base) as address, open_page(address) as page:
            for name in names:
                if name in BLUEPRINTS:
                    write_blueprint(page, name)
                else:
                    write_workflow(page, name)


def rename_graphs() -> None:
    """Gives each graph, and its picture, the file's name that its workflow has now."""
    ids = {graph_id(name): name for name in WORKFLOWS}
    for file in FOLDER.glob("*.json"):
        name = ids.get(json.loads(file.read_text())["id"])
        if name and file != graph_file(name):
            for suffix in (".json", ".jpg"):
                if file.with_suffix(suffix).exists():
                    file.with_suffix(suffix).rename(graph_file(name).with_suffix(suffix))


def write_workflow(page: Page, name: str) -> None:
    prompt = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    page.open_api(prompt, name)
    graph = arrange(page.serialize(), name)
    page.open_file(json.dumps(graph), graph_file(name).name)
    if page.export_prompt() != prompt:
        raise SystemExit(f"{name}: its graph exports another prompt; compare the nodes' inputs.")
    if found := page.overlaps():
        raise SystemExit(f"{name}: {'; '.join(found)}.")
    graph_file(name).write_text(json.dumps(graph, indent=2) + "\n")


def graph_id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"glm-image/{name}"))


def arrange(graph: dict, name: str) -> dict:
    """The graph with its stages in frames and its notes above them.

    Raises:
        SystemExit: the workflow or one of its nodes is not known.
    """
    if name not in WORKFLOWS:
        raise SystemExit(f"{name} has no title; add it to WORKFLOWS.")
    _, frames, reroutes = graph_layout.arrange(graph, NOTE_HEIGHT + GAP)
    name_packs(graph["nodes"])
    last = graph["last_node_id"]
    notes = [
        note(last + 1, 0, "About this graph", WORKFLOWS[name].note),
        note(last + 2, NOTE_WIDTH + GAP, "The model", MODEL_NOTE),
    ]
    return graph | {
        "id": graph_id(name),
        "last_node_id": last + len(notes),
        "nodes": [*sorted(graph["nodes"], key=lambda node: node["id"]), *notes],
        "groups": groups(frames),
        "extra": {
            "ds": view(frames),
            "reroutes": reroutes,
            "linkExtensions": graph_layout.extensions(reroutes),
        },
    }


if __name__ == "__main__":
    main(sys.argv[1:])
