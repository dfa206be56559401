"""Colours of tokens in pictures, kept with the AR model."""

from functools import cached_property

from torch import Tensor

from ...glm_core.files.component import Component
from ...glm_core.files.palette import token_colours


class CodePalette:
    """Computed when a picture is first drawn, then kept with the model."""

    def __init__(self, component: Component, codebook: int) -> None:
        self._component = component
        self._codebook = codebook

    @cached_property
    def colours(self) -> Tensor:
        """float32 [codebook, 3], 0 to 1."""
        return token_colours(self._component, self._codebook)
