"""Colours of tokens in pictures, from the AR model's codebook if its file has one."""

from torch import Tensor

from ..data.token_image import codebook_palette, hash_palette
from .component import Component

CODES = "model.vqmodel.quantize.embedding.weight"


def token_colours(component: Component, codebook: int) -> Tensor:
    """float32 [codebook, 3], 0 to 1."""
    if CODES in component.tensors:
        return codebook_palette(component.tensor(CODES))
    return hash_palette(codebook)  # the file holds only the text part
