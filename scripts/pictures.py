"""`make pictures`: the workflows' thumbnails, painted by the tiny model.

Each workflow runs on a real server with the model `tiny/`, prompts that this model understands,
512x512 and 20 steps; all else is as stored. Its picture becomes the thumbnail of its graph, a
square, with what led to it along the upper edge. `ARGS="NAME ..."` makes only those. The name
`graph` makes the README's picture of the page with a finished graph, `layouts_by_hand_film` its
animation, and `editors` the docs' pictures of editors.
"""

import io
import json
import math
import os
import sys

from PIL import Image, ImageOps

from . import demo, editor_pictures, environment, film
from .client import Client, Prompt
from .page import open_page
from .tiny_graphs import draw_picture
from .workflow_texts import FOLDER, WORKFLOWS, graph_file

SIDE = 640  # pixels of a thumbnail, as the template browser shows it
INSET, FRAME, GAP = 190, 4, 10  # pixels: an inset's side, its frame, around it
GRAPH = environment.ROOT / "docs" / "images" / "graph.jpg"
FILM = f"{film.NAME}_film"
EDITORS = "editors"
GRAPH_SIDE = 1800  # pixels, the longer one
GRAPH_SCALE = 1.5
GRAPH_TIMEOUT_S = 120


def main(names: list[str]) -> None:
    known = [*WORKFLOWS, GRAPH.stem, FILM, EDITORS]
    names = names or known
    if unknown := set(names) - set(known):
        raise SystemExit(
            f"There is no picture {', '.join(sorted(unknown))}: use {', '.join(known)}."
        )
    model = demo.prepare_model(None)
    with demo.demo_server(environment.host(), model) as address:
        drawn = demo.BASE / "input" / "drawn.png"
        draw_picture(drawn)
        for name in names:
            if name == GRAPH.stem:
                photograph_graph(address, model)
                continue
            if name == FILM:
                film.main(address, model)
                continue
            if name == EDITORS:
                editor_pictures.main(address, model)
                continue
            prompt = workflow_prompt(name, model, drawn.name)
            sources = [Image.open(drawn)] if _loads_image(prompt) else []
            *previews, picture = run_images(Client(address), prompt)
            file = graph_file(name).with_suffix(".jpg")
            thumbnail(picture, sources + previews).save(file, quality=88)


def photograph_graph(address: str, model: str) -> None:
    """Runs the text-to-image graph, without its note, in the real page and writes `GRAPH`."""
    graph = json.loads(graph_file("text_to_image").read_text())
    graph["nodes"] = [node for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    os.environ["CHROMIUM"] = environment.chromium()
    with open_page(address, GRAPH_SCALE) as page:
        page.open_file(json.dumps(graph), "text_to_image.json")
        page.set_inputs(model_name=model, prompt=demo.TINY_PROMPT, width=512, height=512, steps=20)
        page.run()
        page.wait_for_image("SaveImage", GRAPH_TIMEOUT_S)
        page.wait_until_idle()
        page.picture(GRAPH, GRAPH_SIDE)


def workflow_prompt(name: str, model: str, image: str) -> Prompt:
    """The stored workflow with the tiny model's prompts; every image it loads is `image`."""
    prompt = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    demo.override(prompt, demo.TINY_SETTINGS, model)
    demo.set_inputs(prompt, {"image": image})
    for node in prompt.values():
        if node["class_type"] == "PrimitiveStringMultiline":
            node["inputs"]["value"] = WORKFLOWS[name].tiny[node["_meta"]["title"]]
        if name == film.NAME and node["class_type"] == "GLMImageLockLayout":
            node["inputs"] |= {"batch_index": film.TAKEN, "cells": film.LOCKED}
    return prompt


def run_images(client: Client, prompt: Prompt) -> list[Image.Image]:
    """The images of a run: of each preview all on one sheet, then the saved one."""
    run = client.run(prompt)
    shown = {
        "GLMImageLockLayout": "glm_images",
        **dict.fromkeys(("GLMImageShowTokens", "PreviewImage", "SaveImage"), "images"),
    }
    return [
        sheet([Image.open(io.BytesIO(client.view(image))) for image in run.outputs[key][name]])
        for kind, name in shown.items()
        for key in sorted(prompt, key=int)
        if prompt[key]["class_type"] == kind and name in run.outputs[key]
    ]


def sheet(images: list[Image.Image]) -> Image.Image:
    """The images of a batch in rows on white, as ComfyUI's page shows them."""
    if len(images) == 1:
        return images[0]
    across = math.ceil(math.sqrt(len(images)))
    width, height = (side + GAP for side in images[0].size)
    down = math.ceil(len(images) / across)
    whole = Image.new("RGB", (across * width - GAP, down * height - GAP), "white")
    for i, image in enumerate(images):
        whole.paste(image, (i % across * width, i // across * height))
    return whole


def thumbnail(picture: Image.Image, sources: list[Image.Image]) -> Image.Image:
    """The picture as a square, with what led to it as insets along its upper edge."""
    whole = ImageOps.fit(picture.convert("RGB"), (SIDE, SIDE))
    left = GAP
    for source in sources:
        inset = ImageOps.contain(source.convert("RGB"), (INSET, INSET))
        whole.paste(ImageOps.expand(inset, FRAME, "#404040"), (left, GAP))
        left += inset.width + 2 * FRAME + GAP
    return whole


def _loads_image(prompt: Prompt) -> bool:
    return any(node["class_type"] == "LoadImage" for node in prompt.values())


if __name__ == "__main__":
    main(sys.argv[1:])
