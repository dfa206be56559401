"""safetensors headers: what is read, and what is refused before a tensor is read."""

import json
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.headers import DTYPES, map_file, read_header
from safetensors.torch import save_file

STATE = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "scale": torch.tensor(2.0),
    "half": torch.ones(5).bfloat16(),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(STATE, tmp_path / "a.safetensors", {"format": "pt", "note": "雨"})
    return tmp_path / "a.safetensors"


def refused(file: Path) -> str:
    with pytest.raises(GLMImageError) as error:
        read_header(file)
    assert str(file) in str(error.value)
    return str(error.value)


def test_entries_give_names_shapes_dtypes_and_bytes(file):
    tensors, metadata = read_header(file)
    assert metadata == {"format": "pt", "note": "雨"}
    assert tensors.keys() == STATE.keys()
    data = file.read_bytes()
    for key, info in tensors.items():
        assert (info.key, info.file) == (key, file)
        assert (info.shape, info.dtype) == (STATE[key].shape, STATE[key].dtype)
        assert info.nbytes == STATE[key].nbytes
        stored = STATE[key].reshape(-1).view(torch.uint8)
        assert data[info.begin : info.end] == bytes(stored.tolist())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_read(tmp_path, dtype):
    save_file({"a": torch.zeros(3, 2).to(dtype)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors")[0]["a"].dtype == dtype


def test_mapped_tensors_are_the_saved_ones(file):
    mapped = map_file(file)
    assert mapped.keys() == STATE.keys()
    assert all(torch.equal(mapped[key], value) for key, value in STATE.items())


@pytest.mark.parametrize("length", [0, 5, 8, 9, 100, 0.5, -1], ids=str)
def test_truncated_files(file, length):
    data = file.read_bytes()
    end = int(length * len(data)) if isinstance(length, float) else length % len(data)
    file.write_bytes(data[:end])
    assert ("is truncated" if end > 8 else "is not a safetensors file") in refused(file)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"PK\x03\x04" + bytes(500), "is not a safetensors file"),
        (b"\x00\x00\x00\x00\x00\x00\x00\x01{}", "is not a safetensors file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "holds no weights"),
    ],
)  # fmt: skip
def test_files_that_hold_no_weights(file, data, sentence):
    file.write_bytes(data)
    assert sentence in refused(file)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "is broken at w"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "is broken at w"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "of an unknown format"),
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "is truncated"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "its header describes"),
        ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "of an unknown format"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "of an unknown format"),
        ({"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}, "of an unknown format"),
        ({"dtype": "F32", "shape": [2]}, "of an unknown format"),
        (1, "of an unknown format"),
    ],
)
def test_entries_that_contradict_the_file(file, entry, sentence):
    header = json.dumps({"w": entry}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert sentence in refused(file)
