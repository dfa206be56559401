"""Opening components: what is read, and what is refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.component import COMPONENTS, FORMAT
from glm_image.glm_core.files.opening import open_component
from reference import GlmImagePipeline, reference_pipeline
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
FOLDERS = {
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
def original(request, tmp_path_factory, pipeline) -> Path:
    folder = tmp_path_factory.mktemp("snapshot")
    sharding = {"max_shard_size": "20KB"} if request.param == "shards" else {}
    pipeline.save_pretrained(folder, **sharding)
    return folder


@pytest.fixture
def snapshot(original, tmp_path) -> Path:
    """A copy of the original that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "snapshot"))


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
def test_every_component_opens(original, pipeline, tmp_path, component, layout):
    path = (
        original if layout == "snapshot" else single_file(original, component, tmp_path / "a.sft")
    )
    opened = open_component(path, component)
    expected = getattr(pipeline, FOLDERS[component]).state_dict()
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
def test_the_processor_and_the_scheduler_are_read(original, pipeline, tmp_path, layout):
    def path(component: str) -> Path:
        file = tmp_path / f"{component}.safetensors"
        return original if layout == "snapshot" else single_file(original, component, file)

    processor = open_component(path("ar"), "ar").processor
    assert processor.tokenizer == (original / "processor" / "tokenizer.json").read_text()
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


# ---- what is refused ---------------------------------------------------------------------------


def refused(path: Path, component: str) -> str:
    """The sentence that refuses a component."""
    with pytest.raises(GLMImageError) as error:
        open_component(path, component)
    return str(error.value)


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


@pytest.mark.parametrize("length", [0, 200])
def test_truncated_weights(snapshot, length):
    file = weight_files(snapshot / "transformer")[0]
    file.write_bytes(file.read_bytes()[:length])
    assert str(file) in refused(snapshot, "decoder")


class TestShards:
    """Indexes and shards that disagree."""

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
    """Files that carry their configs as metadata, or lack some."""

    def test_foreign_file(self, tmp_path):
        save_file({"a": torch.zeros(2)}, tmp_path / "flux.safetensors", {"format": "pt"})
        assert "not a GLM-Image checkpoint" in refused(tmp_path / "flux.safetensors", "decoder")

    def test_another_component(self, original, tmp_path):
        file = single_file(original, "vae", tmp_path / "vae.safetensors")
        assert "holds the VAE, not the diffusion decoder" in refused(file, "decoder")

    def test_config_left_out(self, original, tmp_path):
        file = single_file(original, "vae", tmp_path / "vae.safetensors", config=None)
        assert "no 'config' in its metadata" in refused(file, "vae")

    def test_broken_config(self, original, tmp_path):
        file = single_file(original, "ar", tmp_path / "ar.safetensors", tokenizer_config="{")
        assert "tokenizer_config in the metadata of" in refused(file, "ar")

    def test_config_of_another_model(self, original, tmp_path):
        file = single_file(
            original, "vae", tmp_path / "a.safetensors", config='{"model_type": "x"}'
        )
        assert "does not belong to GLM-Image's VAE" in refused(file, "vae")
