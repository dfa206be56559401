"""The README's animation: a layout chosen and locked by hand, in the real page.

`make pictures ARGS=layouts_by_hand_film` runs the workflow `layouts_by_hand` with the tiny model
and photographs the nodes that hands work on, each gesture in a few frames.
"""

import io
import json
import os
from pathlib import Path

from PIL import Image, ImageDraw

from . import environment
from .editor import ROOT, Editor
from .page import Page, open_page
from .tiny_graphs import suit_tiny
from .workflow_texts import WORKFLOWS, graph_file

NAME = "layouts_by_hand"
GRAPH = graph_file(NAME)
FOLDER = environment.ROOT / "docs" / "images"
PLACES = {"Prompt": (0, 0), "Click one, drag over it": (420, 0), "Save Image": (880, 0)}
AWAY = -4000  # pixels, for the other nodes
CLIP = {"x": 280, "y": 90, "width": 1360, "height": 790}
WIDTH = 900  # of the animation
SMALL_STEPS = 6
TAKEN, LOCKED = 2, "0-15:0-7"  # what the gestures take and lock
OLD, NEW = "blue star", "green square"  # in the prompts for the tiny model
COUNT, GRID = 8, {"rows": 16, "columns": 16}
TIMEOUT_MS = 600_000
POINTER = ((0, 0), (0, 17), (4, 13), (7, 20), (10, 19), (7, 12), (12, 12))
Point = tuple[float, float]


def main(address: str, model: str) -> None:
    os.environ["CHROMIUM"] = environment.chromium()
    with open_page(address) as page:
        film = Film(page)
        open_graph(page, model)
        editor = Editor(page, "Click one, drag over it", "Layouts", GRID)
        choose_and_lock(film, editor)
        editor.still(FOLDER / f"{NAME}.jpg", above=160)
        change_the_prompt(film)
        film.save(FOLDER / f"{NAME}.webp")


class Film:
    """Photographs of a page with the pointer drawn in."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.browser_page = page.browser_page
        self.frames: list[Image.Image] = []
        self.times: list[int] = []
        self.at: Point = (700, 700)

    def shoot(self, milliseconds: int) -> None:
        self.browser_page.wait_for_timeout(400)  # the page draws five times a second
        image = Image.open(io.BytesIO(self.browser_page.screenshot(clip=CLIP))).convert("RGB")
        x, y = (at - CLIP[side] for at, side in zip(self.at, "xy", strict=True))
        pointer = [(x + dx, y + dy) for dx, dy in POINTER]
        ImageDraw.Draw(image).polygon(pointer, fill="white", outline="black")
        height = round(image.height * WIDTH / image.width)
        self.frames.append(image.resize((WIDTH, height), Image.Resampling.LANCZOS))
        self.times.append(milliseconds)

    def move(self, to: Point, frames: int, milliseconds: int = 90) -> None:
        start = self.at
        for i in range(1, frames + 1):
            self.at = tuple(a + (b - a) * i / frames for a, b in zip(start, to, strict=True))
            self.browser_page.mouse.move(*self.at)
            self.shoot(milliseconds)

    def click(self) -> None:
        self.browser_page.mouse.click(*self.at)
        self.shoot(900)

    def save(self, file: Path) -> None:
        first, *others = self.frames
        first.save(
            file,
            save_all=True,
            append_images=others,
            duration=self.times,
            loop=0,
            quality=70,
            method=6,
        )


def open_graph(page: Page, model: str) -> None:
    """Opens the workflow; only the nodes that hands work on are in sight, side by side."""
    graph = json.loads(GRAPH.read_text())
    suit_tiny(graph, NAME)
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    graph |= {"groups": [], "extra": {}}
    for node in graph["nodes"]:
        title = node.get("title", "Save Image" if node["type"] == "SaveImage" else "")
        if node["type"] == "GLMImageLoadCheckpoint":
            node["widgets_values"][0] = model
        node["pos"] = PLACES.get(title, (node["pos"][0], AWAY))
    page.open_file(json.dumps(graph), GRAPH.name)
    _write(page, WORKFLOWS[NAME].tiny["Prompt"].replace(NEW, OLD))
    page.browser_page.evaluate(
        """steps => {
            const small = app.graph.nodes.find(node => node.title === 'Decode small pictures')
            small.widgets.find(widget => widget.name === 'steps').value = steps
            app.canvas.deselectAll()
            app.canvas.ds.scale = 1
            app.canvas.ds.offset = [300, 140]
            app.canvas.setDirty(true, true)
        }""",
        SMALL_STEPS,
    )


def choose_and_lock(film: Film, editor: Editor) -> None:
    page = film.browser_page
    run = page.locator(f"{ROOT} button").first
    box = run.bounding_box()
    film.shoot(900)
    film.move((box["x"] + 12, box["y"] + 10), 3)
    film.click()
    page.get_by_text("layout 0 of 8").wait_for(timeout=TIMEOUT_MS)
    film.page.wait_until_idle()
    film.shoot(1500)
    places = editor.places(COUNT)
    tile, large = places["boxes"][TAKEN], places["large"]
    film.move((tile["x"] + tile["width"] / 2, tile["y"] + tile["height"] / 2), 3)
    film.click()
    film.move((large["x"] + 6, large["y"] + 6), 3)
    page.mouse.down()
    film.move((large["x"] + large["width"] / 2 - 6, large["y"] + large["height"] - 6), 8)
    page.mouse.up()
    film.shoot(1200)


def change_the_prompt(film: Film) -> None:
    """Types the prompt's new words, runs, and waits for the picture."""
    text = WORKFLOWS[NAME].tiny["Prompt"]
    before, after = text.split(NEW)
    film.move((CLIP["x"] + 200, CLIP["y"] + 150), 3)
    for i in range(0, len(NEW), 2):
        _write(film.page, before + NEW[:i] + after)
        film.shoot(110)
    _write(film.page, text)
    film.shoot(900)
    film.page.run()
    film.page.wait_for_image("SaveImage", TIMEOUT_MS / 1000)
    film.page.wait_until_idle()
    film.shoot(3500)


def _write(page: Page, text: str) -> None:
    page.browser_page.evaluate(
        """text => {
            const prompt = app.graph.nodes.find(node => node.title === 'Prompt')
            prompt.widgets[0].value = text
        }""",
        text,
    )
