"""What ComfyUI's save nodes write of our objects loads again, and gives the same picture."""

from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_merging import (
    CheckpointSave,
    CLIPSave,
    ModelMergeSimple,
    ModelSave,
    VAESave,
)
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.conversion import convert
from glm_image.glm_core.files.opening import open_component
from glm_image.nodes.host.paths import find_model, model_names
from helpers import planned, relative_error, same, stages
from safetensors.torch import load_file, save_file
from torch import Tensor

PROMPT = "a door with 'PULL' on it"
SIZE = (64, 96)
LAYERS = ("transformer_blocks.0.ff.net.2", "glyph_projector.net.2")


@pytest.fixture(scope="module")
def run(nodes):
    return stages(nodes, "small", PROMPT, SIZE)


@pytest.fixture(scope="module", autouse=True)
def folders(nodes) -> Path:
    """The folders of the save nodes, which the server adds to those of the loaders."""
    output = Path(folder_paths.get_output_directory())
    for folder in ("checkpoints", "clip", "vae", "diffusion_models"):
        (output / folder).mkdir(exist_ok=True)
        folder_paths.add_model_folder_path(folder, str(output / folder))
    return output


@pytest.fixture(scope="module")
def lora(nodes, run) -> str:
    """The name of a LoRA that changes two layers of the decoder."""
    generator, state = torch.Generator().manual_seed(3), {}
    for layer in LAYERS:
        rows, columns = run.model.model.diffusion_model.get_submodule(layer).weight.shape
        state[f"{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
        state[f"{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
    save_file(state, Path(folder_paths.models_dir, "loras", "saved.safetensors"))
    return "saved.safetensors"


def load(nodes, kind: str, *args: Any) -> Any:
    return nodes[f"GLMImageLoad{kind}"].execute(*args).result[0]


def with_lora(nodes, model, lora: str) -> Any:
    return nodes["GLMImageLoadLora"].execute(lora, 1.0, 1.0, model).result[0]


def decode(nodes, run, model, positive=None, negative=None) -> Tensor:
    rest = (positive or run.positive, negative or run.negative, run.empty, 7, 2, 1.5, 1.0)
    return nodes["GLMImageDecode"].execute(model, *rest).result[0]["samples"]


def saved(folders: Path, prefix: str) -> str:
    """The name of the one file with that prefix, below its folder."""
    (file,) = folders.glob(f"{prefix}_0*.safetensors")
    return file.name


@pytest.mark.parametrize("dtype", ["default", "bf16", "fp8_e4m3fn"])
def test_a_model_with_a_lora(nodes, run, folders, lora, dtype: str) -> None:
    model = with_lora(nodes, load(nodes, "Decoder", "small", dtype), lora)
    ModelSave().save(model, f"diffusion_models/with_lora_{dtype}", prompt={"1": {}})
    name = saved(folders, f"diffusion_models/with_lora_{dtype}")
    assert name in model_names("decoder")
    again = load(nodes, "Decoder", name, "default")
    assert again.model.compute_dtype == model.model.compute_dtype
    picture = decode(nodes, run, model)
    assert same(decode(nodes, run, again), picture)
    plain = load(nodes, "Decoder", "small", dtype)
    assert relative_error(picture, decode(nodes, run, plain)) > 1e-3


def test_a_merge_and_what_is_saved_of_a_saved_one(nodes, run, folders, lora) -> None:
    (merge,) = ModelMergeSimple().merge(run.model, with_lora(nodes, run.model, lora), 0.3)
    ModelSave().save(merge, "diffusion_models/merge")
    again = load(nodes, "Decoder", saved(folders, "diffusion_models/merge"), "default")
    ModelSave().save(again, "diffusion_models/twice")
    twice = load(nodes, "Decoder", saved(folders, "diffusion_models/twice"), "default")
    picture = decode(nodes, run, merge)
    assert relative_error(picture, run.latent["samples"]) > 1e-3
    assert same(decode(nodes, run, again), picture)
    assert same(decode(nodes, run, twice), picture)


def test_a_checkpoint_is_listed_by_the_loaders_of_what_it_holds(nodes, run, folders, lora) -> None:
    model = with_lora(nodes, run.model, lora)
    CheckpointSave().save(model, run.clip, run.vae, "checkpoints/whole")
    name = saved(folders, "checkpoints/whole")
    assert {kind for kind in ("ar", "decoder", "glyph", "vae") if name in model_names(kind)} == {
        "decoder",
        "glyph",
        "vae",
    }
    clip, vae = load(nodes, "GlyphEncoder", name), load(nodes, "VAE", name)
    glyphs, _ = nodes["GLMImageGlyphEncode"].execute(clip, PROMPT).result
    positive, negative, _ = nodes["GLMImageApplyTokens"].execute(glyphs, run.tokens, -1).result
    latents = decode(nodes, run, load(nodes, "Decoder", name, "default"), positive, negative)
    assert same(latents, decode(nodes, run, model))
    assert same(vae.decode(latents), run.vae.decode(latents))
    plan, _ = planned(nodes, name)
    assert load(nodes, "Decoder", name, "default", plan).model.segments == ()
    with pytest.raises(GLMImageError, match=r"holds the .* and the .*, not the AR model; choose"):
        load(nodes, "AR", name, "default")


def test_a_clip_and_a_vae(nodes, run, folders) -> None:
    CLIPSave().save(run.clip, "clip/glyphs")
    VAESave().save(run.vae, "vae/pixels")
    clip = load(nodes, "GlyphEncoder", saved(folders, "clip/glyphs"))
    vae = load(nodes, "VAE", saved(folders, "vae/pixels"))
    glyphs, _ = nodes["GLMImageGlyphEncode"].execute(clip, PROMPT).result
    assert same(glyphs[0][0], run.positive[0][0])
    assert same(vae.decode(run.latent["samples"]), run.image)


def test_the_file_that_holds_the_component_is_found_before_one_of_the_same_name(
    nodes, run, folders
) -> None:
    VAESave().save(run.vae, "diffusion_models/same")
    ModelSave().save(run.model, "checkpoints/same")
    name = saved(folders, "checkpoints/same")
    assert saved(folders, "diffusion_models/same") == name
    assert find_model("decoder", name) == folders / "checkpoints" / name


def test_nothing_is_saved_beside_the_weights_but_the_config(nodes, run, folders) -> None:
    VAESave().save(run.vae, "vae/keys")
    state = load_file(folders / "vae" / saved(folders, "vae/keys"))
    assert state.pop("glm_image_config").dtype == torch.uint8
    assert state.keys() == run.vae.first_stage_model.state_dict().keys()


@pytest.mark.parametrize(
    ("dtype", "split", "message"),
    [
        ("int8", "", "^A decoder in int8 cannot be saved; load the snapshot with weight_dtype"),
        ("int4", "", "^A decoder in int4 cannot be saved; load the snapshot with weight_dtype"),
        ("default", "cpu=0-0,cpu=1-1", "^A decoder that a device plan has split cannot be saved"),
    ],
    ids=["int8", "int4", "split"],
)
def test_what_cannot_be_saved_is_refused(nodes, run, folders, dtype, split, message) -> None:
    plan, _ = planned(nodes, decoder_split=split)
    model = load(nodes, "Decoder", "small", dtype, plan)
    with pytest.raises(GLMImageError, match=message):
        ModelSave().save(model, "diffusion_models/refused")
    assert not list(folders.glob("diffusion_models/refused*"))


def test_a_file_in_scaled_fp8_is_refused(nodes, run, folders) -> None:
    decoder = open_component(find_model("decoder", "small"), "decoder")
    file = convert(decoder, "fp8", folders / "diffusion_models", lambda *_: None)
    model = load(nodes, "Decoder", file.name, "default")
    with pytest.raises(GLMImageError, match=r"^A decoder in fp8_e4m3fn cannot be saved; load"):
        ModelSave().save(model, "diffusion_models/scaled")
