"""Converted files: their content, refusals, resuming an interrupted run, and peak memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.convert import main
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files import conversion
from glm_image.glm_core.files.checking import check_model
from glm_image.glm_core.files.component import COMPONENTS, FORMAT, Component
from glm_image.glm_core.files.conversion import CHOICES, convert
from glm_image.glm_core.files.headers import read_header
from glm_image.glm_core.files.model_folder import find_component
from glm_image.glm_core.files.opening import open_component
from glm_image.glm_core.files.quantisation import QUANTISATION
from glm_image.glm_core.files.weight_dtypes import is_layer_matrix
from glm_image.glm_core.quant.packing import FORMATS, dequantise, packing, quantise
from reference import reference_snapshot
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-I", str(ROOT / "convert.py")]
"""With a Python that searches neither the script's folder nor the current one, as that of ComfyUI's
portable version does."""
QUANTISED = ("ar", "decoder")
FOLDERS = {
    "ar": "text_encoders",
    "decoder": "diffusion_models",
    "glyph": "text_encoders",
    "vae": "vae",
}


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots") / "GLM-Random"
    reference_snapshot(folder, "small")
    return folder


def quiet(done: int, total: int) -> None:
    """Shows no progress."""


def converted(snapshot: Path, name: str, dtype: str, out: Path) -> tuple[Component, Component]:
    """The component in the snapshot, and in the file converted from it."""
    source = open_component(snapshot, name)
    return source, open_component(convert(source, dtype, out, quiet), name)


def restored(component: Component, key: str, shape: torch.Size) -> torch.Tensor:
    """A weight in float32, whatever its format."""
    weight = component.tensor(key)
    if weight.dtype == torch.uint8:
        return dequantise(weight, packing(tuple(shape), component.quantisation), torch.float32)
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * component.tensor(key.replace(".weight", ".weight_scale"))
    return weight.float()


# ---- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CHOICES)
@pytest.mark.parametrize("name", COMPONENTS)
def test_every_weight_is_converted_within_the_formats_error(
    snapshot, tmp_path, name, dtype
) -> None:
    source, target = converted(snapshot, name, dtype, tmp_path)
    assert target.path.parent == tmp_path
    expected = source.state_dict()
    target.check({key: value.shape for key, value in expected.items()})
    limits = {"bf16": 0.003, "fp8": 0.04, "int8": 0.01, "int4": 0.12}
    for key, weight in expected.items():
        quantised = name in QUANTISED and dtype != "bf16" and is_layer_matrix(key, weight.ndim)
        assert (key.removesuffix(".weight") in target.quantised) == quantised
        error = (restored(target, key, weight.shape) - weight).norm() / weight.norm()
        assert error <= limits[dtype if quantised else "bf16"], key
        assert name != "glyph" or error == 0
    assert target.dtype == (torch.float32 if name == "glyph" else torch.bfloat16)


@pytest.mark.parametrize("name", FORMATS)
def test_packed_layers_hold_the_bytes_that_quantise_returns(snapshot, tmp_path, name) -> None:
    source, target = converted(snapshot, "ar", name, tmp_path)
    assert target.quantisation == name
    for layer in target.quantised:
        key = f"{layer}.weight"
        assert torch.equal(target.tensor(key), quantise(source.tensor(key), name))


def test_fp8_layers_use_the_whole_range_and_comfyuis_metadata(snapshot, tmp_path) -> None:
    _, target = converted(snapshot, "decoder", "fp8", tmp_path)
    stored = load_file(target.path)
    metadata = json.loads(read_header(target.path)[1][QUANTISATION])
    one = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert metadata["layers"] == dict.fromkeys(target.quantised, one)
    for layer in target.quantised:
        assert stored[f"{layer}.weight"].dtype == torch.float8_e4m3fn
        assert stored[f"{layer}.weight"].float().abs().max() == 448
        scale = stored[f"{layer}.weight_scale"]
        assert scale.dtype == torch.float32
        assert scale.shape == ()


def test_a_matrix_of_zeros_stays_zero(snapshot, tmp_path) -> None:
    file = tmp_path / "zeros.safetensors"
    source = open_component(convert(open_component(snapshot, "ar"), "bf16", tmp_path, quiet), "ar")
    state = {key: torch.zeros_like(value) for key, value in source.state_dict().items()}
    save_file(state, file, read_header(source.path)[1])
    for dtype in ("fp8", *FORMATS):
        target = open_component(convert(open_component(file, "ar"), dtype, tmp_path, quiet), "ar")
        for key, value in state.items():
            assert not restored(target, key, value.shape).any()


def test_a_file_that_was_cast_to_fp8_is_converted(snapshot, tmp_path) -> None:
    source = open_component(convert(open_component(snapshot, "ar"), "bf16", tmp_path, quiet), "ar")
    state = {
        key: value.to(torch.float8_e4m3fn) if is_layer_matrix(key, value.ndim) else value
        for key, value in source.state_dict().items()
    }
    file = tmp_path / "cast.safetensors"
    save_file(state, file, read_header(source.path)[1])
    target = open_component(convert(open_component(file, "ar"), "fp8", tmp_path, quiet), "ar")
    assert target.quantised
    for layer in target.quantised:
        weight = state[f"{layer}.weight"].float()
        found = restored(target, f"{layer}.weight", weight.shape)
        assert (found - weight).norm() <= 0.04 * weight.norm()


def test_a_converted_file_has_configs_and_provenance(snapshot, tmp_path) -> None:
    for name in COMPONENTS:
        source, target = converted(snapshot, name, "int8", tmp_path)
        for part in ("config", "processor", "scheduler", "vae"):
            assert getattr(target, part) == getattr(source, part)
        metadata = read_header(target.path)[1]
        assert (metadata["format"], metadata["component"]) == (FORMAT, name)
        provenance = json.loads(metadata["provenance"])
        assert provenance["source"] == "GLM-Random"
        assert provenance["dtype"] == "int8"
        assert provenance["tool"].startswith("glm_core.convert ")
        sizes = {file.name: file.stat().st_size for file in source.path.glob("*.safetensors")}
        assert provenance["files"] == sizes


def test_every_tensor_is_aligned(snapshot, tmp_path) -> None:
    for dtype in CHOICES:
        _, target = converted(snapshot, "ar", dtype, tmp_path)
        for info in target.tensors.values():
            assert info.begin % (64 if info.dtype == torch.uint8 else info.dtype.itemsize) == 0


# ---- refusals ----------------------------------------------------------------------------------


def test_a_quantised_file_is_not_converted_again(snapshot, tmp_path) -> None:
    _, target = converted(snapshot, "ar", "int8", tmp_path)
    with pytest.raises(GLMImageError, match="is int8 already; convert from the snapshot"):
        convert(target, "int4", tmp_path, quiet)


def test_int4_of_an_odd_width_is_refused_before_a_byte_is_written(tmp_path) -> None:
    reference_snapshot(tmp_path / "deep", "deep")
    out = tmp_path / "out"
    with pytest.raises(GLMImageError, match="width 72; choose int8"):
        convert(open_component(tmp_path / "deep", "ar"), "int4", out, quiet)
    assert not out.exists()


def test_a_full_disk_is_refused_before_writing(snapshot, tmp_path, monkeypatch) -> None:
    usage = conversion.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(GLMImageError, match=r"0\.0 GiB free"):
        convert(open_component(snapshot, "ar"), "bf16", tmp_path, quiet)
    assert not list(tmp_path.rglob("*.safetensors*"))


def rewritten(file: Path, change) -> Path:
    """The file with other metadata or tensors."""
    metadata, state = read_header(file)[1], load_file(file)
    change(metadata, state)
    save_file(state, file, metadata)
    return file


def other_format(metadata: dict, state: dict) -> None:
    metadata[QUANTISATION] = metadata[QUANTISATION].replace("glm_int8", "nvfp4")


def two_formats(metadata: dict, state: dict) -> None:
    metadata[QUANTISATION] = metadata[QUANTISATION].replace("glm_int8", "glm_int4", 1)


def no_format(metadata: dict, state: dict) -> None:
    del metadata[QUANTISATION]


def broken_format(metadata: dict, state: dict) -> None:
    metadata[QUANTISATION] = '{"layers": {"model": 3}}'


def missing_layer(metadata: dict, state: dict) -> None:
    del state[next(key for key, value in state.items() if value.dtype == torch.uint8)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_format, "quantised as nvfp4; use a file that is all in one of float8_e4m3fn"),
        (two_formats, "quantised as glm_int4 and glm_int8"),
        (no_format, r"holds \d+ quantised weights .* does not say in which format"),
        (broken_format, "_quantization_metadata of .* is broken"),
        (missing_layer, r"says that 1 layers are int8 .* missing or of another kind"),
    ],
)
def test_broken_quantisation_metadata_is_refused_when_opened(
    snapshot, tmp_path, change, message
) -> None:
    _, target = converted(snapshot, "ar", "int8", tmp_path)
    with pytest.raises(GLMImageError, match=message):
        open_component(rewritten(target.path, change), "ar")


def test_only_the_ar_and_the_decoder_may_be_quantised(snapshot, tmp_path) -> None:
    _, vae = converted(snapshot, "vae", "int8", tmp_path)

    def quantise_a_layer(metadata: dict, state: dict) -> None:
        key = "decoder.conv_in.weight"
        metadata[QUANTISATION] = json.dumps({"layers": {key[:-7]: {"format": "glm_int8"}}})
        state[key] = state[key].to(torch.uint8)

    with pytest.raises(GLMImageError, match="the VAE in int8, which only the AR model and"):
        open_component(rewritten(vae.path, quantise_a_layer), "vae")


def test_a_matrix_of_another_size_is_refused_before_it_is_read(snapshot, tmp_path) -> None:
    source, target = converted(snapshot, "ar", "int4", tmp_path)
    expected = {key: info.shape for key, info in source.tensors.items()}
    key = f"{sorted(target.quantised)[0]}.weight"
    rows, columns = expected[key]
    with pytest.raises(GLMImageError, match=f"weights of another shape: 1 .{key}"):
        target.check({**expected, key: torch.Size((rows + 64, columns))})


def test_a_missing_fp8_scale_is_refused(snapshot, tmp_path) -> None:
    source, target = converted(snapshot, "ar", "fp8", tmp_path)
    expected = {key: info.shape for key, info in source.tensors.items()}
    layer = sorted(target.quantised)[0]
    lost = rewritten(target.path, lambda _, state: state.pop(f"{layer}.weight_scale"))
    with pytest.raises(GLMImageError, match=f"weights missing: 1 .{layer}.weight_scale"):
        open_component(lost, "ar").check(expected)


# ---- interrupted runs ----------------------------------------------------------------------------


class Killed(BaseException):
    """Raised in a run in place of a kill."""


@pytest.mark.parametrize("dtype", ["fp8", "int4"])
def test_a_run_interrupted_anywhere_resumes_and_gives_the_same_file(
    snapshot, tmp_path, dtype
) -> None:
    source = open_component(snapshot, "ar")
    whole = convert(source, dtype, tmp_path / "whole", quiet)
    size = whole.stat().st_size
    partial = tmp_path / f"{whole.name}.partial"
    for length in [0, 1, 7, *range(100, size, size // 40), size - 1, size]:
        partial.write_bytes(whole.read_bytes()[:length])
        assert not list(tmp_path.glob("*.safetensors"))  # which a loader would list
        again = convert(source, dtype, tmp_path, quiet)
        assert again.read_bytes() == whole.read_bytes()
        assert not partial.exists()
        again.unlink()


def test_complete_tensors_are_not_written_again(snapshot, tmp_path) -> None:
    source = open_component(snapshot, "decoder")
    whole = convert(source, "int8", tmp_path / "whole", quiet).read_bytes()
    seen: list[int] = []

    def stop_half_way(done: int, total: int) -> None:
        seen.append(done)
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        convert(source, "int8", tmp_path, stop_half_way)
    reached = seen.pop()
    seen.clear()
    file = convert(source, "int8", tmp_path, lambda done, total: seen.append(done))
    assert seen[0] > reached - 1
    assert file.read_bytes() == whole


def interrupted(component: Component, dtype: str, out: Path) -> Path:
    """The file of a run that was stopped half way."""

    def stop_half_way(done: int, total: int) -> None:
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        convert(component, dtype, out, stop_half_way)
    return next(out.glob("*.partial"))


@pytest.mark.parametrize("damage", ["a byte", "zeros", "shorter", "longer"])
def test_a_damaged_part_is_written_again(snapshot, tmp_path, damage) -> None:
    source = open_component(snapshot, "decoder")
    whole = convert(source, "int8", tmp_path / "whole", quiet).read_bytes()
    partial = interrupted(source, "int8", tmp_path)
    data = bytearray(partial.read_bytes())
    if damage == "a byte":
        data[len(data) // 2] ^= 1
    elif damage == "zeros":  # as a power cut leaves it, in its whole length
        data[len(data) // 2 :] = bytes(len(whole) - len(data) // 2)
    else:
        data = data[: len(data) // 3] if damage == "shorter" else data + whole
    partial.write_bytes(data)
    assert convert(source, "int8", tmp_path, quiet).read_bytes() == whole
    assert [file.suffix for file in tmp_path.iterdir() if file.is_file()] == [".safetensors"]


def test_a_second_run_of_one_file_is_refused_and_harms_nothing(snapshot, tmp_path) -> None:
    source = open_component(snapshot, "vae")
    whole = convert(source, "bf16", tmp_path / "whole", quiet).read_bytes()
    refusals = []

    def again(done: int, total: int) -> None:
        with pytest.raises(GLMImageError, match=r"Another run writes .*; wait until") as error:
            convert(source, "bf16", tmp_path, quiet)
        refusals.append(error)

    assert convert(source, "bf16", tmp_path, again).read_bytes() == whole
    assert refusals


def test_a_changed_source_or_header_starts_anew(snapshot, tmp_path) -> None:
    source = open_component(snapshot, "ar")
    file = convert(source, "int8", tmp_path, quiet)
    whole = file.read_bytes()
    partial = file.with_name(f"{file.name}.partial")
    stale = bytearray(whole)
    stale[-100:] = bytes(100)

    partial.write_bytes(stale)
    os.utime(partial, (0, 0))  # older than the snapshot
    assert convert(source, "int8", tmp_path, quiet).read_bytes() == whole

    stale[40] ^= 1  # in the header
    partial.write_bytes(stale)
    assert convert(source, "int8", tmp_path, quiet).read_bytes() == whole


def test_a_killed_command_leaves_no_file_and_finishes_when_run_again(tmp_path) -> None:
    """SIGKILL at some moment while the command writes."""
    big_snapshot(tmp_path / "big", matrices=12, width=1024)
    command = [*COMMAND, str(tmp_path / "big"), str(tmp_path / "out"), "--component", "glyph"]
    command += ["--dtype", "bf16"]
    file = tmp_path / "out" / "big_glyph_f32.safetensors"
    partial = file.with_name(f"{file.name}.partial")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert file.exists() != partial.exists()  # so a file under its final name is complete
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert not partial.exists()
    source = open_component(tmp_path / "big", "glyph").state_dict()
    stored = load_file(file)
    assert stored.keys() == source.keys()
    assert all(torch.equal(stored[key], value) for key, value in source.items())


def big_snapshot(folder: Path, matrices: int, width: int) -> None:
    """A glyph encoder's folder with float32 matrices of any name."""
    weights = folder / "text_encoder"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text('{"model_type": "t5"}')
    generator = torch.Generator().manual_seed(0)
    state = {
        f"m{i}.weight": torch.randn(width, width, generator=generator) for i in range(matrices)
    }
    save_file(state, weights / "model.safetensors")


def test_the_command_writes_into_the_models_own_folder(snapshot, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(snapshot, tmp_path / "models--org--Mine" / "snapshots" / "5d1f"))
    main([str(tmp_path / "models--org--Mine"), "--dtype", "int8"])
    written = {name: find_component(folder, name) for name in COMPONENTS}
    assert {file.name for file in written.values()} == {
        "Mine_ar_int8.safetensors",
        "Mine_decoder_int8.safetensors",
        "Mine_glyph_f32.safetensors",
        "Mine_vae_bf16.safetensors",
    }
    said = capsys.readouterr().err
    assert "Mine_ar_int8.safetensors" in said
    assert "The loaders take these files under the model's own name." in said
    for kind in COMPONENTS.values():
        shutil.rmtree(folder / kind.folder)
    assert not check_model(folder).problems  # what the command says may be deleted


@pytest.mark.parametrize(("inside", "source"), [("", "."), ("vae", "..")])
def test_files_have_the_models_name_also_inside_its_folder(
    snapshot, tmp_path, monkeypatch, inside, source
) -> None:
    monkeypatch.chdir(snapshot / inside)
    main([source, str(tmp_path), "--component", "vae", "--dtype", "bf16"])
    (file,) = tmp_path.iterdir()
    assert file.name == "GLM-Random_vae_bf16.safetensors"
    assert json.loads(read_header(file)[1]["provenance"])["source"] == "GLM-Random"


def test_the_command_does_not_write_a_complete_file_again(snapshot, tmp_path, capsys) -> None:
    run = [str(snapshot), str(tmp_path), "--component", "vae", "--dtype", "bf16"]
    main(run)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_ino
    main(run)
    assert file.stat().st_ino == before
    assert "0.0 GB to write" in capsys.readouterr().err
    data = bytearray(file.read_bytes())
    data[30] ^= 1  # in the header, as of another source
    file.write_bytes(data)
    main(run)
    assert file.stat().st_ino != before
    before = file.stat().st_ino
    os.utime(file, (0, 0))  # older than the snapshot
    main(run)
    assert file.stat().st_ino != before


def test_the_command_sorts_files_into_comfyuis_folders(snapshot, tmp_path) -> None:
    main([str(snapshot), "--models", str(tmp_path), "--dtype", "int8"])
    for name, folder in FOLDERS.items():
        (file,) = (tmp_path / folder).glob(f"GLM-Random_{name}_*.safetensors")
        assert open_component(file, name).name == name
    with pytest.raises(SystemExit, match=r"is ComfyUI's models folder; give .*NAME, or"):
        main([str(snapshot), str(tmp_path), "--dtype", "int8"])


def test_the_command_asks_for_a_format(snapshot, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(snapshot)])
    assert end.value.code == 2
    assert "--dtype {bf16,fp8,int8,int4}" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_is_said_with_the_folder(snapshot, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion.os, "fsync", full)
    with pytest.raises(SystemExit, match=rf"{tmp_path} cannot be .* \(No space left .*; run again"):
        main([str(snapshot), str(tmp_path), "--component", "vae", "--dtype", "bf16"])
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_second_format_in_one_folder_is_said(snapshot, tmp_path, capsys) -> None:
    for dtype in ("int8", "fp8"):
        main([str(snapshot), str(tmp_path), "--dtype", dtype, "--component", "ar"])
    assert "holds the AR model 2 times, in" in capsys.readouterr().err


# ---- memory ------------------------------------------------------------------------------------


PEAK = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    from glm_core.files.component import Component
    from glm_core.files.conversion import convert
    from glm_core.files.headers import read_header

    torch.set_num_threads(1)
    file, dtype, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

    def peak():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    component = Component("ar", file, {}, read_header(file)[0])
    before = peak()
    convert(component, dtype, out, lambda done, total: None)
    sys.stdout.write(str(peak() - before))
    """
)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int4"])
def test_peak_memory_is_bounded_by_one_matrix(tmp_path, dtype) -> None:
    """Of 300 MB of weights 96 MB are an embedding, which is never whole in memory."""
    state = {
        f"model.layers.{i}.mlp.down_proj.weight": torch.full((4096, 2048), 0.1 * i).bfloat16()
        for i in range(12)
    }
    state["model.embed_tokens.weight"] = torch.zeros(24000, 2048).bfloat16()
    file = tmp_path / "source.safetensors"
    save_file(state, file)
    matrix, total = 4096 * 2048 * 2, file.stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(file), dtype, str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    limit = 2 * matrix + 80e6  # a matrix and what it becomes; slices of it in float32
    assert int(run.stdout) < limit < total / 2
