"""The semantic codebook: what a cell of the token grid can say.

A cell is background, the inside of a shape, a shape's edge against the background (two colours and
one of `PATTERNS` patterns of 4 x 4), or a part of a character (its script, its index in the text,
and which part of it). A text's code does not name the character; the glyph encoder does that.
`cells` computes the codes of a scene, and the vision tower learns to compute them from pixels.
"""

from functools import lru_cache
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .render import SLOT, coverage
from .scene import COLOURS, MAX_LETTERS, MAX_OTHERS, Item, Scene, Text

CODEBOOK = 2048
PATTERNS = 32
PARTS = 4  # parts a side of a cell's pattern
EMPTY, FULL = 0.02, 0.98  # shares of a cell below and above which it counts as empty and as full
SAMPLES = 2  # points a side at which a part is sampled

NAMES = list(COLOURS)
PAIRS = {pair: i for i, pair in enumerate(permutations(NAMES, 2))}  # (shape, background)
LONGEST = {"latin": MAX_LETTERS, "digit": MAX_OTHERS, "chinese": MAX_OTHERS}
SLOTS = [(script, i) for script, count in LONGEST.items() for i in range(count)]
INSIDE = len(NAMES)
EDGE = 2 * len(NAMES)
TEXT = EDGE + len(PAIRS) * PATTERNS
THIRDS = 3  # a cell's centre lies in the first, middle or last part of a character on each axis
USED = TEXT + len(SLOTS) * THIRDS**2


def cells(scene: Scene, grid: tuple[int, int] | None = None) -> np.ndarray:
    """int64 [rows, columns]: the scene's codes on a grid, by default the large one."""
    grid = grid or scene.grid
    codes = np.full(grid, NAMES.index(scene.background), np.int64)
    for item in scene.items:
        parts = _parts(scene, item, grid)
        mean = parts.mean((2, 3))
        first = EDGE + PAIRS[item.colour, scene.background] * PATTERNS
        edge = (mean > EMPTY) & (mean < FULL)
        codes[mean >= FULL] = INSIDE + NAMES.index(item.colour)
        codes[edge] = first + _nearest(parts[edge].reshape(-1, PARTS**2), patterns())
    for text in scene.texts:
        _set_text(codes, scene, text)
    return codes


def vectors() -> np.ndarray:
    """float32 [CODEBOOK, 64]: a unit vector for each code, near each other if codes look alike."""
    rng = np.random.default_rng(5)
    features = _features()
    basis, _ = np.linalg.qr(rng.standard_normal((features.shape[1], features.shape[1])))
    table = (features @ basis)[:, :64]
    table[USED:] = rng.standard_normal((CODEBOOK - USED, 64))
    return (table / np.linalg.norm(table, axis=1, keepdims=True)).astype(np.float32)


def factors() -> np.ndarray:
    """float32 [CODEBOOK, F]: 1 where a code has a factor, such as a colour or a pattern.

    The factors are the two colours of an edge, its pattern, the inside, and a text's script, index
    and part. Because codes share the embeddings of their factors, a model can learn from one pair
    of colours what holds for all.
    """
    count = len(NAMES)
    inside, pattern = 2 * count, 2 * count + 1
    text = pattern + PATTERNS
    table = np.zeros((CODEBOOK, text + 1 + len(SLOTS) + THIRDS**2), np.float32)
    for i in range(count):
        table[i, i] = 1
        table[INSIDE + i, [count + i, inside]] = 1
    for (name, ground), i in PAIRS.items():
        for j in range(PATTERNS):
            shared = [NAMES.index(ground), count + NAMES.index(name), pattern + j]
            table[EDGE + i * PATTERNS + j, shared] = 1
    for i in range(len(SLOTS)):
        for part in range(THIRDS**2):
            shared = [text, text + 1 + i, text + 1 + len(SLOTS) + part]
            table[TEXT + i * THIRDS**2 + part, shared] = 1
    return table


@lru_cache
def patterns() -> np.ndarray:
    """float32 [PATTERNS, 16]: the patterns of edges.

    They are the k-means centres of the edge cells of two hundred scenes, stored in a file. They are
    never computed again: other centres would change the meaning of a trained checkpoint's codes.
    """
    return np.load(Path(__file__).parent / "patterns.npy")


def slots_of(codes: Tensor) -> Tensor:
    """The index in SLOTS of each code's character, -1 for codes of no text."""
    return torch.where((codes >= TEXT) & (codes < USED), (codes - TEXT) // THIRDS**2, -1)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    distances = (centres**2).sum(1) - 2 * points @ centres.T
    return distances.argmin(1)


def _parts(scene: Scene, item: Item, grid: tuple[int, int]) -> np.ndarray:
    """[rows, columns, PARTS, PARTS]: how much of each part of each cell an item covers."""
    fine = PARTS * SAMPLES
    rows = (np.arange(grid[0] * fine) + 0.5) * (scene.height / (grid[0] * fine))
    columns = (np.arange(grid[1] * fine) + 0.5) * (scene.width / (grid[1] * fine))
    softness = scene.height / (grid[0] * fine)
    alpha = coverage(scene, item, rows.astype(np.float32), columns.astype(np.float32), softness)
    shape = (grid[0], PARTS, SAMPLES, grid[1], PARTS, SAMPLES)
    return alpha.reshape(shape).mean((2, 5)).transpose(0, 2, 1, 3)


def into_text(scene: Scene, text: Text, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """float [rows] and [columns]: a grid's cell centres, in characters from a text's top left.

    The text reaches from 0 to 1, and from 0 to its length.
    """
    y, x = (
        ((np.arange(count) + 0.5) * pixels / count - 32 * first) / SLOT
        for count, pixels, first in zip(
            grid, (scene.height, scene.width), scene.text_origin(text), strict=True
        )
    )
    return y, x


def _set_text(codes: np.ndarray, scene: Scene, text: Text) -> None:
    """Set the codes of the cells whose centres lie in a character's slot."""
    y, x = into_text(scene, text, codes.shape)
    for i in np.flatnonzero((y >= 0) & (y < 1)):
        for j in np.flatnonzero((x >= 0) & (x < len(text.content))):
            slot = SLOTS.index((text.script, int(x[j])))
            part = _third(y[i]) * THIRDS + _third(x[j] % 1)
            codes[i, j] = TEXT + slot * THIRDS**2 + part


def _third(share: float) -> int:
    return 0 if share < 0.375 else 2 if share > 0.625 else 1


def _features() -> np.ndarray:
    """[CODEBOOK, F]: the colours of a code's 4 x 4 parts, its share of shape, its text factors."""
    colours = np.array([COLOURS[name] for name in NAMES], np.float32) / 127.5 - 1
    rows = np.zeros((CODEBOOK, PARTS**2, 3), np.float32)
    shape = np.zeros((CODEBOOK, 1), np.float32)
    rows[: len(NAMES)] = colours[:, None]
    rows[INSIDE:EDGE] = colours[:, None]
    shape[INSIDE:EDGE] = 1
    for (name, ground), i in PAIRS.items():
        edges = slice(EDGE + i * PATTERNS, EDGE + (i + 1) * PATTERNS)
        alpha, (inner, outer) = patterns()[..., None], (NAMES.index(name), NAMES.index(ground))
        rows[edges] = alpha * colours[inner] + (1 - alpha) * colours[outer]
        shape[edges] = alpha.mean(1)
    text = np.zeros((CODEBOOK, 3 + MAX_LETTERS + 2 * THIRDS), np.float32)
    for i, (script, index) in enumerate(SLOTS):
        for part in range(THIRDS**2):
            columns = [
                list(LONGEST).index(script),
                3 + index,
                3 + MAX_LETTERS + part // THIRDS,
                3 + MAX_LETTERS + THIRDS + part % THIRDS,
            ]
            text[TEXT + i * THIRDS**2 + part, columns] = 1
    return np.concatenate([rows.reshape(CODEBOOK, -1), 2 * shape, 3 * text], 1)
