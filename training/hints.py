"""What helps the decoder to learn where it is: how its first blocks begin, and what two must say.

A code covers two by two patches and says nothing of which one a patch is, so a patch has to find
out from its neighbours; and a character's code says its place in the text, so its shape has to be
looked up among the glyph encoder's states. From the pictures alone a small network learned neither
in a thousand steps: a square's corners and all letters stayed blots.

So the first block begins with the differences to the left and the right, the next with those up and
down, and the third with what the text says at a code's place.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import GlmImageTransformer2DModel
from einops import rearrange
from torch import Tensor, nn

from glm_core.decoder.embeddings import rotary, rotate

from .codes import EDGE, SLOTS
from .glyphs import CHARACTERS

QUARTER_BLOCK, CHARACTER_BLOCK = 1, 2  # after which block a hint is read off
QUARTER_WEIGHT, CHARACTER_WEIGHT = 0.3, 0.3
LOUDNESS = 8.0  # of a place's query and key; quieter ones are drowned in the first hundred steps
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
        _copy(attention, -1.0)
        _open(block, attention=1.0, mlp=0.5)


@torch.no_grad()
def look_up(block: nn.Module, image: Tensor, cells: Tensor, text: Tensor, places: Tensor) -> None:
    """Begin a block with what the text says at the place that a patch's code names.

    Queries and keys are fitted, by least squares, so that a place gives the same vector on both
    sides. It lies in the slow half of each axis's frequencies, which RoPE turns by a radian over a
    whole image at the most.

    Args:
        image: what the block attends with, [N, D]; cells: int64 [N], its index of SLOTS or -1.
        text: what it attends to, [M, D]; places: int64 [M], likewise.
    """
    attention = block.attn1
    size = attention.to_q.out_features // attention.heads
    slow = torch.arange(size).view(4, -1)[:, size // 8 :].flatten()
    generator = torch.Generator().manual_seed(4)
    # The last one is for what is no text; the keys of the image have it too.
    marks = torch.randn(len(slow), len(SLOTS) + 1, generator=generator)
    marks = LOUDNESS * torch.linalg.qr(marks)[0].T
    queries = (image, marks[cells])
    keys = (torch.cat([text, image]), torch.cat([marks[places], marks[-1:].expand(len(image), -1)]))
    for linear, (states, wanted) in ((attention.to_q, queries), (attention.to_k, keys)):
        weight, bias = _least_squares(states, wanted.to(states))
        linear.weight.zero_()
        linear.bias.zero_()
        for head in range(attention.heads):
            linear.weight[head * size + slow] = weight
            linear.bias[head * size + slow] = bias
    _copy(attention)
    _open(block, attention=1.0)


def _least_squares(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [K, D] and bias [K] of the linear layer that gives wanted [N, K] for states [N, D].

    Every vector that is wanted counts the same, however often.
    """
    _, kind, count = wanted.unique(dim=0, return_inverse=True, return_counts=True)
    share = (1 / (len(count) * count[kind])).unsqueeze(1)
    x = torch.cat([states, states.new_ones(len(states), 1)], 1)
    ridge = 1e-4 * torch.eye(x.shape[1], device=x.device)
    solved = torch.linalg.solve(x.T @ (share * x) + ridge, x.T @ (share * wanted))
    return solved[:-1].T, solved[-1]


def _copy(attention: nn.Module, factor: float = 1.0) -> None:
    """What is found reaches the states as it is, but for a factor."""
    own = torch.linalg.qr(torch.randn(attention.to_v.weight.shape))[0]
    attention.to_v.weight.copy_(own)
    attention.to_out[0].weight.copy_(factor * own.T)
    attention.to_v.bias.zero_()
    attention.to_out[0].bias.zero_()


def _open(block: nn.Module, attention: float, mlp: float = 0.0) -> None:
    """Set the gates of the image's attention and feed-forward."""
    gates = rearrange(block.norm1.linear.bias, "(chunk d) -> chunk d", chunk=12)
    gates[4], gates[10] = attention, mlp


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
