"""The names that other people's graphs depend on, as the server tells them."""

import pytest
from glm_image.scripts.client import Client

# id: inputs in order ([optional] in brackets), output types
CONTRACT = {
    "GLMImageLoadAR": ("model_name weight_dtype [device_plan]", "GLM_AR"),
    "GLMImageRemoteAR": ("service", "GLM_AR"),
    "GLMImageLoadDecoder": ("model_name weight_dtype [device_plan]", "MODEL"),
    "GLMImageLoadGlyphEncoder": ("model_name [device_plan]", "CLIP"),
    "GLMImageLoadVAE": ("model_name [device_plan]", "VAE"),
    "GLMImageLoadCheckpoint": (
        "model_name weight_dtype [device_plan]",
        "GLM_AR MODEL CLIP VAE",
    ),
    "GLMImageLoadLora": ("lora_name strength_model strength_ar [model] [ar]", "MODEL GLM_AR"),
    "GLMImageSampleTokens": (
        "ar prompt width height seed temperature top_p top_k batch_size"
        " [layout] [references] [tokens] [mask] [lookahead] [cells] [rows]",
        "GLM_TOKENS GLM_LAYOUT",
    ),
    "GLMImageSampleLayout": (
        "ar prompt width height seed temperature top_p top_k batch_size [layout] [lookahead]"
        " [rows]",
        "GLM_LAYOUT",
    ),
    "GLMImageLockLayout": ("layout lock batch_index [mask] [images] [cells]", "GLM_LAYOUT"),
    "GLMImageComposeLayouts": ("base source row column [mask] [cells]", "GLM_LAYOUT"),
    "GLMImageLayoutToTokens": ("layout", "GLM_TOKENS"),
    "GLMImageEncodeTokens": ("ar image width height", "GLM_TOKENS GLM_LAYOUT INT INT"),
    "GLMImageShowTokens": ("[tokens] [layout] [ar] cell_size [image]", "IMAGE MASK"),
    "GLMImageSaveTokens": ("tokens filename_prefix [layout]", ""),
    "GLMImageLoadTokens": ("file", "GLM_TOKENS GLM_LAYOUT INT INT STRING"),
    "GLMImageGlyphEncode": ("clip prompt [texts]", "CONDITIONING STRING"),
    "GLMImageEncodeReference": (
        "ar vae image [references] batch",
        "GLM_REFERENCES INT INT",
    ),
    "GLMImageReferenceCache": (
        "model references store precision",
        "GLM_REFERENCE_CACHE",
    ),
    "GLMImageApplyTokens": (
        "positive tokens [negative] [reference_cache] batch_index",
        "CONDITIONING CONDITIONING LATENT",
    ),
    "GLMImageScheduler": ("model latent steps denoise", "SIGMAS"),
    "GLMImageModelSampling": ("model latent", "MODEL"),
    "GLMImageDecode": ("model positive negative latent seed steps cfg denoise", "LATENT"),
    "GLMImageSplitBatch": ("positive negative latent", "CONDITIONING CONDITIONING LATENT"),
    "GLMImageCropToSize": ("image width height", "IMAGE"),
    "GLMImageDevicePlan": (
        "model_name weight_dtype width height batch_size references strategy ar decoder glyph vae"
        " ar_split decoder_split reserve_gb",
        "GLM_DEVICE_PLAN STRING",
    ),
    "GLMImageScoreTokens": (
        "ar prompt [tokens] [layout] [references] against [measure]",
        "FLOAT STRING IMAGE",
    ),
    "GLMImageReadText": ("images [prompt] [texts]", "FLOAT STRING IMAGE"),
    "GLMImageKeepBest": (
        "scores weight [scores_2] weight_2 [scores_3] weight_3"
        " [tokens] [layout] [images] [latent] count",
        "GLM_TOKENS GLM_LAYOUT IMAGE LATENT STRING",
    ),
    "GLMImageJoinTokens": (
        " ".join(f"[{kind}_{i}]" for kind in ("tokens", "layout") for i in range(1, 9))
        + " indices",
        "GLM_TOKENS GLM_LAYOUT",
    ),
    "GLMImageCellsToMask": ("cells width height [layout] [tokens]", "MASK"),
    "GLMImagePromptLines": ("text split", "STRING"),
}
SAMPLING = {
    "temperature": 0.9,
    "top_p": 0.75,
    "top_k": 0,
    "batch_size": 1,
    "lookahead": 1,
    "rows": 1,
}
DEFAULTS = {
    "GLMImageLoadAR": {"weight_dtype": "default"},
    "GLMImageLoadDecoder": {"weight_dtype": "default"},
    "GLMImageLoadCheckpoint": {"weight_dtype": "default"},
    "GLMImageLoadLora": {"strength_model": 1.0, "strength_ar": 1.0},
    "GLMImageSampleTokens": SAMPLING | {"cells": ""},
    "GLMImageSampleLayout": SAMPLING,
    "GLMImageLockLayout": {"batch_index": 0, "cells": ""},
    "GLMImageComposeLayouts": {"row": 0, "column": 0, "cells": ""},
    "GLMImageShowTokens": {"cell_size": 16, "image": ""},
    "GLMImageApplyTokens": {"batch_index": -1},
    "GLMImageScheduler": {"steps": 50, "denoise": 1.0},
    "GLMImageDecode": {"steps": 50, "cfg": 1.5, "denoise": 1.0},
    "GLMImageDevicePlan": {
        "weight_dtype": "default",
        "width": 1024,
        "height": 1024,
        "batch_size": 1,
        "references": 0,
        "strategy": "auto",
        **dict.fromkeys(("ar", "decoder", "glyph", "vae"), "auto"),
        "ar_split": "",
        "decoder_split": "",
        "reserve_gb": 1.0,
    },
    "GLMImageScoreTokens": {"against": "", "measure": "prompt match"},
    "GLMImageKeepBest": {"weight": 1.0, "weight_2": 1.0, "weight_3": 1.0, "count": 1},
    "GLMImageJoinTokens": {"indices": ""},
    "GLMImageCellsToMask": {"cells": "", "width": 0, "height": 0},
}


@pytest.fixture(scope="module")
def nodes(client: Client) -> dict[str, dict]:
    found = client.object_info().items()
    return {key: info for key, info in found if key.startswith("GLMImage")}


def test_no_node_is_missing_and_none_is_beside_the_contract(nodes):
    assert nodes.keys() == CONTRACT.keys()


def test_inputs_and_outputs(nodes):
    for node_id, info in nodes.items():
        wanted, outputs = CONTRACT[node_id]
        required = [name for name in wanted.split() if not name.startswith("[")]
        optional = [name.strip("[]") for name in wanted.split() if name.startswith("[")]
        assert info["input_order"].get("required", []) == required, node_id
        assert info["input_order"].get("optional", []) == optional, node_id
        assert info["output"] == outputs.split(), node_id


@pytest.mark.parametrize("node_id", DEFAULTS)
def test_defaults(nodes, node_id):
    inputs = nodes[node_id]["input"]
    options = {**inputs.get("required", {}), **inputs.get("optional", {})}
    found = {name: options[name][1]["default"] for name in DEFAULTS[node_id]}
    assert found == DEFAULTS[node_id]


def test_every_node_and_input_says_what_it_is_for(nodes):
    for info in nodes.values():
        assert info["description"].endswith(".")
        for kind in ("required", "optional"):
            for name, (_, options) in info["input"].get(kind, {}).items():
                assert options.get("tooltip"), (info["name"], name)


def test_these_outputs_are_lists(nodes):
    lists = {key: info["output_is_list"] for key, info in nodes.items()}
    assert {key: found for key, found in lists.items() if any(found)} == {
        "GLMImageSampleTokens": [True, True],
        "GLMImageSampleLayout": [True],
        "GLMImageSplitBatch": [True, True, True],
        "GLMImageScoreTokens": [True, False, False],
        "GLMImageReadText": [True, False, False],
        "GLMImagePromptLines": [True],
    }


def test_seeds_cover_64_bits_and_sizes_step_by_32(nodes):
    sampler = nodes["GLMImageSampleTokens"]["input"]["required"]
    assert sampler["seed"][1]["max"] == 2**64 - 1
    assert sampler["width"][1]["step"] == sampler["height"][1]["step"] == 32


def test_output_nodes(nodes):
    found = {key for key, info in nodes.items() if info["output_node"]}
    assert found == {"GLMImageLockLayout", "GLMImageSaveTokens", "GLMImageShowTokens"}
