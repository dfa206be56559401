"""Prompts that ask for a scene, in English and in Chinese."""

import numpy as np

from .scene import Item, Scene, Text

PLACES = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
    "centre": ("in the centre", "in the middle", "in the center"),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
ZH_PLACES = {
    "left": ("左边", "左侧"), "right": ("右边", "右侧"), "top": ("上方", "顶部"),
    "bottom": ("下方", "底部"), "centre": ("中间", "中央"), "top left": ("左上角",),
    "top right": ("右上角",), "bottom left": ("左下角",), "bottom right": ("右下角",),
}  # fmt: skip
ZH_COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "black": "黑色", "white": "白色",
}  # fmt: skip
ZH_SHAPES = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星星",
    "diamond": "菱形", "heart": "心形",
}  # fmt: skip
NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
ZH_NUMBERS = {2: "两", 3: "三", 4: "四"}
QUOTES = (("'", "'"), ('"', '"'), ("“", "”"), ("「", "」"))


Thing = Item | Text | None
"""What a phrase asks for; None is the background."""


def prompt_of(rng: np.random.Generator, scene: Scene) -> str:
    """One of the many prompts that ask for this scene."""
    return phrased(rng, scene)[0]


def phrased(rng: np.random.Generator, scene: Scene) -> tuple[str, list[tuple[Thing, int, int]]]:
    """A prompt, and for each thing that it asks for the range [start, end) of its phrase."""
    prompt, phrases = _chinese(rng, scene) if rng.random() < 0.25 else _english(rng, scene)
    small = prompt.lower()
    starts = [small.index(phrase.lower()) for _, phrase in phrases]
    return prompt, [
        (thing, start, start + len(phrase))
        for start, (thing, phrase) in zip(starts, phrases, strict=True)
    ]


def _pick(rng: np.random.Generator, options: tuple) -> str:
    return options[int(rng.integers(len(options)))]


def quoted(rng: np.random.Generator, text: Text) -> str:
    opening, closing = QUOTES[int(rng.choice(4, p=(0.5, 0.25, 0.15, 0.1)))]
    return f"{opening}{text.content}{closing}"


def noun(item: Item, article: str) -> str:
    """`a big red circle`, `the red circle`, `blue stars`; the size of rows is not named."""
    count = len(item.centres)
    size = "" if item.size == "medium" or count > 1 else f"{item.size} "
    words = f"{size}{item.colour} {item.shape}"
    if count > 1:
        return f"the {words}s" if article == "the" else f"{words}s"
    vowel = article == "a" and words[0] in "aeiou"
    return f"{article}{'n' * vowel} {words}"


def _english(rng: np.random.Generator, scene: Scene) -> tuple[str, list[tuple[Thing, str]]]:
    things = [_english_item(rng, item) for item in scene.items]
    phrases = list(zip(scene.items, things, strict=True))
    if len(things) > 1 and rng.random() < 0.3:
        things = [*things[:-2], f"{things[-2]} and {things[-1]}"]
    colour = scene.background
    ground = _pick(rng, (f"{colour} background", f"{colour} background", f"a {colour} background",
                         f"on a {colour} background", f"the background is {colour}"))  # fmt: skip
    texts = [_english_text(rng, text) for text in scene.texts]
    phrases += [(None, ground), *zip(scene.texts, texts, strict=True)]
    parts = [*things, ground] if rng.random() < 0.8 else [ground, *things]
    parts = [*parts, *texts] if rng.random() < 0.8 else [*texts, *parts]
    start = "a picture of " if parts[0] in things and rng.random() < 0.25 else ""
    sentence = start + ", ".join(parts) + _pick(rng, ("", "", "."))
    sentence = sentence[0].upper() + sentence[1:] if rng.random() < 0.3 else sentence
    return sentence, phrases


def _english_item(rng: np.random.Generator, item: Item) -> str:
    place = f" {_pick(rng, PLACES[item.place])}" if item.place else ""
    count = len(item.centres)
    number = f"{_pick(rng, NUMBERS[count])} " if count > 1 else ""
    return number + noun(item, "a") + place


def _english_text(rng: np.random.Generator, text: Text) -> str:
    words, place = quoted(rng, text), _pick(rng, PLACES[text.place])
    return _pick(rng, (f"the text {words} {place}", f"the text {words} {place}",
                       f"with the word {words} {place}", f"{words} written {place}",
                       f"text {words} {place}"))  # fmt: skip


def _chinese(rng: np.random.Generator, scene: Scene) -> tuple[str, list[tuple[Thing, str]]]:
    parts = [_chinese_item(rng, item) for item in scene.items]
    ground = f"{ZH_COLOURS[scene.background]}背景"
    phrases = [*zip(scene.items, parts, strict=True), (None, ground)]
    parts = [*parts, ground] if rng.random() < 0.8 else [ground, *parts]
    texts = [_chinese_text(rng, text) for text in scene.texts]
    phrases += zip(scene.texts, texts, strict=True)
    parts = [*parts, *texts] if rng.random() < 0.8 else [*texts, *parts]
    return "，".join(parts) + _pick(rng, ("", "。")), phrases


def _chinese_text(rng: np.random.Generator, text: Text) -> str:
    place, writes = _pick(rng, ZH_PLACES[text.place]), _pick(rng, ("写着", "文字"))
    return f"{place}{writes}{quoted(rng, text)}"


def _chinese_item(rng: np.random.Generator, item: Item) -> str:
    count = len(item.centres)
    number = ZH_NUMBERS[count] if count > 1 else "一"
    size = {"small": "小", "big": "大"}.get(item.size, "") if count == 1 else ""
    thing = f"{number}个{size}{ZH_COLOURS[item.colour]}{ZH_SHAPES[item.shape]}"
    if item.place is None:
        return thing
    return _pick(rng, ZH_PLACES[item.place]) + _pick(rng, ("", "有")) + thing
