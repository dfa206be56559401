"""What to say of a prompt's texts: which are rendered, what is left out, quotes that mislead.

Nothing here changes what is rendered. An apostrophe counts as a quote because it did in training.
"""

import re

from ..errors import first_few, shown
from .texts import MAX_IDS, MAX_LENGTH, MAX_TEXTS, QUOTES, is_cut, texts_that_fit, texts_to_render

LETTER = "[A-Za-z\u00c0-\u04ff]"  # of scripts that write words with apostrophes
PART = f"(?<!{LETTER}){LETTER}{{1,40}}"  # bounded, so that the search takes linear time
APOSTROPHE = re.compile(f"{PART}(?:'{LETTER}{{1,40}})+")
WORD_END = re.compile(f"{PART}'(?!{LETTER})")  # dogs', or the end of a quoted text
NAMES = ("'...'", "“...”", '"..."', "「...」")
"""Of `QUOTES`, in their order."""
UNTRAINED = ("‘’", "«»", "《》")
"""Pairs of quotes whose inside is not rendered."""
MAX_LINES = 20  # of texts that a node shows
LIST_THEM = "list the texts in the input texts"


def advice(prompt: str, listed: list[str] | None = None) -> list[str]:
    """Sentences for the person at the graph; none if there is nothing to say.

    Args:
        prompt: where the quoted texts are found.
        listed: texts that are rendered in their place, if the person has listed some.
    """
    found = texts_to_render(prompt) if listed is None else listed
    sentences = _left_out(found)
    if listed is None:
        sentences += [*_apostrophes(prompt), *_without_partner(prompt), *_untrained(prompt)]
    return sentences


def _left_out(texts: list[str]) -> list[str]:
    fitting = texts_that_fit(texts)
    sentences = [
        f"The end of the text '{shown(text[:40])}...' is cut: {MAX_LENGTH - 1} bytes fit."
        for text in fitting
        if is_cut(text)
    ]
    if len(fitting) < len(texts):
        sentences.append(
            f"The last {len(texts) - len(fitting)} of {len(texts)} texts are left out: at most "
            f"{MAX_TEXTS} texts fit, of {MAX_IDS} bytes together."
        )
    return sentences


def _apostrophes(prompt: str) -> list[str]:
    openings = {match.start() for match in re.finditer(QUOTES[0], prompt)}
    ends = [end.group() for end in WORD_END.finditer(prompt) if end.end() - 1 in openings]
    words = dict.fromkeys([*APOSTROPHE.findall(prompt), *ends])
    if not words:
        return []
    return [
        f"The apostrophe in {first_few(words)} counts as a quote, as it did in training; "
        f"write ’ in its place, or {LIST_THEM}."
    ]


def _without_partner(prompt: str) -> list[str]:
    """Apostrophes within words are not said a second time."""
    without = {
        name: re.sub(quote, "", APOSTROPHE.sub("", prompt) if name[0] == "'" else prompt)
        for quote, name in zip(QUOTES, NAMES, strict=True)
    }
    return [
        f"A quote of the kind {name} has no partner, so it marks no text; close it, or {LIST_THEM}."
        for name, rest in without.items()
        if {name[0], name[-1]} & set(rest)
    ]


def _untrained(prompt: str) -> list[str]:
    found = [
        match.group()
        for start, end in UNTRAINED
        for match in re.finditer(f"{start}[^{start}{end}]*{end}", prompt)
    ]
    if not found:
        return []
    return [
        f"{first_few(found)} will not be rendered, because the model was not trained on "
        f"these quotes; use \"...\", “...”, '...' or 「...」 for a text to render."
    ]


def summary(texts: list[str]) -> list[str]:
    """Lines that say which texts will be rendered."""
    if not texts:
        return ["No text to render: nothing is in quotes."]
    lines = [shown(text) or "(an empty text)" for text in texts[:MAX_LINES]]
    if len(texts) > MAX_LINES:
        lines.append(f"... and {len(texts) - MAX_LINES} more")
    return ["Text to render:" if len(texts) == 1 else f"{len(texts)} texts to render:", *lines]
