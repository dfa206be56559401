"""The trained model in `tiny/` paints what its prompts ask for; `make eval` asks many more."""

from collections.abc import Callable, Iterator

import pytest
from glm_image.scripts import environment, host
from glm_image.scripts.client import Client

from evaluation import cases as evaluation
from evaluation.run import MODEL, totals

STEPS, CASES = 8, 4
LOOKAHEAD = 8  # in float32 the same tokens, in a third of the time
# Of CASES: the share that the model's card measures on many more, less a margin. A picture that
# shows nothing passes none of them.
LEAST = {
    "colours and places of shapes match": 3,
    "kinds of shapes match as well": 3,
    "Latin word read": 3,
    "two Chinese characters read": 3,
    "... the new word read": 3,
    "... the rest unchanged": 3,
    "locked layout, another seed: centres kept": 4,
    "edit keeps the unchanged shapes": 3,
    "edit does what was wished": 3,
}
MOST = {"no lock, another seed: centres kept": 2}

Counts = dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def count(tmp_path_factory) -> Iterator[Callable[..., Counts]]:
    """Runs a kind of cases on a server with the trained model and counts those that passed."""
    base = host.make_base(tmp_path_factory.mktemp("meaning"))
    settings = evaluation.Settings(host.add_model(base, MODEL), steps=STEPS, lookahead=LOOKAHEAD)
    with host.serve(environment.host(), base, threads=1) as address:
        client = Client(address, timeout_s=300)

        def of(cases: Callable) -> Counts:
            return totals(
                case.check(evaluation.paint(client, base / "input", case))
                for case in cases(settings, CASES)
            )

        yield of


@pytest.mark.parametrize("kind", evaluation.SETS)
def test_pictures_mean_what_was_asked(count, kind) -> None:
    counts = count(evaluation.SETS[kind])
    assert counts.keys() & LEAST.keys()
    for measure, (good, asked) in counts.items():
        assert asked == CASES
        assert LEAST.get(measure, 0) <= good <= MOST.get(measure, CASES), measure
