"""Components: checked against a network, mapped and not copied, and what loading one costs."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.component import FORMAT, Component
from glm_image.glm_core.files.opening import open_component
from glm_image.glm_core.glyph.encoder import GlyphConfig, GlyphEncoder
from reference import reference_pipeline
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["one file", "shards"])
def snapshot(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("snapshot")
    sharding = {"max_shard_size": "20KB"} if request.param == "shards" else {}
    reference_pipeline("small").save_pretrained(folder, **sharding)
    return folder


def test_weights_are_views_of_the_mapped_files(snapshot):
    opened = open_component(snapshot, "decoder")
    for key, tensor in opened.state_dict().items():
        spans = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(opened.tensors[key].file))
        ]
        assert any(low <= tensor.data_ptr() < high for low, high in spans), key


def test_ignored_weights_are_neither_checked_nor_read(snapshot):
    opened = open_component(snapshot, "vae")
    encoder = {k: info.shape for k, info in opened.tensors.items() if k.startswith("encoder.")}
    opened.check(encoder, ignored_prefixes=("decoder.",))
    assert opened.state_dict(ignored_prefixes=("decoder.",)).keys() == encoder.keys()


def test_the_dominant_dtype_is_by_bytes(snapshot, tmp_path):
    opened = open_component(snapshot, "vae")
    tensors = dict(opened.tensors)
    largest = max(tensors, key=lambda key: tensors[key].nbytes)
    state = {
        key: value.to(torch.float32 if key == largest else torch.float16)
        for key, value in opened.state_dict().items()
    }
    metadata = {"format": FORMAT, "component": "vae", "config": json.dumps(opened.config)}
    save_file(state, tmp_path / "vae.safetensors", metadata)
    half = sum(value.nbytes for key, value in state.items() if key != largest)
    expected = torch.float32 if state[largest].nbytes > half else torch.float16
    assert open_component(tmp_path / "vae.safetensors", "vae").dtype == expected


def mismatch(opened: Component, expected: dict[str, torch.Size]) -> str:
    with pytest.raises(GLMImageError) as error:
        opened.check(expected)
    return str(error.value)


def test_check_names_what_does_not_fit(snapshot):
    opened = open_component(snapshot, "vae")
    shapes = {key: info.shape for key, info in opened.tensors.items()}
    key = "decoder.conv_in.weight"
    file = opened.tensors[key].file.name
    lacking = {k: v for k, v in shapes.items() if k != key}
    wrong = shapes | {key: torch.Size([1, 2, 3, 3])}
    extra = shapes | {f"more.{i}": torch.Size([1]) for i in range(5)}
    assert f"weights unexpected: 1 ({key} in {file})" in mismatch(opened, lacking)
    assert "weights missing: 5 (more.0, more.1, more.2, ...)" in mismatch(opened, extra)
    assert f"and not [1, 2, 3, 3] in {file}" in mismatch(opened, wrong)


# ---- what loading costs ------------------------------------------------------------------------

GLYPH_2GB = {
    "model_type": "t5", "feed_forward_proj": "gated-gelu", "vocab_size": 384,
    "d_model": 2048, "d_ff": 8192, "d_kv": 64, "num_heads": 32, "num_layers": 8,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}  # fmt: skip

LOAD_AND_TOUCH = """
    import json, sys
    from pathlib import Path
    sys.path.insert(0, "tests")
    import conftest, torch
    from glm_image.glm_core.files.opening import open_component
    from glm_image.glm_core.glyph.encoder import GlyphConfig, GlyphEncoder

    def peak():  # anonymous and file pages together
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    # Building on the meta device imports a part of torch, which is not the checkpoint's cost.
    config = json.loads(Path(sys.argv[1], "text_encoder", "config.json").read_text())
    network = GlyphEncoder(GlyphConfig.from_dict(config), device="meta")
    before = peak()
    component = open_component(sys.argv[1], "glyph")
    component.check({k: v.shape for k, v in network.state_dict().items()})
    opened = peak()
    network.load_state_dict(component.state_dict(), assign=True)
    total = sum(parameter.sum().item() for parameter in network.parameters())
    report = {"opening": opened - before, "loading": peak() - before,
              "size": component.nbytes, "total": total}
    print(json.dumps(report))
"""


def write_large_glyph_encoder(folder: Path) -> None:
    """A snapshot of 2 GB in a shard a block: zeros that the file system need not store."""
    network = GlyphEncoder(GlyphConfig.from_dict(GLYPH_2GB), device="meta")
    shards: dict[str, dict[str, int]] = {}
    for key, value in network.state_dict().items():
        name = key.split(".")[2] if key.startswith("encoder.block.") else "rest"
        shards.setdefault(f"model-{name}.safetensors", {})[key] = value
    folder.mkdir(parents=True)
    for name, tensors in shards.items():
        header, end = {}, 0
        for key, value in tensors.items():
            header[key] = {"dtype": "F32", "shape": list(value.shape),
                           "data_offsets": [end, end + value.nbytes]}  # fmt: skip
            end += value.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(GLYPH_2GB))


def test_peak_memory_while_loading_2_gb(tmp_path):
    write_large_glyph_encoder(tmp_path / "text_encoder")
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(LOAD_AND_TOUCH), str(tmp_path)],
            cwd=ROOT, capture_output=True, text=True, check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        shutil.rmtree(tmp_path / "text_encoder")
    report = json.loads(done.stdout)
    ratio = report["loading"] / report["size"]
    assert report["size"] > 2e9
    assert report["total"] == 0.0
    assert report["opening"] < 8 * 2**20
    assert 0.9 < ratio < 1.2, f"peak {report['loading']} for {report['size']} bytes"
