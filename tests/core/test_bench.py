"""The benchmark runs from end to end, and its rows agree with each other."""

import json
import subprocess
import sys

import pytest
from glm_image.scripts.environment import ROOT

FIELDS = {"preset", "stage", "ours", "reference", "ratio", "unit", "floor"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("bench") / "last.json"
    command = [sys.executable, "-m", "bench", "tiny", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return json.loads(out.read_text())


def test_every_stage_is_compared_with_its_reference(rows) -> None:
    assert all(row.keys() == FIELDS for row in rows)
    both = {row["stage"] for row in rows if row["reference"] is not None}
    for stage in ("AR step", "AR, 64x64, batch 2", "glyph encoder", "VAE decode, 64x64",
                  "decoder step, 64x64, batch 1", "cache of 1 reference",
                  "64x64, 2 steps, CFG 1.5, end to end"):  # fmt: skip
        assert stage in both
    assert all(row["ours"] > 0 for row in rows if row["unit"] != "MiB")


def test_a_ratio_says_how_many_times_better_ours_is(rows) -> None:
    for row in rows:
        if row["ratio"] is None:
            continue
        times = row["reference"] / row["ours"]
        if row["unit"] == "tokens/s":
            times = 1 / times
        assert row["ratio"] == pytest.approx(times)


def test_floors_are_below_our_times(rows) -> None:
    floors = {row["stage"]: row for row in rows if row["floor"] is not None}
    assert 0 < floors["AR step"]["floor"] < floors["AR step"]["ours"]
    decoder = floors["decoder step, 64x64, batch 1"]
    assert 0 < decoder["floor"] < decoder["ours"]
