"""Keys and values of reference images, kept block by block.

They depend on the images, their tokens and the weights alone, so one pass of the decoder serves
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
    """One child a block, so that a host can load, count and evict it as it does a model."""

    def __init__(self, blocks: Sequence["BlockCache"]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    @property
    def tokens(self) -> int:
        """Reference tokens that the largest set adds to a sample's attention."""
        return max(pair.length for pair in self.blocks[0].sets)

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters())


class BlockCache(nn.Module):
    """What one block attends to: a pair of keys and values for each set of references."""

    def __init__(self, sets: Sequence["Pair"]) -> None:
        super().__init__()
        self.sets = nn.ModuleList(sets)


class Pair(nn.Module):
    """Keys and values [1, heads, L, head_dim] of a set, as they are or in fp8.

    In fp8 every head has one scale for each `TOKENS_PER_SCALE` tokens, which bring their largest
    number to the format's largest.
    """

    def __init__(self, keys: Tensor, values: Tensor, fp8: bool) -> None:
        super().__init__()
        self.fp8 = fp8
        self.length = keys.shape[2]
        self.compute = keys.dtype
        for name, tensor in (("keys", keys), ("values", values)):
            kept = to_fp8(tensor) if fp8 else (tensor,)
            for suffix, part in zip(("", "_scale"), kept, strict=False):
                self.register_parameter(name + suffix, nn.Parameter(part, requires_grad=False))

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that `restore` needs, wherever they are."""
        return tuple(self.parameters())

    def restore(self, parts: Sequence[Tensor]) -> KeysValues:
        """Keys and values [1, heads, L, head_dim] as they were given, from a copy of `parts`."""
        if not self.fp8:
            keys, values = parts
            return keys, values
        keys, key_scale, values, value_scale = parts
        length = self.length
        return (
            from_fp8(keys, key_scale, self.compute)[:, :, :length],
            from_fp8(values, value_scale, self.compute)[:, :, :length],
        )


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[1, H, L, D] -> fp8 [1, H, n, TOKENS_PER_SCALE, D] and its scales float32 [1, H, n, 1, 1]."""
    x = F.pad(x.float(), (0, 0, 0, -x.shape[2] % TOKENS_PER_SCALE))
    x = rearrange(x, "b h (n t) d -> b h n t d", t=TOKENS_PER_SCALE)
    scale = x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (x / scale).to(FP8), scale


def from_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
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
        normalise: the VAE's latents to the decoder's.
        device, dtype: where and in what to compute.
        store: where to keep the result.
        progress: called with (blocks done, blocks to do).
    """
    images = dict.fromkeys(image for images in references.sets for image in images)
    runs = {image: _run(decoder, image, normalise, device, dtype) for image in images}
    total = decoder.config.num_layers
    blocks = []
    for done in range(1, total + 1):
        check_interrupt()
        kept = {image: next(run) for image, run in runs.items()}
        pairs = [_joined([kept[image] for image in images], fp8) for images in references.sets]
        blocks.append(BlockCache(pairs).to(store))
        progress(done, total)
    return ReferenceCache(blocks)


def _joined(images: Sequence[KeysValues], fp8: bool) -> Pair:
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*images, strict=True))
    return Pair(keys, values, fp8)


def _run(
    decoder: Decoder,
    image: Reference,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[KeysValues]:
    latent = normalise(image.latent.to(device)).to(dtype)
    tokens = upsample_tokens(image.tokens[None].to(device))
    return decoder.reference_keys_values(latent, tokens, image.size)
