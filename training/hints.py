"""What helps the decoder to learn where it is: how its first blocks begin, and what two must say.

A code covers two by two patches and says nothing of which one a patch is, so a patch has to find
out from its neighbours; and a character's code says its place in the text, so its shape has to be
looked up among the glyph encoder's states. From the pictures alone a small network learned neither
in a thousand steps: a square's corners and all letters stayed blots.
"""

import torch
import torch.nn.functional as F
from diffusers import GlmImageTransformer2DModel
from einops import rearrange
from torch import Tensor, nn

from .codes import EDGE
from .glyphs import CHARACTERS

QUARTER_BLOCK, CHARACTER_BLOCK = 1, 2  # after which block a hint is read off
QUARTER_WEIGHT, CHARACTER_WEIGHT = 0.3, 0.3
SHARPNESS = (0.6, 0.25, 0.15)  # of the three highest frequencies in a neighbour's attention
ROPE_THETA = 10000.0  # as the reference class has it


class Hints(nn.Module):
    """Heads that are trained with the decoder and thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.quarter = nn.Linear(width, 2)
        self.character = nn.Linear(width, len(CHARACTERS))

    def forward(
        self, states: dict[int, Tensor], codes: Tensor, characters: Tensor
    ) -> dict[str, Tensor]:
        """Weighted losses.

        Args:
            states: image states [B, H * W, D] after QUARTER_BLOCK and CHARACTER_BLOCK.
            codes: int64 [B, H, W], one a patch.
            characters: int64 [B, H, W], indices of CHARACTERS; -1 where there is no text.
        """
        height, width = codes.shape[1:]
        quarters = self.quarter(self.norm(states[QUARTER_BLOCK]))
        odd = torch.stack(
            torch.meshgrid(torch.arange(height) % 2, torch.arange(width) % 2, indexing="ij"), -1
        )
        odd = odd.to(quarters).expand(len(codes), -1, -1, -1)
        shown, text = codes >= EDGE, characters >= 0
        quarters = rearrange(quarters, "b (h w) q -> b h w q", h=height)
        named = rearrange(states[CHARACTER_BLOCK], "b (h w) d -> b h w d", h=height)
        losses = {}
        if shown.any():
            right = F.binary_cross_entropy_with_logits(quarters[shown], odd[shown])
            losses["quarter"] = QUARTER_WEIGHT * right
        if text.any():
            logits = self.character(self.norm(named[text]))
            losses["character"] = CHARACTER_WEIGHT * F.cross_entropy(logits, characters[text])
        return losses


@torch.no_grad()
def look_around(network: GlmImageTransformer2DModel) -> None:
    """Begin the first block with the differences to the left and the right, the next up and down.

    Each head's query and key are the same for every patch, so that RoPE alone decides: attention is
    highest one patch away. Its value is taken from the patch's own.
    """
    for block, axis in zip(network.transformer_blocks, (1, 0), strict=False):
        attention = block.attn1
        for linear in (attention.to_q, attention.to_k):
            linear.weight.mul_(0.1)
            linear.bias.zero_()
        size = attention.to_q.out_features // attention.heads
        for head, step in enumerate((-1, 1)):
            query, key = _neighbour(size, axis, step)
            attention.to_q.bias[head * size : (head + 1) * size] = query
            attention.to_k.bias[head * size : (head + 1) * size] = key
        own = torch.linalg.qr(torch.randn(attention.to_v.weight.shape))[0]
        attention.to_v.weight.copy_(own)
        attention.to_out[0].weight.copy_(-own.T)
        attention.to_v.bias.zero_()
        attention.to_out[0].bias.zero_()
        gates = rearrange(block.norm1.linear.bias, "(chunk d) -> chunk d", chunk=12)
        gates[4], gates[10] = 1.0, 0.5  # of the image's attention and MLP


def _neighbour(size: int, axis: int, step: int) -> tuple[Tensor, Tensor]:
    """A query and a key whose product is highest where the key is `step` patches further on.

    The reference pairs entry i of a head with i + size / 2; the first half of the pairs turn with
    the row, the others with the column.
    """
    pairs = size // 4
    angle = step * ROPE_THETA ** (-torch.arange(pairs) / pairs)
    amplitude = torch.zeros(pairs)
    amplitude[: len(SHARPNESS)] = 6 * torch.tensor(SHARPNESS).sqrt()
    query, key = torch.zeros(2, 2, pairs), torch.zeros(2, 2, pairs)  # (real, imaginary), axis
    key[0] = amplitude
    query[0] = amplitude
    query[0, axis], query[1, axis] = amplitude * angle.cos(), amplitude * angle.sin()
    return query.flatten(), key.flatten()
