"""Keeps the best of what was scored."""

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..glm_core.data.ranking import best_first, ranks
from ..glm_core.data.tokens import Layout as LayoutData
from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import BatchError, InputError
from .host.joining import JOINERS, count_of
from .messages import message
from .node import Node
from .types import CATEGORY, Layout, Tokens

MOST = 4096


class KeepBest(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageKeepBest",
            display_name="GLM-Image Keep Best",
            category=f"{CATEGORY}/best of",
            description="Keeps the best of everything that is connected, in order. Each list of "
            "scores counts by its ranks times its weight, so that scores of any kind and any "
            "pack can be joined. Lists and batches are counted in order.",
            inputs=[
                *_score_inputs("scores", "weight", "such as those of GLM-Image Score Tokens"),
                *_score_inputs("scores_2", "weight_2", "of another judge"),
                *_score_inputs("scores_3", "weight_3", "of another judge"),
                Tokens.Input("tokens", optional=True, tooltip="Tokens, one for each score."),
                Layout.Input("layout", optional=True, tooltip="Layouts, one for each score."),
                io.Image.Input("images", optional=True, tooltip="Images, one for each score."),
                io.Latent.Input("latent", optional=True, tooltip="Latents, one for each score."),
                io.Int.Input(
                    "count", default=1, min=1, max=MOST, tooltip="How many to keep, best first."
                ),
            ],
            outputs=[
                Tokens.Output(display_name="tokens"),
                Layout.Output(display_name="layout"),
                io.Image.Output(display_name="images"),
                io.Latent.Output(display_name="latent"),
                io.String.Output(display_name="table", tooltip="All that was scored, best first."),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls,
        scores: list[float],
        weight: list[float],
        weight_2: list[float],
        weight_3: list[float],
        count: list[int],
        scores_2: list[float] | None = None,
        scores_3: list[float] | None = None,
        tokens: list[SemanticTokens] | None = None,
        layout: list[LayoutData] | None = None,
        images: list[Tensor] | None = None,
        latent: list[dict] | None = None,
    ) -> io.NodeOutput:
        given = {"scores": scores, "scores_2": scores_2, "scores_3": scores_3}
        lists = {name: values for name, values in given.items() if values}
        connected = {"tokens": tokens, "layout": layout, "images": images, "latent": latent}
        candidates = {name: values for name, values in connected.items() if values}
        _require_whole(candidates)
        _require_equal_counts(lists, candidates)
        most = len(scores)
        if count[0] > most:
            raise BatchError(
                f"count is {count[0]} and there are {most} scores; use at most {most}."
            )
        numbers = {"weight": weight, "weight_2": weight_2, "weight_3": weight_3}
        weights = dict(zip(given, map(_weight, numbers, numbers.values()), strict=True))
        order = best_first(list(lists.values()), [weights[name] for name in lists])
        kept = [
            join(candidates[name], order[: count[0]])
            if name in candidates
            else ExecutionBlocker(f"Keep Best has no {name} to give; connect some to its input.")
            for name, join in JOINERS.items()
        ]
        table = _table(lists, order)
        return io.NodeOutput(*kept, table, ui=message(table.splitlines()))


def _score_inputs(name: str, weight: str, kind: str) -> list[io.Input]:
    return [
        io.Float.Input(
            name,
            force_input=True,
            optional=name != "scores",
            tooltip=f"Scores, one for each candidate; bigger is better: {kind}.",
        ),
        io.Float.Input(
            weight, default=1.0, min=0.0, max=1000.0, step=0.05, tooltip=f"How much {name} count."
        ),
    ]


def _weight(name: str, values: list[float]) -> float:
    if not values:
        raise InputError(f"{name} is an empty list; connect a number, or nothing.")
    return values[0]


def _require_whole(candidates: dict[str, list]) -> None:
    """An optional input may be None, and so may an entry of its list."""
    for name, values in candidates.items():
        if any(value is None for value in values):
            raise InputError(
                f"{name} has an empty entry; connect one for each score, or nothing at all."
            )


def _require_equal_counts(lists: dict[str, list[float]], candidates: dict[str, list]) -> None:
    """
    Raises:
        GLMImageError: a list of scores or of candidates is longer than another.
    """
    counts = {name: len(values) for name, values in lists.items()}
    counts |= {name: count_of(values) for name, values in candidates.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise BatchError(f"There are {found}; connect one score for each candidate.")


def _table(lists: dict[str, list[float]], order: list[int]) -> str:
    """A row for each candidate, best first, with its scores and their ranks from 1 (best)."""
    heads = ["place", "image", *(head for name in lists for head in (name, "rank"))]
    places = {name: [len(order) - rank for rank in ranks(values)] for name, values in lists.items()}
    rows = [
        [
            str(place),
            str(i),
            *(
                text
                for name, values in lists.items()
                for text in (f"{values[i]:.4f}", f"{places[name][i]:g}")
            ),
        ]
        for place, i in enumerate(order, start=1)
    ]
    return "\n".join("  ".join(f"{cell:>9}" for cell in row) for row in [heads, *rows])
