"""Is the best of several by its score better than a single one?

Each case is written several times in one batch, and all are painted. The first is what a single run
gives. An oracle that knows which are right picks one of them if there is any.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from scripts.client import Client, Prompt

from .cases import SETS, Case, Results, Settings, node, painted

BY_MATCH, BY_LIKELIHOOD, BY_LAYOUT = "prompt match", "likelihood", "layout's likelihood"
BY_TOKENS = (BY_MATCH, BY_LIKELIHOOD, BY_LAYOUT)
BY_OCR = "OCR"
JUDGES = {
    "colours and places of shapes match": BY_TOKENS,
    "kinds of shapes match as well": BY_TOKENS,
    "Latin word read": (BY_OCR,),
    "two Chinese characters read": (BY_OCR,),
}
"""The judges that choose, by what is measured. A judge is a node of the graph with its name."""
READS = {"shapes": False, "latin": True, "chinese": True}
"""The kinds of cases, and whether their pictures are read as well."""


@dataclass(frozen=True)
class Candidates:
    """The candidates of a case.

    held: what each shows of what was asked.
    scores: by judge, one for each candidate.
    seconds: of the server, by judge, and under "picture" one candidate's share of all other nodes.
    """

    held: list[Results]
    scores: dict[str, list[float]]
    seconds: dict[str, float]


def cases_of(
    settings: Settings, count: int, candidates: int, kinds: Iterable[str] = tuple(READS)
) -> Iterator[Case]:
    """`count` cases of each of the kinds, whose graph writes `candidates` and scores them."""
    for kind in kinds:
        for case in SETS[kind](settings, count):
            (graph,) = case.graphs
            yield replace(case, graphs=(_scored(graph, candidates, READS[kind]),))


def _scored(graph: Prompt, candidates: int, reads: bool) -> Prompt:
    """The graph with a batch of candidates, and nodes that show their scores."""
    node(graph, "GLMImageSampleTokens")["batch_size"] = candidates
    ids = {one["class_type"]: key for key, one in graph.items()}
    sampler = ids["GLMImageSampleTokens"]
    ar, prompt = (graph[sampler]["inputs"][name] for name in ("ar", "prompt"))
    layout = {"ar": ar, "prompt": prompt, "layout": [sampler, 1], "against": ""}
    both = layout | {"tokens": [sampler, 0]}
    judges = {
        BY_MATCH: _node("GLMImageScoreTokens", **both, measure="prompt match"),
        BY_LIKELIHOOD: _node("GLMImageScoreTokens", **both, measure="likelihood"),
        BY_LAYOUT: _node("GLMImageScoreTokens", **layout, measure="likelihood"),
    }
    if reads:
        pictures = [ids["VAEDecode"], 0]
        judges[BY_OCR] = _node("GLMImageReadText", images=pictures, prompt=prompt)
    for judge in judges:
        graph[_shown(judge)] = _node("PreviewAny", source=[judge, 0])
    return graph | judges


def _shown(judge: str) -> str:
    """The id of the node that shows a judge's scores."""
    return f"scores of {judge}"


def _node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}


def paint_candidates(client: Client, case: Case) -> Candidates:
    (graph,) = case.graphs
    run = client.run(graph)
    held = [case.check([picture]) for picture in painted(client, run, graph)]
    scores = {
        judge: [float(score) for score in run.outputs[_shown(judge)]["text"]]
        for judge in (*BY_TOKENS, BY_OCR)
        if judge in graph
    }
    seconds = {judge: run.seconds[judge] for judge in scores}
    others = sum(run.seconds.values()) - sum(seconds.values())
    return Candidates(held, scores, seconds | {"picture": others / len(held)})


def chosen(scores: list[float]) -> int:
    """The index of the best score, the lowest of equal ones."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def right_above_wrong(cases: Iterable[tuple[list[float], list[bool]]]) -> float | None:
    """How often a right candidate scores above a wrong one of its own case; ties count half.

    0.5 is chance, 1 is always; None if no case has both.
    """
    wins = [
        (right > wrong) + (right == wrong) / 2
        for scores, held in cases
        for right, is_right in zip(scores, held, strict=True)
        for wrong, is_wrong in zip(scores, held, strict=True)
        if is_right and not is_wrong
    ]
    return sum(wins) / len(wins) if wins else None


def table(found: list[Candidates]) -> str:
    """A row for each judge of each measure, and the seconds that the judges took.

    The mean of all candidates is a steadier estimate of a single run than the first alone.
    """
    lines = [
        "| measure | cases | single | mean of all | oracle | best by | its share "
        "| right above wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for measure, judges in JUDGES.items():
        own = [one for one in found if measure in one.held[0]]
        if not own:
            continue
        held = [[result[measure] for result in one.held] for one in own]
        shares = (
            _share(right[0] for right in held),
            _share(right for rights in held for right in rights),
            _share(map(any, held)),
        )
        for judge in judges:
            scores = [one.scores[judge] for one in own]
            best = _share(right[chosen(score)] for score, right in zip(scores, held, strict=True))
            above = right_above_wrong(zip(scores, held, strict=True))
            cells = (measure, len(own), *(f"{share:.0%}" for share in shares))
            cells += (judge, f"{best:.0%}", "-" if above is None else f"{above:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *_costs(found)])


def _share(held: Iterable[bool]) -> float:
    held = list(held)
    return sum(held) / len(held)


def _costs(found: list[Candidates]) -> Iterator[str]:
    for what in ("picture", *BY_TOKENS, BY_OCR):
        seconds = [one.seconds[what] for one in found if what in one.seconds]
        if seconds:
            mean = sum(seconds) / len(seconds)
            unit = "a picture" if what == "picture" else "to score a batch"
            yield f"{what}: {mean:.2f} s {unit}"


def record(case: Case, found: Candidates) -> dict:
    """As JSON."""
    return {"case": case.name, "prompt": case.prompt, **json.loads(json.dumps(vars(found)))}
