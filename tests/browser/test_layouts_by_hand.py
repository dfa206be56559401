"""The editors in the page: hands choose and lock layouts, paste them, and redraw a region."""

import base64
import io
import json
import time

import numpy as np
import pytest
import torch
from glm_image.glm_core.data.cells import format_cells
from glm_image.scripts.client import Client
from glm_image.scripts.editor import MODULES, ROOT, Editor
from glm_image.scripts.workflow_texts import graph_file
from PIL import Image

WORKFLOW = graph_file("layouts_by_hand")
TIMEOUT_MS = 180_000
ROWS, COLUMNS = 13, 18  # of the preview of 256x192 pixels
FRAME_MS = 16


def wait_for(page, text: str) -> None:
    page.browser_page.locator(ROOT).get_by_text(text).wait_for(timeout=TIMEOUT_MS)


@pytest.fixture
def editor(page) -> Editor:
    """The workflow with three small layouts and few steps."""
    graph = json.loads(WORKFLOW.read_text())
    page.open_file(json.dumps(graph), WORKFLOW.name)
    page.set_inputs(width=256, height=192, steps=1)
    set_value(page, "GLMImageSampleLayout", "batch_size", 3)
    # At this temperature free cells change in any case.
    for sampler in ("GLMImageSampleLayout", "GLMImageSampleTokens"):
        set_value(page, sampler, "temperature", 5.0)
        set_value(page, sampler, "top_p", 1.0)
    shown = Editor(page, "Click one, drag over it", "Layouts", {"rows": ROWS, "columns": COLUMNS})
    shown.center()
    return shown


def set_value(page, node_type, name, value, title=None):
    page.browser_page.evaluate(
        """([type, name, value, title]) => {
            const fits = node => node.type === type && (!title || node.title === title)
            const node = app.graph.nodes.find(fits)
            node.widgets.find(widget => widget.name === name).value = value
        }""",
        [node_type, name, value, title],
    )


def set_prompt(page, title, text):
    set_value(page, "PrimitiveStringMultiline", "value", text, title)


def unmark(page, editor: Editor, *drag) -> None:
    page.browser_page.keyboard.down("Shift")
    editor.drag(*drag)
    page.browser_page.keyboard.up("Shift")


def last_outputs(client: Client) -> dict[str, dict]:
    """The outputs of the newest run, by the type of their node."""
    (run,) = json.loads(client.get("/history?max_items=1")).values()
    nodes = run["prompt"][2]
    return {nodes[key]["class_type"]: output for key, output in run["outputs"].items()}


def colours(grid: dict) -> np.ndarray:
    raw = np.frombuffer(base64.b64decode(grid["colours"]), dtype=np.uint8)
    return raw.reshape(grid["count"], grid["rows"], grid["columns"], 3)


def picture(client: Client, outputs: dict[str, dict]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(client.view(outputs["SaveImage"]["images"][0]))))


def test_run_click_drag_and_another_prompt(editor, page, address):
    client = Client(address)
    page.browser_page.get_by_role("button", name="Run only what leads to this node").click()
    wait_for(page, "layout 0 of 3")
    page.wait_until_idle()
    assert "SaveImage" not in last_outputs(client)
    editor.center()

    requests = []
    page.browser_page.on("request", lambda sent: requests.append(sent.url))
    editor.click_tile(2, 3)
    editor.drag((0, 0), (ROWS - 1, COLUMNS // 2 - 1), 3)
    wait_for(page, "117 of 234 cells locked")
    assert editor.values("batch_index", "cells") == (2, "0-12:0-8")
    assert requests == []

    set_prompt(
        page, "Prompt", "a red circle on the left, a blue star on the right, black background"
    )
    page.run()
    page.wait_until_idle()
    outputs = last_outputs(client)
    (layouts,) = outputs["GLMImageLockLayout"]["glm_grids"]

    # The exported prompt makes the same picture without the page, from nothing.
    client.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)  # until the server has done so
    prompt = page.export_prompt()
    (sampler,) = (k for k, node in prompt.items() if node["class_type"] == "GLMImageSampleTokens")
    used = {"layout": [sampler, 1], "lock": "none", "batch_index": 0, "cells": ""}
    prompt["used"] = {"class_type": "GLMImageLockLayout", "inputs": used}
    run = client.run(prompt)
    assert len(run.cached) == 0
    np.testing.assert_array_equal(picture(client, last_outputs(client)), picture(client, outputs))
    before, after = colours(layouts)[2], colours(run.outputs["used"]["glm_grids"][0])[0]
    np.testing.assert_array_equal(after[:, :9], before[:, :9])
    assert (after[:, 9:] != before[:, 9:]).any()

    # Other layouts: the cells are marked, until they are kept or dropped.
    set_value(page, "GLMImageSampleLayout", "seed", 99)
    page.browser_page.get_by_role("button", name="Run only what leads to this node").click()
    wait_for(page, "These cells were chosen for other layouts.")
    page.wait_until_idle()
    page.browser_page.reload()
    page.browser_page.wait_for_function("window.app?.graph && window.app.vueAppReady")
    wait_for(page, "layout 2 of 3")
    wait_for(page, "These cells were chosen for other layouts.")
    page.browser_page.get_by_role("button", name="Drop them").click()
    wait_for(page, "by lock: whole")
    assert editor.values("cells") == ("",)

    # Nobody who unlocks the last cell means the whole.
    editor.center()
    editor.drag((4, 5), (4, 5), 3)
    assert editor.values("cells", "lock") == ("4:5", "whole")
    unmark(page, editor, (4, 5), (4, 5), 3)
    wait_for(page, "0 of 234 cells locked · by lock: none")
    assert editor.values("cells", "lock") == ("", "none")
    page.browser_page.get_by_role("button", name="Undo").click()
    assert editor.values("cells", "lock") == ("4:5", "whole")
    assert page.errors == []


SIZE = {"width": 96, "height": 64}  # a preview of 13 x 19 cells, and 2 x 3 of 32 pixels
PREVIEW = {"rows": 13, "columns": 19}
LOW = (600, -400)  # where a long node shows its lower end


def pasting_and_redrawing() -> dict:
    """A layout pasted into another, and tokens with that layout of which a region is redrawn."""

    def node(kind, title, **inputs):
        return {"class_type": f"GLMImage{kind}", "inputs": inputs, "_meta": {"title": title}}

    options = {"temperature": 5.0, "top_p": 1.0, "top_k": 0, "batch_size": 1, **SIZE}
    sampled = {"ar": ["1", 0], "prompt": "a red circle", "cells": "", **options}
    layout = {"ar": ["1", 0], "prompt": "a blue star", **options}
    return {
        "1": node("LoadAR", "AR", model_name="GLM-Image", weight_dtype="default"),
        "2": node("SampleLayout", "Base", seed=1, **layout),
        "3": node("SampleLayout", "Source", seed=2, **layout),
        "4": node(
            "ComposeLayouts", "Paste", base=["2", 0], source=["3", 0], row=0, column=0, cells=""
        ),
        "5": node("SampleTokens", "First", layout=["4", 0], seed=3, **sampled),
        "6": node("SampleTokens", "Redraw", tokens=["5", 0], seed=4, **sampled),
        "7": node("ShowTokens", "Show", tokens=["6", 0], cell_size=8),
    }


def test_layouts_are_pasted_and_tokens_redrawn_with_mouse_finger_and_keys(page, address):
    page.open_api(pasting_and_redrawing(), "hands")
    page.browser_page.evaluate(
        """() => app.graph.nodes.forEach(node => {
            node.pos = [1000 * node.id, 0]
            for (const one of node.widgets)
                if (one.name === 'control_after_generate') one.value = 'fixed'
        })"""
    )
    pasting = Editor(page, "Paste", "Source", PREVIEW | {"base": PREVIEW})
    redrawing = Editor(page, "Redraw", "Tokens", {"rows": 2, "columns": 3})
    page.run()
    page.wait_until_idle()

    pasting.center()
    pasting.drag((2, 3), (5, 6))
    pasting.drag((4, 4), (6, 14), 1, "base")
    assert pasting.values("row", "column", "cells") == (2, 10, "2-5:3-6")
    page.browser_page.keyboard.press("Alt+ArrowUp")
    for key in ("ArrowDown", "ArrowRight", "Shift+ArrowRight", "Space"):
        page.browser_page.keyboard.press(key)
    assert pasting.values("row", "column", "cells") == (1, 10, "0:1-2; 2-5:3-6")

    # With no cell named all would be pasted, so one stays.
    unmark(page, pasting, (0, 0), (12, 18))
    wait_for(page, "One cell stays: with none named the mask counts, or all")
    assert pasting.values("row", "column", "cells") == (1, 10, "0:1-2; 2-5:3-6")

    # A second finger means the page; the first alone means cells.
    redrawing.center(LOW)
    fingers = page.browser_page.context.new_cdp_session(page.browser_page)

    def touch(kind, *cells):
        points = [{**redrawing.point(cell), "id": i} for i, cell in enumerate(cells)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (0, 0))
    touch("touchMove", (0, 1))
    touch("touchStart", (0, 1), (1, 2))
    touch("touchEnd")
    assert redrawing.values("cells") == ("",)
    redrawing.center(LOW)
    touch("touchStart", (0, 1))
    touch("touchMove", (1, 1))
    touch("touchEnd")
    assert redrawing.values("cells") == ("0-1:1",)
    wait_for(page, "2 of 6 cells drawn anew")

    page.run()
    page.wait_until_idle()
    (run,) = json.loads(Client(address).get("/history?max_items=1")).values()
    given, written = (run["outputs"]["6"][key][0] for key in ("glm_given", "glm_grids"))
    assert given["marked"] == "0-1:1"
    before, after = colours(given)[0], colours(written)[0]
    np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (after[:, 1] != before[:, 1]).any()
    unmark(page, redrawing, (0, 0), (1, 2))
    wait_for(page, "0 of 6 cells drawn anew")
    assert redrawing.values("cells") == ("",)
    assert page.errors == []


def test_cells_in_the_page_are_those_of_the_server(shared_page):
    """The same canonical text; what hands do to cells; and what is refused."""
    generator = torch.Generator().manual_seed(0)
    grids = [torch.rand(5, 7, generator=generator) < share / 10 for share in range(11)]
    grids += [torch.arange(35).view(5, 7) % 7 < 4]
    script = """async ([module, grids]) => {
        const {parseCells, formatCells, withRectangle, withLine, inverted} = await import(module)
        const texts = grids.map(marks => formatCells(Uint8Array.from(marks), 5, 7))
        const empty = new Uint8Array(35)
        const left = withRectangle(empty, 7, [4, 2], [0, 0], 1)
        return {
            texts,
            again: texts.map(text => formatCells(parseCells(text, 5, 7), 5, 7)),
            hole: formatCells(withRectangle(left, 7, [1, 1], [2, 1], 0), 5, 7),
            others: formatCells(inverted(left), 5, 7),
            line: formatCells(withLine(empty, 7, [0, 0], [3, 6], 1), 5, 7),
            refused: ['3-1:0', '0:7', '5:0', 'x', '1'].map(text => parseCells(text, 5, 7)),
        }
    }"""
    argument = [f"{MODULES}/cells.js", [grid.flatten().int().tolist() for grid in grids]]
    found = shared_page.browser_page.evaluate(script, argument)
    assert found["texts"] == found["again"] == [format_cells(grid) for grid in grids]
    assert found["hole"] == "0:0-2; 1-2:0; 1-2:2; 3-4:0-2"
    assert found["others"] == "0-4:3-6"
    assert found["line"] == "0:0; 1:1-2; 2:3-4; 3:5-6"
    assert found["refused"] == [None] * 5


def test_sixty_layouts_are_drawn_within_a_frame(shared_page):
    script = """async module => {
        const {CellEditor} = await import(`${module}/cell_editor.js`)
        const {CellsPane} = await import(`${module}/cells_pane.js`)
        const {SheetPane} = await import(`${module}/sheet_pane.js`)
        const {decodeEditable} = await import(`${module}/grids.js`)
        const {editorTexts} = await import(`${module}/editor_texts.js`)
        const colours = new Uint8Array(60 * 256 * 3).map(() => 255 * Math.random())
        const grid = decodeEditable({
            kind: 'layout', rows: 16, columns: 16, count: 60, total: 60,
            locked: '', marked: '', given: '',
            colours: btoa(String.fromCharCode(...colours)),
            hashes: Array.from({length: 60}, (_, i) => `${i}`),
        })
        const values = {cells: ''}
        const kind = {
            panes: () => [new SheetPane(), new CellsPane()],
            read: () => ({taken: 7, shown: grid.marked}),
            kept: marks => marks,
            about: () => [],
        }
        const inputs = {values: () => values, isStale: () => false, adopt: () => {}}
        const editor = new CellEditor(kind, inputs, editorTexts('GLMImageLockLayout'))
        editor.element.style.cssText += 'position:fixed;left:0;top:0;width:400px;height:700px'
        document.body.append(editor.element)
        editor.show(grid)
        const times = []
        for (let i = 0; i < 100; i++) {
            values.cells = `0-15:0-${i % 15}` // another selection in every frame, as in a drag
            const start = performance.now()
            editor.draw()
            editor.parts.canvas.getContext('2d').getImageData(0, 0, 1, 1) // waits for the drawing
            times.push(performance.now() - start)
        }
        editor.element.remove()
        return times.sort((a, b) => a - b)
    }"""
    times = shared_page.browser_page.evaluate(script, MODULES)
    print(f"60 layouts of 16x16: {times[len(times) // 2]:.1f} ms a frame (best {times[0]:.1f})")
    assert times[0] < FRAME_MS  # the best, as the machine may be busy with other work
