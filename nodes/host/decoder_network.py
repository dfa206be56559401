"""The decoder's network as ComfyUI runs it: wrappers, block patches, and a cache across steps."""

from collections.abc import Sequence
from typing import Any

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn

from ...glm_core.decoder.embeddings import Rope
from ...glm_core.decoder.model import (
    Decoder,
    DecoderConfig,
    KeysValues,
    ReferenceKeysValues,
    StepInvariants,
)
from ...glm_core.decoder.operations import Operations
from ...glm_core.errors import LoraError
from ...glm_core.split import LayerSegment
from .progress import check_interrupt
from .step_choice import block_operations

MAX_ENTRIES = 16
"""Conditionings or tiles in `StepInvariantsCache`; packs that move their tiles keep adding some."""


class HostDecoder(Decoder):
    """The network with ComfyUI's call, and the wrappers and block patches of other nodes."""

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: Any,
        operations: Any,
        segments: Sequence[LayerSegment] = (),
    ) -> None:
        super().__init__(
            config,
            device=device,
            dtype=dtype,
            operations=operations,
            attention=optimized_attention,
            segments=segments,
            choose=block_operations,
        )
        self.dtype = dtype
        # Other nodes read these names, which ComfyUI's own transformers have.
        self.in_channels = config.in_channels
        self.out_channels = config.out_channels
        self.patch_size = config.patch_size
        self.hidden_size = self.inner_dim = config.hidden_size
        self.num_heads = self.num_attention_heads = config.num_attention_heads
        self.attention_head_dim = config.attention_head_dim
        self.num_layers = config.num_layers
        self.step_invariants = StepInvariantsCache()

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict | None = None,
        tokens: Tensor | None = None,
        size: tuple[int, int] | None = None,
        references: ReferenceKeysValues | None = None,
        **_: Any,
    ) -> Tensor:
        """A prediction [B, C, H, W], as `BaseModel` asks for it.

        Args:
            x: latents [B, C, H, W].
            timesteps: [B], unshifted.
            context: the glyph encoder's states [B, T, D].
            control: always None; `notices` refuses a ControlNet before the run.
            tokens: [B, 1, H, W], each token repeated over the cells of its patch.
        """
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
        )
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self, wrappers
        ).execute(
            x, timesteps, context, control, options, tokens=tokens, size=size, references=references
        )

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: Any,
        transformer_options: dict,
        tokens: Tensor,
        size: tuple[int, int],
        references: ReferenceKeysValues | None,
    ) -> Tensor:
        p = self.config.patch_size
        tokens = tokens[:, 0, ::p, ::p]
        invariants = self.step_invariants.get(self, context, tokens, size, x.dtype)
        transformer_options["total_blocks"] = self.config.num_layers
        transformer_options["block_type"] = "double"
        return self.predict(
            x, timesteps, invariants, references, transformer_options=transformer_options
        )

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
        *,
        transformer_options: dict,
    ) -> tuple[Tensor, Tensor]:
        """The block or another node's replacement of it, then the patches that follow every block.

        Both are called as those of ComfyUI's other models with double blocks. An interrupt ends a
        step here, which takes long where weights are streamed; ComfyUI checks once a step.
        """
        if not torch.compiler.is_compiling():  # a compiled step has no place for the check
            check_interrupt()

        def original_block(args: dict[str, Any]) -> dict[str, Tensor]:
            img, txt, vec, rope = (args[name] for name in ("img", "txt", "vec", "pe"))
            options = args["transformer_options"]
            img, txt = block(
                img, txt, vec, rope, references, operations=operations, transformer_options=options
            )
            return {"img": img, "txt": txt}

        transformer_options["block_index"] = index
        args = {
            "img": img,
            "txt": txt,
            "vec": vec,
            "pe": rope,
            "transformer_options": transformer_options,
        }
        replacements = transformer_options.get("patches_replace", {}).get("dit", {})
        if ("double_block", index) in replacements:
            replace = replacements[("double_block", index)]
            out = replace(args, {"original_block": original_block})
        else:
            out = original_block(args)
        for patch in transformer_options.get("patches", {}).get("double_block", []):
            out = patch({**args, "img": out["img"], "txt": out["txt"], "block_index": index})
        return out["img"], out["txt"]


class StepInvariantsCache:
    """Keeps the `StepInvariants` of a run from step to step.

    They are found by value: the glyph states and the (cropped) token ids, which are quickly
    compared. Hooks may change the weights within a run; `enabled` is False where there are any.
    Training changes them too, and a graph of gradients is used once, so nothing is kept while
    gradients are on. `clear` is called when sampling ends.

    torch.compile leaves `get` out. It branches on values and on the number of entries, which would
    break a step's graph and recompile parts of it for every order of prompts.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.clear()

    def clear(self) -> None:
        self._entries: list[tuple[Tensor, Tensor, tuple, StepInvariants]] = []

    @torch.compiler.disable
    def get(
        self,
        decoder: Decoder,
        glyphs: Tensor,
        tokens: Tensor,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> StepInvariants:
        """`Decoder.prepare`, computed once for equal arguments.

        Raises:
            GLMImageError: a LoRA in ComfyUI's bypass mode changes the embedding of the tokens.
        """
        _refuse_bypass(decoder.prior_token_embedding)
        if not self.enabled or torch.is_grad_enabled():
            return decoder.prepare(glyphs, tokens, size, dtype)
        for known_glyphs, known_tokens, key, invariants in self._entries:
            if key == (size, dtype) and _same(known_glyphs, glyphs) and _same(known_tokens, tokens):
                return invariants
        invariants = decoder.prepare(glyphs, tokens, size, dtype)
        self._entries.append((glyphs, tokens.clone(), (size, dtype), invariants))
        del self._entries[:-MAX_ENTRIES]
        return invariants


def _refuse_bypass(embedding: nn.Module) -> None:
    """Current hosts multiply the input of any layer by a LoRA in bypass mode, ids included."""
    if hasattr(getattr(embedding.forward, "__self__", None), "adapter"):
        raise LoraError(
            "ComfyUI's bypass mode takes the embedding of GLM-Image's tokens for a linear layer; "
            "train with bypass_mode off, and load the LoRA with GLM-Image Load LoRA."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
