"""The trained model in `tiny/` paints what its prompts ask for; `make eval` asks many more."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from glm_image.scripts import environment, host
from glm_image.scripts.client import Client

from evaluation import run as evaluation

SIZE, STEPS, CASES = 512, 10, 3
LEAST = {  # of CASES; below the goals, as so few cases say little
    "colours and places of shapes match": 2,
    "Latin word read": 2,
    "two Chinese characters read": 1,
    "... the new word read": 2,
    "... the rest unchanged": 2,
    "locked layout, another seed: centres kept": 2,
    "edit keeps the unchanged shapes": 2,
}
MOST = {"no lock, another seed: centres kept": 1}

Counts = dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def count(tmp_path_factory) -> Iterator[Callable[..., Counts]]:
    """Runs a kind of cases on a server of the trained model's own and counts what held."""
    base = host.make_base(tmp_path_factory.mktemp("meaning"))
    model: Path = evaluation.MODEL
    (base / "models" / "glm_image" / model.name).symlink_to(model)
    settings = evaluation.Settings(model.name, SIZE, STEPS)
    with host.serve(environment.host(), base) as address:
        client = Client(address, timeout_s=120)

        def of(cases: Callable) -> Counts:
            return evaluation.totals(
                case.check(evaluation.paint(client, base / "input", case))
                for case in cases(settings, CASES)
            )

        yield of


@pytest.mark.parametrize("cases", evaluation.SETS, ids=lambda cases: cases.__name__)
def test_pictures_mean_what_was_asked(count, cases) -> None:
    counts = count(cases)
    assert counts.keys() & (LEAST.keys() | MOST.keys())
    for measure, (good, asked) in counts.items():
        assert asked == CASES
        assert LEAST.get(measure, 0) <= good <= MOST.get(measure, CASES), measure
