"""Some of many tokens, layouts, images or latents, as one batch.

Each function takes a list of batches, as ComfyUI gives them to a node that takes lists, counts
their entries in order, and joins those at the given indices.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...glm_core.data.grids import PIXELS_PER_LATENT
from ...glm_core.data.tokens import Layout, SemanticTokens
from ...glm_core.errors import BatchError

Batches = Sequence[Any]
Latent = dict[str, Any]


def count_of(batches: Batches) -> int:
    return sum(map(_length, batches))


def join_tokens(batches: Sequence[SemanticTokens], indices: Sequence[int]) -> SemanticTokens:
    """
    Raises:
        GLMImageError: those chosen are of several sizes or codebooks.
    """
    chosen = _entries(batches, indices)
    first = chosen[0][0]
    _require_equal("tokens", [(one.width, one.height, one.codebook) for one, _ in chosen])
    tokens = torch.cat([one.tokens[i, None] for one, i in chosen])
    return replace(first, tokens=tokens, info=_joined_info([_info(one, i) for one, i in chosen]))


def join_layouts(batches: Sequence[Layout], indices: Sequence[int]) -> Layout:
    """
    Raises:
        GLMImageError: those chosen are of several sizes or codebooks, or differ in their locks.
    """
    chosen = _entries(batches, indices)
    first = chosen[0][0]
    _require_equal("layouts", [(one.width, one.height, one.codebook) for one, _ in chosen])
    if not all(torch.equal(one.locked, first.locked) for one, _ in chosen):
        raise BatchError(
            "The layouts differ in their locked cells, which a batch shares; keep one of them, or "
            "unlock them with GLM-Image Lock Layout first."
        )
    return replace(first, preview=torch.cat([one.preview[i, None] for one, i in chosen]))


def join_images(batches: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """float32 [B, height, width, channels]

    Raises:
        GLMImageError: those chosen are of several sizes.
    """
    chosen = _entries(batches, indices)
    _require_equal("images", [(one.shape[2], one.shape[1]) for one, _ in chosen])
    return torch.cat([one[i, None] for one, i in chosen])


def join_latents(batches: Sequence[Latent], indices: Sequence[int]) -> Latent:
    """Noise masks and the numbers of noise go with their latents.

    Raises:
        GLMImageError: those chosen are of several sizes.
    """
    chosen = _entries(batches, indices)
    samples = [one["samples"][i, None] for one, i in chosen]
    _require_equal("latents", [_pixels(one) for one in samples])
    joined = {**chosen[0][0], "samples": torch.cat(samples)}
    joined.pop("noise_mask", None)
    joined["batch_index"] = [_noise_number(one, i) for one, i in chosen]
    if any("noise_mask" in one for one, _ in chosen):
        joined["noise_mask"] = torch.cat([_noise_mask(one, i) for one, i in chosen])
    return joined


def _info(tokens: SemanticTokens, i: int) -> dict[str, Any]:
    """How image i of a batch was made: its seed is the batch's and i more."""
    info = tokens.info if isinstance(tokens.info, dict) else {}
    seed = info.get("seed")
    return {**info, "seed": (seed + i) % 2**64} if isinstance(seed, int) else info


def _joined_info(infos: list[dict[str, Any]]) -> dict[str, Any]:
    """What is equal in all, and the seeds of several."""
    first = infos[0]
    common = {key: one for key, one in first.items() if all(i.get(key) == one for i in infos)}
    seeds = {} if "seed" in common else {"seeds": [info.get("seed") for info in infos]}
    return common if len(infos) == 1 else {**common, **seeds}


def _noise_number(latent: Latent, i: int) -> int:
    numbers = latent.get("batch_index")
    return i if numbers is None else numbers[i]


def _noise_mask(latent: Latent, i: int) -> Tensor:
    """The mask of one latent at its size in pixels, [1, 1, height, width]; ones if it has none."""
    size = [PIXELS_PER_LATENT * side for side in latent["samples"].shape[-2:]]
    mask = latent.get("noise_mask")
    if mask is None:
        return torch.ones(1, 1, *size)
    masks = mask.reshape(-1, 1, *mask.shape[-2:])
    return F.interpolate(masks[i % len(masks), None], size=size, mode="bilinear")


def _length(batch: Any) -> int:
    if isinstance(batch, (SemanticTokens, Layout)):
        return len(batch.ids)
    return len(batch["samples"] if isinstance(batch, dict) else batch)


def _entries(batches: Batches, indices: Sequence[int]) -> list[tuple[Any, int]]:
    """The batch and the place in it of each index over all batches."""
    places = [(batch, i) for batch in batches for i in range(_length(batch))]
    return [places[index] for index in indices]


def _pixels(samples: Tensor) -> tuple[int, int]:
    """(width, height)"""
    return PIXELS_PER_LATENT * samples.shape[-1], PIXELS_PER_LATENT * samples.shape[-2]


def _require_equal(name: str, kinds: Sequence[tuple[int, ...]]) -> None:
    if len(set(kinds)) > 1:
        sizes = " and ".join(f"{width}x{height}" for width, height, *_ in dict.fromkeys(kinds))
        raise BatchError(
            f"The best {name} are of several sizes or models ({sizes}), which do not fit into one "
            "batch; set count to 1."
        )


JOINERS: dict[str, Callable[[Batches, Sequence[int]], Any]] = {
    "tokens": join_tokens, "layout": join_layouts, "images": join_images, "latent": join_latents,
}  # fmt: skip
"""By the input of a node."""
