"""The AR model's tokenizer: byte-level BPE, with one token for each capital, digit and Hanzi."""

import json

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GlmImageProcessor, PreTrainedTokenizerFast
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from .codes import CODEBOOK
from .scene import ANCHORS, CHINESE, OPEN, SIZES, TEXT_PLACES, draw_scene
from .wording import prompt_of

VISUAL = CODEBOOK + 16  # ids below the text's: codes, image start, image end and some unused
IMAGE_START, IMAGE_END = CODEBOOK, CODEBOOK + 1
CONTROLS = (
    "<|endoftext|>",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|image|>",
)
SHAPE_AT = {place: f"<|at {place}|>" for place in ANCHORS}
TEXT_AT = {place: f"<|text {place}|>" for place in TEXT_PLACES}
PLACES = (*SHAPE_AT.values(), *TEXT_AT.values())
ANYWHERE = tuple(f"<|anywhere {i}|>" for i, _ in enumerate(OPEN))
NOTES = (*ANYWHERE, *PLACES)
"""Tokens that the chat template adds after every prompt.

The AR model uses each as a note on what is at one place, or on one shape whose place is open.
"""
TEMPLATE = (
    "{% for m in messages %}"
    "{% for c in m.content if c.type != 'image' %}{{ c.text }}{% endfor %}"
    "{% for c in m.content if c.type == 'image' %}"
    "{{ bos_token }}<|image|>{{ eos_token }}"
    "{% else %}<|assistant|>" + "".join(ANYWHERE) + "{% endfor %}{% endfor %}"
) + "".join(PLACES)
"""The wish comes before the reference: the reference's cells can then attend to it, and are at the
same distance from the picture however long it is. Without a reference, <|assistant|> ends the last
phrase of the prompt as a comma ends the others."""
TEXT_TOKENS = 900
REFERENCE_TO_PICTURE = 1 + len(PLACES) + 8
"""Tokens from a reference's last cell to the edited picture's first: the reference's end, the
places, the size and the picture's start."""
IMAGE_PLACEHOLDER = VISUAL + TEXT_TOKENS + CONTROLS.index("<|image|>")
"""The id in a prompt that stands for a reference."""


def make_processor() -> GlmImageProcessor:
    """Tokenizer, image processor and chat template, as `processor/` of a snapshot holds them."""
    return GlmImageProcessor(
        image_processor=GlmImageImageProcessorPil(
            patch_size=16, merge_size=1, temporal_patch_size=1,
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
            min_pixels=512 * 512, max_pixels=2048 * 2048,
        ),
        tokenizer=_tokenizer(),
        chat_template=TEMPLATE,
    )  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    learned = _learn_bpe()
    visual = [f"<|dit_token_{i}|>" for i in range(VISUAL)]
    text = [token for token, _ in sorted(learned["vocab"].items(), key=lambda pair: pair[1])]
    vocab = {token: i for i, token in enumerate([*visual, *text])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(visual)
    tokenizer.add_special_tokens([*CONTROLS, *PLACES, *ANYWHERE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=visual[IMAGE_START],
        eos_token=visual[IMAGE_END],
        pad_token=visual[IMAGE_END],
        extra_special_tokens={
            "image_token": "<|image|>",
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
        },
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _splitter() -> pre_tokenizers.PreTokenizer:
    pieces = Regex(r" ?[A-Z]?[a-z]+|[A-Z]|[0-9]| +|[^A-Za-z0-9 ]")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _learn_bpe() -> dict:
    """Vocabulary and merges, learned from random prompts and all characters of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splitter()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    prompts = []
    for i in range(4000):
        rng = np.random.default_rng([13, i])
        prompts.append(prompt_of(rng, draw_scene(rng, *SIZES[i % len(SIZES)])))
    tokenizer.train_from_iterator([*prompts, *(CHINESE for _ in range(20))], trainer)
    return json.loads(tokenizer.to_str())["model"]
