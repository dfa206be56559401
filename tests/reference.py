"""Random reference models in hub layout, made with transformers and diffusers.

`reference_snapshot` writes a snapshot of a few hundred kilobytes and returns the reference pipeline
that gives the expected values. Nothing here imports the pack.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from einops import rearrange

# torchvision has no build of its operators for a CPU torch. Its Python part, which transformers'
# image code imports, needs their schemas: they are declared before it is imported.
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    if not hasattr(torch.ops.torchvision, _schema.split("(")[0]):
        _TORCHVISION.define(_schema)

from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from tokenizers import decoders as token_decoders  # noqa: E402
from transformers import (  # noqa: E402
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import (  # noqa: E402
    GlmImageImageProcessorPil,
)

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
    "{{ bos_token }}<|image|>{{ eos_token }}{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
ROLES_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ '\\n' }}{% for c in m.content %}"
    "{% if c.type == 'image' %}{{ bos_token }}<|image|>{{ eos_token }}"
    "{% else %}{{ c.text | trim }} please{% endif %}{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of one random model. The ids follow the hub's order: visual, bytes, controls."""

    codebook: int
    visual: int  # visual ids, of which the first `codebook` are codes
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    intermediate: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    partial_rotary_factor: float
    image_start: int
    image_end: int
    chat_template: str
    visual_as_added_tokens: bool
    decoder_layers: int
    decoder_heads: int
    decoder_head_dim: int
    glyph_dim: int
    glyph_layers: int
    vae_channels: tuple[int, ...]
    seed: int


SHAPES = {
    "small": Shape(
        codebook=64, visual=72, hidden=64, heads=4, kv_heads=2, layers=2, intermediate=96,
        rope_theta=10000.0, mrope_section=(1, 1, 2), partial_rotary_factor=0.5,
        image_start=64, image_end=65, chat_template=PLAIN_TEMPLATE, visual_as_added_tokens=False,
        decoder_layers=2, decoder_heads=2, decoder_head_dim=16, glyph_dim=24, glyph_layers=2,
        vae_channels=(8, 16, 16, 16), seed=1,
    ),
    "wide": Shape(
        codebook=96, visual=112, hidden=128, heads=8, kv_heads=2, layers=3, intermediate=160,
        rope_theta=500.0, mrope_section=(1, 2, 1), partial_rotary_factor=0.5,
        image_start=100, image_end=97, chat_template=ROLES_TEMPLATE, visual_as_added_tokens=True,
        decoder_layers=3, decoder_heads=3, decoder_head_dim=8, glyph_dim=32, glyph_layers=1,
        vae_channels=(16, 16, 24, 32), seed=2,
    ),
    "deep": Shape(
        codebook=50, visual=60, hidden=72, heads=6, kv_heads=1, layers=4, intermediate=64,
        rope_theta=10000.0, mrope_section=(2, 2, 2), partial_rotary_factor=1.0,
        image_start=51, image_end=59, chat_template=PLAIN_TEMPLATE, visual_as_added_tokens=True,
        decoder_layers=4, decoder_heads=1, decoder_head_dim=32, glyph_dim=16, glyph_layers=3,
        vae_channels=(8, 8, 16, 16), seed=3,
    ),
}  # fmt: skip

CONTROL_TOKENS = (
    "<|endoftext|>", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>",
    "<think>", "</think>",
)  # fmt: skip
UNMARKED_CONTROL_TOKENS = ("<think>", "</think>")  # added but not "special", as on the hub
MERGES = [("Ġ", "a"), ("h", "e"), ("t", "he"), ("Ġ", "the"), ("Ċ", "a"), ("3", "2"), ("a", "t")]


def reference_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, enough to reveal tokens that join across a seam."""
    visual = [f"<|dit_token_{i}|>" for i in range(shape.visual)]
    text = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    vocab = {token: i for i, token in enumerate(visual + text)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    if shape.visual_as_added_tokens:
        tokenizer.add_special_tokens(visual)
    marked = [t for t in CONTROL_TOKENS if t not in UNMARKED_CONTROL_TOKENS]
    tokenizer.add_special_tokens(marked)
    tokenizer.add_tokens(list(UNMARKED_CONTROL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=visual[shape.image_start],
        eos_token=visual[shape.image_end],
        pad_token=visual[shape.image_end],
        extra_special_tokens={
            "image_token": "<|image|>",
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
        },
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def reference_pipeline(shape_name: str) -> GlmImagePipeline:
    """The random float32 pipeline of a shape, the same on every call."""
    shape = SHAPES[shape_name]
    tokenizer = reference_tokenizer(shape)
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=GlmImageProcessor(
            image_processor=GlmImageImageProcessorPil(
                patch_size=16, merge_size=1, temporal_patch_size=1,
                image_mean=[0.5] * 3, image_std=[0.5] * 3,
                min_pixels=512 * 512, max_pixels=2048 * 2048,
            ),
            tokenizer=tokenizer,
            chat_template=shape.chat_template,
        ),
        text_encoder=T5EncoderModel(
            T5Config(
                d_model=shape.glyph_dim, d_ff=2 * shape.glyph_dim, d_kv=8, num_heads=3,
                num_layers=shape.glyph_layers, vocab_size=384, feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=32, relative_attention_max_distance=128,
            )
        ),
        vision_language_encoder=_autoregressive_model(shape, tokenizer),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=shape.vae_channels, layers_per_block=3, latent_channels=16,
            norm_num_groups=8, sample_size=64, mid_block_add_attention=False,
            use_quant_conv=False, use_post_quant_conv=False,
            latents_mean=torch.linspace(-1, 1, 16).tolist(),
            latents_std=torch.linspace(1, 3, 16).tolist(),
        ),
        transformer=GlmImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=16, num_layers=shape.decoder_layers,
            attention_head_dim=shape.decoder_head_dim, num_attention_heads=shape.decoder_heads,
            text_embed_dim=shape.glyph_dim, time_embed_dim=48, condition_dim=16,
            prior_vq_quantizer_codebook_size=shape.codebook,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75,
            base_image_seq_len=256, max_image_seq_len=4096, time_shift_type="linear",
        ),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(shape.seed)
    for name in ("vision_language_encoder", "transformer", "vae", "text_encoder"):
        _randomise(getattr(pipeline, name).eval().requires_grad_(False), generator)
    pipeline.vision_language_encoder.lm_head.weight *= 3  # far enough apart to have no ties
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference_snapshot(folder: Path | str, shape_name: str) -> GlmImagePipeline:
    """The pipeline of a shape, written to `folder` in hub layout."""
    pipeline = reference_pipeline(shape_name)
    pipeline.save_pretrained(folder)
    return pipeline


@contextmanager
def mended(pipeline: GlmImagePipeline) -> Iterator[None]:
    """Repairs image to image between diffusers 0.42.1 and transformers 5.23 while it is entered.

    The pipeline expects an image's features as a (tokens, C) matrix; transformers now returns and
    takes (C, h, w) maps. transformers' own `generate` gets the original method.
    """
    network = pipeline.vision_language_encoder
    features, tokens, generate = (
        network.get_image_features, network.get_image_tokens, network.generate
    )  # fmt: skip

    def features_as_rows(*args, **kwargs):
        out = features(*args, **kwargs)
        out.pooler_output = [
            torch.cat([rearrange(image, "c h w -> (h w) c") for image in out.pooler_output])
        ]
        return out

    def tokens_of_rows(rows, grids):
        images = rows.split(grids.prod(dim=-1).tolist())
        return tokens(
            [
                rearrange(image, "(h w) c -> c h w", h=int(h))
                for image, (_, h, _) in zip(images, grids, strict=True)
            ]
        )

    def generate_with_maps(*args, **kwargs):
        with patch.object(network, "get_image_features", features):
            return generate(*args, **kwargs)

    with (
        patch.object(network, "get_image_features", features_as_rows),
        patch.object(network, "get_image_tokens", tokens_of_rows),
        patch.object(network, "generate", generate_with_maps),
    ):
        yield


def _autoregressive_model(
    shape: Shape, tokenizer: PreTrainedTokenizerFast
) -> GlmImageForConditionalGeneration:
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(tokenizer) + 3,
            "vision_vocab_size": shape.visual,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "eos_token_id": shape.image_end,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "mrope_section": list(shape.mrope_section),
                "partial_rotary_factor": shape.partial_rotary_factor,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
            "image_size": 256, "patch_size": 16,
        },
        vq_config={
            "embed_dim": 24, "num_embeddings": shape.codebook, "latent_channels": 32,
        },
        image_token_id=tokenizer.image_token_id,
        image_start_token_id=shape.image_start,
        image_end_token_id=shape.image_end,
    )  # fmt: skip
    model = GlmImageForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.9, top_p=0.75, top_k=shape.visual,
        eos_token_id=shape.image_end, pad_token_id=tokenizer.image_token_id,
        # A random model would write ids that are no codes; a trained one does not.
        suppress_tokens=list(range(shape.codebook, shape.visual)),
    )  # fmt: skip
    return model


def _randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Sets weights that keep activations near unit size, with no norm at 1 and no bias at 0."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(noise)
        elif parameter.ndim >= 2:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(1 + 0.2 * noise)
