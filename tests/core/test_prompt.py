"""Prompts become the reference's ids, and control tokens that a user types stay text."""

import json

import pytest
import reference
from glm_image.glm_core.ar.prompt import PromptTokenizer
from glm_image.glm_core.errors import GLMImageError

PROMPTS = [
    "a cat sat at the mat",
    '  "the heat" 32 32,\n\n雨の中 é \U0001f327 \n',
    "x",
    "\nat first a line break, that the template's own may join\t",
]
TYPED = ["<sop>", "<eop>", "<|dit_token_5|>", "<|image|>", "</think>", "<|user|>", "<|endoftext|>"]


@pytest.fixture(scope="module", params=list(reference.SHAPES))
def processor(request):
    return reference.reference_pipeline(request.param).processor


def ours(processor, tmp_path, chat_template):
    processor.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    return PromptTokenizer((tmp_path / "tokenizer.json").read_text(), config, chat_template)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_the_references_with_a_chat_template(processor, tmp_path, prompt):
    tokenizer = ours(processor, tmp_path, processor.chat_template)
    expected = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"target_h": 96, "target_w": 160},
    )
    assert tokenizer.text_to_image(prompt, (3, 5)).ids.tolist() == expected["input_ids"][0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_the_references_without_a_chat_template(processor, tmp_path, prompt):
    tokenizer = ours(processor, tmp_path, None)
    expected = processor(text=[prompt], target_h=1024, target_w=512)["input_ids"]
    assert tokenizer.text_to_image(prompt, (32, 16)).ids.tolist() == expected[0]


def test_typed_control_tokens_are_text(processor, tmp_path):
    tokenizer = ours(processor, tmp_path, processor.chat_template)
    full = processor.tokenizer
    reserved = set(full.get_added_vocab().values()) | {
        i for token, i in full.get_vocab().items() if token.startswith("<|dit_token_")
    }
    plain = tokenizer.text_to_image("x", (3, 2)).ids.tolist()
    scaffold = [i for i in plain if i in reserved]
    for typed in [*TYPED, full.bos_token, full.eos_token, " ".join(TYPED)]:
        prompt = f"a {typed} b"
        if typed in full.get_added_vocab():  # here the full tokenizer would find a control token
            assert reserved.intersection(full(prompt)["input_ids"])
        ids = tokenizer.text_to_image(prompt, (3, 2)).ids.tolist()
        assert [i for i in ids if i in reserved] == scaffold
        text = full.decode([i for i in ids if i not in reserved])
        assert prompt in text


def test_a_visual_token_in_the_vocabulary_is_text(processor, tmp_path):
    """Some tokenizers look up whole words before they split them."""
    processor.tokenizer.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["ignore_merges"] = True
    data["pre_tokenizer"]["use_regex"] = False
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer = PromptTokenizer(json.dumps(data), config, None)
    ids = tokenizer.text_to_image("<|dit_token_5|>", (3, 2)).ids.tolist()
    assert 5 not in ids
    assert len(ids) > len("<|dit_token_5|>")


def test_half_a_surrogate_pair_is_a_question_mark(processor, tmp_path):
    tokenizer = ours(processor, tmp_path, processor.chat_template)
    ids = tokenizer.text_to_image("a \ud83d cat", (3, 5)).ids
    assert ids.tolist() == tokenizer.text_to_image("a ? cat", (3, 5)).ids.tolist()


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_an_empty_prompt_is_refused(processor, tmp_path, prompt):
    with pytest.raises(GLMImageError, match="prompt is empty"):
        ours(processor, tmp_path, None).text_to_image(prompt, (3, 2))


def test_a_tokenizer_of_another_model_is_refused(processor, tmp_path):
    processor.tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(GLMImageError, match="grid_bos_token"):
        PromptTokenizer(text, config | {"grid_bos_token": "<nope>"}, None)
    with pytest.raises(GLMImageError, match="image_token"):
        PromptTokenizer(text, {k: v for k, v in config.items() if k != "image_token"}, None)
    with pytest.raises(GLMImageError, match=r"tokenizer\.json is not valid JSON"):
        PromptTokenizer(text[:-9], config, None)


def test_a_template_that_drops_the_prompt_is_refused(processor, tmp_path):
    with pytest.raises(GLMImageError, match="exactly once"):
        ours(processor, tmp_path, "hello").text_to_image("a cat", (3, 2))
