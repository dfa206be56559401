"""`--check`: what is whole, and a sentence for each file that is missing or broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from glm_image.glm_core.convert import main
from glm_image.glm_core.files.checking import check_model
from glm_image.glm_core.files.component import COMPONENTS
from glm_image.glm_core.files.conversion import convert
from glm_image.glm_core.files.opening import open_component
from reference import reference_pipeline

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """A snapshot in shards."""
    folder = tmp_path_factory.mktemp("checked") / "GLM"
    reference_pipeline("small").save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def snapshot(original, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "GLM"))


@pytest.fixture(scope="session")
def files(original, tmp_path_factory) -> list[Path]:
    """Converted files of every component."""
    out = tmp_path_factory.mktemp("files")
    opened = (open_component(original, name) for name in COMPONENTS)
    return [convert(component, "int8", out, lambda *_: None) for component in opened]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.safetensors"))


def test_a_whole_snapshot(snapshot, capsys) -> None:
    main([str(snapshot), "--check"])
    lines = capsys.readouterr().out.splitlines()
    weights = sum(file.stat().st_size for file in snapshot.rglob("*.safetensors"))
    assert lines[-1].startswith("OK: 0.0 GB of weights")
    assert len(lines) == len(COMPONENTS) + 1
    assert f"{len(shards(snapshot / 'transformer'))} files in" in lines[1]
    assert 0.8 * weights < check_model(snapshot).nbytes < weights


def test_a_hub_folder_files_alone_and_one_file(original, files, tmp_path, capsys) -> None:
    repository = tmp_path / "models--zai-org--GLM-Image"
    shutil.copytree(original, repository / "snapshots" / "5d1f")
    for path in (repository, files[0].parent, files[0]):
        main([str(path), "--check"])
    assert "int8" in capsys.readouterr().out


def test_every_broken_file_is_named_once(snapshot, capsys) -> None:
    first, second, third = shards(snapshot / "transformer")[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    third.write_bytes(POINTER)
    (snapshot / "vae" / "config.json").write_bytes(POINTER)
    (snapshot / "processor" / "tokenizer.json").unlink()
    shutil.rmtree(snapshot / "text_encoder")
    part = snapshot / ".cache" / "huggingface" / "download" / "transformer" / "x.00.incomplete"
    part.parent.mkdir(parents=True)
    part.touch()
    with pytest.raises(SystemExit) as end:
        main([str(snapshot), "--check"])
    assert end.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("Not whole: 6 missing or broken.")
    for file, words in (
        (first, "is missing; download it."),
        (second, "is truncated: it holds"),
        (third, "is a git-lfs pointer"),
        (snapshot / "vae" / "config.json", "is a git-lfs pointer"),
        (snapshot / "processor" / "tokenizer.json", "is missing; download it."),
        (part, "is a part of a download that has not ended."),
    ):
        (line,) = (line for line in lines if line.startswith(f"{file} "))
        assert words in line
    assert sum(line.startswith("The glyph encoder is missing: ") for line in lines) == 1


def rewrite(file: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("transformer/config.json", {"num_layers": 3}, "does not fit its config: weights missing"),
        ("text_encoder/config.json", {"model_type": "bert"}, "does not belong to GLM-Image's"),
        ("scheduler/scheduler_config.json", {"base_shift": "x"}, "base_shift"),
        ("processor/tokenizer.json", {"model": 3}, "tokenizer"),
        ("vision_language_encoder/config.json", {"vq_config": None}, "vq_config"),
    ],
)
def test_configs_are_read_as_loaders_read_them(snapshot, file, change, sentence) -> None:
    rewrite(snapshot / file, lambda value: value.update(change))
    problems = check_model(snapshot).problems
    assert any(sentence in problem for problem in problems), problems
    assert all(problem.endswith(".") for problem in problems)


def test_a_broken_converted_file_is_named_although_the_snapshot_is_whole(
    snapshot, files, tmp_path
) -> None:
    whole = shutil.copy(files[0], snapshot)
    assert not check_model(snapshot).problems
    Path(whole).write_bytes(files[0].read_bytes()[:-10])
    (problem,) = check_model(snapshot).problems
    assert problem.startswith(f"{whole} is truncated")
    (snapshot / "more.safetensors").write_bytes(POINTER)
    assert len(check_model(snapshot).problems) == 2


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("folder", None, "holds no part of GLM-Image; give the folder"),
        ("file.safetensors", POINTER, "is a git-lfs pointer"),
        ("nothing", None, "is no file; choose another one"),
    ],
)
def test_what_is_no_model(tmp_path, name, content, sentence) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif name == "folder":
        (tmp_path / name).mkdir()
    (problem,) = check_model(tmp_path / name).problems
    assert sentence in problem


def test_a_part_of_a_download_does_no_harm_to_what_is_whole(snapshot) -> None:
    part = snapshot / "._____temp" / "model.safetensors"
    part.parent.mkdir()
    part.touch()
    report = check_model(snapshot)
    assert not report.problems
    assert report.leftovers == [part]
