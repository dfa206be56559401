"""A component of a checkpoint: its configs and headers, and its weights as mapped tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, first_few
from ..quant.packing import FORMATS, packing
from .headers import TensorInfo, map_file
from .quantisation import SCALE, layer_of

FORMAT = "glm_image_checkpoint"
"""The `format` in the metadata of a component that is one file."""


@dataclass(frozen=True)
class ComponentKind:
    """A component's name, and what identifies its files.

    Args:
        title: its name in error sentences.
        folder: its folder in a hub snapshot.
        stem: the weight files' name before `.safetensors`.
        identity: a key of config.json, and the value that GLM-Image has there.
        tied: alias -> name of weights that a file may hold under either name, or under both.
        quantisable: whether a file may hold its layers quantised.
    """

    title: str
    folder: str
    stem: str
    identity: tuple[str, str]
    tied: tuple[tuple[str, str], ...] = ()
    quantisable: bool = False


COMPONENTS: dict[str, ComponentKind] = {
    "ar": ComponentKind(
        "AR model",
        "vision_language_encoder",
        "model",
        ("model_type", "glm_image"),
        quantisable=True,
    ),
    "decoder": ComponentKind(
        "diffusion decoder",
        "transformer",
        "diffusion_pytorch_model",
        ("_class_name", "GlmImageTransformer2DModel"),
        quantisable=True,
    ),
    # T5 ties its input embedding: files hold `shared.weight`, the encoder's alias, or both.
    "glyph": ComponentKind(
        "glyph encoder",
        "text_encoder",
        "model",
        ("model_type", "t5"),
        tied=(("encoder.embed_tokens.weight", "shared.weight"),),
    ),
    "vae": ComponentKind("VAE", "vae", "diffusion_pytorch_model", ("_class_name", "AutoencoderKL")),
}


@dataclass(frozen=True)
class Processor:
    """The files beside the AR weights that turn a prompt and images into its input.

    Args:
        tokenizer: the text of tokenizer.json.
        image: the image processor's config, with `min_pixels` and `max_pixels`.
    """

    tokenizer: str
    tokenizer_config: dict[str, Any]
    chat_template: str | None
    generation_config: dict[str, Any]
    image: dict[str, Any]


@dataclass(frozen=True)
class Component:
    """A component whose headers and configs have been read, but none of its weights.

    Args:
        name: a key of `COMPONENTS`.
        path: the folder or file that holds the weights.
        tensors: header entries by the network's own weight names.
        processor: the AR model's, None for the others.
        scheduler: the decoder's scheduler config, None for the others.
        vae: the config of the VAE whose latents the decoder was trained on, None for the others.
        quantisation: the format of quantised layers, a key of `LAYER_FORMATS`; None without any.
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
        """The dtype that most bytes have, not counting quantised layers."""
        nbytes: dict[torch.dtype, int] = {}
        for key, info in self.tensors.items():
            if layer_of(key) not in self.quantised:
                nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
        return max(nbytes, key=nbytes.__getitem__, default=torch.bfloat16)

    def check(
        self, expected: Mapping[str, torch.Size], ignored_prefixes: tuple[str, ...] = ()
    ) -> None:
        """Compare the stored keys and shapes with a network's, before any weight is read.

        Args:
            expected: the network's key -> shape (build it on the meta device).
            ignored_prefixes: of stored keys that the network leaves out on purpose.

        Raises:
            GLMImageError: keys are missing or unexpected, or have other shapes.
        """
        stored = _without(self.tensors, ignored_prefixes)
        expected = {**expected, **self._scales()}
        problems = {
            "missing": [key for key in expected if key not in stored],
            "unexpected": [
                f"{key} in {info.file.name}" for key, info in stored.items() if key not in expected
            ],
            "of another shape": [
                f"{key} is {list(stored[key].shape)} and not {list(shape)} "
                f"in {stored[key].file.name}"
                for key, shape in expected.items()
                if key in stored and not self._has_shape(key, shape)
            ],
        }
        found = [
            f"weights {problem}: {len(keys)} ({first_few(keys)})"
            for problem, keys in problems.items()
            if keys
        ]
        if found:
            raise CheckpointError(
                f"The {self.title} in {self.path} does not fit its config: {'; '.join(found)}. "
                "Download its weights and config again, both from the same checkpoint."
            )

    def _scales(self) -> dict[str, torch.Size]:
        """Key -> shape of the scales that a file in fp8 holds beside the network's weights."""
        if self.quantisation in (None, *FORMATS):
            return {}
        return {f"{layer}.{SCALE}": torch.Size() for layer in self.quantised}

    def _has_shape(self, key: str, shape: torch.Size) -> bool:
        """Whether a stored weight has this shape. int8 and int4 matrices are stored as bytes."""
        info = self.tensors[key]
        if self.quantisation in FORMATS and layer_of(key) in self.quantised:
            nbytes = len(shape) == 2 and packing(tuple(shape), self.quantisation).nbytes
            return info.shape == (nbytes,)
        return info.shape == shape

    def state_dict(self, ignored_prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The weights on the CPU as views of the mapped files: pages are read when first used.

        Args:
            ignored_prefixes: of keys to leave out.
        """
        wanted = _without(self.tensors, ignored_prefixes)
        state: dict[str, Tensor] = {}
        for file in dict.fromkeys(info.file for info in wanted.values()):
            mapped = map_file(file)
            state.update((k, mapped[info.key]) for k, info in wanted.items() if info.file == file)
        return state

    def tensor(self, key: str) -> Tensor:
        """One weight, as a view of its mapped file."""
        info = self.tensors[key]
        return map_file(info.file)[info.key]


def _without(tensors: Mapping[str, TensorInfo], prefixes: tuple[str, ...]) -> dict[str, TensorInfo]:
    return {key: info for key, info in tensors.items() if not key.startswith(prefixes)}
