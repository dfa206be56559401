"""Tokens and layouts: checked as data, saved and loaded as a file."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from glm_image.glm_core.data import token_file
from glm_image.glm_core.data.grids import preview_grid, token_grid
from glm_image.glm_core.data.token_file import load_tokens, save_tokens
from glm_image.glm_core.data.tokens import Layout, SemanticTokens
from glm_image.glm_core.errors import GLMImageError
from glm_image.scripts.environment import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def example(batch=2):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (batch, 3, 2), generator=generator, dtype=torch.int32)
    preview = torch.randint(0, 50, (batch, 19, 13), generator=generator, dtype=torch.int32)
    locked = torch.rand(19, 13, generator=generator) < 0.5
    info = {"seed": 2**64 - 1, "prompt": "雨"}
    return SemanticTokens(ids, 50, 96, 64, info), Layout(preview, locked, 50, 96, 64)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tokens(path, *example())
    return path


def resave(path, tensors=(), **metadata):
    """The same file with other tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(load_file(path) | dict(tensors), path, old | metadata)


def test_a_saved_file_loads_as_it_was(saved):
    tokens, layout = example()
    loaded, loaded_layout = load_tokens(saved)
    assert torch.equal(loaded.tokens, tokens.tokens)
    assert loaded.tokens.dtype == torch.int32
    assert (loaded.codebook, loaded.height, loaded.width) == (50, 96, 64)
    assert loaded.info == tokens.info
    assert torch.equal(loaded_layout.preview, layout.preview)
    assert torch.equal(loaded_layout.locked, layout.locked)
    assert (loaded_layout.codebook, loaded_layout.height, loaded_layout.width) == (50, 96, 64)
    assert os.listdir(saved.parent) == [saved.name]


def test_a_file_has_the_tensors_and_metadata_of_the_contract(saved):
    tensors = load_file(saved)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} == {
        "tokens": (torch.int32, (2, 3, 2)),
        "preview": (torch.int32, (2, 19, 13)),
        "locked": (torch.uint8, (19, 13)),
    }
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "glm_image_tokens"
    assert metadata["version"] == "1"
    assert (metadata["width"], metadata["height"], metadata["codebook"]) == ("64", "96", "50")


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1280, 704), (960, 512)])
def test_a_layout_saved_alone_keeps_its_size(tmp_path, width, height):
    """Its tokens are its preview, an image of its own whose preview may have another shape."""
    rows, columns = preview_grid(token_grid(height, width))
    preview = torch.arange(rows * columns, dtype=torch.int32).view(1, rows, columns)
    layout = Layout(preview, preview[0] % 3 == 0, 500, height, width)
    tokens = SemanticTokens(preview, 500, 32 * rows, 32 * columns)
    save_tokens(tmp_path / "d.safetensors", tokens, layout)
    found, loaded = load_tokens(tmp_path / "d.safetensors")
    assert (found.height, found.width) == (32 * rows, 32 * columns)
    assert (loaded.height, loaded.width) == (height, width)
    assert torch.equal(loaded.preview, preview)
    assert torch.equal(loaded.locked, layout.locked)


def test_tokens_without_a_layout(tmp_path):
    save_tokens(tmp_path / "b.safetensors", example()[0])
    assert load_tokens(tmp_path / "b.safetensors")[1] is None


def test_a_preview_without_locks_is_unlocked(tmp_path, saved):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    tensors = {k: v for k, v in load_file(saved).items() if k != "locked"}
    save_file(tensors, saved, metadata)
    assert not load_tokens(saved)[1].locked.any()


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / f"{'n' * 243}.safetensors"
    save_tokens(path, example()[0])
    assert torch.equal(load_tokens(path)[0].tokens, example()[0].tokens)
    assert os.listdir(tmp_path) == [path.name]


def test_equal_content_is_equal_bytes(tmp_path):
    """safetensors itself writes metadata in a random order."""
    files = set()
    for number in range(12):
        info = {"a": 1, "b": [2]} if number % 2 else {"b": [2], "a": 1}
        tokens = SemanticTokens(torch.zeros(1, 2, 3, dtype=torch.int32), 64, 64, 96, info)
        save_tokens(tmp_path / f"{number}.safetensors", tokens)
        files.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(files) == 1


def test_a_save_removes_what_killed_saves_left(saved, tmp_path):
    old, young = (saved.with_name(f".{letter * 32}.tmp") for letter in "ab")
    foreign = saved.with_name(".mine.tmp")
    for file in (old, young, foreign):
        file.write_bytes(b"half")
    for file in (old, foreign):
        os.utime(file, (0, 0))
    save_tokens(saved, load_tokens(saved)[0])
    assert not old.exists()
    assert young.exists()  # another save may be writing it
    assert foreign.exists()


def test_a_failed_write_leaves_only_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_tokens(saved, example(batch=1)[0])
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


BAD_TENSORS = {
    "another grid": ({"tokens": torch.zeros(2, 2, 3, dtype=torch.int32)}, r"need torch.int32"),
    "another dtype": ({"tokens": torch.zeros(2, 3, 2)}, "The tokens tensor is torch.float32"),
    "no sample": ({"tokens": torch.zeros(0, 3, 2, dtype=torch.int32)}, r"\[0, 3, 2\]"),
    "an id too high": ({"tokens": torch.full((1, 3, 2), 50, dtype=torch.int32)}, "the id 50"),
    "an id too low": ({"tokens": torch.full((1, 3, 2), -1, dtype=torch.int32)}, "the id -1"),
    "a preview too high": (
        {"preview": torch.full((1, 19, 13), 99, dtype=torch.int32)},
        "The preview tensor holds the id 99",
    ),
    "a preview of another size": (
        {"preview": torch.zeros(1, 16, 16, dtype=torch.int32)},
        r"\[batch, 19, 13\]",
    ),
    "locks of another size": ({"locked": torch.zeros(2, 2, dtype=torch.uint8)}, "locks"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit(saved, case):
    tensors, said = BAD_TENSORS[case]
    resave(saved, tensors)
    with pytest.raises(GLMImageError, match=said) as error:
        load_tokens(saved)
    assert "a.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"format": "other"}, "holds no semantic tokens"),
        ({"version": "2"}, "version 2, but this pack reads version 1"),
        ({"width": "wide"}, "width is 'wide', but must be a whole number"),
        ({"height": "9" * 400}, r"height is '9{199}\.\.\., but must be a whole number"),
        ({"height": "-64"}, "height is '-64', but must be"),
        ({"info": "{"}, "info of .* is not valid JSON"),
        ({"info": "[1]"}, "info of .* is not a JSON object"),
        ({"info": "[" * 100_000}, "info of .* nested too deeply"),
        ({"info": '{"a": ' + "[" * 100 + "]" * 100 + "}"}, "nested more than 64 deep"),
        ({"width": "65"}, "65x96 .*multiples of 32"),
        ({"layout_width": "wide"}, "layout_width is 'wide', but must be"),
        ({"layout_width": "960", "layout_height": "96"}, "960x96 pixels need"),
        ({"codebook": "-5"}, "codebook is '-5', but must be"),
        ({"codebook": "0"}, "have 0 ids"),
        ({"codebook": "65537"}, "have 65537 ids, but one has 1 to 65536"),
        ({"codebook": str(10**12)}, "codebook is '1000000000000', but must be"),
    ],
)
def test_metadata_that_does_not_fit(saved, metadata, said):
    resave(saved, **metadata)
    with pytest.raises(GLMImageError, match=said):
        load_tokens(saved)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a tensor", b"\xff" * 64])
def test_a_file_that_is_not_safetensors(saved, content):
    saved.write_bytes(content)
    with pytest.raises(GLMImageError, match="corrupt"):
        load_tokens(saved)


def test_a_truncated_file(saved):
    saved.write_bytes(saved.read_bytes()[:-5])
    with pytest.raises(GLMImageError, match="corrupt"):
        load_tokens(saved)


def test_loaded_tokens_do_not_depend_on_the_file(saved):
    """Shortened by another program, a mapped file would end the process."""
    code = """
import sys
from glm_core.data.token_file import load_tokens
tokens, layout = load_tokens(sys.argv[1])
open(sys.argv[1], "r+b").truncate(0)
print(tokens.tokens.sum().item(), layout.preview.sum().item())
"""
    command = [sys.executable, "-c", code, str(saved)]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    tokens, layout = example()
    assert found.stdout.split() == [
        str(tokens.tokens.sum().item()),
        str(layout.preview.sum().item()),
    ]


def test_a_file_too_large_is_not_read(saved):
    os.truncate(saved, token_file.MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(GLMImageError, match="64 MiB"):
        load_tokens(saved)


def test_a_missing_file(tmp_path):
    with pytest.raises(GLMImageError, match=r"no token file x\.safetensors"):
        load_tokens(tmp_path / "x.safetensors")


def test_a_layout_of_another_preview_shape_is_not_saved(tmp_path):
    tokens, layout = example()
    with pytest.raises(GLMImageError, match="grid of 16x16 and images of 64x96"):
        save_tokens(
            tmp_path / "c",
            tokens,
            dataclasses.replace(
                layout,
                height=96,
                width=96,
                preview=layout.preview[:, :16, :13].repeat(1, 1, 2)[:, :, :16],
                locked=torch.zeros(16, 16, dtype=torch.bool),
            ),
        )
    assert not os.listdir(tmp_path)
