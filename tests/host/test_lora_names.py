"""Every trainer's names in LoRA files, through our loader and through ComfyUI's; names of files."""

import re
from pathlib import Path

import comfy.model_base
import comfy.sd
import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.nodes.host.decoder import GLMImageModel
from lora_kinds import LAYERS, dora_of_peft, key_of, lora, patched, plain
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "loras.md").read_text()


def rows_of(table: str) -> list[list[str]]:
    lines = re.findall(r"^\| (.+) \|$", DOCUMENT.split(f"## {table}\n")[1].split("\n## ")[0], re.M)
    return [re.split(r"\s*\|\s*", line) for line in lines[1:]]


def test_the_document_lists_the_kinds() -> None:
    listed = {kind for kind, *_ in rows_of("Kinds")}
    assert listed == {
        "LoRA", "LoRA of an embedding", "LoRA with a bias", "DoRA", "LoHa", "LoKr", "GLoRA", "OFT",
        "BOFT", "difference", "weight",
    }  # fmt: skip


def test_peft_and_comfyui_write_one_dora(apply, models, normal) -> None:
    """The same matrices and magnitudes, through our loader and through ComfyUI's."""
    weights = {
        layer: plain(models, key_of("decoder", layer))
        for layer in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj")
    }
    peft, comfyui = {}, {}
    for layer, weight in weights.items():
        tensors, _ = dora_of_peft(weight, normal)
        peft |= {f"transformer.{layer}.{name}": value for name, value in tensors.items()}
        tensors["dora_scale"] = tensors.pop("lora_magnitude_vector")[:, None]
        comfyui |= {f"diffusion_model.{layer}.{name}": value for name, value in tensors.items()}
    ours, theirs = apply(peft)["decoder"], apply(comfyui)["decoder"]
    native, _ = comfy.sd.load_lora_for_models(models[0], None, comfyui, 1.0, 0.0)
    for layer in weights:
        results = [patched(it, models, key_of("decoder", layer)) for it in (ours, theirs, native)]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


# ---- names ---------------------------------------------------------------------------------------


def named(pattern: str, component: str) -> tuple[str, str]:
    """A layer's name in a file, and the suffixes of the pair, by a cell of the document."""
    prefix, suffix = re.fullmatch(r"`(.*)…\.(.+)`", pattern).groups()
    layer = LAYERS[component]
    name = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
    return name, suffix


def pair_of(pattern: str, component: str, w: Tensor, t) -> tuple[dict[str, Tensor], Tensor]:
    name, down = named(pattern, component)
    up = down.replace("lora_A", "lora_B").replace("down", "up")
    tensors, _ = lora(w, t)
    expected = w + tensors["lora_B.weight"] @ tensors["lora_A.weight"]
    halves = zip((down, up), tensors.values(), strict=True)
    return {f"{name}.{half}": value for half, value in halves}, expected


NAMES = rows_of("Names")


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row[0])
def test_our_loader_reads_every_name(apply, models, normal, caplog, row) -> None:
    for component, pattern in zip(("decoder", "ar"), row[1:3], strict=True):
        if not pattern:
            continue
        key = key_of(component)
        tensors, expected = pair_of(pattern, component, plain(models, key), normal)
        patcher = apply(tensors)[component]
        torch.testing.assert_close(patched(patcher, models, key), expected)
    assert not caplog.records


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row[0])
def test_comfyuis_loader_reads_a_name_or_says_so(models, normal, row) -> None:
    key = key_of("decoder")
    tensors, expected = pair_of(row[1], "decoder", plain(models, key), normal)
    if row[3] == "yes":
        patcher, _ = comfy.sd.load_lora_for_models(models[0], None, tensors, 1.0, 0.0)
        torch.testing.assert_close(patched(patcher, models, key), expected)
    else:
        with pytest.raises(GLMImageError, match="use GLM-Image Load LoRA"):
            comfy.sd.load_lora_for_models(models[0], None, tensors, 1.0, 0.0)


def test_nothing_of_qwen_image_but_its_lora_names_is_inherited(models) -> None:
    """ComfyUI's LoRA code takes `transformer.`, bare and `lycoris_` names for this class."""
    base, borrowed = comfy.model_base.BaseModel, comfy.model_base.QwenImage
    assert borrowed.__mro__[1] is base
    added = {name for name in vars(borrowed) if name not in ("__module__", "__doc__")}
    assert added - {"__firstlineno__", "__static_attributes__"} <= vars(GLMImageModel).keys()
    model = models[0].model
    plain_model = base(model.model_config, unet_model=lambda **_: model.diffusion_model)
    # What QwenImage's __init__ sets, which is not called.
    assert model.memory_usage_factor_conds == plain_model.memory_usage_factor_conds == ()


def test_comfyui_asks_for_qwen_image_in_its_lora_names_alone() -> None:
    host = Path(comfy.model_base.__file__).parents[1]
    files = [*host.glob("*.py"), *host.glob("comfy/**/*.py"), *host.glob("comfy_extras/*.py")]
    asking = {
        file.relative_to(host).as_posix()
        for file in files
        if re.search(r"model_base\.QwenImage\b(?!\()", file.read_text(encoding="utf-8"))
    }
    assert asking == {"comfy/lora.py"}


# ---- file names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["sub/ラ ü.safetensors", "sub\\ラ ü.safetensors"])
@pytest.mark.parametrize("asked", ["sub/ラ ü.safetensors", "sub\\ラ ü.safetensors"])
def test_folders_are_separated_as_on_any_system(nodes, models, normal, loras, file, asked) -> None:
    path = loras / file
    path.parent.mkdir(exist_ok=True)
    tensors, _ = lora(plain(models, key_of("ar")), normal)
    save_file({f"{LAYERS['ar']}.{name}": value for name, value in tensors.items()}, path)
    node = nodes["GLMImageLoadLora"]
    try:
        assert node.validate_inputs(lora_name=asked) is True
        _, ar = node.execute(asked, 1.0, 1.0, None, models[1]).result
    finally:
        path.unlink()
    assert ar.patcher.patches.keys() == {key_of("ar")}


@pytest.mark.parametrize("name", [5, ["a"], "", "..", "a" * 5000, "a\0b", "a\ud800"], ids=repr)
def test_a_name_of_no_file_is_a_sentence(nodes, models, name) -> None:
    node = nodes["GLMImageLoadLora"]
    said = node.validate_inputs(lora_name=name)
    assert "lora_name is" in said or "into models/loras" in said
    assert len(said) < 400
    with pytest.raises(GLMImageError):
        node.execute(name, 1.0, 1.0, None, models[1])
