"""Broken and hostile files: each is refused in a sentence, soon, and whatever a library raises."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from glm_image.glm_core.ar.chat_template import ChatTemplate
from glm_image.glm_core.ar.prompt import PromptTokenizer
from glm_image.glm_core.errors import GLMImageError, quoted, shown
from glm_image.glm_core.files.headers import mentions, read_header
from glm_image.glm_core.files.opening import open_component
from glm_image.glm_core.foreign import wall
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tiny"
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a cat"}]}]
ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """The tiny model, of which a test may replace a file."""
    for folder in TINY.iterdir():
        if folder.is_dir():
            (tmp_path / folder.name).mkdir()
            for file in folder.iterdir():
                (tmp_path / folder.name / file.name).symlink_to(file)
    return tmp_path


def replace(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text)


def change(file: Path, **values: object) -> None:
    replace(file, json.dumps({**json.loads(file.read_text()), **values}))


def prompt(snapshot: Path, text: str = "a cat") -> list[int]:
    files = open_component(snapshot, "ar").processor
    tokenizer = PromptTokenizer(files.tokenizer, files.tokenizer_config, files.chat_template)
    return tokenizer.text_to_image(text, (4, 4)).ids.tolist()


# ---- the wall ------------------------------------------------------------------------------------


class Panic(BaseException):
    """As a library of Rust raises it."""


@pytest.mark.parametrize("error", [Panic, RecursionError, MemoryError, OSError, StopIteration])
def test_whatever_is_raised_becomes_a_sentence(error) -> None:
    with (
        pytest.raises(GLMImageError, match=r"^A file is broken; download it again\. \[") as raised,
        wall("A file is broken"),
    ):
        raise error("secret")
    assert isinstance(raised.value.__cause__, error)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes(error) -> None:
    with pytest.raises(error), wall("A file is broken"):
        raise error


def test_values_are_cut_in_sentences() -> None:
    assert quoted("x" * 10**6) == "'" + "x" * 199 + "..."
    assert shown("short") == "short"


# ---- headers -------------------------------------------------------------------------------------

BROKEN_HEADERS = {
    "deep": '{"a":' * 2000 + "1" + "}" * 2000,
    "not so deep": '{"a":' + "[" * 20 + "]" * 20 + "}",
    "of many dimensions": '{"w":{"dtype":"F32","shape":['
    + ",".join(["4611686018427387904"] * 100_000)
    + '],"data_offsets":[0,8]}}',
    "of too many dimensions": '{"w":{"dtype":"F32","shape":['
    + ",".join(["2", *["1"] * 99])
    + '],"data_offsets":[0,8]}}',
    "of many tensors": "{" + ",".join(f'"{i}":{ENTRY}' for i in range(150_000)) + "}",
    "of many values": '{"w":[' + "1," * 5_000_000 + "1]}",
    "of negative sizes": '{"w":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}',
    "of a bool": '{"w":{"dtype":"F32","shape":[2,true],"data_offsets":[0,8]}}',
    "of a float": '{"w":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
    "of a float offset": '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}}',
    "of a bool offset": '{"w":{"dtype":"F32","shape":[2],"data_offsets":[false,8]}}',
    "of a huge size": '{"w":{"dtype":"F32","shape":[' + "9" * 4000 + '],"data_offsets":[0,8]}}',
    "of an empty giant": '{"w":' + ENTRY + ',"e":{"dtype":"F32","shape":[0,4611686018427387904,'
    '4611686018427387904],"data_offsets":[8,8]}}',
    "of twins": '{"w":' + ENTRY + ',"w":' + ENTRY + "}",
    "of overlaps": '{"w":' + ENTRY + ',"v":' + ENTRY + "}",
    "of reversed offsets": '{"w":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
    "of half a surrogate": '{"\\ud800":' + ENTRY + "}",
    "of numbers as metadata": '{"__metadata__":{"a":1},"w":' + ENTRY + "}",
    "of a list as metadata": '{"__metadata__":[],"w":' + ENTRY + "}",
    "of a list as a dtype": '{"w":{"dtype":[],"shape":[2],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("name", BROKEN_HEADERS)
def test_a_header_that_lies_is_refused_soon(tmp_path, name) -> None:
    file, header = tmp_path / "a.safetensors", BROKEN_HEADERS[name].encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    start = time.monotonic()
    with pytest.raises(GLMImageError, match=r"header of .* (is broken|holds more than)"):
        read_header(file)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("encoding", ["utf-16-le", "latin-1"])
def test_a_header_in_another_encoding_is_refused(tmp_path, encoding) -> None:
    file, header = tmp_path / "a.safetensors", ('{"é":' + ENTRY + "}").encode(encoding)
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(GLMImageError, match="is broken or of an unknown format"):
        read_header(file)


def test_a_pipe_and_a_folder_are_no_files(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for file in (*tmp_path.iterdir(), tmp_path / ("x" * 300)):
        assert not mentions(file, "glm")
        with pytest.raises(GLMImageError, match="is no file"):
            read_header(file)


def test_a_header_is_parsed_for_a_list_only_if_it_names_the_format(tmp_path) -> None:
    file, header = tmp_path / "a.safetensors", BROKEN_HEADERS["deep"].encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert not mentions(file, "glm_image_checkpoint")
    save_file({"a": torch.zeros(1)}, file, {"format": "glm_image_checkpoint"})
    assert mentions(file, "glm_image_checkpoint")


# ---- configs -------------------------------------------------------------------------------------


def test_a_deep_config_is_refused(snapshot) -> None:
    for depth in (100, 5000):
        text = '{"a": ' + "[" * depth + "]" * depth + "}"
        replace(snapshot / "vision_language_encoder/config.json", text)
        with pytest.raises(GLMImageError, match=r"config\.json is .*nested"):
            open_component(snapshot, "ar")


def test_a_vae_without_means_is_refused_for_the_decoder(snapshot) -> None:
    change(snapshot / "vae/config.json", latents_mean=None)
    with pytest.raises(GLMImageError, match="VAE's config has no 'latents_mean'"):
        open_component(snapshot, "decoder")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", ".", "..", ""])
def test_an_index_that_names_no_file_is_refused(snapshot, name) -> None:
    (snapshot / "vae/diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": name}}
    replace(snapshot / "vae/diffusion_pytorch_model.safetensors.index.json", json.dumps(index))
    with pytest.raises(GLMImageError, match=r"is missing, which|outside its folder"):
        open_component(snapshot, "vae")


@pytest.mark.parametrize("name", [5, None, ["a"]])
def test_an_index_of_another_type_is_refused(snapshot, name) -> None:
    (snapshot / "vae/diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": name}}
    replace(snapshot / "vae/diffusion_pytorch_model.safetensors.index.json", json.dumps(index))
    with pytest.raises(GLMImageError, match="as the file of a"):
        open_component(snapshot, "vae")


# ---- tokenizer and template ----------------------------------------------------------------------


def test_a_panic_of_the_tokenizers_library_is_a_sentence(snapshot) -> None:
    file = snapshot / "processor/tokenizer.json"
    model = json.loads(file.read_text())["model"]
    change(file, model={**model, "continuing_subword_prefix": "F32"})
    with pytest.raises(GLMImageError, match=r"tokenizer\.json cannot be read; download") as error:
        prompt(snapshot)
    assert not isinstance(error.value.__cause__, Exception)  # so it is a panic that was caught


@pytest.mark.parametrize("value", [5, None, [], {}, {"content": 5}, "\ud800", ""])
def test_a_token_of_another_type_is_refused(snapshot, value) -> None:
    change(snapshot / "processor/tokenizer_config.json", bos_token=value)
    with pytest.raises(GLMImageError, match="has no bos_token"):
        prompt(snapshot)


def test_a_vocabulary_with_a_hole_is_refused(snapshot) -> None:
    file = snapshot / "processor/tokenizer.json"
    model = json.loads(file.read_text())["model"]
    change(file, model={**model, "vocab": {**model["vocab"], "zz": 2**31 - 1}})
    with pytest.raises(GLMImageError, match=r"model\.vocab is .* ids up to 1048576"):
        prompt(snapshot)


def test_padding_and_truncation_are_not_applied(snapshot) -> None:
    expected = prompt(snapshot)
    file = snapshot / "processor/tokenizer.json"
    padding = {"strategy": {"Fixed": 2**31}, "direction": "Left", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}  # fmt: skip
    truncation = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    change(file, padding=padding, truncation=truncation)
    assert prompt(snapshot) == expected


def test_a_tokenizer_that_tries_every_split_of_a_text_is_refused_soon(
    snapshot, monkeypatch
) -> None:
    """Each word costs about 2^22 tries, fewer than those after which the library gives up."""
    monkeypatch.setattr("glm_image.glm_core.ar.prompt.TEXT_SECONDS", 0.2)
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    change(snapshot / "processor/tokenizer.json", pre_tokenizer=split)
    start = time.monotonic()
    with pytest.raises(GLMImageError, match="tokenizer fails at this prompt, or is endless; down"):
        prompt(snapshot, ("a" * 22 + "!") * 15)
    assert time.monotonic() - start < 1


ENDLESS = {
    "range": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops": "{% set s = 'aaaaaaaaaaaaaaaa' %}" + "{% for a in s %}" * 15 + "{% endfor %}" * 15,
    "texts doubled": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "texts added": "{% set x = 'ab' %}" + "{% set x = x + x %}" * 60 + "{{ x }}",
    "lists doubled": "{% set x = ['ab'] %}" + "{% set x = x + x %}" * 60 + "{{ x }}",
    "lists of lists": "{% set x = ['ab'] %}" + "{% set x = [x, x] %}" * 60 + "{{ x == x }}",
    "blocks": "{% set n = namespace(x='ab') %}{% for a in 'a' * 60 %}{% set n.x %}{{ n.x }}"
    "{{ n.x }}{% endset %}{% endfor %}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(100) }}",
    "numbers": "{% set x = 3 %}" + "{% set x = x * x %}" * 60 + "{{ x }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a product": "{{ 'a' * 1000000000 }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "another format": "{{ '{:1000000000d}'.format(1) }}",
    "a filter": "{{ 'a' | center(1000000000) }}",
    "a method": "{% set f = 'a'.center %}{{ f(1000000000) }}",
    "depth": "{{ " + "(" * 20_000 + ")" * 20_000 + " }}",
    "length": "a" * 2**17,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_refused_soon(name) -> None:
    start = time.monotonic()
    with pytest.raises(GLMImageError, match=r"chat template .* take chat_template\.jinja from"):
        ChatTemplate(ENDLESS[name]).render(MESSAGES, {})
    assert time.monotonic() - start < 10


def test_an_endless_template_of_a_checkpoint_is_refused(snapshot) -> None:
    replace(snapshot / "processor/chat_template.jinja", ENDLESS["range"])
    with pytest.raises(GLMImageError, match="is endless, or writes too much"):
        prompt(snapshot)


def test_what_templates_use_is_rendered() -> None:
    """As transformers renders it."""
    source = (
        "{%- set n = namespace(i=0) %}{% macro shout(t) %}{{ t | upper | trim }}!{% endmacro %}\n"
        "{%- for m in messages if m.role != 'system' %}\n<|{{ m['role'] }}|>{{ '\\n' }}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        "{% if c.type == 'image' %}{% set n.i = n.i + 1 %}{{ bos_token ~ n.i }}"
        "{% elif 'text' in c %}{{ shout(c.text) }}{{ c.text.split(' ')[-1] + ' ' }}"
        "{{ c | tojson }}{% endif %}{{ loop.index0 * 2 % 3 }}{% if loop.last %}.{% endif %}"
        "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    text = ChatTemplate(source).render(MESSAGES, {"bos_token": "<b>"})
    assert text == '<|user|>\n<b>10A CAT!cat {"type": "text", "text": "a cat"}2.'
