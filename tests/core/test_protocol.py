"""What an AR service and its clients send: it is read as it was written, and checked."""

import base64
import dataclasses
import json

import pytest
import torch
from glm_image.glm_core.ar import protocol
from glm_image.glm_core.ar.protocol import ScoreRequest
from glm_image.glm_core.ar.requests import SampleRequest, Written
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.glm_core.data.tokens import Forced, Layout, SemanticTokens
from glm_image.glm_core.errors import (
    BatchError,
    FileError,
    GLMImageError,
    InputError,
    SizeError,
    TokensError,
)

CODEBOOK = 50
HEIGHT, WIDTH = 96, 64  # a grid of 3 x 2, and a preview of 19 x 13
GENERATOR = torch.Generator().manual_seed(0)


def ids(*shape):
    return torch.randint(0, CODEBOOK, shape, generator=GENERATOR, dtype=torch.int32)


PREVIEW = Forced(ids(1, 19, 13), torch.rand(19, 13, generator=GENERATOR) < 0.5)
LARGE = Forced(ids(1, 3, 2), torch.tensor([[True, False], [True, True], [False, False]]))
REFERENCES = (ids(4, 5), ids(2, 2))
OPTIONS = SamplingOptions(0.7, 0.3, 12)
REQUESTS = {
    "plain": SampleRequest('雨 "Open"', HEIGHT, WIDTH, 2**64 - 1, SamplingOptions()),
    "layout": SampleRequest("a", HEIGHT, WIDTH, 1, OPTIONS, "layout", preview=PREVIEW),
    "redraw": SampleRequest("a", HEIGHT, WIDTH, 1, OPTIONS, preview=PREVIEW, large=LARGE),
    "edit": SampleRequest(
        "a", HEIGHT, WIDTH, 1, OPTIONS, large=LARGE, references=REFERENCES, lookahead=3
    ),
}


def equal(one, other) -> bool:
    """Of values, tensors and dataclasses of them."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if dataclasses.is_dataclass(one) and not isinstance(one, SamplingOptions):
        names = [field.name for field in dataclasses.fields(one)]
        return all(equal(getattr(one, name), getattr(other, name)) for name in names)
    return one == other


@pytest.mark.parametrize("name", REQUESTS)
def test_a_sample_is_read_as_it_was_written(name) -> None:
    sent = json.dumps(protocol.sample_to_json(REQUESTS[name], CODEBOOK))
    assert equal(protocol.sample_from_json(json.loads(sent), CODEBOOK), REQUESTS[name])


@pytest.mark.parametrize("name", REQUESTS)
def test_what_was_written_is_read_as_it_was_sent(name) -> None:
    request = REQUESTS[name]
    written = Written(
        None if request.kind == "layout" else ids(3, 2),
        None if request.references else ids(19, 13),
    )
    text = protocol.written_to_text(written, request, CODEBOOK)
    assert equal(protocol.written_from_text(text, request, CODEBOOK), written)


def test_only_four_values_are_required() -> None:
    data = {"prompt": "a", "width": WIDTH, "height": HEIGHT, "seed": 1}
    expected = SampleRequest("a", HEIGHT, WIDTH, 1, SamplingOptions())
    assert equal(protocol.sample_from_json(data, CODEBOOK), expected)


def sent(name="plain", **changes):
    return protocol.sample_to_json(REQUESTS[name], CODEBOOK) | changes


def token_file(batch=1, width=WIDTH, codebook=CODEBOOK):
    written = Written(ids(3, width // 32), None)
    request = SampleRequest("a", HEIGHT, width, 1, SamplingOptions(), references=REFERENCES)
    text = protocol.written_to_text(written, request, codebook)
    if batch == 1:
        return text
    return protocol.encoded_to_text(ids(batch, 3, 2), codebook)


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ([], InputError, r"is '\[\]'|is \[\]"),
        (sent(prompt=3), InputError, "prompt is 3, but must be a text"),
        (sent(prompt=None), InputError, "has no prompt"),
        (sent(size=3), InputError, "the key 'size'"),
        (sent(width=65), SizeError, "65x96"),
        (sent(width=2**20), InputError, "width is 1048576"),
        (sent(width=True), InputError, "width is True"),
        (sent(seed=-1), InputError, "seed is -1"),
        (sent(seed=2**64), InputError, "seed is 18446744073709551616"),
        (sent(temperature=float("nan")), InputError, "temperature is nan"),
        (sent(temperature="1"), InputError, "temperature is '1'"),
        (sent(top_p=1.5), InputError, "top_p is 1.5"),
        (sent(lookahead=65), InputError, "lookahead is 65"),
        (sent(kind="both"), InputError, "kind is 'both', but must be tokens or layout"),
        (sent(layout="é"), FileError, "layout's token file is not in base64"),
        (sent(layout="AAAA"), FileError, "no safetensors file"),
        (sent(layout=token_file()), FileError, "has no preview"),
        (sent(tokens=token_file()), InputError, "belong together"),
        (sent(tokens=token_file(width=96), cells="*"), SizeError, "96x96"),
        (sent(tokens=token_file(codebook=60), cells="*"), TokensError, "codebook of the tokens"),
        (sent(tokens=token_file(batch=2), cells="*"), BatchError, "has 2 images"),
        (sent(tokens=token_file(), cells="9:9"), InputError, "row 9"),
        (sent(references=[token_file(batch=2)]), BatchError, "has 2 images"),
        (sent(references="x"), InputError, "references is 'x'"),
        (sent("layout", references=[token_file()]), InputError, "A layout alone"),
        (sent("redraw", references=[token_file()]), InputError, "no preview to lock"),
    ],
)
def test_a_wrong_sample_is_a_sentence(data, kind, words) -> None:
    with pytest.raises(kind, match=words):
        protocol.sample_from_json(data, CODEBOOK)


def test_a_layout_of_a_small_image_is_taken_if_its_preview_fits() -> None:
    """GLM-Image Save Tokens writes a layout alone as the tokens of an image of its preview."""
    preview = ids(1, 16, 16)
    alone = Layout(preview, torch.ones(16, 16, dtype=torch.bool), CODEBOOK, 512, 512)
    tokens = SemanticTokens(preview, CODEBOOK, 512, 512)
    data = base64.b64encode(protocol.token_file.to_bytes(tokens, alone)).decode()
    body = {"prompt": "a", "width": 1024, "height": 1024, "seed": 1, "layout": data}
    read = protocol.sample_from_json(body, CODEBOOK)
    assert torch.equal(read.preview.values, preview)
    assert read.preview.mask.all()


def test_results_of_another_request_are_refused() -> None:
    plain, edit = REQUESTS["plain"], REQUESTS["edit"]
    text = protocol.written_to_text(Written(ids(3, 2), None), edit, CODEBOOK)
    for request, codebook in ((plain, CODEBOOK), (edit, 60)):
        with pytest.raises(GLMImageError):
            protocol.written_from_text(text, request, codebook)


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("references", [(), REFERENCES])
@pytest.mark.parametrize("against", ["b", "", None])
def test_a_request_for_scores_is_read_as_it_was_written(with_tokens, references, against) -> None:
    size = (CODEBOOK, HEIGHT, WIDTH)
    locked = torch.zeros(19, 13, dtype=torch.bool)
    layout = None if references else Layout(ids(2, 19, 13), locked, *size)
    tokens = SemanticTokens(ids(2, 3, 2), *size) if with_tokens or references else None
    request = ScoreRequest("a", against, tokens, layout, references)
    read = protocol.score_from_json(protocol.score_to_json(request, CODEBOOK), CODEBOOK)
    assert read.grids.keys() == request.grids.keys()
    assert all(torch.equal(read.grids[name], grid) for name, grid in request.grids.items())
    assert equal((read.prompt, read.against, read.references), ("a", against, references))


def test_tokens_without_their_preview_are_not_scored() -> None:
    body = {"prompt": "a", "tokens": token_file()}
    with pytest.raises(InputError, match="preview"):
        protocol.score_from_json(body, CODEBOOK)


def test_tokens_are_scored_after_their_own_previews_only() -> None:
    def body(tokens, layout):
        data = protocol.token_file.to_bytes(tokens, layout)
        return {"prompt": "a", "tokens": base64.b64encode(data).decode()}

    def layout(preview, height, width):
        locked = torch.zeros(preview.shape[1:], dtype=torch.bool)
        return Layout(preview, locked, CODEBOOK, height, width)

    two = SemanticTokens(ids(2, 3, 2), CODEBOOK, HEIGHT, WIDTH)
    with pytest.raises(BatchError, match="tokens of 2 images and previews of 1"):
        protocol.score_from_json(body(two, layout(ids(1, 19, 13), HEIGHT, WIDTH)), CODEBOOK)
    # A layout that was saved alone: its tokens are those of an image of its preview.
    preview = ids(2, 6, 39)
    tokens = SemanticTokens(preview, CODEBOOK, 192, 1248)
    alone = body(tokens, layout(preview, 32, 192))
    with pytest.raises(SizeError, match="6x39"):
        protocol.score_from_json(alone, CODEBOOK)
    assert protocol.score_from_json(alone | {"kind": "layout"}, CODEBOOK).size == (32, 192)


def test_scores_are_compared_unless_the_request_says_otherwise() -> None:
    body = {"prompt": "a", "tokens": token_file(), "references": [token_file()]}
    assert protocol.score_from_json(body, CODEBOOK).against == ""
    with pytest.raises(InputError, match="against is 'b', but compare is false"):
        protocol.score_from_json(body | {"against": "b", "compare": False}, CODEBOOK)


def test_images_and_their_tokens_are_read_as_they_were_written() -> None:
    images = torch.rand(2, 96, 64, 3, generator=GENERATOR)
    data = protocol.tensors_to_bytes({protocol.IMAGES: images})
    assert torch.equal(protocol.images_from_bytes(data), images)
    tokens = ids(2, 3, 2)
    text = protocol.encoded_to_text(tokens, CODEBOOK)
    assert torch.equal(protocol.encoded_from_text(text, CODEBOOK), tokens)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"images": torch.zeros(1, 96, 64, 4)},
        {"images": torch.zeros(1, 96, 65, 3)},
        {"images": torch.zeros(96, 64, 3)},
        {"images": torch.full((1, 96, 64, 3), float("nan"))},
        {"images": torch.full((1, 96, 64, 3), 2.0)},
        {"images": torch.zeros(1, 96, 64, 3, dtype=torch.float64)},
    ],
)
def test_other_images_are_a_sentence(tensors) -> None:
    with pytest.raises(GLMImageError):
        protocol.images_from_bytes(protocol.tensors_to_bytes(tensors))
