"""Prompts become the same ids with the oldest and the newest transformers, in new processes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red circle on the left, the text 'HELLO'", ' "雨の中" é \U0001f327 <sop> 32 32 \n')


def ids_of_prompts(core: str) -> dict[str, Any]:
    """What the pack makes of PROMPTS with the tiny model's files. `core` is glm_core's name."""
    opening, prompt, texts = (
        importlib.import_module(f"{core}.{name}")
        for name in ("files.opening", "ar.prompt", "glyph.texts")
    )
    files = opening.open_component(ROOT / "tiny", "ar").processor
    reference = torch.arange(6).reshape(2, 3)
    made: dict[str, Any] = {}
    for template in (files.chat_template, None):
        tokenizer = prompt.PromptTokenizer(files.tokenizer, files.tokenizer_config, template)
        for text in PROMPTS:
            prompts = (
                tokenizer.text_to_image(text, (3, 5)),
                tokenizer.image_to_image(text, (3, 5), [reference, reference.T]),
            )
            made[f"{text} {template is None}"] = [
                [found.ids.tolist(), found.positions.tolist()] for found in prompts
            ]
    made["glyphs"] = [texts.glyph_ids(texts.texts_to_render(text)) for text in PROMPTS]
    return made


def ids_of_transformers() -> dict[str, Any]:
    """The same texts through the release of transformers that this process has."""
    import transformers  # it takes seconds

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "tiny" / "processor" / "tokenizer.json")
    )
    return {
        "version": transformers.__version__,
        "file": transformers.__file__,
        "text": tokenizer(PROMPTS[0]).input_ids,
        "glyphs": transformers.ByT5Tokenizer()("HELLO").input_ids,
    }


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    """By release, what a process has answered whose path begins with it."""
    from glm_image.scripts import environment

    started = {}
    for which in environment.TRANSFORMERS:
        folder = environment.transformers(which)
        path = os.pathsep.join([str(folder), str(ROOT)])
        command = [sys.executable, __file__]
        # Without torch, which the tokenizers do not need, transformers is imported sooner.
        settings = {"PYTHONPATH": path, "USE_TORCH": "0", "HF_HUB_OFFLINE": "1"}
        started[which] = (
            folder,
            subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.PIPE),
        )
    found = {}
    for which, (folder, process) in started.items():
        out, _ = process.communicate()
        assert process.returncode == 0
        found[which] = json.loads(out)
        assert Path(found[which]["theirs"]["file"]).is_relative_to(folder)
    return found


@pytest.mark.parametrize(("which", "release"), [("oldest", "4.50.0"), ("newest", "5.")])
def test_the_same_ids(answers, which: str, release: str) -> None:
    ours, theirs = answers[which]["ours"], answers[which]["theirs"]
    assert theirs["version"].startswith(release)
    assert ours == ids_of_prompts("glm_image.glm_core")
    assert json.dumps(theirs["text"])[1:-1] in json.dumps(ours[f"{PROMPTS[0]} True"])
    assert theirs["glyphs"] in ours["glyphs"][0]


if __name__ == "__main__":
    json.dump({"ours": ids_of_prompts("glm_core"), "theirs": ids_of_transformers()}, sys.stdout)
