"""What helps the AR model to learn to read: what a phrase asks for, and what will stand below.

In a picture's codes only the first cells of a shape say whether the prompt was understood; the rest
follows from the cells above. From them alone a small model drew shapes of the right colours in
wrong places after sixty thousand pictures. So its states must say what they know, through heads
that are trained with it and thrown away.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes import EDGE, INSIDE, LONGEST, NAMES, PAIRS, PATTERNS, TEXT, USED
from .scene import ANCHORS, COLOURS, MAX_LETTERS, RADII, SHAPES, Item, Scene, Text

PHRASE_LAYER = 1  # after which layer a phrase must be understood
PHRASE_WEIGHT, BELOW_WEIGHT = 0.1, 0.1
BELOW = (2, 4)  # rows
NOTHING, WRITING = len(NAMES), len(NAMES) + 1  # beside the colours of shapes, what a cell shows
ASKED = {
    "kind": (Item, Text, None),  # None is the background
    "place": (*ANCHORS, None),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(RADII),
    "count": (1, 2, 3, 4),
    "script": tuple(LONGEST),
    "length": tuple(range(1, MAX_LETTERS + 1)),
}
"""What a phrase can ask for, and the answers."""


def asked_by(thing: Item | Text | None, scene: Scene) -> Tensor:
    """int64 [len(ASKED)]: indices of the answers, -1 where the phrase says nothing of it."""
    match thing:
        case None:
            answers = {"kind": None, "colour": scene.background}
        case Text():
            answers = {"kind": Text, "place": thing.place, "script": thing.script}
            answers["length"] = len(thing.content)
        case Item():
            answers = {"kind": Item, "place": thing.place, "colour": thing.colour}
            answers |= {"shape": thing.shape, "size": thing.size, "count": len(thing.centres)}
    return torch.tensor(
        [options.index(answers[name]) if name in answers else -1 for name, options in ASKED.items()]
    )


def shown_by(codes: Tensor) -> Tensor:
    """The colour of the shape that a cell shows at least a part of, or NOTHING, or WRITING."""
    names = torch.tensor([NAMES.index(name) for name, _ in PAIRS], device=codes.device)
    of_edges = names[((codes - EDGE) // PATTERNS).clamp(0, len(PAIRS) - 1)]
    colours = torch.where(codes < EDGE, codes - INSIDE, of_edges)
    colours = torch.where(codes < INSIDE, NOTHING, colours)
    return torch.where((codes >= TEXT) & (codes < USED), WRITING, colours)


class Reading(nn.Module):
    """The heads."""

    def __init__(self, layers: Iterable[nn.Module], width: int) -> None:
        super().__init__()
        self.states = None  # [B, S, width], of the model's last pass
        layers[PHRASE_LAYER].register_forward_hook(self._keep)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.phrase = nn.Linear(width, sum(map(len, ASKED.values())))
        self.below = nn.Linear(width, len(BELOW) * (WRITING + 1))

    def phrases(self, ends: Tensor, asked: Tensor) -> Tensor:
        """Weighted loss of phrases that end at (sample, token) ends [K, 2]; asked: [K, ASKED]."""
        logits = self.phrase(self.norm(self.states[ends[:, 0], ends[:, 1]]))
        losses = [
            F.cross_entropy(part[known], wanted[known])
            for part, wanted in zip(
                logits.split([len(options) for options in ASKED.values()], -1),
                asked.unbind(1),
                strict=True,
            )
            if (known := wanted >= 0).any()
        ]
        return PHRASE_WEIGHT * torch.stack(losses).mean()

    def rows_below(self, states: Tensor, codes: Tensor) -> Tensor:
        """Weighted loss of what stands some rows below the cell that each state is to name.

        Args:
            states: [B, H * W, width], the model's last.
            codes: int64 [B, H, W].
        """
        shown = shown_by(codes)
        parts = self.below(states).unflatten(1, codes.shape[1:]).chunk(len(BELOW), -1)
        losses = [
            F.cross_entropy(part[:, :-rows].flatten(0, 2), shown[:, rows:].flatten())
            for part, rows in zip(parts, BELOW, strict=True)
        ]
        return BELOW_WEIGHT * torch.stack(losses).mean()

    def _keep(self, module: nn.Module, given: tuple, states: Tensor | tuple) -> None:
        self.states = states if isinstance(states, Tensor) else states[0]
