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
from .batches import ORIGIN, SEVERAL, numbers_of

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
    _require_equal("tokens", [_of_codes(one) for one, _ in chosen])
    roots = {id(one): one.root for one, _ in chosen}
    numbers = tuple(one.image_numbers[i] for one, i in chosen)
    one_batch = len(set(roots.values())) == 1 and len(set(numbers)) == len(numbers)
    return replace(
        chosen[0][0],
        tokens=torch.cat([one.tokens[i, None] for one, i in chosen]),
        info=_joined_info([_info(one, i) for one, i in chosen]),
        numbers=numbers if one_batch else None,
        origin=roots[id(chosen[0][0])] if one_batch else None,
    )


def join_layouts(batches: Sequence[Layout], indices: Sequence[int]) -> Layout:
    """
    Raises:
        GLMImageError: those chosen are of several sizes or codebooks, or differ in their locks.
    """
    chosen = _entries(batches, indices)
    first = chosen[0][0]
    _require_equal("layouts", [_of_codes(one) for one, _ in chosen])
    if not all(torch.equal(one.locked, first.locked) for one, _ in chosen):
        raise BatchError(
            "The layouts differ in their locked cells, which a batch shares; keep one of them, or "
            "unlock them with GLM-Image Lock Layout first."
        )
    return replace(first, preview=torch.cat([one.preview[i, None] for one, i in chosen]))


def join_images(batches: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """float32 [B, height, width, channels]

    Raises:
        GLMImageError: those chosen differ in size or channels.
    """
    chosen = _entries(batches, indices)
    kinds = [f"{one.shape[2]}x{one.shape[1]} with {one.shape[3]} channels" for one, _ in chosen]
    _require_equal("images", kinds)
    return torch.cat([one[i, None] for one, i in chosen])


def join_latents(batches: Sequence[Latent], indices: Sequence[int]) -> Latent:
    """Noise masks and the numbers of noise go with their latents.

    Raises:
        GLMImageError: those chosen differ in size or channels.
    """
    chosen = _entries(batches, indices)
    samples = [one["samples"][i, None] for one, i in chosen]
    _require_equal("latents", [_of_latents(one) for one in samples])
    joined = {**chosen[0][0], "samples": torch.cat(samples)}
    joined.pop("noise_mask", None)
    joined["batch_index"] = [_noise_number(one, i) for one, i in chosen]
    origins = {one.get(ORIGIN) for one, _ in chosen}
    if len(origins) > 1:
        joined[ORIGIN] = SEVERAL
    if any("noise_mask" in one for one, _ in chosen):
        joined["noise_mask"] = torch.cat([_noise_mask(one, i) for one, i in chosen])
    return joined


def _info(tokens: SemanticTokens, i: int) -> dict[str, Any]:
    """How image i of a batch was made: its seed is the batch's and i more."""
    info = dict(tokens.info) if isinstance(tokens.info, dict) else {}
    seeds, seed, forced = info.pop("seeds", None), info.get("seed"), info.get("forced")
    if isinstance(forced, list):
        info["forced"] = forced[i] if i < len(forced) else ""
    if isinstance(seeds, list) and i < len(seeds):
        return {**info, "seed": seeds[i]}
    return {**info, "seed": (seed + i) % 2**64} if isinstance(seed, int) else info


def _joined_info(infos: list[dict[str, Any]]) -> dict[str, Any]:
    """What is equal in all. Seeds are listed, as they need not count up; forced cells that differ
    as well."""
    if len(infos) == 1:
        return infos[0]
    first = infos[0]
    common = {key: one for key, one in first.items() if all(i.get(key) == one for i in infos)}
    common.pop("seed", None)
    if "forced" not in common and any("forced" in info for info in infos):
        common["forced"] = [info.get("forced", "") for info in infos]
    return {**common, "seeds": [info.get("seed") for info in infos]}


def _noise_number(latent: Latent, i: int) -> int:
    numbers = numbers_of(latent)
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


def _of_codes(batch: SemanticTokens | Layout) -> str:
    return f"{batch.width}x{batch.height} with {batch.codebook} codes"


def _of_latents(samples: Tensor) -> str:
    height, width = (PIXELS_PER_LATENT * side for side in samples.shape[-2:])
    return f"{width}x{height} with {samples.shape[1]} channels"


def _require_equal(name: str, kinds: Sequence[str]) -> None:
    """
    Args:
        kinds: of each, what a batch has in common, in words.
    """
    if len(set(kinds)) > 1:
        found = ", ".join(dict.fromkeys(kinds))
        raise BatchError(
            f"The {name} to join are not alike ({found}), as those of a batch must be; choose some "
            "that are, or a single one."
        )


JOINERS: dict[str, Callable[[Batches, Sequence[int]], Any]] = {
    "tokens": join_tokens, "layout": join_layouts, "images": join_images, "latent": join_latents,
}  # fmt: skip
"""By the input of a node."""
