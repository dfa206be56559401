"""A model's folder that holds single files beside a snapshot's subfolders, or in their place."""

import importlib
import json
import logging
import os
import shutil
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.component import COMPONENTS
from glm_image.glm_core.files.conversion import convert
from glm_image.glm_core.files.opening import open_component
from helpers import planned, same, written

LOADERS = {"ar": "AR", "decoder": "Decoder", "glyph": "GlyphEncoder", "vae": "VAE"}


@pytest.fixture(scope="module")
def paths(nodes):
    return importlib.import_module("glm_image.nodes.host.paths")


@pytest.fixture(scope="module")
def snapshot(pipelines) -> Path:
    return Path(folder_paths.models_dir) / "glm_image" / "small"


@pytest.fixture(scope="module")
def converted(snapshot, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Files by component and dtype."""
    out = tmp_path_factory.mktemp("converted")

    def file(component: str, dtype: str) -> Path:
        return convert(open_component(snapshot, component), dtype, out, lambda *_: None)

    wanted = [(component, "int8") for component in COMPONENTS]
    wanted += [("ar", "int4"), ("decoder", "bf16")]
    return {key: file(*key) for key in wanted}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The only glm_image folder."""
    places = ([str(tmp_path)], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "glm_image", places)
    return tmp_path


def put(folder: Path, *files: Path, beside: Path | None = None) -> Path:
    """A model's folder with files, beside a snapshot's subfolders if given."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if beside is None:
        folder.mkdir()
    else:
        shutil.copytree(beside, folder, copy_function=os.link)
    for file in files:
        os.link(file, folder / file.name)
    return folder


def whole(converted) -> list[Path]:
    return [converted[component, "int8"] for component in COMPONENTS]


def loaded(nodes, component: str, *inputs) -> object:
    return nodes[f"GLMImageLoad{LOADERS[component]}"].execute(*inputs).result[0]


@pytest.mark.parametrize("name", ["GLM-int8", "org/GLM-int8"])
@pytest.mark.parametrize("suffix", [".safetensors", ".SafeTensors"])
def test_files_alone_are_a_model(nodes, paths, converted, root, name, suffix) -> None:
    folder = put(root / name, *whole(converted))
    for number, file in enumerate(folder.iterdir()):
        file.rename(folder / f"{number}{suffix}")
    assert paths.checkpoint_names() == [name]
    for component in COMPONENTS:
        assert paths.model_names(component)[0] == name
        found = paths.find_model(component, name)
        assert found.suffix == suffix
        assert open_component(found, component).name == component
    assert "decoder" in planned(nodes, name)[1]


def test_files_may_lie_in_a_hub_folder_and_in_what_a_yaml_names(
    paths, converted, snapshot, root, tmp_path, monkeypatch
) -> None:
    revision = root / "hub" / "models--zai-org--GLM-Image" / "snapshots" / "5d1f"
    put(revision, converted["ar", "int8"], beside=snapshot)
    assert paths.find_model("ar", "zai-org/GLM-Image").parent == revision
    folder = put(tmp_path / "Mine", *whole(converted))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "glm_image", ([str(folder)], set()))
    assert paths.checkpoint_names() == ["Mine"]


def test_a_stray_file_hides_no_model(paths, converted, snapshot, root) -> None:
    put(root / "org" / "GLM", beside=snapshot)
    for folder in (root, root / "org"):
        os.link(converted["vae", "int8"], folder / "stray.safetensors")
    assert paths.model_names("vae")[:3] == ["org", "org/GLM", root.name]
    assert paths.checkpoint_names() == ["org/GLM"]


def test_the_file_is_loaded_and_the_log_says_so(
    nodes, paths, converted, snapshot, root, caplog
) -> None:
    folder = put(root / "GLM", converted["ar", "int8"], beside=snapshot)
    assert paths.checkpoint_names() == ["GLM"]
    with caplog.at_level(logging.INFO):
        ar = loaded(nodes, "ar", "GLM", "default")
        loaded(nodes, "decoder", "GLM", "default")
    assert any(value.dtype == torch.uint8 for value in ar.patcher.model.state_dict().values())
    assert [message for message in caplog.messages if message.startswith("GLM-Image: ")] == [
        f"GLM-Image: the AR model is loaded from {folder / converted['ar', 'int8'].name}; "
        "vision_language_encoder in the same folder is not used."
    ]


def test_the_weight_dtype_chooses_among_files(nodes, paths, converted, snapshot, root) -> None:
    int8, int4, bf16 = (
        converted[key] for key in (("ar", "int8"), ("ar", "int4"), ("decoder", "bf16"))
    )
    folder = put(root / "GLM", int8, int4, bf16, beside=snapshot)

    def found(component: str, weight_dtype: str) -> str:
        return paths.find_model(component, "GLM", weight_dtype).name

    assert (found("ar", "int8"), found("ar", "int4")) == (int8.name, int4.name)
    assert found("ar", "fp8_e4m3fn") == folder.name  # neither file can become it
    assert found("decoder", "int4") == bf16.name
    node = nodes["GLMImageLoadCheckpoint"]
    assert node.validate_inputs(model_name="GLM") is True
    with pytest.raises(GLMImageError) as error:
        node.execute("GLM", "default")
    assert error.value.sentence == (
        f"{folder} holds the AR model 2 times, in {int4.name} (int4) and {int8.name} (int8); "
        "set weight_dtype to the format to load, or move all but one to other folders."
    )


def test_two_files_of_a_component_without_formats(paths, converted, root) -> None:
    folder = put(root / "GLM", *whole(converted))
    shutil.copy(converted["vae", "int8"], folder / "again.safetensors")
    with pytest.raises(GLMImageError, match=r"holds the VAE 2 times, in .*\); move all but one"):
        paths.find_model("vae", "GLM", "int8")


def test_a_quantised_file_alone_does_not_become_another_format(nodes, converted, root) -> None:
    put(root / "GLM", *whole(converted))
    with pytest.raises(GLMImageError, match="in int8, which cannot be turned into int4; set"):
        loaded(nodes, "ar", "GLM", "int4")


def test_a_missing_component_is_named(nodes, converted, root) -> None:
    put(root / "GLM", converted["ar", "int8"])
    with pytest.raises(GLMImageError, match="has no folder 'transformer', which holds the diff"):
        nodes["GLMImageLoadCheckpoint"].execute("GLM", "default")


def test_nodes_run_again_once_a_file_has_changed(nodes, converted, snapshot, root) -> None:
    folder = put(root / "GLM", beside=snapshot)

    def seen() -> list[str]:
        inputs = {"model_name": "GLM", "weight_dtype": "default", "device_plan": None}
        loaders = [f"Load{name}" for name in (*LOADERS.values(), "Checkpoint")]
        return [
            nodes[f"GLMImage{name}"].fingerprint_inputs(**inputs)
            for name in (*loaders, "DevicePlan")
        ]

    first = seen()
    assert all(first)
    assert seen() == first
    os.link(converted["vae", "int8"], folder / "vae.safetensors")
    changed = [a != b for a, b in zip(first, seen(), strict=True)]
    assert changed == [False, False, False, True, True, True]
    os.unlink(folder / "scheduler" / "scheduler_config.json")  # a link, so the file is as it was
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert seen()[1] != first[1]
    shutil.rmtree(folder)
    assert seen()[:4] == [""] * 4


def test_many_files_of_other_models_take_no_long_time(paths, converted, root) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for number in range(700):
        folder = root / f"other-{number // 100}"
        folder.mkdir(exist_ok=True)
        content = len(header).to_bytes(8, "little") + header + bytes(4)
        (folder / f"{number}.safetensors").write_bytes(content)
    put(root / "GLM", *whole(converted))
    assert paths.checkpoint_names() == ["GLM"]


# ---- the whole checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", ["default", "int8"])
def test_one_node_loads_what_four_load(nodes, pipelines, weight_dtype) -> None:
    plan, _ = planned(nodes, decoder="cpu", weight_dtype=weight_dtype)
    ar, model, clip, vae = (
        nodes["GLMImageLoadCheckpoint"].execute("small", weight_dtype, plan).result
    )
    found = {"ar": ar.patcher, "decoder": model, "glyph": clip.patcher, "vae": vae.patcher}
    for component, patcher in found.items():
        dtype = [weight_dtype] * COMPONENTS[component].quantisable
        alone = loaded(nodes, component, "small", *dtype, plan)
        expected = getattr(alone, "patcher", alone).model.state_dict()
        ours = patcher.model.state_dict()
        assert ours.keys() == expected.keys()
        assert all(same(ours[key], expected[key]) for key in ours)
        factory, arguments = patcher.cached_patcher_init
        rebuilt = factory(*arguments, disable_dynamic=True)
        assert rebuilt.model is not patcher.model
        assert rebuilt.model.state_dict().keys() == ours.keys()
    comfy.model_management.unload_all_models()
    tokens, _ = written(ar, "a door", 64, 96, 7, 1)
    alone = loaded(nodes, "ar", "small", weight_dtype)
    assert same(tokens.tokens, written(alone, "a door", 64, 96, 7, 1)[0].tokens)


def test_a_name_that_is_none_gets_a_sentence(nodes) -> None:
    sentence = nodes["GLMImageLoadCheckpoint"].validate_inputs(model_name="No Such Model")
    assert sentence.startswith("No AR model is called 'No Such Model' (installed are: ")
    with pytest.raises(GLMImageError, match=r"^weight_dtype is 'fp16'; choose"):
        nodes["GLMImageLoadCheckpoint"].execute("small", "fp16")
