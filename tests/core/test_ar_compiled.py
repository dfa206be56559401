"""Candidates that torch compiles: equal to the plain step, and compiled once for all layers.

The compiler's back end is left out, which would take a minute; its front end is what fails at code
that it cannot read.
"""

import pytest
import torch
from ar_pair import pair
from glm_image.glm_core.ar.compiled import compiled_operations
from glm_image.glm_core.ar.operations import PLAIN, Operations
from glm_image.glm_core.ar.step import next_logits
from glm_image.glm_core.choice import relative_difference
from test_ar_choice import buffers_of
from torch._dynamo.backends.registry import lookup_backend


class Graphs:
    """Runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module, example):
        self.count += 1
        return lookup_backend("eager")(module, example)


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.parametrize("field", ["attend", "run"])
def test_equal_for_every_layer_span_and_batch(graphs, field) -> None:
    model = pair("small").model
    (function,) = compiled_operations(graphs)[field].values()
    operations = Operations(**{field: function})
    counts = []
    for batch, width, span in ((1, 1, 256), (1, 1, 512), (2, 3, 512)):
        buffers = buffers_of(model, batch, width)
        expected = next_logits(model, buffers, span, PLAIN)
        ours = next_logits(model, buffers, span, operations)
        assert relative_difference(ours, expected) < 1e-5
        counts.append(graphs.count)
    assert counts == [1, 1, 2]  # once for all layers and spans, and for a batch of another kind
