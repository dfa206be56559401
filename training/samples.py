"""What the AR model is trained on: prompts with the codes that follow them, and what they know."""

import json
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from glm_core.ar.prompt import Prompt, PromptTokenizer
from glm_core.data.grids import grid_positions

from .codes import CODEBOOK, INSIDE, cells
from .edits import draw_edit
from .reading import (
    EIGHTHS,
    asked_by,
    layout_of,
    noted_at,
    notes_of,
    squares_at,
    to_come,
    wished_by,
)
from .scene import Item, Scene, draw_scene
from .tokenizer import IMAGE_START, NOTES
from .wording import Thing, phrased

NO_POSITIONS = torch.zeros(3, 0, dtype=torch.int64)
NO_CODES, NO_WEIGHTS = NO_POSITIONS[0], torch.zeros(0)
NOWHERE = torch.zeros(0, 2, dtype=torch.int64)
# The share of scenes with all places open, more than `draw_scene`'s: which of the items stand
# already is the last thing to be learnt, and such scenes alone teach it.
OPEN_SCENES = 0.3
# The share of a large grid's cells that are read as other cells than they should be, in half of the
# pictures: whatever went wrong before a cell, it is to be the preview's.
MISREAD = 0.1


@dataclass(frozen=True)
class Sample:
    """A prompt, and the codes that should follow it with their positions; none, if not given.

    codes: int64 [N]; positions: int64 [3, N]; weights: how much each code counts, float [N].
    read: what the model reads where it is to have written each code, int64 [N].
    copied: which token of prompt and codes lies where each code lies, in the preview or in the
        reference; int64 [N], -1 where none does.
    within: where in the preview's cell that is copied the centre of each cell lies, eighths down
        and to the right, int64 [N, 2]; -1 where none is.
    square: in which of the preview's rows and columns of the square around a shape each cell of a
        large grid lies, int64 [N, 2]; -1 where in none.
    noted: which token of the prompt is a note on what each code is a part of, or, in an edit, on
        what is wished, if that changes the cell; likewise.
    grid: rows and columns of the grid that the codes begin with.
    layout: what the picture will show, `reading.layout_of`; None for an edit.
    coming: what of it is still to begin in the preview, `reading.to_come`.
    phrases: for each, the token that must say what it asks for, `reading.asked_by`, and that.
    spoken: the first and the last token that speak of what each of NOTES is about, int64
        [NOTES, 2]; -1 where none does.
    wished: what an edit asks for, `reading.wished_by`.
    subject: whether an edit's wish is about the shape that each of the reference's cells shows, 1
        or 0; int64 [N], -1 where it shows none.
    """

    prompt: Prompt
    grid: tuple[int, int]
    layout: Tensor | None = None
    coming: Tensor | None = None
    phrases: tuple[tuple[int, Tensor], ...] = ()
    spoken: Tensor = NO_CODES
    wished: Tensor | None = None
    codes: Tensor = NO_CODES
    read: Tensor = NO_CODES
    positions: Tensor = NO_POSITIONS
    weights: Tensor = NO_WEIGHTS
    copied: Tensor = NO_CODES
    within: Tensor = NOWHERE
    square: Tensor = NOWHERE
    noted: Tensor = NO_CODES
    subject: Tensor = NO_CODES


class Samples:
    """Draws samples in the words of a saved processor.

    In its methods, `stress` is how much more than others the first cells of things count.
    """

    def __init__(self, processor: Path) -> None:
        self.tokenizer = read_tokenizer(processor)
        self.offsets = Tokenizer.from_file(str(processor / "tokenizer.json"))
        self.first_note = self.offsets.token_to_id(NOTES[0])

    def image(
        self, rng: np.random.Generator, height: int, width: int, whole: bool, stress: float
    ) -> Sample:
        """A prompt and its preview, and if `whole` the large grid after it."""
        scene, sample = self.scene(rng, height, width)
        written, grid = cells(scene, scene.preview), scene.preview
        codes = torch.from_numpy(written).flatten()
        nowhere = torch.full((len(codes), 2), -1)
        sample = replace(
            sample, codes=codes, read=codes, weights=_weights(written, stress),
            positions=grid_positions(grid, sample.prompt.end),
            copied=torch.full_like(codes, -1), within=nowhere, square=nowhere,
            noted=self._noted(sample.prompt, scene, grid), coming=to_come(scene, codes.view(grid)),
        )  # fmt: skip
        if not whole:
            return sample
        noted = self._noted(sample.prompt, scene, scene.grid)
        return self._enlarged(rng, sample, scene, noted, stress)

    def locked(self, rng: np.random.Generator, height: int, width: int, stress: float) -> Sample:
        """A prompt, as given a preview that shows one thing otherwise, and that one's large grid.

        Such is a locked layout, and a preview that failed: the large grid is not to mend it.
        """
        edit = draw_edit(rng, height, width, texts=None)
        told, shown = (edit.before, edit.after)[:: rng.choice((1, -1))]
        sample = self._told(rng, told)
        as_told = torch.from_numpy(cells(told) == cells(shown)).flatten()
        noted = torch.where(as_told, self._noted(sample.prompt, told, told.grid), -1)
        sample = self._enlarged(rng, sample, shown, noted, stress)
        prompt, preview = sample.prompt, torch.from_numpy(cells(shown, shown.preview)).flatten()
        where = grid_positions(shown.preview, prompt.end)
        given = Prompt(torch.cat([prompt.ids, preview]), torch.cat([prompt.positions, where], 1))
        return replace(sample, prompt=given, grid=shown.grid)

    def prompt(self, rng: np.random.Generator, height: int, width: int) -> Sample:
        """A prompt alone."""
        return self.scene(rng, height, width)[1]

    def scene(self, rng: np.random.Generator, height: int, width: int) -> tuple[Scene, Sample]:
        """A scene, and its prompt alone."""
        scene = draw_scene(rng, height, width, all_anywhere=OPEN_SCENES)
        return scene, self._told(rng, scene)

    def _told(self, rng: np.random.Generator, scene: Scene) -> Sample:
        """A scene's prompt alone."""
        words, phrases = phrased(rng, scene)
        spans = self.offsets.encode(words, add_special_tokens=False).offsets
        ends = [end for _, end in spans]
        tokens = {
            thing: (bisect_left(ends, start + 1), bisect_left(ends, end) + _is_open(thing))
            for thing, start, end in phrases
        }
        asked = tuple((last, asked_by(thing, scene)) for thing, (_, last) in tokens.items())
        prompt = self.tokenizer.text_to_image(words, scene.grid)
        spoken = torch.full((len(NOTES), 2), -1)
        for thing, note in reversed(notes_of(scene)):  # a row may be at the place of another
            spoken[NOTES.index(note)] = torch.tensor(tokens[thing])
        return Sample(prompt, scene.preview, layout=layout_of(scene), phrases=asked, spoken=spoken)

    def _enlarged(
        self, rng: np.random.Generator, sample: Sample, scene: Scene, noted: Tensor, stress: float
    ) -> Sample:
        """The sample with a scene's large grid, `noted` in its cells, behind its preview."""
        written, grid = cells(scene), scene.grid
        codes = torch.from_numpy(written).flatten()
        same, within = _same(grid, scene.preview)
        parts = {
            "codes": codes,
            "read": _misread(rng, codes),
            "positions": grid_positions(grid, sample.prompt.end + max(scene.preview)),
            "weights": _weights(written, stress),
            "copied": len(sample.prompt) + same,
            "within": within,
            "square": squares_at(scene, grid).flatten(0, 1),
            "noted": noted,
        }
        # a cell is along the last axis of positions, and the first of all others
        return replace(
            sample,
            **{
                name: torch.cat([getattr(sample, name), part], int(name == "positions"))
                for name, part in parts.items()
            },
        )

    def edit(self, rng: np.random.Generator, height: int, width: int, stress: float) -> Sample:
        """A wish, its reference, and the edited picture's grid."""
        edit = draw_edit(rng, height, width)
        reference = torch.from_numpy(cells(edit.before))
        grid = edit.after.grid
        prompt = self.tokenizer.image_to_image(edit.wish, grid, [reference])
        written = cells(edit.after)
        codes, weights = torch.from_numpy(written).flatten(), _weights(written, stress)
        positions = grid_positions(grid, prompt.end)
        copied = (prompt.ids < CODEBOOK).nonzero()[:, 0]
        before = reference.flatten()
        noted = torch.where(codes == before, -1, copied[0] - 1)
        about = replace(edit.before, items=() if edit.subject is None else (edit.subject,))
        subject = torch.from_numpy(cells(about)).flatten() >= INSIDE
        return Sample(
            prompt, grid, wished=wished_by(edit),
            codes=codes, read=codes, positions=positions, weights=weights,
            copied=copied, noted=noted, subject=torch.where(before < INSIDE, -1, subject.long()),
        )  # fmt: skip

    def wish(self, rng: np.random.Generator, height: int, width: int) -> Sample:
        """A wish, up to the start of the reference."""
        edit = draw_edit(rng, height, width)
        reference = torch.zeros(edit.before.grid, dtype=torch.int64)
        prompt = self.tokenizer.image_to_image(edit.wish, edit.after.grid, [reference])
        start = int((prompt.ids == IMAGE_START).nonzero()[0, 0]) + 1
        prompt = replace(prompt, ids=prompt.ids[:start], positions=prompt.positions[:, :start])
        return Sample(prompt, edit.after.grid, wished=wished_by(edit))

    def _noted(self, prompt: Prompt, scene: Scene, grid: tuple[int, int]) -> Tensor:
        notes = noted_at(scene, grid).flatten()
        first = int((prompt.ids == self.first_note).nonzero())
        return torch.where(notes < 0, -1, first + notes)


def _is_open(thing: Thing) -> bool:
    """Whether only the token behind its phrase can tell that no place follows."""
    return isinstance(thing, Item) and thing.place is None


def _same(grid: tuple[int, int], smaller: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The cell of the smaller grid that each cell's centre is in, and where in it that lies.

    Returns:
        Indices, int64 [H * W], and eighths of the cell down and to the right, int64 [H * W, 2].
    """
    eighths = torch.cartesian_prod(
        *(
            (2 * torch.arange(many) + 1) * few * EIGHTHS // (2 * many)
            for many, few in zip(grid, smaller, strict=True)
        )
    )
    rows, columns = (eighths // EIGHTHS).unbind(-1)
    return rows * smaller[1] + columns, eighths % EIGHTHS


def _misread(rng: np.random.Generator, codes: Tensor) -> Tensor:
    """The codes [N], of which in half of all cases MISREAD are others of them."""
    wrong = torch.from_numpy(rng.random(len(codes)) < MISREAD * rng.integers(2))
    others = codes.unique()
    return torch.where(wrong, others[rng.integers(len(others), size=len(codes))], codes)


def _weights(codes: np.ndarray, stress: float) -> Tensor:
    """float [H * W]: 1, and `stress` more for cells that no shape or text is left of or above."""
    shown = np.pad(codes >= INSIDE, ((1, 0), (1, 1)))
    before = shown[1:, :-2] | shown[:-1, :-2] | shown[:-1, 1:-1] | shown[:-1, 2:]
    first = shown[1:, 1:-1] & ~before
    return 1 + stress * torch.from_numpy(first).flatten().float()


def collate(samples: list[Sample]) -> tuple[Tensor, ...]:
    """ids [B, S], positions [3, B, S], mask [B, S], targets and weights [B, N].

    Prompts are padded left.
    """
    longest = max(len(sample.prompt) for sample in samples)
    ids, positions, mask = [], [], []
    for sample in samples:
        pad = longest - len(sample.prompt)
        ids.append(F.pad(torch.cat([sample.prompt.ids, sample.read[:-1]]), (pad, 0)))
        where = torch.cat([sample.prompt.positions, sample.positions[:, :-1]], 1)
        positions.append(F.pad(where, (pad, 0)))
        mask.append(F.pad(torch.ones(len(where[0]), dtype=torch.int64), (pad, 0)))
    targets = torch.stack([sample.codes for sample in samples])
    weights = torch.stack([sample.weights for sample in samples])
    return torch.stack(ids), torch.stack(positions, 1), torch.stack(mask), targets, weights


def collate_tokens(samples: list[Sample], name: str) -> Tensor:
    """`copied`, `noted` or `spoken` in `collate`'s ids, int64 [B, ...]; -1 is kept."""
    longest = max(len(sample.prompt) for sample in samples)
    pads = torch.tensor([longest - len(sample.prompt) for sample in samples])
    tokens = torch.stack([getattr(sample, name) for sample in samples])
    pads = pads.view(-1, *[1] * (tokens.dim() - 1))
    return torch.where(tokens < 0, -1, tokens + pads)


def collate_phrases(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """(sample, token) of all phrases' ends in `collate`'s ids, [K, 2], and what they ask for."""
    longest = max(len(sample.prompt) for sample in samples)
    ends = [
        (i, longest - len(sample.prompt) + token)
        for i, sample in enumerate(samples)
        for token, _ in sample.phrases
    ]
    return torch.tensor(ends), torch.stack([asked for s in samples for _, asked in s.phrases])


def read_tokenizer(folder: Path) -> PromptTokenizer:
    """The pack's own prompt tokenizer on a saved processor."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    return PromptTokenizer((folder / "tokenizer.json").read_text(), config, template)
