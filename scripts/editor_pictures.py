"""The docs' pictures of editors: layouts pasted and a region redrawn by hand, in the real page.

`make pictures ARGS=editors` runs the workflows with the tiny model and drags on their nodes.
"""

import json
import os

from . import environment
from .editor import Editor
from .page import Page, open_page
from .tiny_graphs import suit_tiny
from .workflow_texts import graph_file

FOLDER = environment.ROOT / "docs" / "images"
GRID = {"rows": 16, "columns": 16}
SIDE, STEPS = 512, 6
TIMEOUT_MS = 600_000


def main(address: str, model: str) -> None:
    os.environ["CHROMIUM"] = environment.chromium()
    with open_page(address) as page:
        run(page, "compose_two_layouts", model)
        pasting = Editor(page, "GLM-Image Compose Layouts", "Source", GRID | {"base": GRID})
        pasting.center()
        pasting.drag((2, 0), (13, 7))
        pasting.drag((8, 12), (6, 13), picture="base")
        page.wait_until_idle()
        pasting.still(FOLDER / "compose_by_hand.jpg", above=150)

        run(page, "redo_region", model)
        redrawing = Editor(page, "Redo the region", "Tokens", GRID)
        redrawing.center((600, -600))  # a long node, with its editor below
        redrawing.drag((3, 7), (12, 15))
        page.wait_until_idle()
        redrawing.still(FOLDER / "redraw_by_hand.jpg", above=0)


def run(page: Page, name: str, model: str) -> None:
    """Opens a workflow with the tiny model's prompts and runs it."""
    graph = json.loads(graph_file(name).read_text())
    suit_tiny(graph, name)
    page.open_file(json.dumps(graph), graph_file(name).name)
    page.set_inputs(model_name=model, width=SIDE, height=SIDE, steps=STEPS)
    page.run()
    page.wait_for_image("SaveImage", TIMEOUT_MS / 1000)
    page.wait_until_idle()
