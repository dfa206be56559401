"""What no memory holds is refused before it is allocated, with the bytes needed and free."""

import re

import comfy.model_management
import pytest
import torch
from glm_image.glm_core.data.tokens import Layout, SemanticTokens
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.placement import memory
from glm_image.glm_core.placement.plan import GIB
from helpers import sampled, stages

PROMPT = "a door with 'PULL' on it"
HUGE = 16384


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, (64, 96))


@pytest.fixture
def free(monkeypatch) -> int:
    """The free bytes of a machine of 8 GiB."""
    nbytes = 6 * GIB
    monkeypatch.setattr(
        comfy.model_management,
        "get_free_memory",
        lambda device=None, torch_free_too=False: (nbytes, nbytes) if torch_free_too else nbytes,
    )
    return nbytes


def big_tokens(batch: int, height: int = HUGE, width: int = HUGE) -> SemanticTokens:
    grid = torch.zeros(1, height // 32, width // 32, dtype=torch.int32)
    return SemanticTokens(grid.expand(batch, -1, -1), 64, height, width)


def show_tokens(nodes, run):
    nodes["GLMImageShowTokens"].execute(cell_size=128, tokens=big_tokens(64))


def show_layouts(nodes, run):
    preview = torch.zeros(1, 16, 16, dtype=torch.int32).expand(4096, -1, -1)
    layouts = Layout(preview, torch.zeros(16, 16, dtype=torch.bool), 64, 64, 64)
    nodes["GLMImageShowTokens"].execute(cell_size=128, layout=layouts)


def sample_tokens(nodes, run):
    sampling = (HUGE, HUGE, 7, 0.9, 0.75, 0, 64)
    sampled(nodes["GLMImageSampleTokens"], run.ar, PROMPT, *sampling)


def encode_tokens(nodes, run):
    images = torch.zeros(1, 8, 8, 3).expand(64, -1, -1, -1)
    nodes["GLMImageEncodeTokens"].execute(run.ar, images, HUGE, HUGE)


def encode_references(nodes, run):
    images = torch.zeros(1, 32, 32, 3).expand(10**7, -1, -1, -1)
    nodes["GLMImageEncodeReference"].execute(run.ar, run.vae, images, "references")


def apply_tokens(nodes, run):
    nodes["GLMImageApplyTokens"].execute(run.positive, big_tokens(64), -1)


def decode(nodes, run):
    samples = torch.zeros(1, 1, 1, 1).expand(64, 16, HUGE // 8, HUGE // 8)
    inputs = (run.positive, run.negative, {"samples": samples}, 7, 2, 1.5, 1.0)
    nodes["GLMImageDecode"].execute(run.model, *inputs)


@pytest.mark.parametrize(
    ("work", "stage", "at_least"),
    [
        (show_tokens, "Show Tokens", 64 * 65536**2 * 12),
        (show_layouts, "Show Tokens", 4096 * 2048**2 * 12),
        (sample_tokens, "The AR model", 0),
        (encode_tokens, "Resizing the images", 64 * HUGE**2 * 12),
        (encode_references, "Resizing the images", 10**7 * 32**2 * 12),
        (apply_tokens, "The latent", 64 * 16 * (HUGE // 8) ** 2 * 4),
        (decode, "The decoder", 64 * 16 * (HUGE // 16) ** 2 * 4),
    ],
)
def test_what_no_memory_holds_is_refused(nodes, run, free, work, stage, at_least) -> None:
    with pytest.raises(GLMImageError) as refused:
        work(nodes, run)
    found = re.fullmatch(
        rf"{stage} needs ([\d.]+) GiB on cpu, and 6\.0 GiB are free; .*\.", refused.value.sentence
    )
    assert found is not None, str(refused.value)
    assert float(found[1]) * GIB >= max(free, at_least)


def test_on_this_machine_too(nodes, run) -> None:
    """With the memory that is really there: more than three terabytes."""
    with pytest.raises(GLMImageError, match=r"^Show Tokens needs \d+\.\d GiB on cpu, and "):
        show_tokens(nodes, run)


def test_the_bytes_of_pictures_and_latents() -> None:
    assert memory.pixels(2, 64, 96) == torch.zeros(2, 64, 96, 3).nbytes
    assert memory.latents(2, 16, (8, 12)) == torch.zeros(2, 16, 8, 12).nbytes
