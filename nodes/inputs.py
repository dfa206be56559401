"""Inputs and outputs that several nodes share, and the checks of their values."""

from collections.abc import Callable, Iterable

from comfy_api.latest import io

from ..glm_core.errors import GLMImageError, InputError, shown
from .types import AR

MAX_SIDE = 16384  # as in ComfyUI's own nodes


def size_inputs() -> list[io.Input]:
    """Width and height of the image to be made."""
    return [
        io.Int.Input(
            side,
            default=1024,
            min=32,
            max=MAX_SIDE,
            step=32,
            tooltip=f"{side.capitalize()} of the image in pixels, a multiple of 32. The model was "
            "trained for 1024 to 2048. For a side between multiples take the next one, and cut the "
            "rest off with GLM-Image Crop To Size.",
        )
        for side in ("width", "height")
    ]


def size_outputs(of: str) -> list[io.Output]:
    """Width and height of a picture in pixels.

    Args:
        of: whose they are, such as "the resized image".
    """
    return [
        io.Int.Output(display_name=side, tooltip=f"{side.capitalize()} of {of}.")
        for side in ("width", "height")
    ]


def seed_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input(
        "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip=tooltip
    )


def vision_input() -> AR.Input:
    """The AR model, for nodes that read images with it."""
    return AR.Input("ar", tooltip="From GLM-Image Load AR Model. Its vision tower reads the image.")


def validate(require: Callable[..., object], *args: object) -> bool | str:
    """For `validate_inputs`: True, or the sentence of the GLMImageError that `require` raises."""
    try:
        require(*args)
    except GLMImageError as error:
        return str(error)
    return True


def fingerprint(of: Callable[..., str], name: object, *others: object) -> str:
    """For `fingerprint_inputs`: what `of` says of the files of a name and other values.

    Empty where it has none, and where the name is linked (None), as hosts tell what links carry
    only to `execute`. So a node with a linked name runs again for another name, but not for
    another file of that name. An exception would have the host run it with every prompt.
    """
    try:
        return "" if name is None else of(name, *others)
    except GLMImageError:
        return ""


def check_choices(*inputs: tuple[str, str | None, Iterable[str]]) -> bool | str:
    """For `validate_inputs`: True, or the first sentence of `require_choices`.

    Args:
        inputs: the name, the value (None where it is linked) and the choices of each.
    """
    return validate(require_choices, *(entry for entry in inputs if entry[1] is not None))


def require_choices(*inputs: tuple[str, str | None, Iterable[str]]) -> None:
    """For `execute`, which is the first to see a linked value.

    ComfyUI 0.3.75 does not check the choices of V3 nodes.

    Raises:
        GLMImageError: a value is none of its choices.
    """
    for name, value, choices in inputs:
        if value not in tuple(choices):
            raise InputError(f"{name} is '{shown(value)}'; choose one of {', '.join(choices)}.")
