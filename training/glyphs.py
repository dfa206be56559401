"""The glyph encoder's stage: from the bytes of a text to what its characters look like.

As Glyph-ByT5 is aligned with glyph images first, the encoder is trained before the decoder. Heads
that are discarded later must read off every byte's state the bitmap of its character, its index in
the text and its script. The decoder is trained on frozen states: when both were trained together,
the encoder forgot within minutes which letter is which.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from glm_core.glyph.texts import EOS, PAD, byte_ids

from .codes import LONGEST, SLOTS
from .render import SLOT, glyph_bitmap
from .scene import CHINESE, draw_content
from .stage import Stage

WIDTH = 192
SIDE = 32  # of the bitmaps
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789" + CHINESE


class GlyphStage(Stage):
    """Mean squared error of bitmaps, cross-entropy of characters and their slots."""

    name = "glyphs"
    component = "text_encoder"
    keys = (("", "encoder."),)
    steps = 1700
    batch = 96
    learning_rate = 3e-3
    by_adamw = ("bitmap", "character", "place")

    def build(self) -> nn.Module:
        encoder = make_glyph_encoder()
        _init_byte_count(encoder)
        return nn.ModuleDict(
            {
                "encoder": encoder,
                "bitmap": nn.Sequential(
                    nn.Linear(WIDTH, 384), nn.GELU(), nn.Linear(384, SIDE * SIDE)
                ),
                "character": nn.Linear(WIDTH, len(CHARACTERS)),
                "place": nn.Linear(WIDTH, len(SLOTS)),
            }
        )

    def draw(self, rng: np.random.Generator, progress: float) -> tuple[Tensor, ...]:
        """ids [B, L]; bitmaps [B, N, SIDE * SIDE], characters and slots [B, N] of the N bytes."""
        script, length = draw_kind(rng)
        lead = int(rng.integers(2))  # an even number of texts puts a pad before each
        examples = [
            _example(draw_content(rng, script, length), script, lead)
            for _ in range(self.batch_size)
        ]
        return tuple(torch.stack(part) for part in zip(*examples, strict=True))

    def loss(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> dict[str, Tensor]:
        ids, bitmaps, characters, slots = (part.to(self.run.device) for part in batch)
        states = self.module["encoder"](input_ids=ids).last_hidden_state
        states = states[:, -1 - slots.shape[1] : -1]
        drawn = self.module["bitmap"](states)
        return {
            "bitmap": F.mse_loss(drawn, bitmaps),
            "character": 0.1 * _cross_entropy(self.module["character"](states), characters),
            "place": 0.1 * _cross_entropy(self.module["place"](states), slots),
        }

    def write(self) -> None:
        self.module["encoder"].save_pretrained(self.run.snapshot / "text_encoder")
        ByT5Tokenizer().save_pretrained(self.run.snapshot / "tokenizer")


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_glyph_encoder() -> T5EncoderModel:
    """An untrained encoder of the tiny model's size."""
    return T5EncoderModel(
        T5Config(
            d_model=WIDTH, d_ff=384, d_kv=32, num_heads=6, num_layers=3, vocab_size=384,
            feed_forward_proj="gated-gelu", relative_attention_num_buckets=32,
            relative_attention_max_distance=128, dropout_rate=0.0,
        )
    )  # fmt: skip


@torch.no_grad()
def _init_byte_count(encoder: T5EncoderModel) -> None:
    """Initialise the first head so that it counts the bytes before each byte.

    T5 knows distances only, but a byte's index is the number of bytes before it. This head attends
    equally to all bytes before, to the byte itself and to the end of the text. The end's share of
    attention is then 1 / (bytes before + 2), and the head writes it to channels that no embedding
    uses. Without it, the encoder still guessed the index after 2700 steps.
    """
    constant, ending, count = 0, 1, slice(2, 6)  # channels
    table = encoder.shared.weight
    table[:, : count.stop] = 0
    table[:, constant] = 4
    table[EOS, ending], table[PAD, ending] = 4, -4
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    head = slice(0, attention.key_value_proj_dim)
    for linear in (attention.q, attention.k, attention.v):
        linear.weight[head] = 0
    attention.q.weight[0, constant] = 0.5
    attention.k.weight[0, ending] = 0.8  # 6 for the end, -6 for pads
    attention.v.weight[0, ending] = 1
    attention.o.weight[:, head] = 0
    attention.o.weight[count, 0] = 3
    distances = attention.relative_attention_bias.weight
    distances[:, 0] = 0
    distances[len(distances) // 2 :, 0] = -6  # later bytes


def draw_kind(rng: np.random.Generator) -> tuple[str, int]:
    """The script and the number of characters of all texts of a batch."""
    script = str(rng.choice(("latin", "digit", "chinese"), p=(0.3, 0.05, 0.65)))
    return script, int(rng.integers(1, LONGEST[script] + 1))


def byte_slots(text: str, script: str) -> list[int]:
    """The index in SLOTS of each byte's character."""
    return [
        SLOTS.index((script, i)) for i, character in enumerate(text) for _ in character.encode()
    ]


def _example(text: str, script: str, lead: int) -> tuple[Tensor, ...]:
    """`GlyphStage.draw` for one text, after `lead` pads."""
    bitmaps, characters = [], []
    for character in text:
        count = len(character.encode())
        image = glyph_bitmap(character).reshape(SIDE, SLOT // SIDE, SIDE, SLOT // SIDE)
        bitmap = torch.from_numpy(image.mean((1, 3)) / 255).float().flatten()
        bitmaps += [bitmap] * count
        characters += [CHARACTERS.index(character)] * count
    ids = torch.tensor([PAD] * lead + byte_ids(text))
    slots = torch.tensor(byte_slots(text, script))
    return ids, torch.stack(bitmaps), torch.tensor(characters), slots
