"""What the CPU has instructions for, by which the faster of torch's kernels is chosen."""

from functools import cache

import torch


@cache
def cpu_has(*names: str) -> bool:
    """Whether it has any of them.

    Args:
        names: as `torch.cpu.get_capabilities` calls them, which older torch lacks: it has none.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in names)
