"""The lists of models, with broken and foreign files in the folders."""

import os
import shutil
import time
from pathlib import Path

import folder_paths
import pytest
from glm_image.glm_core.files.conversion import convert
from glm_image.glm_core.files.opening import open_component
from glm_image.nodes.host import paths

TINY = Path(__file__).parents[2] / "tiny"
HEADERS = {
    "deep": b'{"glm_image_checkpoint":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "wide": b'{"glm_image_checkpoint":{"dtype":"F32","shape":['
    + b",".join([b"4611686018427387904"] * 100_000)
    + b'],"data_offsets":[0,4]}}',
    "list": b'{"__metadata__":{"format":"glm_image_checkpoint","component":[]}}',
    "text": b"{glm_image_checkpoint",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder for VAEs, which holds one of GLM-Image."""
    for name in ("vae", paths.SNAPSHOTS, paths.CHECKPOINTS):
        places = ([str(tmp_path)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, places)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    file = convert(open_component(TINY, "vae"), "bf16", tmp_path, lambda done, total: None)
    shutil.move(file, tmp_path / "ours.safetensors")
    return tmp_path


def test_broken_files_in_a_folder_hide_no_model(folder) -> None:
    for name, header in HEADERS.items():
        content = len(header).to_bytes(8, "little") + header + bytes(4)
        (folder / f"{name}.safetensors").write_bytes(content)
    (folder / "broken.safetensors").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.safetensors")
    start = time.monotonic()
    names = paths.model_names("vae")
    assert time.monotonic() - start < 5
    assert [name for name in names if name.endswith(".safetensors")] == ["ours.safetensors"]
