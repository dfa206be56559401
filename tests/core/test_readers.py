"""Properties of the readers: whatever is in a file, it is read or refused in a sentence.

`make fuzz` tries FUZZ_TIMES as many inputs, other ones each time.
"""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from glm_image.glm_core.ar.chat_template import ChatTemplate
from glm_image.glm_core.ar.model import ARConfig
from glm_image.glm_core.ar.prompt import PromptTokenizer
from glm_image.glm_core.data.token_file import load_tokens
from glm_image.glm_core.decoder.config import DecoderConfig
from glm_image.glm_core.decoder.schedule import ScheduleConfig
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.headers import map_file, read_header
from glm_image.glm_core.glyph.encoder import GlyphConfig
from glm_image.glm_core.vae import VAEConfig
from glm_image.glm_core.vision.encoder import VisionConfig
from glm_image.glm_core.vision.pixels import ImageConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
HUB = ROOT / "tests" / "configs" / "hub"
TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
CONFIGS = {
    "ar": (ARConfig, "vision_language_encoder_config.json"),
    "vision": (VisionConfig, "vision_language_encoder_config.json"),
    "decoder": (DecoderConfig, "transformer_config.json"),
    "schedule": (ScheduleConfig, "scheduler_config.json"),
    "glyph": (GlyphConfig, "text_encoder_config.json"),
    "vae": (VAEConfig, "vae_config.json"),
    "image": (ImageConfig, "processor_preprocessor_config.json"),
}


def inputs(count: int) -> settings:
    """The same inputs in every run of the suite, others in every run of `make fuzz`."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308,
     float("inf"), float("nan"), "", "0", "F32", "\ud800", "x" * 1000, [], [0], [[]], {}, {"a": {}}]
)  # fmt: skip
ANYTHING = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=5),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=5), child),
    max_leaves=5,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    found, waiting = [], [value]
    while waiting:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        for key in keys:
            found.append((parent, key))
            if isinstance(parent[key], dict | list):
                waiting.append(parent[key])
    return found


def changed(data: st.DataObject, original: Any, changes: int = 3) -> Any:
    """The value with up to `changes` parts replaced or left out."""
    value = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, changes))):
        if not (choices := places(value)):
            break
        parent, key = choices[data.draw(st.integers(0, len(choices) - 1))]
        if data.draw(st.booleans()):
            parent[key] = data.draw(ANYTHING)
        else:
            del parent[key]
    return value


def unless_refused(read: Callable[[], Any]) -> Any:
    """What a reader returns, or None if it refuses its file in a sentence."""
    try:
        return read()
    except GLMImageError as error:
        sentence = error.sentence
    assert len(sentence) < 1000
    assert sentence.endswith(".")
    return None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_or_refused(name) -> None:
    kind, file = CONFIGS[name]
    original = json.loads((HUB / file).read_text())

    @inputs(60)
    @given(st.data())
    def read(data) -> None:
        config = unless_refused(lambda: kind.from_dict(changed(data, original)))
        assert "nan" not in repr(config)

    read()


@pytest.mark.parametrize("part", ["values", "bytes"])
def test_a_header_that_is_read_can_be_mapped(tmp_path, part) -> None:
    file = tmp_path / "a.safetensors"
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4).bfloat16(), "c": torch.zeros(0, 2)}
    save_file(state, file, {"format": "pt"})
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])

    @inputs(150)
    @given(st.data())
    def read(data) -> None:
        if part == "values":
            text = json.dumps(changed(data, header, 2)).encode()
            content = len(text).to_bytes(8, "little") + text + whole[end:]
        else:
            content = bytearray(whole)
            for _ in range(data.draw(st.integers(1, 3))):
                place = data.draw(st.integers(0, end))
                content[place : place + data.draw(st.integers(0, 2))] = data.draw(
                    st.binary(max_size=2) | st.sampled_from([b"-", b"0", b",", b"]", b"}", b"9"])
                )
        file.write_bytes(content)
        if header_read := unless_refused(lambda: read_header(file)):
            tensors, metadata = header_read
            mapped = map_file(file)
            assert mapped.keys() == tensors.keys()
            assert all(mapped[key].shape == info.shape for key, info in tensors.items())
            assert all(isinstance(value, str) for value in metadata.values())

    read()


TINY = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": number + 4, "content": token, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for number, token in enumerate(["<0>", "<1>", "<|image|>", "<sop>", "<eop>"])
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
              "vocab": {"a": 0, "b": 1, "ab": 2, "1": 3}, "merges": [["a", "b"]]},
}  # fmt: skip
NAMES = {
    "bos_token": "<0>",
    "eos_token": {"content": "<1>"},
    "image_token": "<|image|>",
    "grid_bos_token": "<sop>",
    "grid_eos_token": "<eop>",
}


@inputs(200)
@given(st.data())
def test_a_tokenizer_is_read_or_refused(data) -> None:
    tokenizer, names = TINY, NAMES
    if data.draw(st.booleans()):
        tokenizer = changed(data, TINY)
    else:
        names = changed(data, NAMES)
    text = json.dumps(tokenizer)
    prompt = unless_refused(lambda: PromptTokenizer(text, names, None).text_to_image("ab", (4, 4)))
    assert prompt is None or len(prompt) < 100


PIECES = [
    "{% for m in messages %}", "{% for c in m.content %}", "{% endfor %}", "{% else %}",
    "{% if c.type == 'image' %}", "{% endif %}", "{{ c.text }}", "{{ bos_token }}<|image|>",
    "{% set x = x ~ x ~ 'a' %}", "{% set x = [x, x] %}", "{% set ns = namespace(a='a') %}",
    "{% set ns.a = ns.a + ns.a %}", "{% for i in range(10**9) %}", "{{ 'a' * 10 ** 9 }}",
    "{{ x | center(10**9) }}", "{{ ''.join(x) }}", "{% macro f(a) %}", "{% endmacro %}",
    "{{ f(f(x)) }}", "{{ f }}", "{{ x }}", "{{ x | string | upper }}", "{{ m[x] }}",
    "{% include 'x' %}", "{{ loop }}", "{{ cycler }}", "{{ x == ns.a }}", "{% for i in x %}", "\n",
]  # fmt: skip


@inputs(150)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=20))
def test_a_template_is_rendered_or_refused(pieces) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "a cat"}]
    messages = [{"role": "user", "content": content}]
    text = unless_refused(lambda: ChatTemplate("".join(pieces)).render(messages, {}))
    assert text is None or len(text) <= 2**24


@inputs(80)
@given(data=st.data())
def test_a_token_file_is_read_or_refused(tmp_path, data) -> None:
    metadata = {"format": "glm_image_tokens", "version": "1", "codebook": "64", "width": "128"}
    metadata |= {"height": "128", "info": "{}"}
    key = data.draw(st.sampled_from(sorted(metadata)))
    metadata[key] = data.draw(
        st.sampled_from(["", "1e3", "9" * 400, "-32", "\u0663", "[" * 9999, '{"a": NaN}', "null"])
        | st.integers(-64, 2**70).map(str)
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    )
    shape = data.draw(st.lists(st.sampled_from([0, 1, 4, 16]), max_size=4))
    kind = data.draw(st.sampled_from([torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn]))
    names = data.draw(st.sets(st.sampled_from(["tokens", "preview", "locked", "x"]), min_size=1))
    tensors = {name: torch.zeros(shape).to(kind) for name in names}
    if data.draw(st.booleans()):
        tensors["tokens"] = torch.zeros(1, 4, 4, dtype=torch.int32)
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata)
    loaded = unless_refused(lambda: load_tokens(file))
    assert loaded is None or loaded[0].tokens.shape == (1, 4, 4)
