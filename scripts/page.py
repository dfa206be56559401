"""ComfyUI's own web page in headless Chromium: opens graphs, exports them and runs them."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Error, Playwright, sync_playwright
from playwright.sync_api import Page as BrowserPage

from .client import Client, Prompt

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # otherwise the first visit opens the template browser
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MaximumFps": 5,  # the CPU draws the canvas, and the server needs the CPU
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # draw text at every zoom
}
MESSAGES = "[role=dialog], .p-toast-message, [role=alert], [role=status]"
# Vue nodes are elements; their rectangles are turned into the canvas's units, in which links are
# drawn. All links are drawn once more, smaller and alone, and looked for behind each node; INSET
# leaves out the slots at its edge.
OVERLAPS = """() => {
    const INSET = 22, ZOOM = 0.25
    const {scale, offset} = app.canvas.ds
    app.canvas.draw(true, true)
    const corner = app.canvas.canvas.getBoundingClientRect()
    const boxes = app.graph.nodes.map(node => {
        let [left, top, width, height] = node.boundingRect
        const element = document.querySelector(`[data-node-id="${node.id}"]`)
        if (LiteGraph.vueNodesMode && element) {
            const box = element.getBoundingClientRect()
            left = (box.left - corner.left) / scale - offset[0]
            top = (box.top - corner.top) / scale - offset[1]
            width = box.width / scale, height = box.height / scale
        }
        const name = `${node.title} (${node.id})`
        return {name, left, top, right: left + width, bottom: top + height}
    })
    const found = []
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
            found.push(`${a.name} overlaps ${b.name}`)
    }))
    const left = Math.min(...boxes.map(box => box.left))
    const top = Math.min(...boxes.map(box => box.top))
    const sheet = document.createElement('canvas')
    sheet.width = (Math.max(...boxes.map(box => box.right)) - left) * ZOOM
    sheet.height = (Math.max(...boxes.map(box => box.bottom)) - top) * ZOOM
    const context = sheet.getContext('2d', {willReadFrequently: true})
    context.setTransform(ZOOM, 0, 0, ZOOM, -left * ZOOM, -top * ZOOM)
    context.lineWidth = 3
    const links = [...app.graph.links.values(), ...app.graph.reroutes.values()]
    links.forEach(({path}) => path && context.stroke(path))
    for (const box of boxes) {
        const width = (box.right - box.left - 2 * INSET) * ZOOM
        const height = (box.bottom - box.top - 2 * INSET) * ZOOM
        const x = (box.left - left + INSET) * ZOOM, y = (box.top - top + INSET) * ZOOM
        const pixels = context.getImageData(x, y, width, height).data
        if (pixels.some((value, i) => i % 4 === 3 && value))
            found.push(`a link passes behind ${box.name}`)
    }
    return found
}"""
# Elements come after their graph, and each reports its place when it gets its size. While the view
# moves, ComfyUI 0.3.75's page takes wrong places for them, so the view has to wait as well.
SETTLE = """async () => {
    const FRAMES = 5, LIMIT_MS = 60000
    const state = () => {
        const elements = [...document.querySelectorAll('[data-node-id]')]
        if (LiteGraph.vueNodesMode && elements.length < app.graph.nodes.length) return null
        const {scale, offset} = app.canvas.ds
        const drawn = app.graph.nodes.map(node => [...node.boundingRect])
        const boxes = elements.map(element => element.getBoundingClientRect())
        return JSON.stringify([scale, ...offset, drawn, boxes])
    }
    const start = performance.now()
    let before = null
    for (let same = 0; same < FRAMES;) {
        if (performance.now() - start > LIMIT_MS) throw new Error('The nodes do not come to rest.')
        await new Promise(requestAnimationFrame)
        const now = state()
        same = now !== null && now === before ? same + 1 : 0
        before = now
    }
}"""
EMPTY_GRAPH = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "version": 0.4}
EMPTY_SPOT = (960, 700)  # of the canvas, in the viewport
VIEWPORT = {"width": 1920, "height": 1080}
PICTURE_SIDE = 1000
START_TIMEOUT_MS = 60_000


class Page:
    """The page of one server; `errors` collects its script errors."""

    def __init__(self, page: BrowserPage, address: str) -> None:
        self.browser_page = page
        self.address = address
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(START_TIMEOUT_MS)
        page.goto(f"http://{address}/")
        page.wait_for_function("window.app?.graph && window.app.vueAppReady")

    @contextmanager
    def another(self) -> Iterator["Page"]:
        """The server's page once more in this browser, as on a first visit."""
        page = self.browser_page.context.browser.new_page(viewport=VIEWPORT)
        try:
            yield Page(page, self.address)
        finally:
            page.close()

    def open_api(self, prompt: Prompt, name: str) -> None:
        """Opens a prompt in API form; the page makes a graph of it."""
        self._evaluate("([prompt, name]) => app.loadApiJson(prompt, name)", [prompt, name])

    def open_file(self, text: str, name: str) -> None:
        """Opens a workflow file as if it were dropped on the page, and fits it into view."""
        self._evaluate(
            """([text, name]) =>
                app.handleFile(new File([text], name, {type: 'application/json'}))""",
            [text, name],
        )
        self.fit_view()

    def fit_view(self) -> None:
        """Fits the graph into view, once its nodes stay where they are."""
        self._evaluate(SETTLE)
        self._evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self._evaluate(SETTLE)

    def node_types(self) -> list[str]:
        return self._evaluate("() => app.graph.nodes.map(node => node.type)")

    def unknown_node_types(self) -> list[str]:
        return self._evaluate(
            """() => app.graph.nodes.map(node => node.type)
                .filter(type => !(type in LiteGraph.registered_node_types))"""
        )

    def messages(self) -> list[str]:
        """The texts of the page's dialogs, notices and errors."""
        return self.browser_page.locator(MESSAGES).all_inner_texts()

    def export_prompt(self) -> Prompt:
        """The prompt in API form, by the page's own export, with titles as its only notes.

        Newer pages also write down the pack of each node.
        """
        return self._evaluate(
            """async () => {
                const {output} = await app.graphToPrompt()
                for (const node of Object.values(output)) node._meta = {title: node._meta.title}
                return output
            }"""
        )

    def serialize(self) -> dict:
        return json.loads(self._evaluate("() => JSON.stringify(app.graph.serialize())"))

    def place_node(self, title: str) -> None:
        """Opens an empty graph and places a node, or a blueprint, by the page's search."""
        self.open_file(json.dumps(EMPTY_GRAPH), "empty.json")
        self.browser_page.mouse.dblclick(*EMPTY_SPOT)
        self.browser_page.wait_for_function("document.activeElement.tagName === 'INPUT'")
        self.browser_page.keyboard.type(title)
        self.browser_page.get_by_text(title).first.wait_for()
        self.browser_page.keyboard.press("Enter")
        self.browser_page.mouse.click(*EMPTY_SPOT)  # newer pages let it hang on the pointer
        self.browser_page.wait_for_function("app.graph.nodes.length === 1")

    def set_inputs(self, **values: int | str) -> None:
        """Sets every input of these names, at its primitive if it is linked to one."""
        self._evaluate(
            """values => app.graph.nodes.forEach(node => node.inputs?.forEach((input, slot) => {
                if (node.type === 'SolidMask' || !input.widget || !(input.name in values)) return
                const source = input.link == null ? null : node.getInputNode(slot)
                if (source && !source.type.startsWith('Primitive')) return
                const widgets = (source ?? node).widgets
                const name = source ? 'value' : input.name
                widgets.find(widget => widget.name === name).value = values[input.name]
            }))""",
            values,
        )

    def run(self) -> None:
        """Runs the open graph by the page's own shortcut, Control and Enter."""
        self.browser_page.keyboard.press("Control+Enter")

    def wait_for_image(self, node_type: str, timeout_s: float) -> tuple[int, int]:
        """The (height, width) of the image that a node shows, once it is loaded."""
        shown = self.browser_page.wait_for_function(
            """type => {
                const image = app.graph.nodes.find(node => node.type === type)?.imgs?.[0]
                return image?.naturalWidth && [image.naturalHeight, image.naturalWidth]
            }""",
            arg=node_type,
            timeout=timeout_s * 1000,
        )
        return tuple(shown.json_value())

    def wait_until_idle(self) -> None:
        """Waits until nothing is queued and the page has drawn that."""
        self._evaluate(
            """async () => {
                const waits = async () => (await (await fetch('/prompt')).json()).exec_info
                while ((await waits()).queue_remaining) await new Promise(d => setTimeout(d, 200))
                await new Promise(done => setTimeout(done, 1000))
            }"""
        )

    def draw_nodes_as_elements(self, on: bool) -> None:
        """Sets whether nodes are elements of the page, or drawn on its canvas."""
        self._evaluate(
            "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)",
            on,
        )
        self._evaluate(SETTLE)

    def overlaps(self) -> list[str]:
        """Which nodes overlap, and behind which ones a link passes, as the page draws them now."""
        return self._evaluate(OVERLAPS)

    def picture(self, file: Path, side: int = PICTURE_SIDE) -> None:
        """Writes a JPEG of the whole graph without the page's bars, each side at most `side`."""
        left, top, right, bottom = self._evaluate(
            """() => {
                const boxes = app.graph.groups.map(group => group.boundingRect)
                    .concat(app.graph.nodes.map(node => node.boundingRect))
                    .concat([...app.graph.reroutes.values()].map(({pos}) => [...pos, 0, 0]))
                const {scale, offset} = app.canvas.ds
                const sides = boxes.map(([x, y, width, height]) => [x, y, x + width, y + height])
                return [0, 1, 2, 3].map(side => {
                    const values = sides.map(box => (box[side] + offset[side % 2]) * scale)
                    return side < 2 ? Math.min(...values) - 10 : Math.max(...values) + 10
                })
            }"""
        )
        clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        image = Image.open(io.BytesIO(self.browser_page.screenshot(clip=clip)))
        image.thumbnail((side, side))
        image.convert("RGB").save(file, quality=80)

    def _evaluate(self, script: str, argument=None):
        return self.browser_page.evaluate(script, argument)


@contextmanager
def open_page(address: str, scale: float = 1) -> Iterator[Page]:
    """The page of the server at `address`, drawn with `scale` pixels to each of its own."""
    client = Client(address)
    for name, value in SETTINGS.items():
        client.post(f"/settings/{name}", value)
    with sync_playwright() as playwright:
        browser, page = _open(playwright, address, scale)
        try:
            yield page
        finally:
            browser.close()


def _open(
    playwright: Playwright, address: str, scale: float, tries: int = 3
) -> tuple[Browser, Page]:
    """A browser that shows the page; one that crashes while it starts is started again."""
    browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=FLAGS)
    try:
        page = browser.new_page(viewport=VIEWPORT, device_scale_factor=scale)
        return browser, Page(page, address)
    except Error as error:
        browser.close()
        if "has been closed" not in error.message or tries == 1:
            raise
    return _open(playwright, address, scale, tries - 1)
