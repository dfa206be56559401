"""Nodes that take whole lists: a list's entries, and samples of all entries written together."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from ...glm_core.ar.requests import SampleRequest, Written
from ...glm_core.errors import InputError
from .ar import HostAR


def entries_of(inputs: Mapping[str, list[Any] | None]) -> list[dict[str, Any]]:
    """The inputs of each entry. Shorter lists repeat their last entry, as in ComfyUI.

    Args:
        inputs: a list each; None where nothing is connected.

    Raises:
        GLMImageError: a list is empty.
    """
    lists = {name: values for name, values in inputs.items() if values is not None}
    for name, values in lists.items():
        if not values:
            raise InputError(f"{name} is an empty list; connect a node that gives something.")
    count = max(map(len, lists.values()))
    return [
        {name: values[min(i, len(values) - 1)] for name, values in lists.items()}
        for i in range(count)
    ]


def write_lists(
    ars: Sequence[HostAR], requests: Sequence[Sequence[SampleRequest]], rows: int
) -> list[list[Written]]:
    """What is written for each entry of a list.

    Args:
        ars: the AR model of each entry.
        requests: the samples of each entry.
        rows: with one, an entry is written after the other. With more, samples of all entries of a
            model are written together, see `HostAR.write`.
    """
    if rows == 1:
        return [ar.write(own, 1) for ar, own in zip(ars, requests, strict=True)]
    written: list[list[Written]] = [[] for _ in requests]
    for ar in dict.fromkeys(ars):
        entries = [i for i, other in enumerate(ars) if other is ar]
        samples = iter(ar.write([one for i in entries for one in requests[i]], rows))
        for i in entries:
            written[i] = list(islice(samples, len(requests[i])))
    return written
