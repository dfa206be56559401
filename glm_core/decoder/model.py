"""The diffusion decoder: a single-stream DiT over glyph text and image tokens.

Keys and formulas are those of diffusers' `GlmImageTransformer2DModel`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import sdpa
from ..layers import Layers
from ..split import LayerSegment, Segment, all_segments, on_device, own_layers
from .config import DecoderConfig
from .embeddings import Rope, TimeSizeEmbedding, rotary
from .feed_forward import FeedForward, Projection, gelu_tanh
from .operations import PLAIN, Operations, add, modulated_norm

DROPPED = -1
"""The token id of a cell without a prior: its embedding is zero, as in the unconditional pass."""

KeysValues = tuple[Tensor, Tensor]


Chooser = Callable[[Tensor, Tensor, Rope], Operations]
"""Gives the operations of blocks from their hidden states of image and text and their rotation."""


class ReferenceKeysValues(Protocol):
    """For block i, the keys and values of references, as `Attention.forward` takes them."""

    def __getitem__(self, block: int) -> Sequence[KeysValues]: ...


def plainly(*_: Any) -> Operations:
    """A `Chooser` of the plain operations."""
    return PLAIN


class StepInvariants(NamedTuple):
    """What is the same at every step of a run: it depends on the conditioning alone."""

    text: Tensor  # [B, T, hidden]
    prior: Tensor  # [B, N, hidden]
    size: Tensor  # [1, time_embed_dim]
    ropes: tuple[Rope, ...]  # one copy per segment of blocks: cos, sin [T + N, head_dim]


class Decoder(nn.Module):
    """Predicts the flow (noise - image) of latents, given semantic tokens and glyph text."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        operations: Any = nn,
        attention: Callable[..., Tensor] = sdpa,
        segments: Sequence[LayerSegment] = (),
        choose: Chooser = plainly,
    ) -> None:
        """
        Args:
            operations: the classes of layers to build from, see `Layers`.
            attention: is called as `sdpa`.
            segments: the last blocks of a split decoder, from `block_segment`.
            choose: is called in each step, once for every segment.
        """
        super().__init__()
        self.choose = choose
        self.config = config
        self.segments = tuple(segments)
        layers = Layers(operations, device, dtype)
        hidden = config.hidden_size
        patch = config.patch_size**2

        self.image_projector = Projection(config.in_channels * patch, hidden, layers)
        self.glyph_projector = FeedForward(config.text_embed_dim, hidden, hidden, F.gelu, layers)
        self.prior_token_embedding = layers.Embedding(
            config.prior_vq_quantizer_codebook_size, hidden
        )
        self.prior_projector = FeedForward(hidden, hidden, hidden, F.silu, layers)
        self.time_condition_embed = TimeSizeEmbedding(
            config.time_embed_dim, config.condition_dim, layers
        )
        self.transformer_blocks = nn.ModuleList(
            Block(config, layers, attention) for _ in range(own_layers(config.num_layers, segments))
        )
        self.norm_out = FinalNorm(hidden, config.time_embed_dim, layers)
        self.proj_out = layers.Linear(hidden, config.out_channels * patch)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        glyphs: Tensor,
        tokens: Tensor,
        size: tuple[int, int],
        references: ReferenceKeysValues | None = None,
    ) -> Tensor:
        """One prediction.

        Args:
            x: latents [B, C, H, W].
            timestep: float [B], unshifted (`ScheduleConfig.timestep`).
            glyphs: the glyph encoder's states [B, T, text_embed_dim], unpadded.
            tokens: semantic token ids, one per patch [B, ceil(H / p), ceil(W / p)]; `DROPPED`
                cells have no prior.
            size: (height, width) in pixels of the whole image.
            references: keys and values of reference images, see `reference_keys_values`.

        Returns:
            [B, C_out, H, W]
        """
        return self.predict(x, timestep, self.prepare(glyphs, tokens, size, x.dtype), references)

    def prepare(
        self, glyphs: Tensor, tokens: Tensor, size: tuple[int, int], dtype: torch.dtype
    ) -> StepInvariants:
        """The part of `forward` that is the same at every step."""
        text = self.glyph_projector(glyphs.to(dtype))
        ids = rearrange(tokens, "b h w -> b (h w)")
        embedded = self.prior_token_embedding(ids.clamp(min=0)).to(dtype)
        prior = self.prior_projector(embedded * (ids != DROPPED).unsqueeze(-1))
        rope = rotary(tokens.shape[1:], text.shape[1], self.config.attention_head_dim, text.device)
        ropes = (tuple(x.to(device) for x in rope) for device, _ in self._segments(text.device))
        size_embedding = self.time_condition_embed.embed_size(size, text.device, dtype)
        return StepInvariants(text, prior, size_embedding, tuple(ropes))

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        invariants: StepInvariants,
        references: ReferenceKeysValues | None = None,
        **attention_options: Any,
    ) -> Tensor:
        """The part of `forward` that depends on the step.

        Args:
            attention_options: further arguments for the attention function.
        """
        p = self.config.patch_size
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % p, 0, -height % p), mode="replicate")
        rows, cols = x.shape[-2] // p, x.shape[-1] // p
        txt, prior, size_embedding, ropes = invariants

        img = self._embed(x) + prior
        vec = self.time_condition_embed(timestep, size_embedding)
        img = self._run_blocks(img, txt, vec, ropes, references, **attention_options)
        out = self.proj_out(self.norm_out(img, vec))
        out = rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=cols, p=p, q=p)
        return out[..., :height, :width]

    def _run_blocks(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        ropes: Sequence[Rope],
        references: ReferenceKeysValues | None,
        **attention_options: Any,
    ) -> Tensor:
        """All blocks, segment by segment, each on its device."""
        own_device = img.device
        for (device, blocks), rope in zip(self._segments(own_device), ropes, strict=True):
            img, txt, vec = (x.to(device) for x in (img, txt, vec))
            with on_device(device, current=own_device):
                operations = self._operations(img, txt, rope)
                for i, block in blocks:
                    pairs = () if references is None else references[i]
                    img, txt = self.run_block(
                        i, block, img, txt, vec, rope, pairs, operations, **attention_options
                    )
        return img.to(own_device)

    def _operations(self, img: Tensor, txt: Tensor, rope: Rope) -> Operations:
        """A compiler fuses operations itself, and only torch's own have gradients."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return PLAIN
        return self.choose(img, txt, rope)

    def run_block(
        self,
        index: int,
        block: nn.Module,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        rope: Rope,
        references: Sequence[KeysValues],
        operations: Operations,
        **attention_options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run block number `index` in `predict`; a host overrides this to run patches around it.

        `block` is called as a module, since a compiled form may stand in its place.

        Returns:
            img, txt
        """
        return block(img, txt, vec, rope, references, operations=operations, **attention_options)

    def reference_keys_values(
        self, latent: Tensor, tokens: Tensor, size: tuple[int, int]
    ) -> Iterator[KeysValues]:
        """Keys (rotated) and values of a reference image, block by block.

        The reference is run once, at timestep 0, without text, with its own tokens and size. The
        result depends on the reference and the weights alone.

        Args:
            latent: [1, C, H, W], normalised, in the dtype to compute in.
            tokens: ids [1, H / p, W / p].
            size: (height, width) of the reference in pixels.

        Yields:
            key, value: [1, heads, N, head_dim] of the next block, on that block's device.
        """
        no_text = latent.new_zeros(1, 0, self.config.text_embed_dim)
        txt, prior, size_embedding, ropes = self.prepare(no_text, tokens, size, latent.dtype)
        img = self._embed(latent) + prior
        vec = self.time_condition_embed(latent.new_zeros(1), size_embedding)
        collected: list[KeysValues] = []
        for (device, blocks), rope in zip(self._segments(img.device), ropes, strict=True):
            img, txt, vec = (x.to(device) for x in (img, txt, vec))
            for _, block in blocks:
                with on_device(device, current=latent.device):
                    img, txt = block(img, txt, vec, rope, collect=collected)
                yield collected.pop()

    def _embed(self, x: Tensor) -> Tensor:
        """Latents on the patch grid [B, C, H, W] -> [B, N, hidden]"""
        p = self.config.patch_size
        return self.image_projector(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))

    def _segments(self, device: torch.device) -> Iterator[Segment]:
        return all_segments(self.transformer_blocks, device, self.segments)


def block_segment(
    config: DecoderConfig,
    numbers: range,
    on: torch.device,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    operations: Any = nn,
    attention: Callable[..., Tensor] = sdpa,
    prefix: str = "",
) -> LayerSegment:
    """Some of a decoder's blocks, as a segment of their own.

    Args:
        on: the device on which they compute.
        prefix: what a host puts before the decoder's keys.
    """
    layers = Layers(operations, device, dtype)
    path = f"{prefix}transformer_blocks"
    return LayerSegment(path, numbers, on, lambda _: Block(config, layers, attention))


class Block(nn.Module):
    """Joint attention over text and image with shared projections, then a shared feed-forward."""

    def __init__(
        self, config: DecoderConfig, layers: Layers, attention: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm1 = Modulation(config.time_embed_dim, hidden, layers)
        self.attn1 = Attention(config, layers, attention)
        self.ff = FeedForward(hidden, 4 * hidden, hidden, gelu_tanh, layers)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        rope: Rope,
        references: Sequence[KeysValues] = (),
        collect: list[KeysValues] | None = None,
        operations: Operations = PLAIN,
        **attention_options: Any,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            img, txt: [B, N, hidden], [B, T, hidden].
            vec: time and size embedding [B, time_embed_dim].
            rope: cos, sin of text and image positions [T + N, head_dim].
            references, collect, attention_options: see `Attention.forward`.
            operations: what is done between products and attention, see `choice.py`.

        Returns:
            img, txt
        """
        if torch.compiler.is_compiling():  # the compiler fuses operations itself
            operations = PLAIN
        vectors = self.norm1(vec)
        x = operations.modulate(txt, img, vectors)
        x = self.attn1(x, rope, references, collect, operations, **attention_options)
        txt, img, x = operations.add_modulate(txt, img, x, vectors)
        # One product for both: where weights are streamed or unpacked, it is done once.
        txt, img = add(txt, img, self.ff(x), vectors)
        return img, txt


class Attention(nn.Module):
    """Normalises queries and keys of every head without weights and rotates them in float32."""

    def __init__(
        self, config: DecoderConfig, layers: Layers, attention: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.attention = attention
        hidden = config.hidden_size
        self.to_q = layers.Linear(hidden, hidden)
        self.to_k = layers.Linear(hidden, hidden)
        self.to_v = layers.Linear(hidden, hidden)
        self.to_out = nn.ModuleList([layers.Linear(hidden, hidden)])

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        references: Sequence[KeysValues] = (),
        collect: list[KeysValues] | None = None,
        operations: Operations = PLAIN,
        **attention_options: Any,
    ) -> Tensor:
        """
        Args:
            x: [B, T + N, hidden].
            references: none; one [1, heads, R, head_dim] pair for all samples; or several, of any
                lengths, where sample i attends to number i modulo their count.
            collect: a list to which this block's own keys and values are appended.
            attention_options: further arguments for the attention function.

        Returns:
            the shape of x
        """
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b l h d", h=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        # Heads move before tokens only after the norm, which would copy the other order first.
        q, k = operations.norm_rotate(q, k, rope)
        q, k, v = (rearrange(y, "b l h d -> b h l d") for y in (q, k, v))
        if collect is not None:
            collect.append((k, v))
        if len(references) < 2:
            reference = references[0] if references else None
            return self.to_out[0](self._attend(q, k, v, reference, **attention_options))
        out, count = torch.empty_like(x), len(references)
        for i, reference in enumerate(references):
            some = (y[i::count] for y in (q, k, v))
            out[i::count] = self._attend(*some, reference, **attention_options)
        return self.to_out[0](out)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        reference: KeysValues | None,
        **attention_options: Any,
    ) -> Tensor:
        """Samples that share a reference [B, heads, L, head_dim] -> [B, L, hidden]"""
        if reference is not None:
            k, v = (
                torch.cat([cached.expand(own.shape[0], -1, -1, -1), own], dim=2)
                for cached, own in zip(reference, (k, v), strict=True)
            )
        return self.attention(q, k, v, self.heads, skip_reshape=True, **attention_options)


class Modulation(nn.Module):
    """AdaLN's twelve vectors of a block; the embedding already has a SiLU."""

    def __init__(self, time_dim: int, hidden: int, layers: Layers) -> None:
        super().__init__()
        self.linear = layers.Linear(time_dim, 12 * hidden)

    def forward(self, vec: Tensor) -> Tensor:
        """vec [B, time_dim] -> [B, 12, hidden], see `operations.py`"""
        return self.linear(vec).unflatten(-1, (12, -1))


class FinalNorm(nn.Module):
    """The last modulated norm: scale, then shift."""

    def __init__(self, hidden: int, time_dim: int, layers: Layers) -> None:
        super().__init__()
        self.linear = layers.Linear(time_dim, 2 * hidden)

    def forward(self, img: Tensor, vec: Tensor) -> Tensor:
        scale, shift = self.linear(vec).unsqueeze(1).chunk(2, dim=-1)
        return modulated_norm(img, scale, shift)
