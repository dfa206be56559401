"""Keys and values of reference images in every block of the decoder.

They depend only on the images, their tokens and the weights, so one pass of the decoder serves
every prompt, seed and step.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..data.grids import upsample_tokens
from ..data.references import Reference, References
from .model import Decoder, KeysValues

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
TOKENS_PER_SCALE = 64


class ReferenceCache(nn.Module):
    """A module with a child for each block, so that a host can load, count and evict it."""

    def __init__(self, blocks: Sequence["BlockCache"]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    @property
    def tokens(self) -> int:
        """The number of reference tokens in the largest set."""
        return max(pair.length for pair in self.blocks[0].sets)

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters())


class BlockCache(nn.Module):
    """The keys and values of one block, for each set of references."""

    def __init__(self, sets: Sequence["KeyValuePair"]) -> None:
        super().__init__()
        self.sets = nn.ModuleList(sets)


class KeyValuePair(nn.Module):
    """Keys and values [1, heads, L, head_dim] of a set, unchanged or in fp8.

    In fp8 every head has one scale for each `TOKENS_PER_SCALE` tokens, which maps their largest
    number to the format's largest.
    """

    def __init__(self, keys: Tensor, values: Tensor, fp8: bool) -> None:
        super().__init__()
        self.fp8 = fp8
        self.length = keys.shape[2]
        self.compute_dtype = keys.dtype
        for name, tensor in (("keys", keys), ("values", values)):
            stored = to_fp8(tensor) if fp8 else (tensor,)
            for suffix, part in zip(("", "_scale"), stored, strict=False):
                self.register_parameter(name + suffix, nn.Parameter(part, requires_grad=False))

    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values, in fp8 each with its scales, as `restore` takes them."""
        return tuple(self.parameters())

    def restore(self, tensors: Sequence[Tensor]) -> KeysValues:
        """Keys and values [1, heads, L, head_dim] in their first dtype, from a copy of `tensors`.

        The copy may lie on any device.
        """
        if not self.fp8:
            keys, values = tensors
            return keys, values
        keys, key_scale, values, value_scale = tensors
        return (
            from_fp8(keys, key_scale, self.compute_dtype)[:, :, : self.length],
            from_fp8(values, value_scale, self.compute_dtype)[:, :, : self.length],
        )


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[1, H, L, D] -> fp8 [1, H, n, TOKENS_PER_SCALE, D] and its scales float32 [1, H, n, 1, 1].

    The last of the n groups is padded with zeros.
    """
    x = F.pad(x.float(), (0, 0, 0, -x.shape[2] % TOKENS_PER_SCALE))
    x = rearrange(x, "b h (n t) d -> b h n t d", t=TOKENS_PER_SCALE)
    scale = x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (x / scale).to(FP8), scale


def from_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_fp8`, padding included: [1, H, n * TOKENS_PER_SCALE, D]."""
    return rearrange(x.to(dtype) * scale.to(dtype), "b h n t d -> b h (n t) d")


def make_cache(
    decoder: Decoder,
    references: References,
    normalise: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    store: torch.device,
    fp8: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> ReferenceCache:
    """Run the decoder once over every reference, block by block for all of them.

    Args:
        normalise: converts latents of the VAE to those of the decoder.
        device, dtype: where and in what to compute.
        store: where the cache is stored.
        progress: called with (blocks done, blocks to do).
    """
    images = dict.fromkeys(image for images in references.sets for image in images)
    runs = {image: _run(decoder, image, normalise, device, dtype) for image in images}
    total = decoder.config.num_layers
    blocks = []
    for done in range(1, total + 1):
        check_interrupt()
        found = {image: next(run) for image, run in runs.items()}
        pairs = [_join([found[image] for image in images], fp8) for images in references.sets]
        blocks.append(BlockCache(pairs).to(store))
        progress(done, total)
    return ReferenceCache(blocks)


def _join(images: Sequence[KeysValues], fp8: bool) -> KeyValuePair:
    """The keys and values of a set's images, one after the other."""
    keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*images, strict=True))
    return KeyValuePair(keys, values, fp8)


def _run(
    decoder: Decoder,
    image: Reference,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[KeysValues]:
    """The keys and values of one image, block after block."""
    latent = normalise(image.latent.to(device)).to(dtype)
    tokens = upsample_tokens(image.tokens[None].to(device))
    return decoder.reference_keys_values(latent, tokens, image.size)
