"""The AR model's stage: from a prompt to the codes of preview and large grid, and for edits."""

import math
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from . import parallel
from .codes import CODEBOOK, factors
from .copying import (
    COPY_LAYER,
    FROM_NOTES,
    FROM_PREVIEW,
    FROM_REFERENCE,
    FROM_SHAPES,
    FROM_WISH,
    init_copy_heads,
    note_attention_loss,
    queries_and_keys,
    shape_attention_loss,
    target_attention_loss,
)
from .reading import POSITION_LAYER, REFERENCE_LAYER, Reading
from .samples import Sample, Samples, collate, collate_phrases, collate_tokens
from .scene import draw_size
from .stage import Run, Stage
from .tokenizer import IMAGE_END, IMAGE_PLACEHOLDER, IMAGE_START, VISUAL, make_processor

HIDDEN, LAYERS = 192, 6
# The column's frequencies are the last of sixteen. With the hub's theta of 10000, neighbouring
# columns would differ by three thousandths of a radian, too little for a small model.
ROPE_THETA = 4.0
LOCKED = 0.4  # share of the batches of whole images whose preview is given in the prompt
FIRST_CELLS = 4.0  # additional weight of the first cells of shapes and texts at the start


class AutoregressiveStage(Stage):
    """Cross-entropy of the codes that follow the prompt, plus the auxiliary losses of `Reading`."""

    name = "autoregressive"
    component = "vision_language_encoder"
    keys = (("model.language_model.", "text."), ("lm_head.", "head."))
    steps = 20000
    batch = 12
    learning_rate = 2e-3
    by_adamw = ("head", "reading.")
    ema = 0.998

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        folder = run.snapshot / "processor"
        # a run keeps the vocabulary that it started with
        if parallel.rank() == 0 and not folder.is_dir():
            if run.start:
                shutil.copytree(run.start / "processor", folder)
            else:
                make_processor().save_pretrained(folder)
        parallel.meet()
        self.samples = Samples(folder)

    def build(self) -> nn.Module:
        model = GlmImageForConditionalGeneration(ar_config())
        table = torch.from_numpy(factors())
        codes = table @ torch.randn(table.shape[1], HIDDEN) / 3**0.5  # a code has three factors
        with torch.no_grad():
            model.model.language_model.embed_tokens.weight.mul_(50)  # from 0.02 to unit size
            model.model.language_model.embed_tokens.weight[:CODEBOOK] = codes
            model.lm_head.weight[:CODEBOOK] = codes / HIDDEN**0.5
        text = model.model.language_model
        init_copy_heads(text)
        reading = Reading(text.layers, HIDDEN)
        if self.run.compile:
            text.compile(dynamic=True)
        return nn.ModuleDict({"text": text, "head": model.lm_head, "reading": reading})

    def draw(self, rng: np.random.Generator, progress: float) -> list[Sample]:
        """Samples of one kind and size: mostly previews at first, then more whole images and edits.

        Some batches are prompts alone, so many that they are as long as a batch of previews. Early
        in training the first cells of shapes and texts count more, because the other cells follow
        from them.
        """
        stress = FIRST_CELLS * (1 - progress)
        early = progress < 0.25 and self.run.start is None
        kind = rng.choice(3, p=(0.75, 0.25, 0) if early else (0.3, 0.45, 0.25))
        # At 512 x 512 the large grid equals its preview.
        height, width = draw_size(rng, 0.1 if kind == 1 else 0.28)
        prompts, wishes = (0.2, 0) if early else (0.1, 0.05)
        alone = rng.random()
        if alone < prompts:
            return [self.samples.prompt(rng, height, width) for _ in range(6 * self.batch_size)]
        if alone < prompts + wishes:
            return [self.samples.wish(rng, height, width) for _ in range(10 * self.batch_size)]
        tokens = (300, 300 + height * width // 1024, 50 + height * width // 512)[kind]
        count = max(1, self.batch_size * 300 // tokens)
        if kind == 2:
            return [self.samples.edit(rng, height, width, stress) for _ in range(count)]
        if kind == 1 and rng.random() < LOCKED:
            return [self.samples.locked(rng, height, width, stress) for _ in range(count)]
        return [self.samples.image(rng, height, width, kind == 1, stress) for _ in range(count)]

    def loss(self, batch: list[Sample], generator: torch.Generator) -> dict[str, Tensor]:
        ids, positions, mask, targets, weights = (
            part.to(self.run.device) for part in collate(batch)
        )
        states = self.module["text"](
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        losses = {}
        if count := targets.shape[1]:
            losses |= self._code_losses(batch, states[:, -count:], targets, weights)
            losses |= self._attention_losses(batch, positions, mask, targets, generator)
        if batch[0].wished is None:
            return losses | self._prompt_losses(batch, ids, positions, mask)
        return losses | self._edit_losses(batch, ids, targets)

    def _code_losses(
        self, batch: list[Sample], states: Tensor, targets: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the codes, of the named cells' positions and of the rows below them."""
        reading = self.module["reading"]
        logits = self.module["head"](states)[..., :CODEBOOK]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        named = torch.stack([sample.positions for sample in batch], 1).to(self.run.device)
        first = math.prod(batch[0].grid)
        grid = targets[:, :first].unflatten(1, batch[0].grid)
        losses = {
            "codes": (each * weights.flatten()).mean(),
            "where": reading.cell_positions(named),
            "below": reading.rows_below(states[:, :first], grid),
        }
        if batch[0].coming is not None:
            coming = torch.stack([sample.coming for sample in batch]).to(self.run.device)
            losses["coming"] = reading.coming(states[:, :first], coming)
            losses["begun"] = reading.begun(targets[:, :first], targets.shape[1])
        if batch[0].wished is None:
            losses |= self._large_grid_losses(batch)
        return losses

    def _large_grid_losses(self, batch: list[Sample]) -> dict[str, Tensor]:
        """Losses of where in a preview cell, and where in a shape, the large grid's cells lie."""
        reading = self.module["reading"]
        copied = collate_tokens(batch, "copied").to(self.run.device)
        within, square = (
            torch.stack([getattr(sample, name) for sample in batch]).to(self.run.device)
            for name in ("within", "square")
        )
        losses = {}
        if (within >= 0).any():
            losses["within"] = reading.phases(within)
        if (square >= 0).any():
            losses["square"] = reading.squares(copied, square)
        return losses

    def _attention_losses(
        self,
        batch: list[Sample],
        positions: Tensor,
        mask: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Losses of the attention of the heads that copy, and that read the notes or the wish."""
        copies = FROM_PREVIEW if batch[0].wished is None else FROM_REFERENCE
        queries, keys = self._queries_and_keys(COPY_LAYER, positions)
        heads = {"copied": copies, "noted": FROM_NOTES}
        wanted = {name: collate_tokens(batch, name).to(self.run.device) for name in heads}
        losses = {
            name: target_attention_loss(queries[:, head], keys, mask, wanted[name], generator)
            for name, head in heads.items()
            if (wanted[name] >= 0).any()
        }
        if copies == FROM_REFERENCE:
            losses["turned"] = self._wish_attention_loss(
                wanted["copied"], positions, mask, generator
            )
        elif batch[0].coming is not None:
            preview = targets[:, : math.prod(batch[0].grid)]
            queries, keys = self._queries_and_keys(POSITION_LAYER, positions)
            losses["overlooked"] = shape_attention_loss(
                queries[:, FROM_SHAPES], keys, mask, preview, targets.shape[1]
            )
        return losses

    def _wish_attention_loss(
        self, reference: Tensor, positions: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Loss of a head's attention from the reference's tokens [B, N] to the wish before them."""
        queries, keys = self._queries_and_keys(REFERENCE_LAYER, positions)
        wish = (reference[:, :1] - 1).expand_as(reference)
        wanted = torch.full_like(mask, -1).scatter(1, reference, wish)
        return target_attention_loss(queries[:, FROM_WISH], keys, mask, wanted, generator)

    def _queries_and_keys(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`queries_and_keys` of a layer in the model's last forward pass."""
        before = self.module["reading"].states[layer - 1]
        return queries_and_keys(self.module["text"], layer, before, positions)

    def _prompt_losses(
        self, batch: list[Sample], ids: Tensor, positions: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Losses of what the phrases ask for, what the notes say, and where the notes look."""
        reading = self.module["reading"]
        ends, asked = (part.to(self.run.device) for part in collate_phrases(batch))
        notes = torch.stack([sample.notes for sample in batch]).to(self.run.device)
        first = int((ids[0] == self.samples.first_note).nonzero())
        spoken = collate_tokens(batch, "spoken").to(self.run.device)
        queries, keys = self._queries_and_keys(REFERENCE_LAYER, positions)
        return {
            "phrases": reading.phrases(ends, asked),
            "layout": reading.notes(first, notes),
            "strayed": note_attention_loss(queries, keys, mask, first, spoken),
        }

    def _edit_losses(self, batch: list[Sample], ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Losses of what the wish says, and of what the reference's cells will become."""
        reading = self.module["reading"]
        wished = torch.stack([sample.wished for sample in batch]).to(self.run.device)
        if not targets.shape[1]:
            return {"wish": reading.wishes(torch.full_like(ids[:, 0], ids.shape[1] - 1), wished)}
        reference = collate_tokens(batch, "copied").to(self.run.device)
        subject = torch.stack([sample.subject for sample in batch]).to(self.run.device)
        return {
            "wish": reading.wishes(reference[:, 0] - 1, wished),
            "told": reading.reference_wishes(reference, wished),
            "subject": reading.subjects(reference, subject),
            "become": reading.becomes(reference, ids.gather(1, reference), targets),
        }

    def write(self) -> None:
        text = {f"model.language_model.{k}": v for k, v in self.module["text"].state_dict().items()}
        head = {f"lm_head.{k}": v for k, v in self.module["head"].state_dict().items()}
        save_file({**text, **head}, self.folder / "weights.safetensors")


def ar_config() -> GlmImageConfig:
    """The config of the text model, the vision tower and the quantiser."""
    return GlmImageConfig(
        text_config={
            "vocab_size": VISUAL + 1024,
            "vision_vocab_size": VISUAL,
            "hidden_size": HIDDEN,
            "intermediate_size": 512,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "pad_token_id": IMAGE_PLACEHOLDER,  # its embedding is never read
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
