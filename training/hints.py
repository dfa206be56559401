"""Initial weights and auxiliary losses that help the decoder to find a patch's position and letter.

A code covers two by two patches and does not say which of them a patch is; a patch has to learn
that from its neighbours. A character's code says its index in the text only, so its shape has to be
looked up in the glyph encoder's states. From pictures alone a small network learned neither in a
thousand steps: the corners of squares and all letters stayed blots.

So the first block starts with the differences to the left and right neighbours, the second with
those to the upper and lower ones, and the third with the text's state at the index of a code.
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

QUARTER_BLOCK, CHARACTER_BLOCK = 1, 2  # the block after which each head reads the states
QUARTER_WEIGHT, CHARACTER_WEIGHT = 0.3, 0.3
SCALE = 8.0  # length of a slot's query and key; shorter ones are lost in the first hundred steps
SHARPNESS = (0.6, 0.25, 0.15)  # shares of the three highest frequencies in a neighbour's attention


class Hints(nn.Module):
    """Heads that are trained with the decoder on its last pass's states, and then discarded."""

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
        """Weighted losses of a patch's quarter of its cell and of its character.

        Args:
            codes: int64 [B, H, W], one for each patch.
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
        """The normed states after a block, [B, H, W, D] for codes [B, H, W]."""
        return rearrange(self.norm(self.states[block]), "b (h w) d -> b h w d", h=codes.shape[1])


@torch.no_grad()
def init_neighbour_heads(network: GlmImageTransformer2DModel) -> None:
    """Initialise the first block with differences to left and right, the second with up and down.

    Each of the two heads has one query and one key for all patches, so that RoPE alone decides.
    Attention is highest one patch away, and the value found is subtracted from the patch's own.
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
        _init_values(attention, -1.0)
        _set_gates(block, attention=1.0, mlp=0.5)


@torch.no_grad()
def init_text_lookup(
    block: nn.Module, image: Tensor, image_slots: Tensor, text: Tensor, text_slots: Tensor
) -> None:
    """Initialise a block so that a patch attends to the text's states in the slot of its code.

    Queries and keys are fitted by least squares, so that a slot gives the same vector on both
    sides. The vector uses the lower half of each axis's frequencies, which RoPE turns by at most a
    radian over a whole image.

    Args:
        image: states that attend, [N, D]; image_slots: int64 [N], their index in SLOTS or -1.
        text: states attended to, [M, D]; text_slots: int64 [M], likewise.
    """
    attention = block.attn1
    size = attention.to_q.out_features // attention.heads
    slow = torch.arange(size).view(4, -1)[:, size // 8 :].flatten()
    generator = torch.Generator().manual_seed(4)
    # The last vector is for states of no slot, and for all keys of the image.
    marks = torch.randn(len(slow), len(SLOTS) + 1, generator=generator)
    marks = SCALE * torch.linalg.qr(marks)[0].T
    queries = (image, marks[image_slots])
    no_slot = marks[-1:].expand(len(image), -1)
    keys = (torch.cat([text, image]), torch.cat([marks[text_slots], no_slot]))
    for linear, (states, wanted) in ((attention.to_q, queries), (attention.to_k, keys)):
        weight, bias = _least_squares(states, wanted.to(states))
        linear.weight.zero_()
        linear.bias.zero_()
        for head in range(attention.heads):
            linear.weight[head * size + slow] = weight
            linear.bias[head * size + slow] = bias
    _init_values(attention)
    _set_gates(block, attention=1.0)


def _least_squares(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [K, D] and bias [K] of the linear layer that gives wanted [N, K] for states [N, D].

    Every distinct wanted vector counts the same, however often it occurs.
    """
    _, kind, count = wanted.unique(dim=0, return_inverse=True, return_counts=True)
    share = (1 / (len(count) * count[kind])).unsqueeze(1)
    x = torch.cat([states, states.new_ones(len(states), 1)], 1)
    ridge = 1e-4 * torch.eye(x.shape[1], device=x.device)
    solved = torch.linalg.solve(x.T @ (share * x) + ridge, x.T @ (share * wanted))
    return solved[:-1].T, solved[-1]


def _init_values(attention: nn.Module, factor: float = 1.0) -> None:
    """Let attention's output be the attended states times a factor."""
    own = torch.linalg.qr(torch.randn(attention.to_v.weight.shape))[0]
    attention.to_v.weight.copy_(own)
    attention.to_out[0].weight.copy_(factor * own.T)
    attention.to_v.bias.zero_()
    attention.to_out[0].bias.zero_()


def _set_gates(block: nn.Module, attention: float, mlp: float = 0.0) -> None:
    """Set the gates of the image's attention and feed-forward."""
    gates = rearrange(block.norm1.linear.bias, "(chunk d) -> chunk d", chunk=12)
    gates[4], gates[10] = attention, mlp


def _neighbour(size: int, axis: int, step: int) -> tuple[Tensor, Tensor]:
    """A query and a key whose product is highest if the key is `step` patches further on.

    RoPE turns the first half of a head's pairs with the row, the others with the column.
    """
    pairs = size // 4
    amplitude = torch.zeros(pairs)
    amplitude[: len(SHARPNESS)] = 6 * torch.tensor(SHARPNESS).sqrt()
    key = torch.cat([amplitude, amplitude, torch.zeros(2 * pairs)])
    cos, sin = rotary((2, 2), 0, size, key.device)
    position = [2 - axis]  # (1, 0) is the third of the four positions, (0, 1) the second
    return rotate(key.view(1, 1, 1, size), (cos[position], step * sin[position])).flatten(), key
