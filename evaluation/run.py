"""`python -m evaluation.run`: does the trained model in `tiny/` paint what its prompts ask for?

The pack's own workflows paint every picture on a real server. The scenes come from seeds that
training does not use, though simple scenes may occur in both. Training never draws the Latin words
that are read here.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from scripts import demo, environment, host
from scripts.client import Client
from training.scene import SIZES

from . import best_of
from .cases import SETS, Case, Results, Settings, paint

T = TypeVar("T")

MODEL = environment.ROOT / "tiny"
WORKFLOWS = ("text_to_image", "best_of_eight_layouts")
"""Stored ones that can paint scenes and texts, the usual one first."""

GOALS = {
    "colours and places of shapes match": 0.9,
    "kinds of shapes match as well": None,
    "Latin word read": 0.8,
    "two Chinese characters read": 0.6,
    "glyph override changes the word alone": None,
    "... the new word read": None,
    "... the rest unchanged": None,
    "locked layout, another seed: centres kept": 0.95,
    "no lock, another seed: centres kept": None,
    "edit keeps the unchanged shapes": None,
    "edit does what was wished": None,
}
"""What is measured, and the share of cases that should pass; None sets no goal."""


def totals(results: Iterable[Results]) -> dict[str, tuple[int, int]]:
    """How often each of the GOALS held, and in how many cases it was measured."""
    counts: dict[str, tuple[int, int]] = {}
    for result in results:
        for measure, held in result.items():
            good, asked = counts.get(measure, (0, 0))
            counts[measure] = good + held, asked + 1
    return counts


def table(counts: dict[str, tuple[int, int]]) -> str:
    lines = ["| measure | goal | result | share |", "|---|---|---|---|"]
    for measure, goal in GOALS.items():
        if measure in counts:
            good, asked = counts[measure]
            wanted = "" if goal is None else f"{goal:.0%}"
            lines.append(f"| {measure} | {wanted} | {good}/{asked} | {good / asked:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.run", description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="cases of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=read_size, default=(512, 512), metavar="WIDTHxHEIGHT",
                        help="of all pictures, in pixels; one number for a square")  # fmt: skip
    parser.add_argument("--out", type=Path, default=environment.ROOT / "evaluation/last.json")
    parser.add_argument("--kinds", nargs="+", choices=SETS, default=list(SETS), metavar="KIND",
                        help=f"of cases: {', '.join(SETS)}")  # fmt: skip
    parser.add_argument("--servers", type=int, default=1, help="side by side, a core each")
    parser.add_argument("--best-of", type=int, default=0, metavar="COUNT",
                        help="keep the best of so many candidates by their scores")  # fmt: skip
    parser.add_argument("--workflow", choices=WORKFLOWS, default=WORKFLOWS[0],
                        help=f"that paints scenes and texts: {', '.join(WORKFLOWS)}")  # fmt: skip
    given = parser.parse_args()
    if given.best_of and given.workflow != WORKFLOWS[0]:
        parser.error(f"--best-of makes its candidates with {WORKFLOWS[0]}; leave --workflow out.")
    if not MODEL.is_dir():
        raise SystemExit(f"There is no trained model in {MODEL}: run make train-tiny.")
    settings = Settings(MODEL.name, *given.size, given.steps, workflow=given.workflow)
    used = {name: getattr(given, name) for name in ("size", "steps", "count", "workflow")}
    if given.best_of:
        _measure_best_of(settings, given, used | {"best_of": given.best_of})
    else:
        _measure_cases(settings, given, used)


def _measure_cases(settings: Settings, given: argparse.Namespace, used: dict) -> None:
    records = []
    cases = [case for kind in given.kinds for case in SETS[kind](settings, given.count)]
    with run_on_servers(given.servers, paint) as pictures_of:
        for case, pictures in zip(cases, pictures_of(cases), strict=True):
            results = case.check(pictures)
            records.append({"case": case.name, "prompt": case.prompt, "held": results})
            print(case.name, "".join("x."[held] for held in results.values()), flush=True)
            _write_report(given.out, used, records)  # after each case, so that none is lost
    print(table(totals(record["held"] for record in records)))


def _measure_best_of(settings: Settings, given: argparse.Namespace, used: dict) -> None:
    found, records = [], []
    kinds = [kind for kind in given.kinds if kind in best_of.READS]
    if not kinds:
        raise SystemExit(f"--best-of chooses among cases of {', '.join(best_of.READS)} only.")
    cases = list(best_of.cases_of(settings, given.count, given.best_of, kinds))

    def paint_candidates(client: Client, _: Path, case: Case) -> best_of.Candidates:
        return best_of.paint_candidates(client, case)

    with run_on_servers(given.servers, paint_candidates) as candidates_of:
        for case, candidates in zip(cases, candidates_of(cases), strict=True):
            found.append(candidates)
            records.append(best_of.record(case, candidates))
            marks = ("".join("x."[held] for held in one.values()) for one in candidates.held)
            print(case.name, *marks, flush=True)
            report = {"settings": used, "cases": records}
            given.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(best_of.table(found))


def read_size(given: str) -> tuple[int, int]:
    """(width, height) from "768x512", or from "512" for a square; the model must know the size."""
    known = {f"{width}x{height}": (width, height) for height, width in SIZES}
    size = given if "x" in given else f"{given}x{given}"
    if size not in known:
        raise argparse.ArgumentTypeError(
            f"the model does not know the size {given}: use {', '.join(known)}"
        )
    return known[size]


@contextmanager
def run_on_servers(
    count: int, work: Callable[[Client, Path, Case], T]
) -> Iterator[Callable[[Iterable[Case]], Iterator[T]]]:
    """Starts `count` servers, and yields a map of cases through `work` on whichever is free.

    Args:
        work: gets a server's client, its input folder and a case.
    """
    comfyui = environment.host()
    flags = ("--output-directory", str(demo.OUTPUT))
    threads = 1 if count > 1 else None
    free = SimpleQueue()
    with ExitStack() as stack:
        for i in range(count):
            base = host.make_base(environment.CACHE / "evaluation" / str(i))
            host.add_model(base, MODEL)
            server = host.serve(comfyui, base, *flags, threads=threads)
            address = stack.enter_context(server)
            free.put((Client(address), base / "input"))

        def on_a_free_one(case: Case) -> T:
            server = free.get()
            try:
                return work(*server, case)
            finally:
                free.put(server)

        pool = stack.enter_context(ThreadPoolExecutor(count))
        yield lambda cases: pool.map(on_a_free_one, cases)


def _write_report(file: Path, used: dict, records: list[dict]) -> None:
    counts = totals(record["held"] for record in records)
    summary = {
        measure: {"goal": GOALS[measure], "good": good, "cases": asked}
        for measure, (good, asked) in counts.items()
    }
    report = {"settings": used, "summary": summary, "cases": records}
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
