"""Every kind of LoRA: the host's patched weight equals the formula, and what is left is named."""

import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from lora_kinds import (
    ALPHA,
    KINDS,
    LAYERS,
    RANK,
    SCALE,
    UNSCALED,
    boft,
    difference,
    dora_of_peft,
    glora,
    key_of,
    loha,
    lokr,
    lokr_of_a_split_first,
    lokr_of_whole_matrices,
    lora,
    oft,
    patched,
    plain,
)
from torch import Tensor


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


@pytest.mark.parametrize(
    "halves",
    [
        (".lora_A", ".lora_B"),
        (".lora.down.weight", ".lora.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        (".lora_A.my_style.weight", ".lora_B.my_style.weight"),
    ],
)
def test_a_pairs_other_spellings(apply, models, normal, halves) -> None:
    key = key_of("decoder")
    down, up = lora(plain(models, key), normal)[0].values()
    name = f"transformer.{LAYERS['decoder']}"
    decoder = apply({name + halves[0]: down, name + halves[1]: up})["decoder"]
    torch.testing.assert_close(patched(decoder, models, key), plain(models, key) + up @ down)


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
        "LoKr of convolutions": factors | {"lokr_t2": t(RANK, RANK, 1, 1)},
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
