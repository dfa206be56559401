"""`make pictures`: the workflows' pictures, painted by the tiny model.

Each workflow of PROMPTS runs on a real server with the model `tiny/`, prompts that this model
understands, 512x512 and 20 steps; all else is as stored. Its input, previews and saved images
become `workflows/NAME.jpg`. The other workflows show their graph instead, because the tiny model
knows no styles and only one reference. `ARGS="NAME ..."` makes only those. The name `graph` makes
the README's picture of the page with a finished graph.
"""

import io
import json
import os
import sys
from dataclasses import replace

from PIL import Image

from training.render import render
from training.scene import Scene, place_item

from . import demo, environment
from .client import Client, Prompt
from .page import open_page

FOLDER = environment.ROOT / "workflows"
HEIGHT, GAP = 384, 8  # pixels: of each picture, and between two
PER_ROW = 3
GRAPH = environment.ROOT / "docs" / "images" / "graph.jpg"
GRAPH_SIDE = 1800  # pixels, the longer one
GRAPH_SCALE = 1.5
GRAPH_TIMEOUT_S = 120

PROMPTS = {
    "text_to_image": [demo.TINY_PROMPT],
    "text_to_image_ksampler": ["中间一个红色心形，白色背景，底部写着“福喜”"],
    "text_to_image_chinese": ["左边一个蓝色星形，黄色背景，顶部写着“猫茶”"],
    "layout_contact_sheet": ["a red square and a blue star, yellow background"],
    "lock_layout_change_prompt": [
        "a red circle on the left, a green square on the right, white background, "
        "the text 'BOOK' at the bottom",
        "a red circle on the left, a green square on the right, white background, "
        "the text 'OPEN' at the bottom",
    ],
    "compose_two_layouts": [
        "a red circle on the left, white background",
        "a blue star on the left, white background",  # its left half is pasted on the right
        "a red circle on the left, a blue star on the right, white background",
    ],
    "lock_region_resample_rest": [
        "a red circle on the left, a blue square on the right, white background"
    ],
    "redo_region": [
        "a red circle on the left, white background",
        "a red circle on the left, a blue star on the right, white background",
    ],
    "layout_from_sketch": [
        "a blue circle on the left, an orange diamond on the right, white background"
    ],
    "upscale_in_tiles": [demo.TINY_PROMPT],
    "edit_image": ["change the background to yellow"],
}
"""The texts of each workflow's prompt nodes, in the order of their ids."""


def main(names: list[str]) -> None:
    names = names or [*PROMPTS, GRAPH.stem]
    if unknown := set(names) - {*PROMPTS, GRAPH.stem}:
        raise SystemExit(
            f"There is no picture {', '.join(sorted(unknown))}: use {', '.join(PROMPTS)} or "
            f"{GRAPH.stem}."
        )
    model = demo.prepare_model(None)
    with demo.demo_server(environment.host(), model) as address:
        drawn = demo.BASE / "input" / "drawn.png"
        Image.fromarray(render(_scene())).save(drawn)
        for name in names:
            if name == GRAPH.stem:
                photograph_graph(address, model)
                continue
            prompt = workflow_prompt(name, model, drawn.name)
            images = [Image.open(drawn)] if _loads_image(prompt) else []
            images += run_images(Client(address), prompt)
            sheet(images).save(FOLDER / f"{name}.jpg", quality=88)


def photograph_graph(address: str, model: str) -> None:
    """Runs the text-to-image graph, without its note, in the real page and writes `GRAPH`."""
    graph = json.loads((FOLDER / "text_to_image.json").read_text())
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    os.environ["CHROMIUM"] = environment.chromium()
    with open_page(address, GRAPH_SCALE) as page:
        page.open_file(json.dumps(graph), "text_to_image.json")
        page.set_inputs(model_name=model, value=demo.TINY_PROMPT, width=512, height=512, steps=20)
        page.run()
        page.wait_for_image("SaveImage", GRAPH_TIMEOUT_S)
        page.wait_until_idle()
        page.picture(GRAPH, GRAPH_SIDE)


def workflow_prompt(name: str, model: str, image: str) -> Prompt:
    """The stored workflow with the tiny model's prompts; every image it loads is `image`."""
    prompt = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    demo.override(prompt, demo.TINY_SETTINGS, model)
    demo.set_inputs(prompt, {"image": image})
    nodes = [prompt[key] for key in sorted(prompt, key=int)]
    texts = [node for node in nodes if node["class_type"] == "PrimitiveStringMultiline"]
    for node, text in zip(texts, PROMPTS[name], strict=True):
        node["inputs"]["value"] = text
    return prompt


def run_images(client: Client, prompt: Prompt) -> list[Image.Image]:
    """All images of a run, previews first."""
    run = client.run(prompt)
    return [
        Image.open(io.BytesIO(png))
        for kind in ("PreviewImage", "SaveImage")
        for key in sorted(prompt, key=int)
        if prompt[key]["class_type"] == kind
        for png in client.images(run, key)
    ]


def sheet(images: list[Image.Image]) -> Image.Image:
    """The images scaled to one height, in rows of PER_ROW on white."""
    images = [image.convert("RGB") for image in images]
    images = [image.resize((HEIGHT * image.width // image.height, HEIGHT)) for image in images]
    rows = [images[i : i + PER_ROW] for i in range(0, len(images), PER_ROW)]
    width = max(sum(image.width + GAP for image in row) - GAP for row in rows)
    whole = Image.new("RGB", (width, len(rows) * (HEIGHT + GAP) - GAP), "white")
    for i, row in enumerate(rows):
        left = 0
        for image in row:
            whole.paste(image, (left, i * (HEIGHT + GAP)))
            left += image.width + GAP
    return whole


def _scene() -> Scene:
    """The scene that is drawn for the workflows that load an image."""
    empty = Scene(512, 512, "white", (), ())
    things = (("circle", "blue", "left"), ("diamond", "orange", "right"))
    items = (place_item(empty, shape, colour, "medium", place) for shape, colour, place in things)
    return replace(empty, items=tuple(items))


def _loads_image(prompt: Prompt) -> bool:
    return any(node["class_type"] == "LoadImage" for node in prompt.values())


if __name__ == "__main__":
    main(sys.argv[1:])
