"""The exceptions that the pack raises on purpose, by kind; their values; full devices."""

from collections.abc import Iterable

import torch

FULL = ("out of memory", "alloc_failed", "can't allocate memory")
LONGEST = 200
"""Characters of a value in a sentence."""


class GLMImageError(ValueError):
    """A sentence for the person at the graph: what was wrong, the value, what to do.

    A program knows the kind by the class, a person by the code at the sentence's end. The codes are
    explained in docs/errors.md and the help pages, in every language.
    """

    __module__ = "glm_image"  # shown by hosts, which import the pack under its file path
    code = "GLM-ERROR"

    def __init_subclass__(cls) -> None:
        cls.__module__ = GLMImageError.__module__

    @property
    def sentence(self) -> str:
        """Without the code, for a sentence that tells more."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.sentence} [{self.code}]"


class InputError(GLMImageError):
    """A value or a type that an input cannot have, or an input that is not connected."""

    code = "GLM-INPUT"


class SizeError(GLMImageError):
    """Sizes of pictures, tokens, layouts or latents that do not fit."""

    code = "GLM-SIZE"


class BatchError(GLMImageError):
    """Numbers of images that do not fit together, or an index beyond them."""

    code = "GLM-BATCH"


class PromptError(GLMImageError):
    """A prompt or a text that cannot be read."""

    code = "GLM-PROMPT"


class ReferenceImageError(GLMImageError):
    """A picture that cannot be read, or none."""

    code = "GLM-REFERENCE"


class TokensError(GLMImageError):
    """Tokens, a layout or a conditioning that are not what is needed."""

    code = "GLM-TOKENS"


class ModelError(GLMImageError):
    """A connected model that is not the one that is needed."""

    code = "GLM-MODEL"


class FileError(GLMImageError):
    """A file that is missing, broken or cannot be read or written."""

    code = "GLM-FILE"


class CheckpointError(GLMImageError):
    """A file or a config that is not of GLM-Image, or weights that do not fit their config."""

    code = "GLM-CHECKPOINT"


class WeightsError(GLMImageError):
    """Weights in a format that cannot be used here."""

    code = "GLM-WEIGHTS"


class LoraError(GLMImageError):
    """A LoRA that cannot be read or does not fit the connected models."""

    code = "GLM-LORA"


class DeviceError(GLMImageError):
    """A device or a split that is not possible on this machine."""

    code = "GLM-DEVICE"


class LowMemoryError(GLMImageError):
    """A device with too little free memory."""

    code = "GLM-MEMORY"


class ServiceError(GLMImageError):
    """An AR service that is unknown, not reached, refuses the key or has another model."""

    code = "GLM-SERVICE"


class UnsupportedError(GLMImageError):
    """Something that another node asks for and this model cannot do."""

    code = "GLM-UNSUPPORTED"


def shown(value: object) -> str:
    """A value as a sentence shows it: on one line, its end cut, half surrogate pairs as `?`."""
    text = " ".join(str(value).split())
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def quoted(value: object) -> str:
    """A value as Python writes it, cut like `shown`."""
    return shown(repr(value))


def first_few(items: Iterable[str], count: int = 3) -> str:
    """The first `count` items, each as `shown`, with dots if there are more."""
    items = list(items)
    return ", ".join(map(shown, items[:count])) + (", ..." if len(items) > count else "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device is full. torch has a type for it, and libraries texts."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in FULL)
