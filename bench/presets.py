"""The networks to measure: the hub's configs, most of them with smaller numbers."""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HUB = Path(__file__).resolve().parent.parent / "tests" / "configs" / "hub"


@dataclass(frozen=True)
class Preset:
    """Networks, and how much of each stage's work one measurement does.

    Args:
        ar, decoder, glyph, vae: configs in the form of transformers and diffusers.
        ar_dtype, dtype: of the AR model's weights, and of everything else.
        sizes: (height, width) of the pictures in pixels.
        batches: numbers of images at once.
        rounds: the median is taken of this many measurements, after one that is not counted.
        block: ids read in one pass.
        generate: whether whole grids are written, or only single steps.
        reference_cells: `transformers.generate` writes at most this many cells of a grid; its pace
            is the same for all cells.
        references: numbers of reference pictures that the decoder attends to.
        steps: decoder steps of a whole picture, from prompt to pixels; 0 paints none.
    """

    name: str
    ar: dict[str, Any]
    decoder: dict[str, Any]
    glyph: dict[str, Any]
    vae: dict[str, Any]
    ar_dtype: torch.dtype
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    rounds: int
    block: int
    generate: bool
    reference_cells: int
    references: tuple[int, ...]
    steps: int


def _hub(name: str) -> dict[str, Any]:
    return json.loads((HUB / f"{name}_config.json").read_text())


def scheduler() -> dict[str, Any]:
    return _hub("scheduler")


def _ar(hidden: int, layers: int, mlp: int, heads: int, kv_heads: int, codebook: int) -> dict:
    """The hub's AR config in another size; the vocabulary is the codes and 512 text ids."""
    config = deepcopy(_hub("vision_language_encoder"))
    head_dim = hidden // heads
    visual = codebook + 128
    eighth = head_dim // 16
    config["text_config"] |= {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vision_vocab_size": visual, "vocab_size": visual + 512,
        "pad_token_id": visual, "eos_token_id": codebook + 1, "max_position_embeddings": 8192,
    }  # fmt: skip
    config["text_config"]["rope_parameters"]["mrope_section"] = [
        eighth, (4 * eighth - eighth) // 2, 4 * eighth - eighth - (4 * eighth - eighth) // 2
    ]  # fmt: skip
    config["vision_config"] |= {
        "depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64
    }  # fmt: skip
    config["vq_config"] |= {"embed_dim": 16, "latent_channels": 64, "num_embeddings": codebook}
    ids = {"image_start_token_id": codebook, "image_end_token_id": codebook + 1}
    return config | ids | {"image_token_id": visual + 1}


def _decoder(blocks: int, heads: int, head_dim: int) -> dict[str, Any]:
    return _hub("transformer") | {
        "num_layers": blocks, "num_attention_heads": heads, "attention_head_dim": head_dim,
        "text_embed_dim": 128, "prior_vq_quantizer_codebook_size": 1024,
    }  # fmt: skip


_SMALL_GLYPH = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 4}
_SMALL_VAE = {"block_out_channels": [32, 64, 128, 128]}

PRESETS = {
    # Takes seconds and tests that everything runs; its figures mean nothing.
    "tiny": lambda: Preset(
        "tiny",
        ar=_ar(64, 2, 96, 4, 2, codebook=128),
        decoder=_decoder(2, 2, 32),
        glyph=_hub("text_encoder") | _SMALL_GLYPH,
        vae=_hub("vae") | {"block_out_channels": [32, 32, 32, 32]},
        ar_dtype=torch.float32,
        dtype=torch.float32,
        sizes=((64, 64),),
        batches=(1, 2),
        rounds=1,
        block=16,
        generate=True,
        reference_cells=512,
        references=(1,),
        steps=2,
    ),
    "small": lambda: Preset(
        "small",
        ar=_ar(256, 4, 688, 4, 2, codebook=1024),
        decoder=_decoder(4, 4, 64),
        glyph=_hub("text_encoder") | _SMALL_GLYPH,
        vae=_hub("vae") | _SMALL_VAE,
        ar_dtype=torch.float32,
        dtype=torch.float32,
        sizes=((512, 512),),
        batches=(1,),
        rounds=5,
        block=256,
        generate=True,
        reference_cells=512,
        references=(),
        steps=0,
    ),
    "medium": lambda: Preset(
        "medium",
        ar=_ar(2048, 24, 6848, 16, 2, codebook=16384),
        decoder=_decoder(8, 8, 64),
        glyph=_hub("text_encoder") | _SMALL_GLYPH,
        vae=_hub("vae") | {"block_out_channels": [64, 128, 256, 256]},
        ar_dtype=torch.bfloat16,
        dtype=torch.float32,
        sizes=((512, 512),),
        batches=(1,),
        rounds=5,
        block=16,
        generate=False,
        reference_cells=0,
        references=(1, 2, 4),
        steps=0,
    ),
    "full": lambda: Preset(
        "full",
        ar=_hub("vision_language_encoder"),
        decoder=_hub("transformer"),
        glyph=_hub("text_encoder"),
        vae=_hub("vae"),
        ar_dtype=torch.bfloat16,
        dtype=torch.bfloat16,
        sizes=((1024, 1024), (2048, 2048)),
        batches=(1, 4),
        rounds=3,
        block=256,
        generate=True,
        reference_cells=512,
        references=(1,),
        steps=50,
    ),
}
