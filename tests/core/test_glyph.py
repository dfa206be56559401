"""Glyph texts, ids and encodings against the reference pipeline, tokenizer and T5 encoder."""

import json
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.glyph.advice import advice, summary
from glm_image.glm_core.glyph.encoder import GlyphConfig, GlyphEncoder, relative_position_buckets
from glm_image.glm_core.glyph.texts import (
    byte_ids,
    encode_texts,
    glyph_ids,
    texts_that_fit,
    texts_to_render,
)
from reference import SHAPES, reference_pipeline
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

HUB = Path(__file__).parents[1] / "configs" / "hub"
PROMPTS = {
    "none": "a red fox in the snow",
    "empty prompt": "",
    "one": 'a sign that says "OPEN"',
    "two": 'a sign "OPEN" beside a sign "closed at 5"',
    "three kinds": "'first' and “third” and \"fourth\" and 'second'",
    "chinese": "海报上写着「欢迎光临」和“中文（简体）”",
    "apostrophes": "the dog's bowl and the cat's dish",
    "empty quotes": "nothing in '' or \"\" to see",
    "nested": "“he said 'no' twice” and 「a “b” c」",
    "long": 'a page: "' + "lorem ipsum 龙 " * 200 + '"',
    "emoji": 'a mug with "👋🏽 ok"',
}


@pytest.fixture(scope="module", params=sorted(SHAPES))
def pipeline(request):
    return reference_pipeline(request.param)


def network_of(reference: T5EncoderModel) -> GlyphEncoder:
    network = GlyphEncoder(GlyphConfig.from_dict(reference.config.to_dict()), device="meta")
    state = reference.state_dict()
    state.pop("encoder.embed_tokens.weight")
    network.load_state_dict(state, assign=True)
    return network


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-4, f"relative error {error:.2e}"


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_texts_equal_the_references(pipeline, prompt):
    assert [texts_to_render(prompt)] == pipeline.get_glyph_texts(prompt)


def test_texts_are_ordered_by_kind_of_quote():
    assert texts_to_render("「d」 \"c\" “b” 'a'") == ["a", "b", "c", "d"]
    assert texts_to_render("it's a dog's life") == ["s a dog"]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("It's a cat's", ["apostrophe in It's, cat's counts", "write ’"]),
        ("the dogs' and cats' dish", ["apostrophe in dogs' counts"]),
        ("It's a sign 'OPEN'", ["apostrophe in It's counts"]),
        ("L'été d'Anna", ["L'été, d'Anna"]),
        ('a "sign', ['kind "..." has no partner']),
        ("'OPEN' and 'SHUT", ["kind '...' has no partner"]),
        ("写着「欢迎", ["kind 「...」 has no partner"]),
        ("a ”sign", ["kind “...” has no partner"]),
        ("海报《红楼梦》", ["《红楼梦》 will not be rendered", "“...”"]),
        ("a sign ‘OPEN’ and «SHUT»", ["‘OPEN’, «SHUT» will not be rendered"]),
    ],
)
def test_quotes_that_mislead_are_named(prompt, parts):
    (sentence,) = advice(prompt)
    for part in parts:
        assert part in sentence
    assert sentence.endswith(".")
    assert advice(prompt, ["OPEN"]) == []  # the prompt's quotes are not read


@pytest.mark.parametrize(
    "prompt",
    [
        *(
            "",
            "a fox",
            "'OPEN'",
            "'a' 'b'",
            "Tom’s dogs’ bowl",
            "写着'OPEN'和'SHUT'",
            '“a” 「b」 "c"',
        ),
        "a" * 10**6,
    ],
    ids=lambda prompt: prompt[:20],
)
def test_usual_quotes_are_not_named(prompt):
    assert advice(prompt) == []


def test_the_summary_is_what_is_rendered():
    assert summary([]) == ["No text to render: nothing is in quotes."]
    assert summary(texts_to_render("it's a dog's life")) == ["Text to render:", "s a dog"]
    assert summary(["a\nb", ""]) == ["2 texts to render:", "a b", "(an empty text)"]
    assert summary(["x"] * 25)[-1] == "... and 5 more"


@pytest.mark.parametrize("text", ["", "OPEN", "欢迎光临", "a\nb\t ", "👋🏽", "é" * 3000])
def test_ids_equal_the_tokenizers(text):
    expected = ByT5Tokenizer()([text], max_length=2048, truncation=True).input_ids[0]
    assert byte_ids(text) == expected


def test_control_tokens_in_a_text_are_bytes():
    assert byte_ids("</s>") == [*(b + 3 for b in b"</s>"), 1]
    assert byte_ids("<pad>") == [*(b + 3 for b in b"<pad>"), 1]


def test_the_number_of_texts_and_their_bytes_are_bounded():
    assert texts_that_fit(texts_to_render("'" * 10**5)) == [""] * 256
    lines = [f"line {i}" for i in range(300)]
    assert texts_that_fit(lines) == lines[:256]
    assert texts_that_fit(["x" * 10**6] * 50) == ["x" * 10**6] * 8  # each is cut to 2048 ids
    assert texts_that_fit(["x" * 2047, *["龙" * 500] * 20]) == ["x" * 2047, *["龙" * 500] * 9]
    assert texts_that_fit([]) == []


def test_truncation_keeps_eos():
    assert byte_ids("abcdef", max_length=4) == [100, 101, 102, 1]


def test_half_a_surrogate_pair_is_a_question_mark():
    assert byte_ids("\ud83d") == byte_ids("?")


def test_an_even_number_of_texts_begins_with_a_pad():
    assert glyph_ids([]) == [[1]]
    assert glyph_ids(["a"]) == [[100, 1]]
    assert glyph_ids(["a", "b"]) == [[0, 100, 1], [0, 101, 1]]
    assert glyph_ids(["a", "b", "c"]) == [[100, 1], [101, 1], [102, 1]]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_embeddings_equal_the_references(pipeline, prompt):
    theirs = pipeline._get_glyph_embeds([prompt], 2048)
    ours = encode_texts(network_of(pipeline.text_encoder), texts_to_render(prompt))
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    "sizes",
    [
        {"d_model": 24, "d_ff": 40, "d_kv": 8, "num_heads": 3, "num_layers": 1},
        {"d_model": 32, "d_ff": 16, "d_kv": 4, "num_heads": 8, "num_layers": 3,
         "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40},
        {"d_model": 20, "d_ff": 64, "d_kv": 16, "num_heads": 1, "num_layers": 2,
         "vocab_size": 300, "layer_norm_epsilon": 0.1},
    ],
)  # fmt: skip
def test_the_encoder_equals_t5(sizes):
    torch.manual_seed(0)
    config = T5Config(**{"vocab_size": 384, **sizes}, feed_forward_proj="gated-gelu")
    reference = T5EncoderModel(config).eval()
    for parameter in reference.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids = torch.randint(0, 259, (2, 300))
    assert_close(network_of(reference)(ids), reference(ids).last_hidden_state)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 40), (64, 1000), (4, 2)])
def test_position_buckets_equal_t5s(buckets, distance):
    position = torch.arange(2049)
    expected = T5Attention._relative_position_bucket(
        position[None, :] - position[:, None], num_buckets=buckets, max_distance=distance
    )
    assert torch.equal(relative_position_buckets(2049, buckets, distance), expected)


def test_full_size_keys_and_shapes_equal_the_references():
    config = json.loads((HUB / "text_encoder_config.json").read_text())
    with torch.device("meta"):
        reference = T5EncoderModel(T5Config(**config)).state_dict()
    reference.pop("encoder.embed_tokens.weight")
    ours = GlyphEncoder(GlyphConfig.from_dict(config), device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in reference.items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
        ({"vocab_size": 128}, "vocab_size is 128"),
        ({"d_kv": None}, "no 'd_kv'"),
        ({"relative_attention_max_distance": 4}, "max_distance 4 do not fit"),
    ],
)
def test_another_text_encoder_is_refused(change, sentence):
    config = json.loads((HUB / "text_encoder_config.json").read_text()) | change
    with pytest.raises(GLMImageError, match=sentence):
        GlyphConfig.from_dict({k: v for k, v in config.items() if v is not None})
