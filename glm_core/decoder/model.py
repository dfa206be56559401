"""The diffusion decoder: a single-stream DiT over glyph text and image tokens.

Keys equal those of diffusers' `GlmImageTransformer2DModel`, from which the formulas are taken.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import sdpa
from ..errors import GLMImageError
from ..split import LayerSegment, Segment, all_segments, on_device, own_layers

EPS = 1e-5
DROPPED = -1
"""The token id of a cell without a prior: its embedding is zero, as in the unconditional pass."""

Rope = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]


class ReferenceKeysValues(Protocol):
    """What every block may attend to besides: for block i, the pairs of `Attention.forward`."""

    def __getitem__(self, block: int) -> Sequence[KeysValues]: ...


@dataclass(frozen=True)
class DecoderConfig:
    """The fields of `transformer/config.json`."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    text_embed_dim: int
    time_embed_dim: int
    condition_dim: int
    prior_vq_quantizer_codebook_size: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        missing = [f.name for f in fields(cls) if f.name not in config]
        if missing:
            raise GLMImageError(
                f"The decoder's config.json lacks {', '.join(missing)}; "
                "take it from the snapshot's transformer folder."
            )
        return cls(**{f.name: config[f.name] for f in fields(cls)})

    def __post_init__(self) -> None:
        if self.attention_head_dim % 4:
            raise GLMImageError(
                f"attention_head_dim is {self.attention_head_dim}; "
                "rows and columns need a quarter of it each, so it must be a multiple of 4."
            )
        if self.time_embed_dim % 2 or self.condition_dim % 2:
            raise GLMImageError(
                f"time_embed_dim {self.time_embed_dim} and condition_dim {self.condition_dim} "
                "hold cosines and sines, so both must be even."
            )

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class StepInvariants(NamedTuple):
    """What a denoising run computes once: it depends on the conditioning, not on the step."""

    text: Tensor  # [B, T, hidden]
    prior: Tensor  # [B, N, hidden]
    size: Tensor  # [1, time_embed_dim]
    ropes: tuple[Rope, ...]  # for each segment of blocks, cos, sin: [T + N, head_dim]


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
    ) -> None:
        """
        Args:
            operations: the layers to build from.
            segments: its last blocks, which lie apart (`block_segment`); none for a whole decoder.
        """
        super().__init__()
        self.config = config
        self.segments = tuple(segments)
        kw = {"device": device, "dtype": dtype, "operations": operations}
        layer_kw = {"device": device, "dtype": dtype}
        hidden = config.hidden_size
        patch = config.patch_size**2

        self.image_projector = Projection(config.in_channels * patch, hidden, **kw)
        self.glyph_projector = FeedForward(config.text_embed_dim, hidden, hidden, F.gelu, **kw)
        self.prior_token_embedding = operations.Embedding(
            config.prior_vq_quantizer_codebook_size, hidden, **layer_kw
        )
        self.prior_projector = FeedForward(hidden, hidden, hidden, F.silu, **kw)
        self.time_condition_embed = TimeSizeEmbedding(config, **kw)
        self.transformer_blocks = nn.ModuleList(
            Block(config, attention=attention, **kw)
            for _ in range(own_layers(config.num_layers, segments))
        )
        self.norm_out = FinalNorm(hidden, config.time_embed_dim, **kw)
        self.proj_out = operations.Linear(hidden, config.out_channels * patch, **layer_kw)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        glyphs: Tensor,
        tokens: Tensor,
        size: tuple[int, int],
        transformer_options: dict | None = None,
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
            transformer_options: ComfyUI's block patches and attention override.
            references: what the image tokens attend to besides, see `reference_keys_values`.

        Returns:
            [B, C_out, H, W]
        """
        invariants = self.prepare(glyphs, tokens, size, x.dtype)
        return self.predict(x, timestep, invariants, transformer_options, references)

    def reference_keys_values(
        self, latent: Tensor, tokens: Tensor, size: tuple[int, int]
    ) -> Iterator[KeysValues]:
        """Keys (rotated) and values of a reference image, block by block.

        The reference is run once, at timestep 0, without text, with its own tokens and size: they
        depend on it and on the weights alone.

        Args:
            latent: [1, C, H, W], normalised, in the dtype to compute in.
            tokens: ids [1, H / p, W / p].
            size: (height, width) of the reference in pixels.

        Yields:
            key, value: [1, heads, N, head_dim], of each block in turn, where it computes.
        """
        no_text = latent.new_zeros(1, 0, self.config.text_embed_dim)
        txt, prior, sized, ropes = self.prepare(no_text, tokens, size, latent.dtype)
        img = self._embed(latent) + prior
        vec = self.time_condition_embed(latent.new_zeros(1), sized)
        for (device, blocks), rope in zip(self._segments(img.device), ropes, strict=True):
            img, txt, vec = (x.to(device) for x in (img, txt, vec))
            for _, block in blocks:
                kept: list[KeysValues] = []
                with on_device(device, current=latent.device):
                    img, txt = block(img, txt, vec, rope, {}, keep=kept.append)
                yield kept.pop()

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
        sized = self.time_condition_embed.of_size(size, text.device, dtype)
        return StepInvariants(text, prior, sized, tuple(ropes))

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        invariants: StepInvariants,
        transformer_options: dict | None = None,
        references: ReferenceKeysValues | None = None,
    ) -> Tensor:
        """The part of `forward` that depends on the step."""
        p = self.config.patch_size
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % p, 0, -height % p), mode="replicate")
        rows, cols = x.shape[-2] // p, x.shape[-1] // p
        txt, prior, sized, ropes = invariants

        img = self._embed(x) + prior
        vec = self.time_condition_embed(timestep, sized)
        img = self._run_blocks(img, txt, vec, ropes, transformer_options or {}, references)
        out = self.proj_out(self.norm_out(img, vec))
        out = rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=cols, p=p, q=p)
        return out[..., :height, :width]

    def _embed(self, x: Tensor) -> Tensor:
        """Latents on the patch grid [B, C, H, W] -> [B, N, hidden]"""
        p = self.config.patch_size
        return self.image_projector(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))

    def _segments(self, device: torch.device) -> Iterator[Segment]:
        return all_segments(self.transformer_blocks, device, self.segments)

    def _run_blocks(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        ropes: Sequence[Rope],
        transformer_options: dict,
        references: ReferenceKeysValues | None,
    ) -> Tensor:
        transformer_options["total_blocks"] = self.config.num_layers
        transformer_options["block_type"] = "double"
        own_device = img.device
        for (device, blocks), pe in zip(self._segments(own_device), ropes, strict=True):
            img, txt, vec = (x.to(device) for x in (img, txt, vec))
            with on_device(device, current=own_device):
                for i, block in blocks:
                    run = partial(run_block, block)
                    if references is not None:
                        run = partial(run, references=references[i])
                    img, txt = _run_patched(run, i, img, txt, vec, pe, transformer_options)
        return img.to(own_device)


def _run_patched(
    run: Callable[[dict], dict],
    index: int,
    img: Tensor,
    txt: Tensor,
    vec: Tensor,
    pe: Rope,
    transformer_options: dict,
) -> tuple[Tensor, Tensor]:
    """A block, or what other nodes have put in its place, and then what they have put after it."""
    replace = transformer_options.get("patches_replace", {}).get("dit", {})
    after_block = transformer_options.get("patches", {}).get("double_block", [])
    transformer_options["block_index"] = index
    args = {
        "img": img,
        "txt": txt,
        "vec": vec,
        "pe": pe,
        "transformer_options": transformer_options,
    }
    if ("double_block", index) in replace:
        out = replace[("double_block", index)](args, {"original_block": run})
    else:
        out = run(args)
    for patch in after_block:
        out = patch({**args, "img": out["img"], "txt": out["txt"], "block_index": index})
    return out["img"], out["txt"]


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
    """Some of a decoder's blocks, to lie apart from it.

    Args:
        on: the device on which they compute.
        prefix: what a host puts before the decoder's keys.
    """
    kw = {"device": device, "dtype": dtype, "operations": operations, "attention": attention}
    return LayerSegment(f"{prefix}transformer_blocks", numbers, on, lambda _: Block(config, **kw))


class Block(nn.Module):
    """Joint attention over text and image with shared projections, then a shared feed-forward."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        device: Any,
        dtype: torch.dtype | None,
        operations: Any,
        attention: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        kw = {"device": device, "dtype": dtype, "operations": operations}
        hidden = config.hidden_size
        self.norm1 = Modulation(config.time_embed_dim, hidden, **kw)
        self.attn1 = Attention(config, attention=attention, **kw)
        self.ff = FeedForward(hidden, 4 * hidden, hidden, gelu_tanh, **kw)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        pe: Rope,
        transformer_options: dict,
        references: Sequence[KeysValues] = (),
        keep: Callable[[KeysValues], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            img, txt: [B, N, hidden], [B, T, hidden].
            vec: time and size embedding [B, time_embed_dim].
            pe: cos, sin of text and image positions [T + N, head_dim].
            references: see `Attention.forward`.
            keep: is given this block's own keys and values.

        Returns:
            img, txt
        """
        (
            (shift, shift_txt, scale, scale_txt, gate, gate_txt),
            (ff_shift, ff_shift_txt, ff_scale, ff_scale_txt, ff_gate, ff_gate_txt),
        ) = self.norm1(vec)
        joint = torch.cat(
            [modulated_norm(txt, scale_txt, shift_txt), modulated_norm(img, scale, shift)], dim=1
        )
        attended = self.attn1(joint, pe, transformer_options, references, keep)
        # addcmul: one pass over memory where a product and a sum are two
        img = torch.addcmul(img, gate, attended[:, txt.shape[1] :])
        txt = torch.addcmul(txt, gate_txt, attended[:, : txt.shape[1]])
        img = torch.addcmul(img, ff_gate, self.ff(modulated_norm(img, ff_scale, ff_shift)))
        txt = torch.addcmul(
            txt, ff_gate_txt, self.ff(modulated_norm(txt, ff_scale_txt, ff_shift_txt))
        )
        return img, txt


def run_block(
    block: nn.Module, args: dict[str, Any], references: Sequence[KeysValues] = ()
) -> dict[str, Tensor]:
    """A block's pass in the form of ComfyUI's `patches_replace`.

    It is called as a module, because a host may have put its compiled form in its place.
    """
    names = ("img", "txt", "vec", "pe", "transformer_options")
    img, txt = block(*(args[name] for name in names), references)
    return {"img": img, "txt": txt}


class Attention(nn.Module):
    """Every head's query and key is normalised without weights, then rotated in float32."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        device: Any,
        dtype: torch.dtype | None,
        operations: Any,
        attention: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.attention = attention
        hidden = config.hidden_size
        linear = {
            name: operations.Linear(hidden, hidden, device=device, dtype=dtype)
            for name in ("to_q", "to_k", "to_v", "to_out")
        }
        self.to_q, self.to_k, self.to_v = linear["to_q"], linear["to_k"], linear["to_v"]
        self.to_out = nn.ModuleList([linear["to_out"]])

    def forward(
        self,
        x: Tensor,
        pe: Rope,
        transformer_options: dict,
        references: Sequence[KeysValues] = (),
        keep: Callable[[KeysValues], None] | None = None,
    ) -> Tensor:
        """
        Args:
            x: [B, T + N, hidden].
            references: none; one [1, heads, R, head_dim] pair for all samples; or several, of any
                lengths, of which sample i attends to number i modulo their count.

        Returns:
            the shape of x
        """
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b l h d", h=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        # As they lie, and heads before tokens only then: a norm of the other order copies first.
        q, k = (rotate(F.layer_norm(y, y.shape[-1:], eps=EPS), pe) for y in (q, k))
        q, k, v = (rearrange(y, "b l h d -> b h l d") for y in (q, k, v))
        if keep is not None:
            keep((k, v))
        sets = max(len(references), 1)

        def attend(i: int) -> Tensor:
            """The samples that share reference set i."""
            keys, values = k[i::sets], v[i::sets]
            if references:
                keys, values = (
                    torch.cat([cached.expand(own.shape[0], -1, -1, -1), own], dim=2)
                    for cached, own in zip(references[i], (keys, values), strict=True)
                )
            return self.attention(
                q[i::sets],
                keys,
                values,
                self.heads,
                skip_reshape=True,
                transformer_options=transformer_options,
            )

        if sets == 1:
            return self.to_out[0](attend(0))
        out = torch.empty_like(x)
        for i in range(sets):
            out[i::sets] = attend(i)
        return self.to_out[0](out)


class Modulation(nn.Module):
    """AdaLN's twelve vectors, image and text interleaved; no SiLU, the embedding has had one."""

    def __init__(
        self, time_dim: int, hidden: int, *, device: Any, dtype: torch.dtype | None, operations: Any
    ) -> None:
        super().__init__()
        self.linear = operations.Linear(time_dim, 12 * hidden, device=device, dtype=dtype)

    def forward(self, vec: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """vec [B, time_dim] -> for attention and for the feed-forward, each of [B, 1, hidden]:
        shift, text shift, scale, text scale, gate, text gate."""
        parts = self.linear(vec).unsqueeze(1).chunk(12, dim=-1)
        return parts[:6], parts[6:]


class FinalNorm(nn.Module):
    """The last modulated norm: scale, then shift."""

    def __init__(
        self, hidden: int, time_dim: int, *, device: Any, dtype: torch.dtype | None, operations: Any
    ) -> None:
        super().__init__()
        self.linear = operations.Linear(time_dim, 2 * hidden, device=device, dtype=dtype)

    def forward(self, img: Tensor, vec: Tensor) -> Tensor:
        scale, shift = self.linear(vec).unsqueeze(1).chunk(2, dim=-1)
        return modulated_norm(img, scale, shift)


class TimeSizeEmbedding(nn.Module):
    """One vector for the timestep and for crop_top, crop_left, height and width in pixels."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        device: Any,
        dtype: torch.dtype | None,
        operations: Any,
    ) -> None:
        super().__init__()
        self.time_dim = config.time_embed_dim
        self.condition_dim = config.condition_dim
        kw = {"device": device, "dtype": dtype, "operations": operations}
        self.timestep_embedder = EmbeddingMLP(self.time_dim, self.time_dim, **kw)
        self.condition_embedder = EmbeddingMLP(4 * self.condition_dim, self.time_dim, **kw)

    def of_size(self, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The part of (height, width), uncropped: [1, time_embed_dim]"""
        numbers = torch.tensor((0.0, 0.0, *size), device=device)
        condition = rearrange(sinusoids(numbers, self.condition_dim), "n d -> 1 (n d)")
        return self.condition_embedder(condition.to(dtype))

    def forward(self, timestep: Tensor, sized: Tensor) -> Tensor:
        """timestep [B], `of_size` [1, time_embed_dim] -> [B, time_embed_dim]"""
        time = self.timestep_embedder(sinusoids(timestep, self.time_dim).to(sized.dtype))
        return F.silu(time + sized)


class EmbeddingMLP(nn.Module):
    def __init__(
        self, dim: int, out: int, *, device: Any, dtype: torch.dtype | None, operations: Any
    ) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(dim, out, device=device, dtype=dtype)
        self.linear_2 = operations.Linear(out, out, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Projection(nn.Module):
    """A linear layer under the key `proj`."""

    def __init__(
        self, dim: int, hidden: int, *, device: Any, dtype: torch.dtype | None, operations: Any
    ) -> None:
        super().__init__()
        self.proj = operations.Linear(dim, hidden, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FeedForward(nn.Module):
    """Linear, activation, linear; `net` holds the places that the checkpoint's keys name."""

    def __init__(
        self,
        dim: int,
        inner: int,
        out: int,
        activation: Callable[[Tensor], Tensor],
        *,
        device: Any,
        dtype: torch.dtype | None,
        operations: Any,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.net = nn.ModuleList(
            [
                Projection(dim, inner, device=device, dtype=dtype, operations=operations),
                nn.Identity(),
                operations.Linear(inner, out, device=device, dtype=dtype),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.activation(self.net[0](x)))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Weightless LayerNorm, then an affine map given by the conditioning."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """[B] -> float32 [B, dim]: cosines, then sines, of values * 10000^(-2i / dim)."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary(grid: tuple[int, int], text: int, head_dim: int, device: Any) -> Rope:
    """Rotation of every position: none for the text, (row, column) for the image.

    Each axis has head_dim / 4 frequencies 10000^(-2i / (head_dim / 2)).

    Returns:
        cos, sin: float32 [text + rows * cols, head_dim], for `rotate`: the first half of the sines
        is negative.
    """
    rows, cols = grid
    half = head_dim // 2
    frequency = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    row = torch.arange(rows, device=device).unsqueeze(-1) * frequency
    col = torch.arange(cols, device=device).unsqueeze(-1) * frequency
    angles = torch.cat(
        [
            row.unsqueeze(1).expand(rows, cols, -1),
            col.unsqueeze(0).expand(rows, cols, -1),
        ],
        dim=-1,
    )
    angles = F.pad(rearrange(angles, "h w d -> (h w) d"), (0, 0, text, 0))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, pe: Rope) -> Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of x [B, L, heads, head_dim], in float32."""
    cos, sin = (table.unsqueeze(1) for table in pe)
    left, right = x.float().chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([right, left], dim=-1), sin).to(x.dtype)
