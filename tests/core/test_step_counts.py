"""Work of a step at the hub's sizes, counted without a GPU: docs/speed.md has the table.

The step runs on the meta device. Operations that launch a kernel are counted, views are not. Norms
and attention count as one, as on GPUs where torch fuses them.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from glm_image.glm_core.ar.choice import candidates
from glm_image.glm_core.ar.kernels import attention, norms, pointwise, projection
from glm_image.glm_core.ar.model import ARConfig, ARModel
from glm_image.glm_core.ar.operations import PLAIN
from glm_image.glm_core.ar.step import SamplingOptions, StepBuffers, StepShape, step
from glm_image.glm_core.choice import named, operations_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

HUB = Path(__file__).parents[1] / "configs" / "hub"
META = torch.device("meta")
SPEED = Path(__file__).parents[2] / "docs" / "speed.md"
EVERY = "add_norm=triton attend=split gate=triton project=triton rotate_write=triton"
VIEWS = {
    "view", "_unsafe_view", "transpose", "t", "split", "split_with_sizes", "slice", "select",
    "unsqueeze", "squeeze", "expand", "permute", "alias", "detach", "unbind", "as_strided",
    "_reshape_alias", "reshape", "empty", "empty_like", "new_empty", "lift_fresh",
}  # fmt: skip
KINDS = {
    "mm": "products", "addmm": "products", "bmm": "products", "rms_norm": "norms",
    "scaled_dot_product_attention": "attention", "cat": "rotation", "addcmul": "rotation",
    "index_copy_": "cache and token writes",
}  # fmt: skip


class Whole(TorchFunctionMode):
    """Counts functions that a GPU runs as one kernel, and does not look inside."""

    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.rms_norm, F.scaled_dot_product_attention):
            self.counts[function.__name__] += 1
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name not in VIEWS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class CountedKernel:
    def __init__(self, name: str, counts: Counter) -> None:
        self.name, self.counts = name, counts

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs) -> None:
        self.counts[self.name] += 1


@pytest.fixture(scope="module")
def model() -> ARModel:
    config = json.loads((HUB / "vision_language_encoder_config.json").read_text())
    return ARModel(ARConfig.from_dict(config), device=META, dtype=torch.bfloat16)


def count(model: ARModel, operations=PLAIN) -> Counter:
    counts: Counter = Counter()
    shape = StepShape(1, 1280, 32, 1536, SamplingOptions(), META, torch.bfloat16)
    buffers = StepBuffers.allocate(model, shape)
    with Whole(counts), Launches(counts):
        step(model, buffers, 1536, operations)
    return counts


def by_kind(counts: Counter) -> Counter:
    kinds: Counter = Counter()
    for name, number in counts.items():
        kind = "kernels of Triton" if name.endswith("_kernel") else KINDS.get(name, "others")
        kinds[kind] += number
    return kinds


def test_the_table_of_a_steps_work_is_true(model, monkeypatch) -> None:
    plain = by_kind(count(model))
    found = operations_of(PLAIN, named(EVERY), candidates())
    counts: Counter = Counter()
    for module in (attention, norms, pointwise, projection):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, CountedKernel(name, counts))
    replaced = by_kind(count(model, found) + counts)
    assert plain["products"] == 40 * 6 + 1
    assert plain["norms"] == 40 * 4 + 1
    assert plain["attention"] == 40
    assert replaced["norms"] == 1
    assert replaced["products"] == 40 * 3 + 1
    assert replaced["kernels of Triton"] == 40 * (2 + 1 + 1 + 2 + 1)
    rows = {*plain, *replaced}
    lines = SPEED.read_text().splitlines()
    for kind in rows:
        assert f"| {kind} | {plain[kind]} | {replaced[kind]} |" in lines
    assert f"| all | {plain.total()} | {replaced.total()} |" in lines
