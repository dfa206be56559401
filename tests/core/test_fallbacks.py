"""Operations that a device lacks are done by others, with the same results."""

import pytest
import torch
import torch.nn.functional as F
from glm_image.glm_core.ar.cache import KVCache, StepPass, step_mask
from glm_image.glm_core.ar.operations import Rotation
from glm_image.glm_core.fallbacks import bilinear, index_copy_, sample_table
from torch.utils._python_dispatch import TorchDispatchMode


class Lacking(TorchDispatchMode):
    """A device without these operations."""

    def __init__(self, error: type[Exception], *names: str) -> None:
        super().__init__()
        self.error, self.names = error, {f"aten::{name}" for name in names}
        self.asked: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in self.names:
            self.asked.append(func._schema.name)
            raise self.error(f"{func._schema.name} is not implemented for this device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 5, 1, 4), (1, 2, 7, 3)])
def test_bilinear_equals_torch_within_and_beyond_the_table(shape) -> None:
    table, points = torch.randn(shape), torch.rand(1, 9, 11, 2) * 3 - 1.5
    corners = torch.tensor([[-1.0, -1], [1, 1], [0, 0], [-1, 1]])
    points[0, 0, :4] = corners
    expected = F.grid_sample(
        table, points, mode="bilinear", padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(bilinear(table, points), expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_index_copy_equals_torch(dim: int) -> None:
    target, index = torch.randn(4, 5, 6), torch.tensor([3, 0, 2])
    shape = [3 if axis == dim else side for axis, side in enumerate(target.shape)]
    source, ours = torch.randn(shape), target.clone()
    with Lacking(NotImplementedError, "index_copy_") as device:
        index_copy_(ours, dim, index, source)
    assert device.asked
    assert torch.equal(ours, target.index_copy(dim, index, source))


def test_a_table_is_sampled_where_torch_cannot() -> None:
    table, points = torch.randn(1, 4, 6, 6), torch.rand(1, 5, 5, 2) * 2 - 1
    expected = sample_table(table, points)
    with Lacking(RuntimeError, "grid_sampler_2d") as device:
        found = sample_table(table, points)
    assert device.asked
    torch.testing.assert_close(found, expected)


def test_a_full_device_does_not_lack_the_operation() -> None:
    with Lacking(torch.OutOfMemoryError, "grid_sampler_2d"), pytest.raises(torch.OutOfMemoryError):
        sample_table(torch.randn(1, 4, 6, 6), torch.zeros(1, 5, 5, 2))


def test_a_step_of_the_ar_model_writes_its_cache() -> None:
    caches = []
    position = torch.tensor([4])
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    mask = step_mask(position, 2, 16, torch.float32)
    rotation = Rotation(torch.ones(1, 1, 8), torch.zeros(1, 1, 8), 8)
    for lacking in ((), ("index_copy_",)):
        cache = KVCache([(position.device, 1)], 1, 1, 16, 8, dtype=torch.float32)
        with Lacking(NotImplementedError, *lacking):
            out = StepPass(cache, position, mask).attend(0, q, k, v, rotation)
        caches.append((out, *cache.layers[0]))
    for plain, other in zip(*caches, strict=True):
        assert torch.equal(plain, other)
        assert plain.any()
