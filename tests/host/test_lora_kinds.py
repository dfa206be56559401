"""Every kind of LoRA under every trainer's names: the host's patched weight equals the formula."""

import json
import re
from pathlib import Path

import comfy.lora
import comfy.model_base
import comfy.sd
import comfy.utils
import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.nodes.host.decoder import GLMImageModel
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "loras.md").read_text()
LAYERS = {
    "decoder": "transformer_blocks.0.attn1.to_q",
    "ar": "model.language_model.layers.0.self_attn.q_proj",
}
RANK, ALPHA = 4, 6.0
SCALE = ALPHA / RANK


@pytest.fixture(scope="module")
def models(nodes):
    """The decoder's patcher and the AR, small."""
    return tuple(
        nodes[f"GLMImageLoad{kind}"].execute("small", "default").result[0]
        for kind in ("Decoder", "AR")
    )


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.3


@pytest.fixture
def apply(nodes, models, loras):
    """Applies a file to both models with a strength; gives their patchers."""

    def apply(tensors: dict[str, Tensor], metadata: dict | None = None, strength: float = 1.0):
        save_file(
            {key: value.contiguous().clone() for key, value in tensors.items()},
            loras / "kind.safetensors",
            metadata and {"lora_adapter_metadata": json.dumps(metadata)},
        )
        load_lora = nodes["GLMImageLoadLora"].execute
        decoder, ar = load_lora("kind.safetensors", strength, strength, *models).result
        return {"decoder": decoder, "ar": ar.patcher}

    return apply


def key_of(component: str, layer: str | None = None, target: str = "weight") -> str:
    root = "diffusion_model." if component == "decoder" else ""
    return f"{root}{layer or LAYERS[component]}.{target}"


def plain(models, key: str) -> Tensor:
    patcher = models[0] if key.startswith("diffusion_model.") else models[1].patcher
    return comfy.utils.get_attr(patcher.model, key).detach().clone()


def patched(patcher, models, key: str) -> Tensor:
    """As the host bakes its patches into a weight."""
    return comfy.lora.calculate_weight(patcher.patches[key], plain(models, key), key)


def rows_of(table: str) -> list[list[str]]:
    lines = re.findall(r"^\| (.+) \|$", DOCUMENT.split(f"## {table}\n")[1].split("\n## ")[0], re.M)
    return [re.split(r"\s*\|\s*", line) for line in lines[1:]]


# ---- kinds --------------------------------------------------------------------------------------


def lora(w, t):
    tensors = {"lora_A.weight": t(RANK, w.shape[1]), "lora_B.weight": t(w.shape[0], RANK)}
    return tensors, w + SCALE * tensors["lora_B.weight"] @ tensors["lora_A.weight"]


def lora_of_kohya(w, t):
    tensors, expected = lora(w, t)
    return dict(
        zip(("lora_down.weight", "lora_up.weight"), tensors.values(), strict=True)
    ), expected


def dora_of_peft(w, t):
    tensors, changed = lora(w, t)
    magnitude = t(w.shape[0]).abs() + 1
    return (
        tensors | {"lora_magnitude_vector": magnitude},
        magnitude[:, None] * changed / w.norm(dim=1, keepdim=True),
    )


def dora_by_rows(w, t):
    tensors, expected = dora_of_peft(w, t)
    magnitude = tensors.pop("lora_magnitude_vector")
    return tensors | {"dora_scale": magnitude[:, None]}, expected


def dora_by_columns(w, t):
    tensors, changed = lora(w, t)
    magnitude = t(1, w.shape[1]).abs() + 1
    expected = magnitude * changed / changed.norm(dim=0, keepdim=True)
    return tensors | {"dora_scale": magnitude}, expected


def loha(w, t):
    tensors = {}
    for i in "12":
        tensors |= {f"hada_w{i}_a": t(w.shape[0], RANK), f"hada_w{i}_b": t(RANK, w.shape[1])}
    first, second, third, fourth = tensors.values()
    return tensors, w + SCALE * (first @ second) * (third @ fourth)


def lokr(w, t):
    rows, columns = w.shape
    tensors = {
        "lokr_w1": t(2, 4),
        "lokr_w2_a": t(rows // 2, RANK),
        "lokr_w2_b": t(RANK, columns // 4),
    }
    whole, a, b = tensors.values()
    return tensors, w + SCALE * torch.kron(whole, a @ b)


def lokr_of_a_split_first(w, t):
    rows, columns = w.shape
    tensors = {
        "lokr_w1_a": t(8, RANK),
        "lokr_w1_b": t(RANK, 8),
        "lokr_w2": t(rows // 8, columns // 8),
    }
    a, b, whole = tensors.values()
    return tensors, w + SCALE * torch.kron(a @ b, whole)


def lokr_of_whole_matrices(w, t):
    """LyCORIS does not scale it."""
    tensors = {"lokr_w1": t(2, 4), "lokr_w2": t(w.shape[0] // 2, w.shape[1] // 4)}
    return tensors, w + torch.kron(*tensors.values())


def glora(w, t):
    rows, columns = w.shape
    shapes = {
        "a1": (columns, RANK),
        "a2": (RANK, columns),
        "b1": (rows, RANK),
        "b2": (RANK, columns),
    }
    tensors = {f"{name}.weight": t(*shape) for name, shape in shapes.items()}
    a1, a2, b1, b2 = tensors.values()
    return tensors, w + SCALE * (w @ a1 @ a2 + b1 @ b2)


def rotation(blocks: Tensor) -> Tensor:
    """Cayley's map of the skew part, as LyCORIS defines OFT; alpha limits its size."""
    skew = blocks - blocks.mT
    skew = skew * min(1.0, ALPHA / skew.norm())
    eye = torch.eye(blocks.shape[-1])
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def oft(w, t):
    blocks = t(w.shape[0] // 8, 8, 8)
    turned = rotation(blocks).mT @ w.view(-1, 8, w.shape[1])
    return {"oft_blocks": blocks}, turned.reshape(w.shape)


def boft(w, t):
    """Of one factor: pairs of rows of blocks are turned as they lie."""
    blocks, rescale = t(1, w.shape[0] // 8, 8, 8), t(w.shape[0], 1) + 1
    turned = rotation(blocks)[0] @ _interleaved(w).view(-1, 8, w.shape[1])
    back = turned.reshape(-1, 4, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
    return {"oft_blocks": blocks, "rescale": rescale}, back * rescale


def _interleaved(w: Tensor) -> Tensor:
    return w.view(-1, 2, 4, w.shape[1]).transpose(1, 2).reshape(w.shape)


def difference(w, t):
    return {"diff": (d := t(*w.shape))}, w + d


def norm_difference(w, t):
    return {"w_norm": (d := t(*w.shape))}, w + d


def whole_weight(w, t):
    return {"set_weight": (new := t(*w.shape))}, new


KINDS = [
    lora, lora_of_kohya, dora_of_peft, dora_by_rows, dora_by_columns, loha, lokr,
    lokr_of_a_split_first, lokr_of_whole_matrices, glora, oft, boft, difference, norm_difference,
    whole_weight,
]  # fmt: skip
UNSCALED = (difference, norm_difference, whole_weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("component", ["decoder", "ar"])
def test_the_patched_weight_is_the_formula(
    apply, models, normal, caplog, component: str, kind
) -> None:
    key = key_of(component)
    tensors, expected = kind(plain(models, key), normal)
    if kind not in UNSCALED:
        tensors["alpha"] = torch.tensor(ALPHA)
    patchers = apply({f"{LAYERS[component]}.{name}": value for name, value in tensors.items()})
    torch.testing.assert_close(patched(patchers[component], models, key), expected)
    other = "ar" if component == "decoder" else "decoder"
    assert not patchers[other].patches
    assert not caplog.records


def test_a_lora_of_an_embedding(apply, models, normal) -> None:
    name = "prior_token_embedding"
    key = key_of("decoder", name)
    w = plain(models, key)
    a, b = normal(RANK, w.shape[0]), normal(w.shape[1], RANK)
    tensors = {f"transformer.{name}.lora_embedding_A": a, f"transformer.{name}.lora_embedding_B": b}
    decoder = apply(tensors, {"transformer.lora_alpha": ALPHA})["decoder"]
    torch.testing.assert_close(patched(decoder, models, key), w + SCALE * (b @ a).T)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_a_pairs_bias_is_scaled_as_its_product(apply, models, normal, rank_stabilised) -> None:
    key, bias = key_of("decoder"), key_of("decoder", target="bias")
    scale = ALPHA / RANK**0.5 if rank_stabilised else SCALE
    tensors, _ = lora(plain(models, key), normal)
    tensors["lora_B.bias"] = normal(plain(models, bias).shape[0])
    decoder = apply(
        {f"{LAYERS['decoder']}.{name}": value for name, value in tensors.items()},
        {"lora_alpha": ALPHA, "use_rslora": rank_stabilised},
    )["decoder"]
    down, up, added = tensors.values()
    expected = plain(models, key) + scale * up @ down
    torch.testing.assert_close(patched(decoder, models, key), expected)
    torch.testing.assert_close(patched(decoder, models, bias), plain(models, bias) + scale * added)


@pytest.mark.parametrize("names", [("diff_b",), ("w_norm", "b_norm")])
def test_a_difference_of_a_bias(apply, models, normal, names) -> None:
    bias = key_of("decoder", target="bias")
    weight = plain(models, key_of("decoder"))
    added = normal(weight.shape[0])
    values = {"w_norm": normal(*weight.shape), names[-1]: added}
    tensors = {f"transformer.{LAYERS['decoder']}.{name}": values[name] for name in names}
    decoder = apply(tensors)["decoder"]
    torch.testing.assert_close(patched(decoder, models, bias), plain(models, bias) + added)


@pytest.mark.parametrize("kind", [loha, lokr, lokr_of_a_split_first])
def test_peft_scales_loha_and_lokr_by_its_config(apply, models, normal, kind) -> None:
    key = key_of("decoder")
    tensors, expected = kind(plain(models, key), normal)
    named = {
        f"base_model.model.{LAYERS['decoder']}.{name}": value for name, value in tensors.items()
    }
    decoder = apply(named, {"alpha": ALPHA, "r": RANK})["decoder"]
    torch.testing.assert_close(patched(decoder, models, key), expected)


def test_peft_scales_a_lokr_of_whole_matrices_too(apply, models, normal) -> None:
    key = key_of("decoder")
    w = plain(models, key)
    tensors, unscaled = lokr_of_whole_matrices(w, normal)
    named = {
        f"base_model.model.{LAYERS['decoder']}.{name}": value for name, value in tensors.items()
    }
    config = {
        "alpha": 1.0,
        "r": 99,
        "alpha_pattern": {"to_q": ALPHA},
        "rank_pattern": {"to_q": RANK},
    }
    decoder = apply(named, config)["decoder"]
    torch.testing.assert_close(patched(decoder, models, key), w + SCALE * (unscaled - w))


def test_two_changes_of_one_weight_are_both_applied(apply, models, normal) -> None:
    key = key_of("decoder")
    w = plain(models, key)
    first, changed = lora(w, normal)
    second, different = difference(w, normal)
    tensors = {f"transformer.{LAYERS['decoder']}.{k}": v for k, v in (first | second).items()}
    tensors |= {f"diffusion_model.{LAYERS['decoder']}.{k}": v for k, v in first.items()}
    decoder = apply(tensors, {"transformer.lora_alpha": ALPHA, "diffusion_model.lora_alpha": ALPHA})
    expected = w + 2 * (changed - w) + (different - w)
    torch.testing.assert_close(patched(decoder["decoder"], models, key), expected)


def test_the_strength_of_a_dora_mixes_it_with_the_plain_weight(apply, models, normal) -> None:
    key = key_of("decoder")
    w = plain(models, key)
    tensors, expected = dora_of_peft(w, normal)
    named = {f"transformer.{LAYERS['decoder']}.{name}": value for name, value in tensors.items()}
    decoder = apply(named, {"transformer.lora_alpha": ALPHA}, strength=0.25)["decoder"]
    torch.testing.assert_close(patched(decoder, models, key), w + 0.25 * (expected - w))


@pytest.mark.parametrize(
    "suffix", ["lora_magnitude_vector.default.weight", "lora_magnitude_vector.default"]
)
def test_magnitudes_in_a_peft_models_memory(apply, models, normal, suffix) -> None:
    key = key_of("ar")
    tensors, expected = dora_of_peft(plain(models, key), normal)
    down, up, magnitude = tensors.values()
    named = {
        "lora_A.default.weight": down, "lora_B.default.weight": up, suffix: magnitude,
        "alpha": torch.tensor(ALPHA),
    }  # fmt: skip
    ar = apply({f"{LAYERS['ar']}.{name}": value for name, value in named.items()})["ar"]
    torch.testing.assert_close(patched(ar, models, key), expected)


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


# ---- what is not applied -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.transformer_blocks.0.attn1.to_q.oft_R", (4, 28)),
        ("transformer.transformer_blocks.0.attn1.to_q.on_input", ()),
        ("transformer.transformer_blocks.0.attn1.to_q.weight", (8, 8)),
        ("transformer.transformer_blocks.0.attn1.to_k.rescale", (8, 1)),
        ("transformer.transformer_blocks.0.attn1.to_k.lora_B.weight", (8, 2)),
        ("transformer.transformer_blocks.0.attn1.to_k.hada_t1", (2, 2, 1, 1)),
        ("transformer.transformer_blocks.0.attn1.to_k.alpha", ()),
        ("transformer.transformer_blocks.0.attn1.to_k.lora_B.bias", (8,)),
        ("vision_language_encoder.lm_head.diff_b", (8,)),  # a layer without a bias
        ("text_encoder.block.0.lora_A.weight", (2, 8)),
        ("quite.another", (3,)),
    ],
)  # fmt: skip
def test_every_other_tensor_is_named(apply, models, normal, caplog, name, shape) -> None:
    key = key_of("decoder")
    tensors, expected = lora(plain(models, key), normal)
    named = {f"transformer.{LAYERS['decoder']}.{k}": v for k, v in tensors.items()}
    decoder = apply(named | {name: normal(*shape)}, {"transformer.lora_alpha": ALPHA})["decoder"]
    torch.testing.assert_close(patched(decoder, models, key), expected)
    (record,) = caplog.records
    assert "tensors are not applied" in record.getMessage()
    assert record.getMessage().endswith(f": {name}")


def misfits(w: Tensor, t) -> dict[str, dict[str, Tensor]]:
    rows, columns = w.shape
    (pair, _), (halves, _), (factors, _) = lora(w, t), loha(w, t), lokr(w, t)
    (general, _), (turn, _), (turns, _) = glora(w, t), oft(w, t), boft(w, t)
    return {
        "LoRA folded into other rows": {
            "lora_A.weight": t(RANK, columns // 2), "lora_B.weight": t(rows * 2, RANK)
        },
        "LoRA of rank 0": {"lora_A.weight": t(0, columns), "lora_B.weight": t(rows, 0)},
        "LoRA with a middle": pair | {"lora_mid": t(RANK, RANK + 1, 1, 1)},
        "LoRA of one number": pair | {"lora_A.weight": t()},
        "LoRA that enlarges": pair | {"reshape_weight": torch.tensor([rows + 1, columns])},
        "two alphas": pair | {"alpha": torch.ones(2)},
        "endless alpha": pair | {"alpha": torch.tensor(float("inf"))},
        "DoRA of other rows": pair | {"dora_scale": t(rows + 1, 1)},
        "magnitudes of other rows": pair | {"lora_magnitude_vector": t(rows + 1)},
        "LoHa": halves | {"hada_w1_a": t(rows + 1, RANK)},
        "LoHa of convolutions by half": halves | {"hada_t1": t(RANK, RANK, 1, 1)},
        "LoKr": factors | {"lokr_w1": t(3, 4)},
        "GLoRA": general | {"b1.weight": t(rows + 1, RANK)},
        "OFT": turn | {"oft_blocks": t(3, 8, 8)},
        "BOFT": turns | {"oft_blocks": t(9, rows // 8, 8, 8)},
        "difference": {"diff": t(rows, columns + 1)},
        "difference of one row": {"diff": t(columns)},
        "weight": {"set_weight": t(1, columns)},
        "bias": {"diff_b": t(rows + 1)},
    }  # fmt: skip


@pytest.mark.parametrize("case", misfits(torch.ones(64, 64), lambda *shape: torch.ones(shape)))
def test_tensors_of_other_sizes_are_refused(apply, models, normal, case) -> None:
    w = plain(models, key_of("decoder"))
    named = {f"{LAYERS['decoder']}.{k}": v for k, v in misfits(w, normal)[case].items()}
    with pytest.raises(GLMImageError, match=r"to_q\.(weight|bias), which is .* of another model"):
        apply(named)


def test_a_file_of_two_adapters_is_refused(apply, models, normal) -> None:
    tensors = {
        f"{LAYERS['decoder']}.lora_{half}.{adapter}.weight": normal(8, 8)
        for half in "AB"
        for adapter in ("one", "two")
    }
    with pytest.raises(GLMImageError, match="twice, under two names"):
        apply(tensors)


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
    assert "in models/loras" in said or "into models/loras" in said
    assert len(said) < 400
    with pytest.raises(GLMImageError):
        node.execute(name, 1.0, 1.0, None, models[1])
