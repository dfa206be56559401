"""GLM_AR: what nodes ask of an AR model, whether it is on this machine or behind a service."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ...glm_core.ar.requests import SampleRequest, Written
from ...glm_core.data.grids import Size
from ...glm_core.vision.pixels import ImageConfig


class Vision(Protocol):
    """The vision tower and its quantiser."""

    image_config: ImageConfig

    def encode(self, images: Tensor) -> Tensor:
        """Tokens int32 [B, H / 32, W / 32] of images float [B, H, W, 3], 0 to 1."""


class Palette(Protocol):
    """Colours of tokens in pictures."""

    @property
    def colours(self) -> Tensor:
        """float32 [codebook, 3], 0 to 1."""


class AnyAR(ABC):
    """An AR model on a graph."""

    has_rows = False
    """Whether it writes samples in rows of its own, whatever a node's `rows` is."""
    vision: Vision
    palette: Palette

    @property
    @abstractmethod
    def codebook(self) -> int:
        """The number of codes."""

    @abstractmethod
    def require_patcher(self) -> Any:
        """The network's, for LoRAs. A method, since current hosts look for `patcher` on outputs.

        Raises:
            GLMImageError: the weights are on another machine.
        """

    @abstractmethod
    def write(self, requests: Sequence[SampleRequest], rows: int) -> list[Written]:
        """Write samples, with progress, live previews and interrupts.

        Raises:
            GLMImageError: a prompt is empty, memory is short, or a service does not answer.
        """

    @abstractmethod
    def cell_scores(
        self,
        prompt: str,
        against: str | None,
        size: Size,
        sets: Sequence[Sequence[Tensor] | None],
        grids: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """How likely the cells of grids are under a prompt, or how much more than under another.

        Args:
            against: may be empty; None compares with no other prompt.
            sets: the tokens of each reference, or None without references; sample i has set i
                modulo their number.
            grids: int32 [B, rows, columns] by kind, in the order of writing.

        Returns:
            float32 [B, rows, columns] of nats for each kind.
        """
