"""Triton kernels for the small operations of a step; none where Triton is missing.

They accumulate in float32 and round where the plain operations do. They touch activations, the
cache and weights that lie in place; other weights are the layers' own matter.
"""

from collections.abc import Callable, Mapping

from ...choice import triton_version

VERSION = 3
"""To be raised with every change of a kernel: choices that were made before are made again."""


def triton_operations() -> Mapping[str, Mapping[str, Callable]]:
    """The kernels by the field of `Operations` that they are for, and by name."""
    if triton_version() is None:
        return {}
    from .attention import attend_in_parts
    from .norms import add_norm
    from .pointwise import gate, rotate_write
    from .projection import project

    return {
        "add_norm": {"triton": add_norm},
        "rotate_write": {"triton": rotate_write},
        "attend": {"split": attend_in_parts},
        "gate": {"triton": gate},
        "project": {"triton": project},
    }
