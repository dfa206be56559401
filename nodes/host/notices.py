"""What other nodes ask of the decoder in vain: said once a run, in the log and on the node."""

import logging
from collections.abc import Iterable
from typing import Any

from comfy_execution.utils import get_executing_context

from ...glm_core.errors import UnsupportedError
from .conditioning import guides_away_from_tokens
from .progress import show_notice
from .tiles import PLACES, without_places

log = logging.getLogger(__name__)

READ = {
    *("cross_attn", "pooled_output", "model_conds", "uuid", "additional_models", "control"),
    *("control_apply_to_uncond", "prompt_type", "width", "height", "device", "noise", "seed"),
    *("area", "strength", "mask", "mask_strength", "set_area_to_bounds", "hooks", "default"),
    *("timestep_start", "timestep_end", "start_percent", "end_percent"),
    *("clip_start_percent", "clip_end_percent"),
}
"""Entries of a CONDITIONING that ComfyUI's samplers read, whatever the model."""
OURS = "glm_"
ADVICE = {
    "reference_latents": "give it pictures with GLM-Image Encode Reference and Reference Cache",
    "concat_latent_image": "inpaint with the latent's noise mask (Set Latent Noise Mask)",
    "clip_vision_output": "give it pictures with GLM-Image Encode Reference and Reference Cache",
    "unclip_conditioning": "give it pictures with GLM-Image Encode Reference and Reference Cache",
    "guidance": "set cfg on the sampler",
}
"""What to use in the place of entries that the decoder does not read."""
PATCHES = {"double_block"}
REPLACEMENTS = {("dit", "double_block")}
"""What `HostDecoder.run_block` calls."""


class Notices:
    """The sentences of one run, `said` so far."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.said: list[str] = []

    def say(self, sentences: Iterable[str]) -> None:
        new = [sentence for sentence in sentences if sentence not in self.said]
        for sentence in new:
            log.warning("%s", sentence)
        self.said += new
        running = get_executing_context()
        if new and running is not None:
            show_notice(running, "\n".join(self.said))


def about_conditions(conds: dict[str, list[dict[str, Any]]], guided: bool) -> list[str]:
    """Sentences about conditionings, as a guider has them by name.

    Args:
        guided: whether guidance is on.

    Raises:
        GLMImageError: one has a ControlNet.
    """
    sentences = []
    for name, entries in conds.items():
        if any(entry.get("control") is not None for entry in entries):
            raise UnsupportedError(
                "GLM-Image's decoder takes no ControlNet; remove the Apply ControlNet node."
            )
        keys = {key: None for entry in entries for key in entry if _is_set(key, entry[key])}
        for key in keys:
            if key not in READ and not key.startswith(OURS):
                advice = f"; {ADVICE[key]}" if key in ADVICE else ""
                sentences.append(
                    f"GLM-Image's decoder does not read '{key:.200}' of the {name} conditioning, "
                    f"so the node that added it changes nothing{advice}."
                )
    if guided and any(map(guides_away_from_tokens, conds.get("negative", []))):
        sentences.append(
            "The negative conditioning has semantic tokens, so guidance leads away from the "
            "picture that they describe; connect the negative of GLM-Image Apply Tokens."
        )
    return sentences


def _is_set(key: str, value: Any) -> bool:
    return bool(without_places(value)) if key == PLACES else value is not None


def about_patches(options: dict[str, Any]) -> list[str]:
    """Sentences about patches of the network in `transformer_options`."""
    names = [name for name, found in options.get("patches", {}).items() if found]
    replaced = [
        (name, block[0] if isinstance(block, tuple) else block)
        for name, blocks in options.get("patches_replace", {}).items()
        for block in blocks
    ]
    unknown = [name for name in names if name not in PATCHES]
    unknown += [name for name, block in replaced if (name, block) not in REPLACEMENTS]
    return [
        f"GLM-Image's decoder has no place for the model patch '{name:.200}', so the node that set "
        "it changes nothing. Nodes made for U-Nets set such ones (FreeU, HyperTile, Deep Shrink, "
        "token merging, self-attention guidance, NAG, IPAdapter); remove it."
        for name in dict.fromkeys(unknown)
    ]


def refuse_recorded_attention(options: dict[str, Any]) -> None:
    """Refuses Self-Attention Guidance and its kind, which fail without a U-Net's attention.

    They replace an attention layer, record what it computes, and read that after each step.

    Raises:
        GLMImageError: the model's options have both.
    """
    replaced = options.get("transformer_options", {}).get("patches_replace", {})
    if replaced.get("attn1") and options.get("sampler_post_cfg_function"):
        raise UnsupportedError(
            "A node guides by what it records in a U-Net's attention (Self-Attention Guidance is "
            "one), and GLM-Image's decoder is no U-Net; remove that node."
        )
