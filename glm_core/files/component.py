"""A component of a checkpoint: its configs and headers, and its weights as mapped tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GLMImageError, first_few
from ..quant.packing import FORMATS, packing
from .headers import TensorInfo, map_file

FORMAT = "glm_image_checkpoint"
HUB_NAME = "zai-org/GLM-Image"


@dataclass(frozen=True)
class ComponentKind:
    """What a component is called and how its folder is recognised.

    Args:
        title: the component in an error sentence.
        folder: its folder in a hub snapshot.
        stem: the weight files' name before `.safetensors`.
        identity: a key of config.json and the value that says it is this component.
        tied: alias -> name of weights that the checkpoint may hold under either name, or both.
    """

    title: str
    folder: str
    stem: str
    identity: tuple[str, str]
    tied: tuple[tuple[str, str], ...] = ()


COMPONENTS: dict[str, ComponentKind] = {
    "ar": ComponentKind(
        "AR model",
        "vision_language_encoder",
        "model",
        ("model_type", "glm_image"),
    ),
    "decoder": ComponentKind(
        "diffusion decoder",
        "transformer",
        "diffusion_pytorch_model",
        ("_class_name", "GlmImageTransformer2DModel"),
    ),
    # T5 ties its input embedding: files hold `shared.weight`, the encoder's alias, or both.
    "glyph": ComponentKind(
        "glyph encoder",
        "text_encoder",
        "model",
        ("model_type", "t5"),
        (("encoder.embed_tokens.weight", "shared.weight"),),
    ),
    "vae": ComponentKind("VAE", "vae", "diffusion_pytorch_model", ("_class_name", "AutoencoderKL")),
}

QUANTISABLE = ("ar", "decoder")

QUANTISATION = "_quantization_metadata"
"""Metadata key of a quantised file, as ComfyUI has it: {"layers": {name: {"format": ...}}}."""
FILE_FORMATS = {"float8_e4m3fn": "fp8_e4m3fn", "glm_int8": "int8", "glm_int4": "int4"}
"""The names of formats in files, and our loaders' names for them."""
SCALE = "weight_scale"
"""Beside the weight of an fp8 layer: a number to multiply it by."""


@dataclass(frozen=True)
class Processor:
    """The files beside the AR weights that turn a prompt and images into its input.

    Args:
        tokenizer: the text of tokenizer.json.
        image: the image processor's config, with `min_pixels` and `max_pixels` whichever way the
            library that saved it wrote them.
    """

    tokenizer: str
    tokenizer_config: dict[str, Any]
    chat_template: str | None
    generation_config: dict[str, Any]
    image: dict[str, Any]


@dataclass(frozen=True)
class Component:
    """A component whose headers and configs have been read, and none of its weights.

    Args:
        name: a key of `COMPONENTS`.
        path: the folder or file that holds the weights.
        tensors: every weight by the name that the network gives it.
        processor: the AR model's, None for the others.
        scheduler: the decoder's scheduler config, None for the others.
        vae: the config of the VAE whose latents the decoder was trained on, None for the others.
        quantisation: the format of the file's quantised layers, a value of `FILE_FORMATS`.
        quantised: the names of those layers.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    processor: Processor | None = None
    scheduler: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    quantisation: str | None = None
    quantised: frozenset[str] = frozenset()

    @property
    def title(self) -> str:
        return COMPONENTS[self.name].title

    @property
    def nbytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the bytes have, quantised layers left out."""
        nbytes: dict[torch.dtype, int] = {}
        kept = [t for key, t in self.tensors.items() if layer_of(key) not in self.quantised]
        for info in kept:
            nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
        return max(nbytes, key=nbytes.__getitem__)

    def check(
        self, expected: Mapping[str, torch.Size], ignored_prefixes: tuple[str, ...] = ()
    ) -> None:
        """Compare the stored keys and shapes with a network's, before any weight is read.

        Args:
            expected: the network's key -> shape (build it on the meta device).
            ignored_prefixes: stored keys that the network leaves out on purpose.

        Raises:
            GLMImageError: keys are missing or unexpected, or have other shapes.
        """
        found = _without(self.tensors, ignored_prefixes)
        if self.quantisation not in (None, *FORMATS):
            scales = dict.fromkeys((f"{layer}.{SCALE}" for layer in self.quantised), torch.Size())
            expected = {**expected, **scales}
        missing = [key for key in expected if key not in found]
        unexpected = [
            f"{key} in {info.file.name}" for key, info in found.items() if key not in expected
        ]
        reshaped = [
            f"{key} is {list(found[key].shape)} and not {list(shape)} in {found[key].file.name}"
            for key, shape in expected.items()
            if key in found and not self._has_shape(key, shape)
        ]
        problems = [
            f"{what} {len(items)} ({first_few(items)})"
            for what, items in (
                ("weights missing:", missing),
                ("weights unexpected:", unexpected),
                ("weights of another shape:", reshaped),
            )
            if items
        ]
        if problems:
            raise GLMImageError(
                f"The {self.title} in {self.path} does not fit its config: {'; '.join(problems)}. "
                "Download its weights and config again, from one and the same checkpoint."
            )

    def _has_shape(self, key: str, shape: torch.Size) -> bool:
        """Whether a stored weight is one of this shape; int8 and int4 hold it as a run of bytes."""
        info = self.tensors[key]
        if self.quantisation in FORMATS and layer_of(key) in self.quantised:
            fits = len(shape) == 2 and packing(tuple(shape), self.quantisation).nbytes
            return info.shape == (fits,)
        return info.shape == shape

    def state_dict(self, ignored_prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The weights on the CPU as views of the mapped files: pages are read when first used.

        Args:
            ignored_prefixes: keys to leave out.
        """
        wanted = _without(self.tensors, ignored_prefixes)
        state: dict[str, Tensor] = {}
        for file in dict.fromkeys(info.file for info in wanted.values()):
            stored = map_file(file)
            state.update((k, stored[info.key]) for k, info in wanted.items() if info.file == file)
        return state

    def tensor(self, key: str) -> Tensor:
        """One of the weights, as a view of its mapped file."""
        info = self.tensors[key]
        return map_file(info.file)[info.key]


def layer_of(key: str) -> str:
    """The layer that a weight belongs to, or the scale beside it."""
    return key.removesuffix(f".{SCALE}").removesuffix(".weight")


def _without(tensors: Mapping[str, TensorInfo], prefixes: tuple[str, ...]) -> dict[str, TensorInfo]:
    return {key: info for key, info in tensors.items() if not key.startswith(prefixes)}
