"""How well semantic tokens match their prompt, by the AR model itself."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..glm_core.data.references import References as ReferenceData
from ..glm_core.data.token_image import draw_sheet
from ..glm_core.data.tokens import UNKNOWN, SemanticTokens
from ..glm_core.data.tokens import Layout as LayoutData
from .host.ar_interface import AnyAR
from .host.scoring import LIKELIHOOD, MEASURES, Scores, score_tokens
from .inputs import check_choices, require_choices
from .messages import message
from .node import Node
from .types import AR, CATEGORY, Layout, References, Tokens

CELL = 16  # pixels
STRONGEST = 2.0  # nats that have the deepest colour, of a prompt match
LEVELS = 101  # of colours, the middle one for 0


class ScoreTokens(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageScoreTokens",
            display_name="GLM-Image Score Tokens",
            category=f"{CATEGORY}/best of",
            description="How likely the AR model finds tokens under their prompt, or how much "
            "more likely than under another one or none: a judge that needs no other model. "
            "Bigger is better. It compares candidates of one prompt; scores of two prompts say "
            "nothing about each other.",
            inputs=[
                AR.Input("ar", tooltip="The AR model that wrote the tokens."),
                io.String.Input(
                    "prompt", multiline=True, tooltip="The prompt that the tokens should match."
                ),
                Tokens.Input(
                    "tokens",
                    optional=True,
                    tooltip="Tokens to score, with the layout that came with them, or with their "
                    "references.",
                ),
                Layout.Input(
                    "layout",
                    optional=True,
                    tooltip="Alone: the layouts are scored, before their tokens are written. "
                    "Locked cells do not count.",
                ),
                References.Input(
                    "references",
                    optional=True,
                    tooltip="The references that the tokens were made from.",
                ),
                io.String.Input(
                    "against",
                    default="",
                    multiline=True,
                    tooltip="The prompt to compare with, such as the same one without the "
                    "detail that matters to you. Empty: no prompt.",
                ),
                io.Combo.Input(
                    "measure",
                    options=list(MEASURES),
                    default=MEASURES[0],
                    optional=True,
                    tooltip="prompt match: how much more likely the tokens are under the prompt "
                    "than under against. likelihood: how likely they are under the prompt alone, "
                    "which finds where the model went astray and takes half the time; against "
                    "must be empty.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="A number for each image, in nats a cell. Connect it to GLM-Image "
                    "Keep Best.",
                ),
                io.String.Output(display_name="table"),
                io.Image.Output(
                    display_name="heat map",
                    tooltip="Red cells speak for the prompt, blue ones against it; dark ones were "
                    "locked. With the measure likelihood, the bluer the less likely.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, measure: str | None = None) -> bool | str:
        return check_choices(("measure", measure, MEASURES))

    @classmethod
    def execute(
        cls,
        ar: AnyAR,
        prompt: str,
        against: str,
        tokens: SemanticTokens | None = None,
        layout: LayoutData | None = None,
        references: ReferenceData | None = None,
        measure: str = MEASURES[0],
    ) -> io.NodeOutput:
        require_choices(("measure", measure, MEASURES))
        scores = score_tokens(ar, prompt, against, tokens, layout, references, measure)
        table = _table(scores)
        said = message(table.splitlines())
        return io.NodeOutput(scores.means, table, _heat_map(scores)[None], ui=said)


def _table(scores: Scores) -> str:
    """A row for each sample, best first."""
    kinds = list(scores.grids)
    columns = ["image", "score", *(kinds if len(kinds) > 1 else [])]
    order = sorted(range(len(scores.means)), key=lambda i: _key(scores.means[i]), reverse=True)
    lines = ["  ".join(f"{name:>8}" for name in columns)]
    for i in order:
        own = [scores.mean(kind, i) for kind in columns[2:]]
        numbers = [f"{value:+.4f}" for value in (scores.means[i], *own)]
        lines.append("  ".join(f"{cell:>8}" for cell in (str(i), *numbers)))
    return "\n".join(lines)


def _key(score: float) -> float:
    """To sort by: a sample without a score comes last."""
    return score if score == score else -torch.inf


def _heat_map(scores: Scores) -> Tensor:
    """A sheet of the grids that were written last: float32 [height, width, 3]."""
    kind = list(scores.grids)[-1]
    cells, drawn = scores.cells[kind], scores.grids[kind].drawn
    share = (cells / _strongest(cells[drawn.expand_as(cells)], scores.measure)).clamp(-1, 1)
    levels = ((share + 1) / 2 * (LEVELS - 1)).round().long()
    return draw_sheet(levels.masked_fill(~drawn, UNKNOWN), _colours(), CELL)


def _strongest(cells: Tensor, measure: str) -> float:
    """Nats that have the deepest colour. Of a likelihood, whose scale varies: the least likely."""
    if measure != LIKELIHOOD or not cells.numel():
        return STRONGEST
    return max(-cells.min().item(), torch.finfo(cells.dtype).eps)


def _colours() -> Tensor:
    """From blue over white to red: float32 [LEVELS, 3], 0 to 1."""
    share = torch.linspace(-1, 1, LEVELS)[:, None]
    blue, white, red = torch.tensor([[0.13, 0.4, 0.67], [0.97, 0.97, 0.97], [0.7, 0.09, 0.17]])
    return torch.where(
        share < 0, white + share.abs() * (blue - white), white + share * (red - white)
    )
