"""Colours of tokens in pictures, from the AR model's codebook if its file has one."""

from functools import cached_property

from torch import Tensor

from ...glm_core.data.token_image import codebook_palette, hash_palette
from ...glm_core.files.component import Component

CODES = "model.vqmodel.quantize.embedding.weight"


class CodePalette:
    """Computed when a picture is first drawn, then kept with the model."""

    def __init__(self, component: Component, codebook: int) -> None:
        self._component = component
        self._codebook = codebook

    @cached_property
    def colours(self) -> Tensor:
        """float32 [codebook, 3], 0 to 1."""
        if CODES in self._component.tensors:
            return codebook_palette(self._component.tensor(CODES))
        return hash_palette(self._codebook)  # the file holds only the text part
