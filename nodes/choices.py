"""Inputs with fixed choices: not every host refuses another value of a V3 node's."""

from collections.abc import Iterable

from ..glm_core.errors import GLMImageError


def check_choices(*inputs: tuple[str, str | None, Iterable[str]]) -> bool | str:
    """For `validate_inputs`: True, or the first sentence of `require_choices`.

    Args:
        inputs: each one's name, its value (None where it is linked) and its choices.
    """
    try:
        require_choices(*(entry for entry in inputs if entry[1] is not None))
    except GLMImageError as error:
        return str(error)
    return True


def require_choices(*inputs: tuple[str, str | None, Iterable[str]]) -> None:
    """For `execute`, which is the first to see a linked value.

    Raises:
        GLMImageError: a value is none of its choices.
    """
    for name, value, choices in inputs:
        if value not in tuple(choices):
            raise GLMImageError(f"{name} is '{value}'; choose one of {', '.join(choices)}.")
