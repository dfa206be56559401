"""`python -m evaluation.run`: does the trained model in `tiny/` paint what its prompts ask for?

The pack's own workflows paint every picture on a real server. The scenes come from seeds that
training does not use, though simple scenes may occur in both. Training never draws the Latin words
that are read here.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from PIL import Image

from scripts import demo, environment, host
from scripts.client import Client, Prompt
from training.edits import Edit, draw_edit
from training.render import render
from training.scene import HELD_OUT_WORDS, SIZES, Scene, draw_scene
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

MODEL = environment.ROOT / "tiny"
WORKFLOWS = environment.ROOT / "workflows" / "api"
HELD_OUT = 990  # first number of the seeds of held-out scenes
MAX_CHANGED = 0.05  # share of the pixels outside a text's box

GOALS = {
    "colours and places of shapes match": 0.9,
    "kinds of shapes match as well": None,
    "Latin word read": 0.8,
    "two Chinese characters read": 0.6,
    "glyph override changes the word alone": None,
    "... the new word read": None,
    "... the rest unchanged": None,
    "locked layout, another seed: centres kept": 0.95,
    "no lock, another seed: centres kept": None,
    "edit keeps the unchanged shapes": None,
    "edit does what was wished": None,
}
"""What is measured, and the share of cases that should pass; None sets no goal."""

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
    """Settings of all graphs; `model` is the name of a folder among the server's models."""

    model: str
    width: int = 512
    height: int = 512
    steps: int = 20

    def graph(self, workflow: str, prompt: str, seed: int, name: str) -> Prompt:
        """A stored workflow with these values in every input of their names that is not a link."""
        values = {
            "model_name": self.model, "width": self.width, "height": self.height,
            "steps": self.steps, "prompt": prompt, "seed": seed,
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
        graph = settings.graph("text_to_image", prompt, i, name)
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
    pictures = []
    for graph in case.graphs:
        (saving,) = (key for key, one in graph.items() if one["class_type"] == "SaveImage")
        png = client.images(client.run(graph), saving)[0]
        pictures.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
    return pictures


def totals(results: Iterable[Results]) -> dict[str, tuple[int, int]]:
    """How often each of the GOALS held, and in how many cases it was measured."""
    counts: dict[str, tuple[int, int]] = {}
    for result in results:
        for measure, held in result.items():
            good, asked = counts.get(measure, (0, 0))
            counts[measure] = good + held, asked + 1
    return counts


def table(counts: dict[str, tuple[int, int]]) -> str:
    lines = ["| measure | goal | result | share |", "|---|---|---|---|"]
    for measure, goal in GOALS.items():
        if measure in counts:
            good, asked = counts[measure]
            wanted = "" if goal is None else f"{goal:.0%}"
            lines.append(f"| {measure} | {wanted} | {good}/{asked} | {good / asked:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.run", description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="cases of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=read_size, default=(512, 512), metavar="WIDTHxHEIGHT",
                        help="of all pictures, in pixels; one number for a square")  # fmt: skip
    parser.add_argument("--out", type=Path, default=environment.ROOT / "evaluation/last.json")
    parser.add_argument("--kinds", nargs="+", choices=SETS, default=list(SETS), metavar="KIND",
                        help=f"of cases: {', '.join(SETS)}")  # fmt: skip
    parser.add_argument("--servers", type=int, default=1, help="side by side, a core each")
    given = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit(f"There is no trained model in {MODEL}: run make train-tiny.")
    settings = Settings(MODEL.name, *given.size, given.steps)
    records = []
    used = {"size": given.size, "steps": given.steps, "count": given.count}
    cases = [case for kind in given.kinds for case in SETS[kind](settings, given.count)]
    with servers(given.servers) as painted, ThreadPoolExecutor(given.servers) as pool:
        for case, pictures in zip(cases, pool.map(painted, cases), strict=True):
            results = case.check(pictures)
            records.append({"case": case.name, "prompt": case.prompt, "held": results})
            print(case.name, "".join("x."[held] for held in results.values()), flush=True)
            _write_report(given.out, used, records)  # after each case, so that none is lost
    print(table(totals(record["held"] for record in records)))


def read_size(given: str) -> tuple[int, int]:
    """(width, height) from "768x512", or from "512" for a square; the model must know the size."""
    known = {f"{width}x{height}": (width, height) for height, width in SIZES}
    size = given if "x" in given else f"{given}x{given}"
    if size not in known:
        raise argparse.ArgumentTypeError(
            f"the model does not know the size {given}: use {', '.join(known)}"
        )
    return known[size]


@contextmanager
def servers(count: int) -> Iterator[Callable[[Case], Pictures]]:
    """Starts `count` servers and yields `paint` on whichever of them is free."""
    comfyui = environment.host()
    flags = ("--output-directory", str(demo.OUTPUT))
    threads = 1 if count > 1 else None
    free = SimpleQueue()
    with ExitStack() as stack:
        for i in range(count):
            base = host.make_base(environment.CACHE / "evaluation" / str(i))
            host.add_model(base, MODEL)
            server = host.serve(comfyui, base, *flags, threads=threads)
            address = stack.enter_context(server)
            free.put((Client(address), base / "input"))

        def painted(case: Case) -> Pictures:
            server = free.get()
            try:
                return paint(*server, case)
            finally:
                free.put(server)

        yield painted


def _write_report(file: Path, used: dict, records: list[dict]) -> None:
    counts = totals(record["held"] for record in records)
    summary = {
        measure: {"goal": GOALS[measure], "good": good, "cases": asked}
        for measure, (good, asked) in counts.items()
    }
    report = {"settings": used, "summary": summary, "cases": records}
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


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
        graph = settings.graph("text_to_image", prompt, i, name)
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


if __name__ == "__main__":
    main()
