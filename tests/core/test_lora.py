"""LoRA files: every trainer's names find our weights, and alphas are read from metadata."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.lora import lora_key_map, read_lora, require_match, unmatched_keys
from reference import reference_pipeline
from safetensors.torch import save_file

RANK = 4
TO_Q = "transformer_blocks.0.attn1.to_q"
TO_OUT = "transformer_blocks.1.attn1.to_out.0"
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"
GATE_UP = "model.language_model.layers.1.mlp.gate_up_proj"


@pytest.fixture(scope="module")
def weights() -> dict[str, list[str]]:
    """The reference's keys, which equal ours."""
    pipeline = reference_pipeline("small")
    return {
        "decoder": list(pipeline.transformer.state_dict()),
        "ar": list(pipeline.vision_language_encoder.state_dict()),
    }


def pair(module: str, down: str = "lora_A.weight", up: str = "lora_B.weight"):
    return {f"{module}.{down}": torch.ones(RANK, 8), f"{module}.{up}": torch.ones(8, RANK)}


def save_lora(file: Path, state: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """Save as diffusers does, with the adapter's config as JSON in the metadata."""
    metadata = {"format": "pt"}
    if config is not None:
        metadata["lora_adapter_metadata"] = json.dumps(config)
    save_file(state, file, metadata)
    return file


KOHYA = ("lora_down.weight", "lora_up.weight")
NAMES = [
    ("decoder", TO_Q, TO_Q, ()),  # diffusers, a model's save_lora_adapter
    ("decoder", TO_OUT, f"transformer.{TO_OUT}", ()),  # diffusers, a pipeline's save_lora_weights
    ("decoder", TO_OUT, f"diffusion_model.{TO_OUT}", ()),  # ComfyUI's trainer, ai-toolkit
    ("decoder", TO_Q, f"base_model.model.{TO_Q}", ()),  # PEFT
    ("decoder", TO_Q, f"transformer.{TO_Q}", KOHYA),
    ("decoder", TO_OUT, "lora_unet_transformer_blocks_1_attn1_to_out_0", KOHYA),
    ("decoder", TO_OUT, "lora_transformer_transformer_blocks_1_attn1_to_out_0", KOHYA),
    ("decoder", TO_OUT, "lycoris_transformer_blocks_1_attn1_to_out_0", ("lokr_w1", "lokr_w2")),
    ("ar", Q_PROJ, Q_PROJ, ()),
    ("ar", GATE_UP, f"vision_language_encoder.{GATE_UP}", ()),
    ("ar", Q_PROJ, f"base_model.model.{Q_PROJ}", ()),
    ("ar", Q_PROJ, f"base_model.model.{Q_PROJ.removeprefix('model.')}", ()),  # PEFT, inner model
    ("ar", "lm_head", "base_model.model.lm_head", ()),
    ("ar", GATE_UP, "lora_te_model_language_model_layers_1_mlp_gate_up_proj", KOHYA),
]


@pytest.mark.parametrize(("component", "module", "name", "suffixes"), NAMES)
@pytest.mark.parametrize("root", ["", "diffusion_model."])
def test_every_trainers_name_finds_its_weight(weights, component, module, name, suffixes, root):
    others = {"ar": "decoder", "decoder": "ar"}
    names = lora_key_map((root + key for key in weights[component]), component, root)
    assert names[name] == f"{root}{module}.weight"
    assert unmatched_keys(pair(name, *suffixes), names) == []
    wrong = lora_key_map(weights[others[component]], others[component])
    assert unmatched_keys(pair(name, *suffixes), wrong) == list(pair(name, *suffixes))


@pytest.mark.parametrize("component", ["decoder", "ar"])
def test_no_name_belongs_to_two_weights(weights, component):
    names = lora_key_map(weights[component], component)
    modules = [key for key in weights[component] if key.endswith(".weight")]
    assert set(names.values()) == set(modules)
    assert len(names) == sum(len(lora_key_map([key], component)) for key in modules)


def test_only_weights_under_the_root_have_names(weights):
    keys = ["model_sampling.weight", "diffusion_model.proj_out.bias", "diffusion_model.a.weight"]
    assert set(lora_key_map(keys, "decoder", "diffusion_model.").values()) == {keys[2]}


def test_a_file_for_both_models_matches_fully(weights):
    maps = [lora_key_map(weights[name], name) for name in ("decoder", "ar")]
    lora = pair(f"transformer.{TO_Q}") | pair(f"vision_language_encoder.{Q_PROJ}")
    assert unmatched_keys(lora, *maps) == []
    assert unmatched_keys(lora, maps[0]) == list(pair(f"vision_language_encoder.{Q_PROJ}"))


@pytest.mark.parametrize("suffix", ["lora_magnitude_vector", "lora_B.bias", "something"])
def test_kinds_of_tensors_that_no_host_reads_are_unmatched(weights, suffix):
    names = lora_key_map(weights["decoder"], "decoder")
    lora = pair(TO_Q) | {f"{TO_Q}.{suffix}": torch.ones(8)}
    assert unmatched_keys(lora, names) == [f"{TO_Q}.{suffix}"]


def test_a_foreign_lora_is_refused(weights, tmp_path):
    names = lora_key_map(weights["decoder"], "decoder")
    foreign = pair("transformer.single_transformer_blocks.0.attn.to_k")
    with pytest.raises(GLMImageError, match=r"None of the 2 keys in .*flux"):
        require_match(tmp_path / "flux.safetensors", foreign, names)
    require_match(tmp_path / "mixed.safetensors", foreign | pair(TO_Q), names)


# ---- alpha -------------------------------------------------------------------------------------


def alphas(lora: dict[str, torch.Tensor]) -> dict[str, float]:
    return {k.removesuffix(".alpha"): v.item() for k, v in lora.items() if k.endswith(".alpha")}


def test_without_metadata_there_is_no_alpha(tmp_path):
    lora = read_lora(save_lora(tmp_path / "a.safetensors", pair(TO_Q)))
    assert lora.keys() == pair(TO_Q).keys()


def test_diffusers_pipeline_metadata(tmp_path):
    config = {
        "transformer.r": RANK, "transformer.lora_alpha": 10,
        "transformer.alpha_pattern": {TO_Q: 3, "ff.net.2": 5},
    }  # fmt: skip
    modules = [TO_Q, TO_OUT, "transformer_blocks.0.ff.net.2", f"transformer_blocks.1.a{TO_Q}"]
    state = {}
    for module in modules:
        state |= pair(f"transformer.{module}")
    state |= pair(f"text_encoder.{Q_PROJ}")
    lora = read_lora(save_lora(tmp_path / "a.safetensors", state, config))
    expected = dict(zip(modules, (3.0, 10.0, 5.0, 10.0), strict=True))
    assert alphas(lora) == {f"transformer.{k}": v for k, v in expected.items()}
    assert lora.keys() > state.keys()


def test_diffusers_model_metadata(tmp_path):
    config = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {rf"^{TO_OUT}": 2, "^to_q": 9}}
    file = save_lora(tmp_path / "a.safetensors", pair(TO_Q) | pair(TO_OUT), config)
    assert alphas(read_lora(file)) == {TO_Q: 6.0, TO_OUT: 2.0}


def test_peft_folder(tmp_path):
    file = save_lora(tmp_path / "adapter_model.safetensors", pair(f"base_model.model.{Q_PROJ}"))
    config = {"lora_alpha": 6, "use_rslora": True, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    # rank-stabilised: alpha / sqrt(rank), which is (alpha * sqrt(rank)) / rank
    alpha = alphas(read_lora(file))[f"base_model.model.{Q_PROJ}"]
    assert alpha == pytest.approx(6 * math.sqrt(RANK))


def test_peft_folder_without_its_config(tmp_path):
    file = save_lora(tmp_path / "adapter_model.safetensors", pair(Q_PROJ))
    with pytest.raises(GLMImageError, match=r"adapter_config\.json is missing"):
        read_lora(file)


def test_alphas_among_the_tensors_take_precedence(tmp_path):
    state = pair(TO_Q) | {f"{TO_Q}.alpha": torch.tensor(1.5)}
    lora = read_lora(save_lora(tmp_path / "a.safetensors", state, {"lora_alpha": 6}))
    assert alphas(lora) == {TO_Q: 1.5}


@pytest.mark.parametrize("adapter", ["default", "my_style"])
def test_adapter_names_are_dropped(tmp_path, adapter):
    state = pair(TO_Q, f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight")
    lora = read_lora(save_lora(tmp_path / "a.safetensors", state, {"lora_alpha": 6}))
    assert lora.keys() == {f"{TO_Q}.alpha", *pair(TO_Q)}


@pytest.mark.parametrize(
    "config",
    [
        {f"m{i}.lora_alpha": 1 for i in range(20_000)},
        {"lora_alpha": 1, "alpha_pattern": {f"m{i}.x": 2 for i in range(20_000)}},
        {"lora_alpha": 1, "alpha_pattern": {f"^m{i}": 2 for i in range(20_000)}},
    ],
    ids=["configs", "ends", "whole names"],
)
def test_many_keys_and_many_entries_are_read_in_a_moment(tmp_path, config):
    state = {f"m{i}.lora_A.weight": torch.zeros(1) for i in range(20_000)}
    file = save_lora(tmp_path / "a.safetensors", state, config)
    start = time.process_time()
    lora = read_lora(file)
    assert time.process_time() - start < 5  # 400 million comparisons take minutes
    assert len(alphas(lora)) == 20_000


def test_the_first_entry_of_a_pattern_holds(tmp_path):
    config = {"lora_alpha": 6, "alpha_pattern": {"to_q": 1, f"^{TO_Q}": 2, "attn1.to_q": 3}}
    assert alphas(read_lora(save_lora(tmp_path / "a.safetensors", pair(TO_Q), config))) == {TO_Q: 1}
    config["alpha_pattern"] = {f"^{TO_Q}": 2, "to_q": 1}
    assert alphas(read_lora(save_lora(tmp_path / "a.safetensors", pair(TO_Q), config))) == {TO_Q: 2}


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 1, "alpha_pattern": 5},
        {"lora_alpha": 1, "alpha_pattern": ["to_q"]},
        {"lora_alpha": 1, "alpha_pattern": {"to_q": {}}},
        {"lora_alpha": 1, "alpha_pattern": {"to_q": "x" * 10_000}},
        {"lora_alpha": 1, "alpha_pattern": {"(" * 10_000: 1}},
        {"lora_alpha": 1, "alpha_pattern": {"": 1}},
        {"lora_alpha": 1, "use_rslora": "yes"},
        {"lora_alpha": [1]},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "inf"},
    ],
    ids=lambda config: str(config)[:60],
)
def test_an_entry_of_another_type_is_a_sentence(tmp_path, config):
    named = {f"transformer.{name}": value for name, value in config.items()}
    file = save_lora(tmp_path / "a.safetensors", pair(f"transformer.{TO_Q}"), named)
    with pytest.raises(GLMImageError, match="save the LoRA") as caught:
        read_lora(file)
    assert len(str(caught.value)) < 400


def test_entries_of_another_models_adapter_do_not_matter(tmp_path):
    config = {"transformer.lora_alpha": 6, "text_encoder.alpha_pattern": 5}
    file = save_lora(tmp_path / "a.safetensors", pair(f"transformer.{TO_Q}"), config)
    assert alphas(read_lora(file)) == {f"transformer.{TO_Q}": 6}


@pytest.mark.parametrize("key", ["x" * 100_000, ".".join("x" * 50_000)])
def test_endless_names_are_read_in_a_moment(tmp_path, key):
    config = {"lora_alpha": 1, "alpha_pattern": {"y": 2}}
    start = time.process_time()
    lora = read_lora(save_lora(tmp_path / "a.safetensors", pair(key), config))
    with pytest.raises(GLMImageError, match="None of the 2 keys") as caught:
        require_match("a", lora, {})
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 1000


def test_regular_expressions_are_refused(tmp_path):
    config = {"lora_alpha": 6, "alpha_pattern": {"(a+)+b": 1}}
    with pytest.raises(GLMImageError, match="regular expression"):
        read_lora(save_lora(tmp_path / "a.safetensors", pair(TO_Q), config))


# ---- files that are not LoRAs ------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(GLMImageError, match="does not exist"):
        read_lora(tmp_path / "none.safetensors")


def test_truncated_file(tmp_path):
    file = save_lora(tmp_path / "a.safetensors", pair(TO_Q))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(GLMImageError, match="is truncated"):
        read_lora(file)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [("{", "is not valid JSON"), ('{"lora_alpha": "much"}', "lora_alpha 'much' is no number")],
)
def test_broken_metadata(tmp_path, metadata, sentence):
    save_file(pair(TO_Q), tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(GLMImageError, match=sentence):
        read_lora(tmp_path / "a.safetensors")
