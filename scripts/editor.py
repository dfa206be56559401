"""An editor of cells in the real page, and the hands that work on it."""

import io
import time
from pathlib import Path

from PIL import Image

from .page import Page

ROOT = ".glm-image-editor"
MODULES = "/extensions/ComfyUI-GLM-Image"
CORNER = (600, 200)  # of a node that is brought into sight, in pixels of the page
Cell = tuple[int, int]


class Editor:
    """The editor of a node, which is drawn on the canvas and at its own size.

    Args:
        title: the node's.
        label: how the editor's canvas begins to describe itself to those who do not see it.
        grid: the rows and columns of the grid whose cells are marked, and those of the `base`.
    """

    def __init__(self, page: Page, title: str, label: str, grid: dict) -> None:
        self.page = page
        self.browser_page = page.browser_page
        self.title = title
        self.root = f'{ROOT}:has(canvas[aria-label^="{label}"])'
        self.grid = grid

    def center(self, corner: tuple[int, int] = CORNER) -> None:
        """Brings the node into sight, its corner to a place of the page or beyond its edge."""
        self.browser_page.evaluate(
            """([title, corner]) => {
                const node = app.graph.nodes.find(node => node.title === title)
                app.canvas.ds.scale = 1
                app.canvas.ds.offset = corner.map((at, side) => at - node.pos[side])
                app.canvas.setDirty(true, true)
            }""",
            [self.title, corner],
        )
        time.sleep(0.5)

    def values(self, *names: str) -> tuple:
        """The values of inputs of the node."""
        found = self.browser_page.evaluate(
            """([title, names]) => {
                const {widgets} = app.graph.nodes.find(node => node.title === title)
                return names.map(name => widgets.find(widget => widget.name === name).value)
            }""",
            [self.title, names],
        )
        return tuple(found)

    def places(self, count: int = 1) -> dict:
        """Where `count` tiles and the pictures are on the screen, by the page's own module."""
        return self.browser_page.evaluate(
            """async ([module, root, grid]) => {
                const {placesOf} = await import(module)
                const canvases = [...document.querySelectorAll(`${root} canvas`)]
                const canvas = canvases.find(canvas => canvas.clientWidth)
                const {left, top, width, height} = canvas.getBoundingClientRect()
                const {boxes, large, base} = placesOf(grid, width, height)
                const moved = box => box && {...box, x: box.x + left, y: box.y + top}
                return {boxes: boxes.map(moved), large: moved(large), base: moved(base)}
            }""",
            [f"{MODULES}/editor_places.js", self.root, {**self.grid, "count": count}],
        )

    def click_tile(self, index: int, count: int) -> None:
        box = self.places(count)["boxes"][index]
        self.browser_page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def point(self, cell: Cell, count: int = 1, picture: str = "large") -> dict:
        """The middle of a (row, column) of a picture on the screen, as x and y."""
        (row, column), box = cell, self.places(count)[picture]
        return {
            "x": box["x"] + (column + 0.5) * box["width"] / self.grid["columns"],
            "y": box["y"] + (row + 0.5) * box["height"] / self.grid["rows"],
        }

    def drag(self, start: Cell, end: Cell, count: int = 1, picture: str = "large") -> None:
        """From one (row, column) of a picture to another."""
        mouse = self.browser_page.mouse
        mouse.move(**self.point(start, count, picture))
        mouse.down()
        mouse.move(**self.point(end, count, picture), steps=5)
        mouse.up()

    def still(self, file: Path, above: int) -> None:
        """Writes a picture of the editor, and of so many pixels of its node above it."""
        box = self.browser_page.locator(f"{self.root}:visible").bounding_box()
        x, y = box["x"] - 14, box["y"] - above
        width, height = box["width"] + 28, box["height"] + above + 8
        clip = {"x": x, "y": y, "width": width, "height": height}
        image = Image.open(io.BytesIO(self.browser_page.screenshot(clip=clip)))
        image.convert("RGB").save(file, quality=85)
