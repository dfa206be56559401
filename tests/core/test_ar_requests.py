"""Requests: each is written as its single run writes it, and which of them share a run."""

from dataclasses import replace

import pytest
import torch
from ar_pair import CPU_FLOAT32, pair
from glm_image.glm_core.ar.requests import SampleRequest, shared_runs, write_together
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.glm_core.data.tokens import Forced
from glm_image.glm_core.errors import GLMImageError

ONE = SampleRequest("a cat at the mat", 96, 64, 3, SamplingOptions())


def test_a_request_is_written_as_its_single_run():
    both = pair("small")
    (written,) = write_together(both.model, both.tokenizer, [ONE], 1, **CPU_FLOAT32)
    tokens, preview = both.tokens(ONE.prompt, (3, 2), seed=3)
    assert torch.equal(written.tokens, tokens[0].int())
    assert torch.equal(written.preview, preview[0].int())


def test_requests_share_runs_by_size_options_and_locks():
    locks = Forced(torch.zeros(1, 19, 13, dtype=torch.int64), torch.eye(19, 13) > 0)
    requests = [
        ONE,
        replace(ONE, prompt="another", seed=9),
        replace(ONE, height=64),
        replace(ONE, preview=locks),
        replace(ONE, preview=replace(locks, values=locks.values + 5), prompt="x"),
        replace(ONE, options=SamplingOptions(top_k=3)),
        replace(ONE, prompt="far " * 300),
        replace(ONE, seed=10),
    ]
    tokenizer = pair("small").tokenizer
    assert shared_runs(tokenizer, requests, 16) == [[0, 1, 7], [2], [3, 4], [5], [6]]
    assert shared_runs(tokenizer, requests, 2) == [[0, 1], [7], [2], [3, 4], [5], [6]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "both"}, "'both'; use tokens or layout"),
        ({"kind": "layout", "references": (torch.zeros(2, 2),)}, "neither tokens nor references"),
        ({"height": 50}, "64x50 pixels has no grid"),
    ],
)
def test_a_request_that_makes_no_sense(change, said):
    with pytest.raises(GLMImageError, match=said):
        replace(ONE, **change)
