"""The AR model's samples: prompts, the codes that follow them, and targets of auxiliary losses."""

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
    note_answers,
    notes_of,
    notes_on_cells,
    phrase_answers,
    shapes_to_come,
    squares_at,
    wish_answers,
)
from .scene import Item, Scene, draw_scene
from .tokenizer import IMAGE_START, NOTES
from .wording import Thing, phrased

NO_POSITIONS = torch.zeros(3, 0, dtype=torch.int64)
NO_CODES, NO_WEIGHTS = NO_POSITIONS[0], torch.zeros(0)
NOWHERE = torch.zeros(0, 2, dtype=torch.int64)
# The share of scenes with all places open, more than `draw_scene`'s. Only such scenes teach the
# model which items it has already drawn, and it learns this last.
OPEN_SCENES = 0.3
# In half of the pictures, this share of the large grid's cells is replaced in the model's input, so
# that a cell follows the preview even after errors.
MISREAD = 0.1


@dataclass(frozen=True)
class Sample:
    """A prompt, the codes that should follow it, and their positions.

    Without codes, N is 0. Tokens are indices into the prompt and codes.

    codes: int64 [N]; positions: int64 [3, N]; weights: of the codes in the loss, float [N].
    read: the model's input in place of each code, int64 [N].
    copied: the token at each code's place in the preview or in the reference, int64 [N]; -1 for
        none.
    within: where in the copied preview cell each cell's centre lies, eighths down and to the right,
        int64 [N, 2]; -1 for none.
    square: the row and column of each cell of a large grid in the square around a shape, in preview
        cells, int64 [N, 2]; -1 for cells outside all squares.
    noted: the note on each code's shape or text, int64 [N]; in an edit, the token after the wish
        for cells that it changes; -1 for none.
    grid: rows and columns of the codes' first grid.
    notes: what the notes must say, `reading.note_answers`; None for an edit.
    coming: the shapes that are still to begin in the preview, `reading.shapes_to_come`.
    phrases: for each phrase, its last token and what it asks for, `reading.phrase_answers`.
    spoken: the first and last token of the phrase about each note's subject, int64 [NOTES, 2]; -1
        for none.
    wished: what an edit asks for, `reading.wish_answers`.
    subject: whether an edit's wish is about the shape that each of the reference's cells shows, 1
        or 0; int64 [N], -1 for cells that show none.
    """

    prompt: Prompt
    grid: tuple[int, int]
    notes: Tensor | None = None
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
    """Draws samples with the tokenizer of a saved processor.

    In its methods, `stress` is the additional weight of the first cells of shapes and texts.
    """

    def __init__(self, processor: Path) -> None:
        self.tokenizer = read_tokenizer(processor)
        self.offsets = Tokenizer.from_file(str(processor / "tokenizer.json"))
        self.first_note = self.offsets.token_to_id(NOTES[0])

    def image(
        self, rng: np.random.Generator, height: int, width: int, whole: bool, stress: float
    ) -> Sample:
        """A prompt with its preview, and if `whole` also the large grid."""
        scene, sample = self.scene(rng, height, width)
        written, grid = cells(scene, scene.preview), scene.preview
        codes = torch.from_numpy(written).flatten()
        nowhere = torch.full((len(codes), 2), -1)
        sample = replace(
            sample, codes=codes, read=codes, weights=_weights(written, stress),
            positions=grid_positions(grid, sample.prompt.end),
            copied=torch.full_like(codes, -1), within=nowhere, square=nowhere,
            noted=self._note_tokens(sample.prompt, scene, grid),
            coming=shapes_to_come(scene, codes.view(grid)),
        )  # fmt: skip
        if not whole:
            return sample
        noted = self._note_tokens(sample.prompt, scene, scene.grid)
        return self._with_large_grid(rng, sample, scene, noted, stress)

    def locked(self, rng: np.random.Generator, height: int, width: int, stress: float) -> Sample:
        """A prompt that ends with a given preview, which differs from it in one thing.

        The codes are the large grid of that preview. It must follow a locked layout or a wrong
        preview and not correct it.
        """
        edit = draw_edit(rng, height, width, texts=None)
        described, shown = (edit.before, edit.after)[:: rng.choice((1, -1))]
        sample = self._prompt_sample(rng, described)
        agree = torch.from_numpy(cells(described) == cells(shown)).flatten()
        noted = torch.where(agree, self._note_tokens(sample.prompt, described, described.grid), -1)
        sample = self._with_large_grid(rng, sample, shown, noted, stress)
        prompt, preview = sample.prompt, torch.from_numpy(cells(shown, shown.preview)).flatten()
        positions = torch.cat([prompt.positions, grid_positions(shown.preview, prompt.end)], 1)
        given = Prompt(torch.cat([prompt.ids, preview]), positions)
        return replace(sample, prompt=given, grid=shown.grid)

    def prompt(self, rng: np.random.Generator, height: int, width: int) -> Sample:
        """A prompt alone."""
        return self.scene(rng, height, width)[1]

    def scene(self, rng: np.random.Generator, height: int, width: int) -> tuple[Scene, Sample]:
        """A scene and its prompt alone."""
        scene = draw_scene(rng, height, width, all_anywhere=OPEN_SCENES)
        return scene, self._prompt_sample(rng, scene)

    def _prompt_sample(self, rng: np.random.Generator, scene: Scene) -> Sample:
        """The prompt of a scene, without codes."""
        words, phrases = phrased(rng, scene)
        spans = self.offsets.encode(words, add_special_tokens=False).offsets
        ends = [end for _, end in spans]
        tokens = {
            thing: (bisect_left(ends, start + 1), bisect_left(ends, end) + _is_open(thing))
            for thing, start, end in phrases
        }
        asked = tuple((last, phrase_answers(thing, scene)) for thing, (_, last) in tokens.items())
        prompt = self.tokenizer.text_to_image(words, scene.grid)
        spoken = torch.full((len(NOTES), 2), -1)
        for thing, note in reversed(notes_of(scene)):  # the first of two items at a place wins
            spoken[NOTES.index(note)] = torch.tensor(tokens[thing])
        return Sample(
            prompt, scene.preview, notes=note_answers(scene), phrases=asked, spoken=spoken
        )

    def _with_large_grid(
        self, rng: np.random.Generator, sample: Sample, scene: Scene, noted: Tensor, stress: float
    ) -> Sample:
        """The sample with a scene's large grid after its preview; `noted` is of the large grid."""
        written, grid = cells(scene), scene.grid
        codes = torch.from_numpy(written).flatten()
        copied, within = _preview_cells(grid, scene.preview)
        parts = {
            "codes": codes,
            "read": _misread(rng, codes),
            "positions": grid_positions(grid, sample.prompt.end + max(scene.preview)),
            "weights": _weights(written, stress),
            "copied": len(sample.prompt) + copied,
            "within": within,
            "square": squares_at(scene, grid).flatten(0, 1),
            "noted": noted,
        }
        # cells are the last axis of positions, and the first of all others
        return replace(
            sample,
            **{
                name: torch.cat([getattr(sample, name), part], int(name == "positions"))
                for name, part in parts.items()
            },
        )

    def edit(self, rng: np.random.Generator, height: int, width: int, stress: float) -> Sample:
        """A wish, its reference, and the large grid of the edited picture."""
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
            prompt, grid, wished=wish_answers(edit),
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
        return Sample(prompt, edit.after.grid, wished=wish_answers(edit))

    def _note_tokens(self, prompt: Prompt, scene: Scene, grid: tuple[int, int]) -> Tensor:
        notes = notes_on_cells(scene, grid).flatten()
        first = int((prompt.ids == self.first_note).nonzero())
        return torch.where(notes < 0, -1, first + notes)


def _is_open(thing: Thing) -> bool:
    """Whether the place is open; only the token after the phrase then shows that none follows."""
    return isinstance(thing, Item) and thing.place is None


def _preview_cells(grid: tuple[int, int], smaller: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The cell of the smaller grid that holds each cell's centre, and where in that cell it lies.

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
    """The codes [N]; in half of all cases a share MISREAD is replaced by other codes among them."""
    wrong = torch.from_numpy(rng.random(len(codes)) < MISREAD * rng.integers(2))
    others = codes.unique()
    return torch.where(wrong, others[rng.integers(len(others), size=len(codes))], codes)


def _weights(codes: np.ndarray, stress: float) -> Tensor:
    """float [H * W]: 1, plus `stress` for first cells, left of and above which is background."""
    shown = np.pad(codes >= INSIDE, ((1, 0), (1, 1)))
    before = shown[1:, :-2] | shown[:-1, :-2] | shown[:-1, 1:-1] | shown[:-1, 2:]
    first = shown[1:, 1:-1] & ~before
    return 1 + stress * torch.from_numpy(first).flatten().float()


def collate(samples: list[Sample]) -> tuple[Tensor, ...]:
    """ids [B, S], positions [3, B, S], mask [B, S], targets and weights [B, N].

    Prompts are padded on the left.
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
    """int64 [B, ...]: `copied`, `noted` or `spoken` as indices into `collate`'s ids; -1 stays."""
    longest = max(len(sample.prompt) for sample in samples)
    pads = torch.tensor([longest - len(sample.prompt) for sample in samples])
    tokens = torch.stack([getattr(sample, name) for sample in samples])
    pads = pads.view(-1, *[1] * (tokens.dim() - 1))
    return torch.where(tokens < 0, -1, tokens + pads)


def collate_phrases(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """[K, 2]: (sample, token) in `collate`'s ids of all phrases' ends, and what they ask for."""
    longest = max(len(sample.prompt) for sample in samples)
    ends = [
        (i, longest - len(sample.prompt) + token)
        for i, sample in enumerate(samples)
        for token, _ in sample.phrases
    ]
    return torch.tensor(ends), torch.stack([asked for s in samples for _, asked in s.phrases])


def read_tokenizer(folder: Path) -> PromptTokenizer:
    """The pack's prompt tokenizer with a saved processor's files."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    return PromptTokenizer((folder / "tokenizer.json").read_text(), config, template)
