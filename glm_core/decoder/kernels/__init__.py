"""Triton kernels for a block's operations, each in one pass over memory; none where it is missing.

They accumulate in float32 and round where the plain operations do. They read no weights, so it is
nothing to them where those lie and who patches them.
"""

from collections.abc import Callable, Mapping

from ...choice import triton_version

VERSION = 1
"""To be raised with every change of a kernel: choices that were made before are made again."""


def triton_operations() -> Mapping[str, Mapping[str, Callable]]:
    """The kernels by the field of `Operations` that they are for, and by name; what usually gains
    most comes first."""
    if triton_version() is None:
        return {}
    from .modulation import add_modulate, modulate
    from .rotation import norm_rotate

    return {
        "norm_rotate": {"triton": norm_rotate},
        "add_modulate": {"triton": add_modulate},
        "modulate": {"triton": modulate},
    }
