"""Writes a small random GLM-Image checkpoint in hub layout, the same one for the same seed.

Small enough that a whole 1024x1024 picture takes seconds on a CPU. Nothing in it is trained: the
sizes of the weights are chosen so that the tokens vary and show as texture in the picture.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from glm_core.ar_model import ARConfig, ARModel
from glm_core.decoder import Decoder, DecoderConfig
from glm_core.glyph_encoder import GlyphConfig, GlyphEncoder
from glm_core.vae import AutoencoderKL, VAEConfig
from glm_core.vision import VisionConfig, VisionEncoder

CODEBOOK = 1024
VISUAL = 1040  # visual ids: the codes, image start, image end, and some to spare as on the hub
IMAGE_START, IMAGE_END = 1024, 1025
CONTROLS = ("<|endoftext|>", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>")
TEXT_WIDTH = 96
CHAT_TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
    "{{ bos_token }}<|image|>{{ eos_token }}{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)

# How much larger than 1/sqrt(fan in) the weights are whose keys end so. Peaked logits and a strong
# prior make neighbouring tokens alike and visible; the rest is small so that the prior shows.
GAINS = {
    "lm_head.weight": 4.0,
    "prior_projector.net.2.weight": 12.0,
    "proj_out.weight": 3.0,
    "decoder.conv_out.weight": 1.0,
}


def text_ids() -> dict[str, int]:
    """The vocabulary below the control tokens: visual tokens, then one token a byte."""
    tokens = [f"<|dit_token_{i}|>" for i in range(VISUAL)]
    tokens += sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: i for i, token in enumerate(tokens)}


def control_ids() -> dict[str, int]:
    first = len(text_ids())
    return {token: first + i for i, token in enumerate((*CONTROLS, "<|image|>"))}


def ar_config() -> dict:
    ids = control_ids()
    return {
        "architectures": ["GlmImageForConditionalGeneration"],
        "model_type": "glm_image",
        "image_start_token_id": IMAGE_START,
        "image_end_token_id": IMAGE_END,
        "image_token_id": ids["<|image|>"],
        "text_config": {
            "model_type": "glm_image_text",
            "vocab_size": max(ids.values()) + 1,
            "vision_vocab_size": VISUAL,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": IMAGE_END,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000,
                "mrope_section": [4, 6, 6],
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": {
            "model_type": "glm_image_vision",
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 128,
            "image_size": 2048,
            "in_channels": 3,
            "patch_size": 16,
            "hidden_act": "gelu",
            "attention_bias": True,
            "layer_norm_eps": 1e-6,
        },
        "vq_config": {
            "model_type": "glm_image_vqmodel",
            "embed_dim": 64,
            "in_channels": 3,
            "latent_channels": 64,
            "num_embeddings": CODEBOOK,
        },
    }


DECODER_CONFIG = {
    "_class_name": "GlmImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 64,
    "condition_dim": 32,
    "prior_vq_quantizer_codebook_size": CODEBOOK,
}
GLYPH_CONFIG = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": TEXT_WIDTH,
    "d_ff": 192,
    "d_kv": 32,
    "num_heads": 3,
    "num_layers": 2,
    "vocab_size": 384,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [16, 32, 32, 32],
    "layers_per_block": 3,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "base_shift": 0.25,
    "max_shift": 0.75,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "linear",
}
MODEL_INDEX = {
    "_class_name": "GlmImagePipeline",
    "processor": ["transformers", "GlmImageProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "ByT5Tokenizer"],
    "transformer": ["diffusers", "GlmImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"],
}


def write_checkpoint(folder: Path, seed: int) -> None:
    """Writes all seven components; the AR model in two shards, the others in one file each."""
    write_processor(folder / "processor")
    write_json(folder / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)

    ar = folder / "vision_language_encoder"
    write_json(ar / "config.json", ar_config())
    write_json(ar / "generation_config.json", generation_config())
    write_shards(ar, ar_weights(seed, torch.bfloat16), count=2)

    for name, file, config, network, dtype in (
        (
            "transformer",
            "diffusion_pytorch_model",
            DECODER_CONFIG,
            lambda: Decoder(DecoderConfig.from_dict(DECODER_CONFIG)),
            torch.bfloat16,
        ),
        (
            "vae",
            "diffusion_pytorch_model",
            VAE_CONFIG,
            lambda: AutoencoderKL(VAEConfig.from_dict(VAE_CONFIG)),
            torch.bfloat16,
        ),
        (
            "text_encoder",
            "model",
            GLYPH_CONFIG,
            lambda: GlyphEncoder(GlyphConfig.from_dict(GLYPH_CONFIG)),
            torch.float32,
        ),
    ):
        write_json(folder / name / "config.json", config)
        save_file(random_weights(network, seed, dtype), folder / name / f"{file}.safetensors")
    write_json(folder / "model_index.json", MODEL_INDEX)  # last: it says that the rest is there


def ar_weights(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The text model's, the vision tower's, and those that are in the file but never run."""
    config = ar_config()
    unused = "model.vqmodel.post_quant_conv"
    vq = config["vq_config"]
    shapes = {
        f"{unused}.weight": torch.Size([vq["latent_channels"], vq["embed_dim"], 1, 1]),
        f"{unused}.bias": torch.Size([vq["latent_channels"]]),
    }
    return (
        random_weights(lambda: ARModel(ARConfig.from_dict(config)), seed, dtype)
        | random_weights(lambda: VisionEncoder(VisionConfig.from_dict(config)), seed, dtype)
        | {key: random_weight(key, shape, seed).to(dtype) for key, shape in shapes.items()}
    )


def random_weights(
    network: Callable[[], nn.Module], seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights for each key of a network; a key's depend on nothing but the key and the seed."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in network().state_dict().items()}
    return {key: random_weight(key, shape, seed).to(dtype) for key, shape in shapes.items()}


def random_weight(key: str, shape: torch.Size, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.02 * noise if key.endswith("bias") else 1 + 0.02 * noise
    if "embed" in key.rsplit(".", 2)[-2]:
        return noise
    gain = next((gain for ending, gain in GAINS.items() if key.endswith(ending)), 1.0)
    return noise * gain / math.sqrt(shape[1:].numel())


def generation_config() -> dict:
    return {
        "do_sample": True,
        "temperature": 0.9,
        "top_p": 0.75,
        "top_k": VISUAL,
        "eos_token_id": IMAGE_END,
        "pad_token_id": control_ids()["<|image|>"],
    }


def write_processor(folder: Path) -> None:
    """A byte-level BPE without merges, so every text is its bytes."""
    tokenizer = Tokenizer(models.BPE(vocab=text_ids(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(text_ids())[:VISUAL])
    tokenizer.add_special_tokens(list(control_ids()))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": f"<|dit_token_{IMAGE_START}|>",
            "eos_token": f"<|dit_token_{IMAGE_END}|>",
            "pad_token": f"<|dit_token_{IMAGE_END}|>",
            "image_token": "<|image|>",
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "GlmImageImageProcessor",
            "processor_class": "GlmImageProcessor",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "rescale_factor": 1 / 255,
            "min_pixels": 512 * 512,
            "max_pixels": 2048 * 2048,
            "patch_size": 16,
            "temporal_patch_size": 1,
            "merge_size": 1,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 3,
        },
    )


def write_shards(folder: Path, weights: dict[str, Tensor], count: int) -> None:
    """Splits weights over files as the hub does, with the index that says which is where."""
    weight_map: dict[str, str] = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = dict(list(weights.items())[shard::count])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(arguments.folder, arguments.seed)
