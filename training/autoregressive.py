"""The AR model: from a prompt to the preview's codes and the large grid's; edits likewise."""

import json
import math
import shutil
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from glm_core.grids import grid_positions
from glm_core.prompt import Prompt, PromptTokenizer

from .codes import CODEBOOK, INSIDE, cells, factors
from .copying import FROM_NOTES, FROM_PREVIEW, FROM_REFERENCE, find_cells, missed, queries_and_keys
from .edits import draw_edit
from .reading import WHERE_LAYER, Reading, asked_by, layout_of, noted_at
from .scene import SIZES, Scene, draw_scene
from .stage import Run, Stage
from .tokenizer import (
    IMAGE_END,
    IMAGE_PLACEHOLDER,
    IMAGE_START,
    PLACES,
    VISUAL,
    make_processor,
)
from .wording import phrased

HIDDEN, LAYERS = 192, 6
# The column's frequencies are the last of sixteen: with the hub's 10000 a small model would have to
# tell neighbouring columns by three thousandths of a radian.
ROPE_THETA = 4.0
FIRST_CELLS = 4.0  # how much more the first cell of a thing counts when training begins

NO_POSITIONS = torch.zeros(3, 0, dtype=torch.int64)
NO_CODES, NO_WEIGHTS = NO_POSITIONS[0], torch.zeros(0)


@dataclass(frozen=True)
class Sample:
    """A prompt, and the codes that should follow it with their positions; none, if not given.

    codes: int64 [N]; positions: int64 [3, N]; weights: how much each code counts, float [N].
    copied: which token of prompt and codes lies where each code lies, in the preview or in the
        reference; int64 [N], -1 where none does.
    noted: which token of the prompt is a note on what each code is a part of; likewise.
    grid: rows and columns of the grid that the codes begin with.
    layout: what the picture will show, `reading.layout_of`.
    phrases: for each, the token that it ends with and what it asks for (`reading.asked_by`).
    """

    prompt: Prompt
    grid: tuple[int, int]
    layout: Tensor
    phrases: tuple[tuple[int, Tensor], ...] = ()
    codes: Tensor = NO_CODES
    positions: Tensor = NO_POSITIONS
    weights: Tensor = NO_WEIGHTS
    copied: Tensor = NO_CODES
    noted: Tensor = NO_CODES


class AutoregressiveStage(Stage):
    """Next-code cross-entropy over what follows the prompt, and what `Reading` asks besides."""

    name = "autoregressive"
    component = "vision_language_encoder"
    keys = (("model.language_model.", "text."), ("lm_head.", "head."))
    steps = 10000
    batch = 12
    learning_rate = 2e-3
    by_adamw = ("head", "reading.")
    ema = 0.998

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        folder = run.snapshot / "processor"
        if not folder.is_dir():  # a run keeps the vocabulary that it began with
            if run.start:
                shutil.copytree(run.start / "processor", folder)
            else:
                make_processor().save_pretrained(folder)
        self.tokenizer = read_tokenizer(folder)
        self.offsets = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.first_place = self.offsets.token_to_id(PLACES[0])

    def build(self) -> nn.Module:
        model = GlmImageForConditionalGeneration(ar_config())
        table = torch.from_numpy(factors())
        codes = table @ torch.randn(table.shape[1], HIDDEN) / 3**0.5  # three things a code
        with torch.no_grad():
            model.model.language_model.embed_tokens.weight.mul_(50)  # from 0.02 to unit size
            model.model.language_model.embed_tokens.weight[:CODEBOOK] = codes
            model.lm_head.weight[:CODEBOOK] = codes / HIDDEN**0.5
        text = model.model.language_model
        find_cells(text)
        reading = Reading(text.layers, HIDDEN)
        if self.run.compile:
            text.compile(dynamic=True)
        return nn.ModuleDict({"text": text, "head": model.lm_head, "reading": reading})

    def draw(self, rng: np.random.Generator, progress: float) -> list[Sample]:
        """All of one kind and size: mostly previews at first, then more whole images, and edits.

        Some batches are prompts alone, as many as have the length of a batch of previews. The first
        cells of things count more at first: all else follows from them and from the cells above.
        """
        stress = FIRST_CELLS * (1 - progress)
        early = progress < 0.25 and self.run.start is None
        height, width = SIZES[rng.choice(len(SIZES), p=(0.28, *(0.12,) * 6))]
        if rng.random() < (0.2 if early else 0.05):
            return [self._prompt(rng, height, width) for _ in range(6 * self.batch_size)]
        kind = rng.choice(3, p=(0.75, 0.25, 0) if early else (0.3, 0.4, 0.3))
        tokens = (300, 300 + height * width // 1024, 50 + height * width // 512)[kind]
        count = max(1, self.batch_size * 300 // tokens)
        if kind == 2:
            return [self._edit(rng, height, width, stress) for _ in range(count)]
        return [self._image(rng, height, width, kind == 1, stress) for _ in range(count)]

    def loss(self, batch: list[Sample], generator: torch.Generator) -> dict[str, Tensor]:
        ids, positions, mask, targets, weights = (
            part.to(self.run.device) for part in collate(batch)
        )
        states = self.module["text"](
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        losses = {}
        if count := targets.shape[1]:
            losses |= self._written(batch, states[:, -count:], targets, weights)
            losses |= self._looked(batch, positions, mask, generator)
        return losses | self._understood(batch, ids)

    def _written(
        self, batch: list[Sample], states: Tensor, targets: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the codes, of where they lie and of what stands below them."""
        reading = self.module["reading"]
        logits = self.module["head"](states)[..., :CODEBOOK]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        named = torch.stack([sample.positions for sample in batch], 1).to(self.run.device)
        first = math.prod(batch[0].grid)
        grid = targets[:, :first].unflatten(1, batch[0].grid)
        return {
            "codes": (each * weights.flatten()).mean(),
            "where": reading.whereabouts(named),
            "below": reading.rows_below(states[:, :first], grid),
        }

    def _looked(
        self, batch: list[Sample], positions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Losses of where the heads look that copy, and that read the notes."""
        copies = FROM_PREVIEW if batch[0].phrases else FROM_REFERENCE
        before = self.module["reading"].states[WHERE_LAYER]
        queries, keys = queries_and_keys(self.module["text"], before, positions)
        losses = {}
        for name, head in (("copied", copies), ("noted", FROM_NOTES)):
            wanted = collate_tokens(batch, name).to(self.run.device)
            if (wanted >= 0).any():
                losses[name] = missed(queries[:, head], keys, mask, wanted, generator)
        return losses

    def _understood(self, batch: list[Sample], ids: Tensor) -> dict[str, Tensor]:
        """Losses of what the prompt says, and of what the picture will show."""
        losses, reading = {}, self.module["reading"]
        if batch[0].phrases:
            ends, asked = (part.to(self.run.device) for part in collate_phrases(batch))
            losses["phrases"] = reading.phrases(ends, asked)
        layouts = torch.stack([sample.layout for sample in batch]).to(self.run.device)
        first = int((ids[0] == self.first_place).nonzero())
        return losses | {"layout": reading.layouts(first, layouts)}

    def write(self) -> None:
        text = {f"model.language_model.{k}": v for k, v in self.module["text"].state_dict().items()}
        head = {f"lm_head.{k}": v for k, v in self.module["head"].state_dict().items()}
        save_file({**text, **head}, self.folder / "weights.safetensors")

    def _image(
        self, rng: np.random.Generator, height: int, width: int, whole: bool, stress: float
    ) -> Sample:
        scene, sample = self._scene(rng, height, width)
        grids = [scene.preview, scene.grid] if whole else [scene.preview]
        base, codes, positions, weights, noted = sample.prompt.end, [], [], [], []
        for grid in grids:
            written = cells(scene, grid)
            codes.append(torch.from_numpy(written).flatten())
            positions.append(grid_positions(grid, base))
            weights.append(_weights(written, stress))
            noted.append(self._noted(sample.prompt, scene, grid))
            base += max(grid)
        codes, first = torch.cat(codes), len(sample.prompt)
        copied = torch.full_like(codes, -1)
        if whole:
            copied[len(copied) - math.prod(scene.grid) :] = first + _same(scene.grid, scene.preview)
        return replace(
            sample, codes=codes, positions=torch.cat(positions, 1), weights=torch.cat(weights),
            copied=copied, noted=torch.cat(noted),
        )  # fmt: skip

    def _prompt(self, rng: np.random.Generator, height: int, width: int) -> Sample:
        return self._scene(rng, height, width)[1]

    def _scene(self, rng: np.random.Generator, height: int, width: int) -> tuple[Scene, Sample]:
        """A scene and its prompt, which no codes follow."""
        scene = draw_scene(rng, height, width)
        words, phrases = phrased(rng, scene)
        spans = self.offsets.encode(words, add_special_tokens=False).offsets
        ends = [end for _, end in spans]
        asked = tuple((bisect_left(ends, said), asked_by(thing, scene)) for thing, said in phrases)
        prompt = self.tokenizer.text_to_image(words, scene.grid)
        return scene, Sample(prompt, scene.preview, layout_of(scene), asked)

    def _edit(self, rng: np.random.Generator, height: int, width: int, stress: float) -> Sample:
        edit = draw_edit(rng, height, width)
        reference = torch.from_numpy(cells(edit.before))
        grid = edit.after.grid
        prompt = self.tokenizer.image_to_image(edit.wish, grid, [reference])
        written = cells(edit.after)
        codes, weights = torch.from_numpy(written).flatten(), _weights(written, stress)
        positions = grid_positions(grid, prompt.end)
        copied = (prompt.ids < CODEBOOK).nonzero()[:, 0]
        noted = self._noted(prompt, edit.after, grid)
        return Sample(
            prompt, grid, layout_of(edit.after),
            codes=codes, positions=positions, weights=weights, copied=copied, noted=noted,
        )  # fmt: skip

    def _noted(self, prompt: Prompt, scene: Scene, grid: tuple[int, int]) -> Tensor:
        first = int((prompt.ids == self.first_place).nonzero())
        places = noted_at(scene, grid).flatten()
        return torch.where(places < 0, -1, first + places)


def _same(grid: tuple[int, int], smaller: tuple[int, int]) -> Tensor:
    """int64 [H * W]: the index, in the smaller grid, of the cell that each cell's centre is in."""
    indices = torch.arange(math.prod(smaller), dtype=torch.float32).view(1, 1, *smaller)
    return F.interpolate(indices, grid, mode="nearest-exact").flatten().long()


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
        ids.append(F.pad(torch.cat([sample.prompt.ids, sample.codes[:-1]]), (pad, 0)))
        where = torch.cat([sample.prompt.positions, sample.positions[:, :-1]], 1)
        positions.append(F.pad(where, (pad, 0)))
        mask.append(F.pad(torch.ones(len(where[0]), dtype=torch.int64), (pad, 0)))
    targets = torch.stack([sample.codes for sample in samples])
    weights = torch.stack([sample.weights for sample in samples])
    return torch.stack(ids), torch.stack(positions, 1), torch.stack(mask), targets, weights


def collate_tokens(samples: list[Sample], name: str) -> Tensor:
    """`copied` or `noted` as tokens in `collate`'s ids, int64 [B, N], -1 where there is none."""
    longest = max(len(sample.prompt) for sample in samples)
    pads = torch.tensor([longest - len(sample.prompt) for sample in samples])
    tokens = torch.stack([getattr(sample, name) for sample in samples])
    return torch.where(tokens < 0, -1, tokens + pads[:, None])


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


def ar_config() -> GlmImageConfig:
    """Sizes of the text model, the vision tower and the quantiser."""
    return GlmImageConfig(
        text_config={
            "vocab_size": VISUAL + 1024,
            "vision_vocab_size": VISUAL,
            "hidden_size": HIDDEN,
            "intermediate_size": 512,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "pad_token_id": IMAGE_PLACEHOLDER,  # whose embedding nothing reads
            "eos_token_id": IMAGE_END,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "mrope_section": [4, 6, 6],
                "partial_rotary_factor": 0.5,
            },
        },
        vision_config={
            "depth": 3, "hidden_size": 128, "num_heads": 4, "intermediate_size": 384,
            "image_size": 1024, "patch_size": 16,
        },
        vq_config={"embed_dim": 64, "num_embeddings": CODEBOOK, "latent_channels": 128},
        image_token_id=IMAGE_PLACEHOLDER,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
    )  # fmt: skip
