"""What helps the decoder to learn where it is: how its first blocks begin, and what two must say.

A code covers two by two patches and says nothing of which one a patch is, so a patch has to find
out from its neighbours; and a character's code says its place in the text, so its shape has to be
looked up among the glyph encoder's states. From the pictures alone a small network learned neither
in a thousand steps: a square's corners and all letters stayed blots.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import GlmImageTransformer2DModel
from einops import rearrange
from torch import Tensor, nn

from glm_core.decoder import rotary, rotate

from .codes import EDGE
from .glyphs import CHARACTERS

QUARTER_BLOCK, CHARACTER_BLOCK = 1, 2  # after which block a hint is read off
QUARTER_WEIGHT, CHARACTER_WEIGHT = 0.3, 0.3
SHARPNESS = (0.6, 0.25, 0.15)  # of the three highest frequencies in a neighbour's attention


class Hints(nn.Module):
    """Heads that are trained with the decoder, on what its last pass left, and thrown away."""

    def __init__(self, network: GlmImageTransformer2DModel) -> None:
        super().__init__()
        width = network.proj_out.in_features
        self.states = {}  # image states [B, H * W, D] after QUARTER_BLOCK and CHARACTER_BLOCK
        for block in (QUARTER_BLOCK, CHARACTER_BLOCK):
            network.transformer_blocks[block].register_forward_hook(partial(self._keep, block))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.quarter = nn.Linear(width, 2)
        self.character = nn.Linear(width, len(CHARACTERS))

    def forward(self, codes: Tensor, characters: Tensor) -> dict[str, Tensor]:
        """Weighted losses.

        Args:
            codes: int64 [B, H, W], one a patch.
            characters: int64 [B, H, W], indices of CHARACTERS; -1 where there is no text.
        """
        shown, text = codes >= EDGE, characters >= 0
        quarters = self.quarter(self._states(QUARTER_BLOCK, codes)[shown])
        odd = (torch.stack(torch.where(shown)[1:], -1) % 2).to(quarters)
        losses = {}
        if shown.any():
            right = F.binary_cross_entropy_with_logits(quarters, odd)
            losses["quarter"] = QUARTER_WEIGHT * right
        if text.any():
            logits = self.character(self._states(CHARACTER_BLOCK, codes)[text])
            losses["character"] = CHARACTER_WEIGHT * F.cross_entropy(logits, characters[text])
        return losses

    def _keep(self, block: int, module: nn.Module, given: tuple, states: tuple) -> None:
        self.states[block] = states[0]

    def _states(self, block: int, codes: Tensor) -> Tensor:
        """[B, H, W, D], in the shape of codes."""
        return rearrange(self.norm(self.states[block]), "b (h w) d -> b h w d", h=codes.shape[1])


@torch.no_grad()
def look_around(network: GlmImageTransformer2DModel) -> None:
    """Begin the first block with the differences to the left and the right, the next up and down.

    Each of the two heads has one query and one key for all patches, so that RoPE alone decides:
    attention is highest one patch away. What it finds there is taken from the patch's own.
    """
    for block, axis in zip(network.transformer_blocks[:2], (1, 0), strict=True):
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

    The first half of a head's pairs turn with the row, the others with the column.
    """
    pairs = size // 4
    amplitude = torch.zeros(pairs)
    amplitude[: len(SHARPNESS)] = 6 * torch.tensor(SHARPNESS).sqrt()
    key = torch.cat([amplitude, amplitude, torch.zeros(2 * pairs)])
    cos, sin = rotary((2, 2), 0, size, key.device)
    there = [2 - axis]  # (1, 0) is the third of the four positions, (0, 1) the second
    return rotate(key.view(1, 1, 1, size), (cos[there], step * sin[there])).flatten(), key
