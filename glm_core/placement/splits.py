"""A split as the user writes it: `gpu:0=0-19,gpu:1=20-39`."""

import re

from ..errors import DeviceError

NAME = re.compile(r"cpu|gpu:\d+")
PIECE = re.compile(r"(?P<device>[^=]*)=(?P<first>\d{1,9})-(?P<last>\d{1,9})")

Split = tuple[tuple[str, range], ...]
"""Device names and the layers that each device runs, first to last."""


def parse_split(text: str, stage: str, layers: int | None = None) -> Split:
    """The devices and their layers; empty text is no split.

    Args:
        layers: how many layers the stage has; None checks the form only.

    Raises:
        GLMImageError: a piece has another form, or a layer is missing, repeated or out of order.
    """
    pieces = [piece.strip() for piece in text.split(",")] if text.strip() else []
    split = tuple(_parse_piece(piece, stage) for piece in pieces)
    expected = 0
    for device, numbers in split:
        if numbers.start != expected:
            raise DeviceError(
                f"{stage}_split gives {device} the layers from {numbers.start} on where "
                f"{expected} is next; give every layer once, from 0 on, in order."
            )
        expected = numbers.stop
    if split and layers is not None and expected != layers:
        raise DeviceError(
            f"{stage}_split ends at layer {expected - 1} and the model's last one is "
            f"{layers - 1}; give every layer to a device."
        )
    return split


def _parse_piece(piece: str, stage: str) -> tuple[str, range]:
    match = PIECE.fullmatch(piece)
    if match is None:
        raise DeviceError(
            f"{stage}_split holds '{piece}', which is not of the form device=first-last; "
            "write it as in gpu:0=0-19,gpu:1=20-39."
        )
    device, first, last = match["device"], int(match["first"]), int(match["last"])
    if not NAME.fullmatch(device):
        raise DeviceError(
            f"{stage}_split names the device '{device}'; devices are called cpu, gpu:0, gpu:1 ..."
        )
    if last < first:
        raise DeviceError(
            f"{stage}_split holds '{piece}', whose last layer comes before its first; swap them."
        )
    return device, range(first, last + 1)
