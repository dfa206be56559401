"""Cases of `make eval`: graphs to run, and a check of the pictures that they make."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from scripts import demo, environment
from scripts.client import Client, Prompt, Run
from training.edits import Edit, draw_edit
from training.render import render
from training.scene import HELD_OUT_WORDS, Scene, draw_scene
from training.wording import prompt_of

from .judge import (
    TOKEN,
    changed_outside,
    furthest_move,
    matches_kinds,
    matches_scene,
    read_text,
    shapes_of,
    shows_item,
    text_box,
)

WORKFLOWS = environment.ROOT / "workflows" / "api"
HELD_OUT = 990  # first number of the seeds of held-out scenes
MAX_CHANGED = 0.05  # share of the pixels outside a text's box

Pictures = list[np.ndarray]
Results = dict[str, bool]


@dataclass(frozen=True)
class Case:
    """Graphs to run one after the other, and a check of their pictures against some of the GOALS.

    `inputs` are the pictures that the graphs load, by file name.
    """

    name: str
    prompt: str
    graphs: tuple[Prompt, ...]
    check: Callable[[Pictures], Results]
    inputs: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Settings of all graphs; `model` is the name of a folder among the server's models.

    `workflow` is the stored one that paints scenes and texts; other cases have their own.
    """

    model: str
    width: int = 512
    height: int = 512
    steps: int = 20
    lookahead: int = 1
    workflow: str = "text_to_image"

    def graph(self, workflow: str, prompt: str, seed: int, name: str) -> Prompt:
        """A stored workflow with these values in every input of their names that is not a link."""
        values = {
            "model_name": self.model, "width": self.width, "height": self.height,
            "steps": self.steps, "lookahead": self.lookahead, "prompt": prompt, "seed": seed,
            "filename_prefix": f"evaluation/{name}",
        }  # fmt: skip
        graph = json.loads((WORKFLOWS / f"{workflow}.json").read_text())
        demo.set_inputs(graph, values)
        return graph


def shape_cases(settings: Settings, count: int) -> Iterator[Case]:
    """Scenes with at least one shape, with and without texts."""

    def check(scene: Scene, pictures: Pictures) -> Results:
        return {
            "colours and places of shapes match": matches_scene(pictures[0], scene),
            "kinds of shapes match as well": matches_kinds(pictures[0], scene),
        }

    for i in range(count):
        rng = _held_out(0, i)
        scene = _draw(rng, settings, None, lambda scene: scene.items)
        prompt, name = prompt_of(rng, scene), f"shapes_{i:02}"
        graph = settings.graph(settings.workflow, prompt, i, name)
        yield Case(name, prompt, (graph,), partial(check, scene))


def latin_cases(settings: Settings, count: int) -> Iterator[Case]:
    """Latin words that no training stage draws."""
    return _text_cases(settings, count, 1, "Latin word read", _is_latin)


def chinese_cases(settings: Settings, count: int) -> Iterator[Case]:
    """Texts of two characters."""
    return _text_cases(settings, count, 2, "two Chinese characters read", _is_chinese_pair)


def override_cases(settings: Settings, count: int) -> Iterator[Case]:
    """Two runs with the same tokens and noise, whose glyph encoder gets two words of one length."""

    def check(scene: Scene, word: str, pictures: Pictures) -> Results:
        box = text_box(scene, scene.texts[0])
        read = read_text(pictures[1], box) == word
        unchanged = changed_outside(*pictures, box) <= MAX_CHANGED
        return {
            "glyph override changes the word alone": read and unchanged,
            "... the new word read": read,
            "... the rest unchanged": unchanged,
        }

    for i in range(count):
        rng = _held_out(3, i)
        old = str(rng.choice(HELD_OUT_WORDS))
        same_length = [word for word in HELD_OUT_WORDS if len(word) == len(old) and word != old]
        new = str(rng.choice(same_length))
        scene = _with_word(_draw(rng, settings, 1, _is_latin), old)
        prompt, name = prompt_of(rng, scene), f"override_{i:02}"
        first = settings.graph("text_to_image", prompt, i, name)
        second = settings.graph("text_to_image", prompt, i, name)
        node(second, "GLMImageGlyphEncode")["texts"] = new
        yield Case(name, prompt, (first, second), partial(check, scene, new))


def layout_cases(settings: Settings, count: int) -> Iterator[Case]:
    """Two seeds with one locked layout, and the second seed without it.

    The scenes have two or more items whose places the prompt leaves open. A place in the prompt
    would hold a shape without a lock.
    """

    def check(scene: Scene, pictures: Pictures) -> Results:
        first, locked, free = (shapes_of(picture, scene) for picture in pictures)
        return {
            "locked layout, another seed: centres kept": furthest_move(first, locked) <= TOKEN,
            "no lock, another seed: centres kept": furthest_move(first, free) <= TOKEN,
        }

    for i in range(count):
        rng = _held_out(4, i)
        scene = _draw(rng, settings, 0, _is_open)
        prompt, name = prompt_of(rng, scene), f"layout_{i:02}"
        locked = [
            settings.graph("lock_layout_change_prompt", prompt, seed, name)
            for seed in (i, 1000 + i)
        ]
        for graph in locked:
            node(graph, "GLMImageSampleLayout")["seed"] = i
        free = settings.graph("text_to_image", prompt, 1000 + i, name)
        yield Case(name, prompt, (*locked, free), partial(check, scene))


def edit_cases(settings: Settings, count: int) -> Iterator[Case]:
    """Edits of a drawn reference. Edits that leave no shape unchanged are skipped."""

    def check(edit: Edit, pictures: Pictures) -> Results:
        (picture,) = pictures
        found = shapes_of(picture, edit.after)
        shown = {item: shows_item(found, edit.after, item) for item in edit.after.items}
        unchanged = shown.keys() & set(edit.before.items)
        return {
            "edit keeps the unchanged shapes": all(shown[item] for item in unchanged),
            "edit does what was wished": all(shown.values()) and matches_kinds(picture, edit.after),
        }

    for i in range(count):
        rng = _held_out(5, i)
        size = (settings.height, settings.width)
        edit = draw_edit(rng, *size)
        while not set(edit.before.items) & set(edit.after.items):
            edit = draw_edit(rng, *size)
        name = f"edit_{i:02}"
        graph = settings.graph("edit_image", edit.wish, i, name)
        node(graph, "LoadImage")["image"] = f"{name}.png"
        inputs = {f"{name}.png": render(edit.before)}
        yield Case(name, edit.wish, (graph,), partial(check, edit), inputs)


SETS = {
    "shapes": shape_cases, "latin": latin_cases, "chinese": chinese_cases,
    "override": override_cases, "layout": layout_cases, "edit": edit_cases,
}  # fmt: skip


def node(graph: Prompt, class_type: str) -> dict:
    """The inputs of the graph's one node of a type."""
    (inputs,) = (one["inputs"] for one in graph.values() if one["class_type"] == class_type)
    return inputs


def paint(client: Client, input_folder: Path, case: Case) -> Pictures:
    """The picture that each graph of a case saves, uint8 [H, W, 3].

    The case's inputs are written to the server's input folder first.
    """
    for name, picture in case.inputs.items():
        Image.fromarray(picture).save(input_folder / name)
    return [
        picture for graph in case.graphs for picture in painted(client, client.run(graph), graph)
    ]


def painted(client: Client, run: Run, graph: Prompt) -> Pictures:
    """The pictures that a run of a graph has saved, uint8 [H, W, 3] each."""
    (saving,) = (key for key, one in graph.items() if one["class_type"] == "SaveImage")
    pngs = client.images(run, saving)
    return [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in pngs]


def _text_cases(
    settings: Settings, count: int, number: int, measure: str, wanted: Callable[[Scene], bool]
) -> Iterator[Case]:
    def check(scene: Scene, pictures: Pictures) -> Results:
        text = scene.texts[0]
        return {measure: read_text(pictures[0], text_box(scene, text)) == text.content}

    for i in range(count):
        rng = _held_out(number, i)
        scene = _draw(rng, settings, 1, wanted)
        if scene.texts[0].script == "latin":
            scene = _with_word(scene, str(rng.choice(HELD_OUT_WORDS)))
        prompt, name = prompt_of(rng, scene), f"{scene.texts[0].script}_{i:02}"
        graph = settings.graph(settings.workflow, prompt, i, name)
        yield Case(name, prompt, (graph,), partial(check, scene))


def _held_out(number: int, i: int) -> np.random.Generator:
    return np.random.default_rng([HELD_OUT, 1000 * number + i])


def _draw(
    rng: np.random.Generator,
    settings: Settings,
    texts: int | None,
    wanted: Callable[[Scene], bool | tuple],
) -> Scene:
    while True:
        scene = draw_scene(rng, settings.height, settings.width, texts)
        if wanted(scene):
            return scene


def _with_word(scene: Scene, word: str) -> Scene:
    return replace(scene, texts=(replace(scene.texts[0], content=word),))


def _is_open(scene: Scene) -> bool:
    return len(scene.items) > 1 and not any(item.place for item in scene.items)


def _is_latin(scene: Scene) -> bool:
    return scene.texts[0].script == "latin"


def _is_chinese_pair(scene: Scene) -> bool:
    return scene.texts[0].script == "chinese" and len(scene.texts[0].content) == 2
