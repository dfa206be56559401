"""What a node says after it has run: under its widgets, in the history, and warnings in the log.

The page shows the lines of `text` by `web/node_messages.js`, until the node runs again.
"""

import logging
from collections.abc import Iterable

log = logging.getLogger(__name__)


def message(lines: Iterable[str]) -> dict[str, list[str]]:
    """The `ui` of a node's output. Without lines it takes away those of the run before."""
    return {"text": list(lines)}


def warning(sentences: Iterable[str]) -> dict[str, list[str]]:
    """A message whose sentences are logged as well."""
    said = message(sentences)
    for sentence in said["text"]:
        log.warning("%s", sentence)
    return said
