"""Pairs for editing: a scene, the scene with one change, and the wish that asks for it."""

from dataclasses import dataclass, replace

import numpy as np

from .scene import COLOURS, SHAPES, Item, Scene, draw_scene
from .wording import ZH_COLOURS, ZH_SHAPES, noun


@dataclass(frozen=True)
class Edit:
    """The scene of a reference, the scene it should become, and the words that ask for it.

    subject: the item that the wish is about; None is the background.
    to: the colour or the shape that the wish names, if any.
    """

    before: Scene
    after: Scene
    wish: str
    kind: str
    subject: Item | None
    to: str | None


def draw_edit(rng: np.random.Generator, height: int, width: int, texts: int | None = 0) -> Edit:
    """A random change of a random scene with `texts` texts (0 to 2; None: any)."""
    scene = draw_scene(rng, height, width, texts)
    while not scene.items:
        scene = draw_scene(rng, height, width, texts)
    kind = str(rng.choice(list(EDITS)))
    return EDITS[kind](rng, scene)


def _other(rng: np.random.Generator, options, *taken: str) -> str:
    return str(rng.choice([option for option in options if option not in taken]))


def _subject(rng: np.random.Generator, scene: Scene) -> int:
    return int(rng.integers(len(scene.items)))


def _changed(scene: Scene, index: int, **what) -> Scene:
    items = list(scene.items)
    items[index] = replace(items[index], **what)
    return replace(scene, items=tuple(items))


def _recolour(rng: np.random.Generator, scene: Scene) -> Edit:
    index = _subject(rng, scene)
    item = scene.items[index]
    alike = [other.colour for other in scene.items if other.shape == item.shape]
    colour = _other(rng, COLOURS, scene.background, *alike)
    wish = f"make {noun(item, 'the')} {colour}"
    if rng.random() < 0.25:
        wish = f"把{ZH_COLOURS[item.colour]}{ZH_SHAPES[item.shape]}变成{ZH_COLOURS[colour]}"
    return Edit(scene, _changed(scene, index, colour=colour), wish, "recolour", item, colour)


def _background(rng: np.random.Generator, scene: Scene) -> Edit:
    colour = _other(rng, COLOURS, scene.background, *(item.colour for item in scene.items))
    wish = f"change the background to {colour}"
    if rng.random() < 0.25:
        wish = f"把背景变成{ZH_COLOURS[colour]}"
    return Edit(scene, replace(scene, background=colour), wish, "background", None, colour)


def _replace(rng: np.random.Generator, scene: Scene) -> Edit:
    index = _subject(rng, scene)
    item = scene.items[index]
    alike = [other.shape for other in scene.items if other.colour == item.colour]
    shape = _other(rng, SHAPES, *alike)
    plural = "s" if len(item.centres) > 1 else ""
    wish = f"turn {noun(item, 'the')} into {'' if plural else 'a '}{shape}{plural}"
    return Edit(scene, _changed(scene, index, shape=shape), wish, "replace", item, shape)


def _remove(rng: np.random.Generator, scene: Scene) -> Edit:
    index = _subject(rng, scene)
    item = scene.items[index]
    rest = scene.items[:index] + scene.items[index + 1 :]
    wish = f"remove {noun(item, 'the')}"
    return Edit(scene, replace(scene, items=rest), wish, "remove", item, None)


def _isolate(rng: np.random.Generator, scene: Scene) -> Edit:
    """The subject alone, where it was, on another background."""
    item = scene.items[_subject(rng, scene)]
    colour = _other(rng, COLOURS, scene.background, item.colour)
    wish = f"only {noun(item, 'the')}, {colour} background"
    after = replace(scene, background=colour, items=(item,))
    return Edit(scene, after, wish, "isolate", item, colour)


EDITS = {
    "recolour": _recolour,
    "background": _background,
    "replace": _replace,
    "remove": _remove,
    "isolate": _isolate,
}
