"""Operations that some devices lack, by others that they have. They are tried each time.

No device is asked for its name: torch adds operations with every release. Apple's devices have no
`grid_sample` with border padding in most, and no `index_copy_` in older ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def index_copy_(target: Tensor, dim: int, index: Tensor, source: Tensor) -> None:
    """Write `source` into `target` at the indices int64 [L] of a dimension."""
    try:
        target.index_copy_(dim, index, source)
    except NotImplementedError:
        target[(slice(None),) * dim + (index,)] = source


def sample_table(table: Tensor, points: Tensor) -> Tensor:
    """A table [1, D, H, W] sampled bilinearly at points [1, h, w, 2]: [1, D, h, w].

    A point is (x, y), from -1 to 1 between the outer edges of the table's cells. Beyond the outer
    centres the nearest cell is continued.
    """
    try:
        return F.grid_sample(
            table, points, mode="bilinear", padding_mode="border", align_corners=False
        )
    except torch.cuda.OutOfMemoryError:  # the one of every device
        raise
    except RuntimeError:  # torch has no kind of its own for a mode that a device lacks
        return bilinear(table, points)


def bilinear(table: Tensor, points: Tensor) -> Tensor:
    """The same by indexing."""
    height, width = table.shape[-2:]
    x, y = (
        (((points[0, ..., axis] + 1) * side - 1) / 2).clamp(0, side - 1)
        for axis, side in enumerate((width, height))
    )
    left, top = x.floor().long(), y.floor().long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    to_right, to_bottom = x - left, y - top
    upper = table[..., top, left] * (1 - to_right) + table[..., top, right] * to_right
    lower = table[..., bottom, left] * (1 - to_right) + table[..., bottom, right] * to_right
    return upper * (1 - to_bottom) + lower * to_bottom
