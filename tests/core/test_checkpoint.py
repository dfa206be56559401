"""Opening components: what is read, what is refused in one sentence, and what loading costs."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.component import COMPONENTS, FORMAT, Component
from glm_image.glm_core.files.opening import open_component
from glm_image.glm_core.glyph.encoder import GlyphConfig, GlyphEncoder
from reference import GlmImagePipeline, reference_pipeline
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
STATES = {
    "ar": "vision_language_encoder",
    "decoder": "transformer",
    "glyph": "text_encoder",
    "vae": "vae",
}
GLYPH_ALIAS = "encoder.embed_tokens.weight"


@pytest.fixture(scope="session")
def pipeline() -> GlmImagePipeline:
    return reference_pipeline("small")


@pytest.fixture(scope="session", params=["one file", "shards"])
def saved(request, tmp_path_factory, pipeline) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    sharding = {"max_shard_size": "20KB"} if request.param == "shards" else {}
    pipeline.save_pretrained(folder, **sharding)
    return folder


@pytest.fixture
def snapshot(saved, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "snapshot"))


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def single_file(snapshot: Path, component: str, file: Path, **changes: str | None) -> Path:
    """The component as one file with its configs in the metadata; None leaves a key out."""
    opened = open_component(snapshot, component)
    metadata = {"format": FORMAT, "component": component, "config": json.dumps(opened.config)}
    if opened.processor:
        metadata |= {
            "tokenizer": opened.processor.tokenizer,
            "tokenizer_config": json.dumps(opened.processor.tokenizer_config),
            "chat_template": opened.processor.chat_template,
            "generation_config": json.dumps(opened.processor.generation_config),
            "processor": json.dumps(opened.processor.image),
        }
    if opened.scheduler:
        metadata["scheduler"] = json.dumps(opened.scheduler)
        metadata["vae"] = json.dumps(opened.vae)
    metadata |= changes
    state = {key: value.clone() for key, value in opened.state_dict().items()}
    save_file(state, file, {key: value for key, value in metadata.items() if value is not None})
    return file


def rewrite_json(file: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# ---- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("layout", ["snapshot", "file"])
def test_every_component_opens(saved, pipeline, tmp_path, component, layout):
    path = saved if layout == "snapshot" else single_file(saved, component, tmp_path / "a.sft")
    opened = open_component(path, component)
    expected = getattr(pipeline, STATES[component]).state_dict()
    if component == "glyph":
        expected.pop(GLYPH_ALIAS)
    opened.check({key: value.shape for key, value in expected.items()})
    state = opened.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert opened.nbytes == sum(value.nbytes for value in expected.values())
    assert opened.dtype == torch.float32
    assert (opened.processor is not None) == (component == "ar")
    assert (opened.scheduler is not None) == (component == "decoder")


@pytest.mark.parametrize("layout", ["snapshot", "file"])
def test_the_processor_and_scheduler_come_along(saved, pipeline, tmp_path, layout):
    def path(component: str) -> Path:
        file = tmp_path / f"{component}.safetensors"
        return saved if layout == "snapshot" else single_file(saved, component, file)

    processor = open_component(path("ar"), "ar").processor
    assert processor.tokenizer == (saved / "processor" / "tokenizer.json").read_text()
    assert processor.chat_template == pipeline.processor.chat_template
    assert processor.tokenizer_config["eos_token"] == pipeline.processor.tokenizer.eos_token
    assert (processor.image["min_pixels"], processor.image["max_pixels"]) == (512**2, 2048**2)
    assert open_component(path("decoder"), "decoder").scheduler["base_shift"] == 0.25


def test_the_hubs_own_image_config_is_read(snapshot):
    (snapshot / "processor" / "processor_config.json").unlink()
    hub = ROOT / "tests" / "configs" / "hub" / "processor_preprocessor_config.json"
    shutil.copy(hub, snapshot / "processor" / "preprocessor_config.json")
    image = open_component(snapshot, "ar").processor.image
    assert (image["min_pixels"], image["max_pixels"]) == (262144, 4194304)


@pytest.mark.parametrize(
    "names", [["shared.weight"], [GLYPH_ALIAS], ["shared.weight", GLYPH_ALIAS]]
)
def test_the_tied_embedding_may_have_either_name(snapshot, pipeline, names):
    folder = snapshot / "text_encoder"
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for file in weight_files(folder):
        file.unlink()
    state = pipeline.text_encoder.state_dict()
    embedding = state.pop("shared.weight")
    state.pop(GLYPH_ALIAS)
    state |= {name: embedding.clone() for name in names}
    save_file(state, folder / "model.safetensors")
    opened = open_component(snapshot, "glyph")
    assert GLYPH_ALIAS not in opened.tensors
    assert torch.equal(opened.state_dict()["shared.weight"], embedding)


def test_weights_are_views_of_the_mapped_files(saved):
    opened = open_component(saved, "decoder")
    lines = Path("/proc/self/maps").read_text
    for key, tensor in opened.state_dict().items():
        spans = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in lines().splitlines()
            if line.endswith(str(opened.tensors[key].file))
        ]
        assert any(low <= tensor.data_ptr() < high for low, high in spans), key


def test_ignored_weights_are_neither_checked_nor_read(saved):
    opened = open_component(saved, "vae")
    encoder = {k: info.shape for k, info in opened.tensors.items() if k.startswith("encoder.")}
    opened.check(encoder, ignored_prefixes=("decoder.",))
    assert opened.state_dict(ignored_prefixes=("decoder.",)).keys() == encoder.keys()


def test_the_dominant_dtype_is_by_bytes(tmp_path, saved):
    opened = open_component(saved, "vae")
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


# ---- what is refused ---------------------------------------------------------------------------


def refused(path: Path, component: str) -> str:
    """The sentence, which holds the path of what is wrong."""
    with pytest.raises(GLMImageError) as error:
        open_component(path, component)
    return str(error.value)


def first_weights(snapshot: Path) -> Path:
    return weight_files(snapshot / "transformer")[0]


def test_no_such_path(tmp_path):
    assert "nowhere does not exist" in refused(tmp_path / "nowhere", "ar")


@pytest.mark.parametrize("component", COMPONENTS)
def test_missing_component_folder(snapshot, component):
    folder = COMPONENTS[component].folder
    shutil.rmtree(snapshot / folder)
    assert f"no folder '{folder}'" in refused(snapshot, component)


@pytest.mark.parametrize(
    ("component", "file"),
    [
        ("decoder", "transformer/config.json"),
        ("decoder", "scheduler/scheduler_config.json"),
        ("ar", "processor/tokenizer.json"),
        ("ar", "processor/tokenizer_config.json"),
    ],
)
def test_missing_file(snapshot, component, file):
    (snapshot / file).unlink()
    assert f"{file} is missing" in refused(snapshot, component)


def test_missing_image_config(snapshot):
    (snapshot / "processor" / "processor_config.json").unlink()
    assert "preprocessor_config.json is missing" in refused(snapshot, "ar")


def test_image_config_without_limits(snapshot):
    rewrite_json(
        snapshot / "processor" / "processor_config.json", lambda c: c["image_processor"].pop("size")
    )
    assert "neither min_pixels" in refused(snapshot, "ar")


@pytest.mark.parametrize("text", ['{"_class_name": ', "[1, 2]", ""])
def test_broken_config(snapshot, text):
    (snapshot / "transformer" / "config.json").write_text(text)
    sentence = refused(snapshot, "decoder")
    assert "transformer/config.json is not" in sentence
    assert "JSON" in sentence


def test_config_that_is_no_text(snapshot):
    (snapshot / "transformer" / "config.json").write_bytes(b"\xff\xfe\x00{")
    assert "config.json cannot be read" in refused(snapshot, "decoder")


def test_config_of_another_model(snapshot):
    rewrite_json(
        snapshot / "transformer" / "config.json",
        lambda config: config.update(_class_name="FluxTransformer2DModel"),
    )
    assert "_class_name is 'FluxTransformer2DModel'" in refused(snapshot, "decoder")


def test_no_weights(snapshot):
    for file in (snapshot / "vae").glob("diffusion_pytorch_model*"):
        file.unlink()
    assert "holds neither" in refused(snapshot, "vae")


def test_both_an_index_and_a_single_file(snapshot):
    for name in ("diffusion_pytorch_model.safetensors.index.json",
                 "diffusion_pytorch_model.safetensors"):  # fmt: skip
        (snapshot / "vae" / name).touch()
    assert "remove the one that is stale" in refused(snapshot, "vae")


@pytest.mark.parametrize("left", [0, 5, 200, 0.5, -1], ids=str)
def test_truncated_weights(snapshot, left):
    file = first_weights(snapshot)
    data = file.read_bytes()
    keep = int(left * len(data)) if isinstance(left, float) else left % len(data)
    file.write_bytes(data[:keep])
    sentence = refused(snapshot, "decoder")
    assert str(file) in sentence
    assert ("is truncated" if keep > 8 else "is not a safetensors file") in sentence


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"PK\x03\x04" + bytes(500), "is not a safetensors file"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{\"a\": 1}", "header of .* is broken"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "holds no weights"),
    ],
)  # fmt: skip
def test_files_that_are_no_weights(snapshot, data, sentence):
    first_weights(snapshot).write_bytes(data)
    with pytest.raises(GLMImageError, match=sentence):
        open_component(snapshot, "decoder")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "broken at w"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "broken at w"),
        ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "unknown format"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "its header describes"),
    ],
)
def test_headers_that_contradict_the_file(snapshot, entry, sentence):
    header = json.dumps({"w": entry}).encode()
    first_weights(snapshot).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(GLMImageError, match=sentence):
        open_component(snapshot, "decoder")


class TestShards:
    """Disagreements between an index and its shards."""

    @pytest.fixture
    def folder(self, pipeline, tmp_path) -> Path:
        pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
        return tmp_path / "transformer"

    def refused(self, folder: Path) -> str:
        return refused(folder.parent, "decoder")

    def change_index(self, folder: Path, change) -> None:
        rewrite_json(next(folder.glob("*.index.json")), lambda index: change(index["weight_map"]))

    def test_missing_shard(self, folder):
        shard = weight_files(folder)[1]
        shard.unlink()
        assert f"{shard} is missing, which" in self.refused(folder)

    def test_key_that_no_shard_holds(self, folder):
        name = weight_files(folder)[0].name
        self.change_index(folder, lambda keys: keys.update({"extra.weight": name}))
        assert "disagree about 1 weights (extra.weight)" in self.refused(folder)

    def test_key_that_the_index_lacks(self, folder):
        self.change_index(folder, lambda keys: keys.pop("proj_out.weight"))
        assert "disagree about 1 weights (proj_out.weight)" in self.refused(folder)

    def test_key_in_another_shard(self, folder):
        def swap(keys: dict[str, str]) -> None:
            first, *_, last = keys
            keys[first], keys[last] = keys[last], keys[first]

        self.change_index(folder, swap)
        assert "disagree about 2 weights" in self.refused(folder)

    def test_key_in_two_shards(self, folder):
        one, two, *_ = weight_files(folder)
        key, value = next(iter(load_file(one).items()))
        save_file(load_file(two) | {key: value}, two)
        assert f"holds too ({key})" in self.refused(folder)

    def test_index_that_leaves_its_folder(self, folder):
        self.change_index(folder, lambda keys: keys.update({"x": "../vae/a.safetensors"}))
        assert "outside its folder" in self.refused(folder)

    def test_index_without_a_map(self, folder):
        next(folder.glob("*.index.json")).write_text('{"metadata": {}}')
        assert "has no weight_map" in self.refused(folder)


class TestSingleFiles:
    """Files whose metadata says what they are, or does not."""

    def test_foreign_file(self, tmp_path):
        save_file({"a": torch.zeros(2)}, tmp_path / "flux.safetensors", {"format": "pt"})
        assert "not a GLM-Image checkpoint" in refused(tmp_path / "flux.safetensors", "decoder")

    def test_another_component(self, saved, tmp_path):
        file = single_file(saved, "vae", tmp_path / "vae.safetensors")
        assert "holds the VAE, not the diffusion decoder" in refused(file, "decoder")

    def test_config_left_out(self, saved, tmp_path):
        file = single_file(saved, "vae", tmp_path / "vae.safetensors", config=None)
        assert "no 'config' in its metadata" in refused(file, "vae")

    def test_broken_config(self, saved, tmp_path):
        file = single_file(saved, "ar", tmp_path / "ar.safetensors", tokenizer_config="{")
        assert "tokenizer_config in the metadata of" in refused(file, "ar")

    def test_config_of_another_model(self, saved, tmp_path):
        file = single_file(saved, "vae", tmp_path / "a.safetensors", config='{"model_type": "x"}')
        assert "does not belong to GLM-Image's VAE" in refused(file, "vae")


def mismatch(opened: Component, expected: dict[str, torch.Size]) -> str:
    with pytest.raises(GLMImageError) as error:
        opened.check(expected)
    return str(error.value)


def test_check_names_what_does_not_fit(saved):
    opened = open_component(saved, "vae")
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
