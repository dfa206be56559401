"""Where models lie, and the names under which they are found."""

import importlib
import json
import os
import runpy
import shutil
import time
from pathlib import Path

import folder_paths
import pytest
from glm_image.glm_core.errors import GLMImageError
from glm_image.scripts import environment

REVISION = "5d1f2a"


@pytest.fixture(scope="module")
def paths(nodes):
    return importlib.import_module("glm_image.nodes.host.paths")


@pytest.fixture(scope="module")
def snapshot(pipelines) -> Path:
    return Path(folder_paths.models_dir) / "glm_image" / "small"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The only glm_image folder."""
    return only_root(tmp_path / "root", monkeypatch)


def only_root(folder: Path, monkeypatch) -> Path:
    """Lists a folder alone, as an entry of extra_model_paths.yaml does."""
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "glm_image", ([str(folder)], set()))
    return folder


def put(snapshot: Path, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(snapshot, folder, copy_function=os.link)
    return folder


def put_into_hub(snapshot: Path, cache: Path, *, main: str | None = REVISION) -> Path:
    """A hub cache's folder with two snapshots, of which only that of REVISION is whole."""
    repository = cache / "models--zai-org--GLM-Image"
    put(snapshot, repository / "snapshots" / REVISION)
    older = repository / "snapshots" / "0000"
    (older / "vae").mkdir(parents=True)
    os.utime(older, (0, 0))
    (repository / "refs").mkdir()
    if main is not None:
        (repository / "refs" / "main").write_text(main)
    return repository


@pytest.mark.parametrize("name", ["GLM-Image", "zai-org/GLM-Image", "a/b/c/d"])
def test_a_name_is_the_path_below_the_root(paths, snapshot, root, name) -> None:
    folder = put(snapshot, root / name)
    for component in ("ar", "decoder", "glyph", "vae"):
        assert name in paths.model_names(component)
        assert paths.find_model(component, name) == folder
        assert paths.find_model(component, name.replace("/", "\\")) == folder


@pytest.mark.parametrize("cache", [".", "hub"])
@pytest.mark.parametrize("main", [REVISION, REVISION + "\n", None, "not downloaded"])
def test_a_hub_folder_is_called_as_on_the_hub(paths, snapshot, root, cache, main) -> None:
    repository = put_into_hub(snapshot, root / cache, main=main)
    assert "zai-org/GLM-Image" in paths.model_names("decoder")
    found = paths.find_model("decoder", "zai-org/GLM-Image")
    assert found == repository / "snapshots" / REVISION


def test_refs_main_says_which_snapshot_although_another_is_newer(paths, snapshot, root) -> None:
    repository = put_into_hub(snapshot, root)
    os.utime(repository / "snapshots" / "0000")
    os.utime(repository / "snapshots" / REVISION, (0, 0))
    found = paths.find_model("decoder", "zai-org/GLM-Image")
    assert found == repository / "snapshots" / REVISION


def test_an_entry_may_name_the_snapshot_itself(paths, snapshot, tmp_path, monkeypatch) -> None:
    folder = only_root(put(snapshot, tmp_path / "My-GLM"), monkeypatch)
    other = put(snapshot, folder / "beside" / "it")
    assert paths.model_names("ar")[:2] == ["My-GLM", "beside/it"]
    assert paths.find_model("ar", "My-GLM") == folder
    assert paths.find_model("ar", "beside/it") == other


@pytest.mark.parametrize("below", [".", f"snapshots/{REVISION}"])
def test_an_entry_may_name_a_hub_folder(paths, snapshot, tmp_path, monkeypatch, below) -> None:
    repository = put_into_hub(snapshot, tmp_path)
    only_root(repository / below, monkeypatch)
    assert "zai-org/GLM-Image" in paths.model_names("vae")
    found = paths.find_model("vae", "zai-org/GLM-Image")
    assert found == repository / "snapshots" / REVISION


def test_what_the_yaml_names_is_found(paths, snapshot, tmp_path, root) -> None:
    """Read by ComfyUI's own code: a snapshot, and a folder of folders."""
    put(snapshot, tmp_path / "disk" / "Whole")
    put(snapshot, tmp_path / "disk" / "more" / "org" / "Nested")
    put(snapshot, root / "Local")
    config = tmp_path / "extra_model_paths.yaml"
    entries = f"{tmp_path}/disk/Whole\n{tmp_path}/disk/more\n"
    config.write_text(json.dumps({"glm": {"glm_image": entries}}))
    # By its path: another module called utils may be loaded already.
    reader = runpy.run_path(str(environment.host().path / "utils" / "extra_config.py"))
    reader["load_extra_path_config"](str(config))
    assert {"Whole", "org/Nested", "Local"} <= set(paths.model_names("glyph"))


def test_of_two_with_one_name_the_earlier_root_has_it(paths, snapshot, tmp_path, root) -> None:
    first = put(snapshot, root / "org" / "Same")
    put(snapshot, tmp_path / "second" / "org" / "Same")
    folder_paths.add_model_folder_path("glm_image", str(tmp_path / "second"))
    assert paths.find_model("vae", "org/Same") == first
    assert paths.model_names("vae").count("org/Same") == 1


def test_links_in_circles_and_links_to_nowhere(paths, snapshot, root) -> None:
    put(snapshot, root / "org" / "Model")
    (root / "org" / "up").symlink_to(root)
    (root / "org" / "itself").symlink_to("itself")
    (root / "dead").symlink_to("/nowhere")
    (root / "alias").symlink_to(root / "org")
    assert paths.model_names("vae")[:2] == ["alias/Model", "org/Model"]


def test_many_files_neither_hide_a_model_nor_take_long(paths, snapshot, root) -> None:
    for folder in ("archive", "archive/deep", "pictures"):
        (root / folder).mkdir()
        for i in range(3000):
            (root / folder / f"{i}.png").touch()
    for i in range(300):
        (root / f"run-{i}" / "a" / "b" / "c" / "d" / "e").mkdir(parents=True)
    put(snapshot, root / "zai-org" / "GLM-Image")
    start = time.perf_counter()
    assert "zai-org/GLM-Image" in paths.model_names("vae")
    assert time.perf_counter() - start < 5


def test_a_folder_that_is_no_snapshot_says_what_is_missing(nodes, root) -> None:
    (root / "empty").mkdir()
    with pytest.raises(GLMImageError, match="has no folder 'vae'"):
        nodes["GLMImageLoadVAE"].EXECUTE_NORMALIZED(model_name="empty")


@pytest.mark.parametrize("listed", ["sub/one.safetensors", "sub\\one.safetensors"])
@pytest.mark.parametrize("asked", ["sub/one.safetensors", "sub\\one.safetensors"])
def test_slashes_of_either_kind_are_the_same_name(paths, listed, asked) -> None:
    assert paths.as_listed("model_name", asked, ["other", listed]) == listed
    assert paths.as_listed("model_name", "two", ["other", listed]) is None


@pytest.mark.parametrize("asked", ["sub/v.safetensors", "sub\\v.safetensors"])
def test_a_single_file_is_found_by_either_slash(paths, tmp_path, monkeypatch, asked) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "v.safetensors"
    file.touch()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "vae", ([str(tmp_path)], {".safetensors"})
    )
    assert paths.find_model("vae", asked) == file


@pytest.mark.parametrize(
    "name", [3, 0.5, True, [1], {"a": "b"}, "\ud83d", "a\0b", "..", "x" * 9999]
)
@pytest.mark.parametrize(
    "node", ["LoadAR", "LoadDecoder", "LoadGlyphEncoder", "LoadVAE", "DevicePlan"]
)
def test_a_name_that_is_none_gets_a_sentence(nodes, node, name) -> None:
    sentence = nodes[f"GLMImage{node}"].validate_inputs(model_name=name)
    assert isinstance(sentence, str)
    assert sentence.endswith((". [GLM-FILE]", ". [GLM-INPUT]"))
    assert len(sentence) < 700
    sentence.encode("utf-8")


def test_a_device_that_is_no_text_gets_a_sentence(nodes) -> None:
    sentence = nodes["GLMImageDevicePlan"].validate_inputs(ar=5)
    assert sentence == "ar is set to '5'; devices are called auto, cpu, gpu:0, gpu:1 ..."


def test_a_plan_is_made_for_a_nested_model_by_either_slash(nodes, snapshot, root) -> None:
    from helpers import planned

    put(snapshot, root / "org" / "Nested")
    tables = [planned(nodes, name)[1] for name in ("org/Nested", "org\\Nested")]
    assert tables[0].startswith("stage")
    assert tables[0] == tables[1]
