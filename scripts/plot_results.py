"""`python -m scripts.plot_results`: the ratios of `bench/RESULTS.md` as `docs/images/bench.svg`."""

import math
import re

from .environment import ROOT

RESULTS = ROOT / "bench" / "RESULTS.md"
PLOT = ROOT / "docs" / "images" / "bench.svg"
COLOURS = ("#d1495b", "#2e6f95", "#8a9a5b")
LEFT, WIDTH, ROW, TOP = 410, 480, 22, 62  # pixels
TICKS = (0.75, 1, 1.5, 2, 3, 4, 6)
GRIDS = "AR, 512x512, batch 1"
SHORT = "the same beside", "cached decoder step beside"
OWN = " beside "
"""In a stage's name: compared with another run of ours; without it, with the reference."""


def draw() -> str:
    machines = read(RESULTS.read_text())
    stages = dict.fromkeys(stage for ratios in machines.values() for stage in ratios)
    groups = {
        "beside transformers and diffusers": [stage for stage in stages if OWN not in stage],
        "beside another run of ours": [stage for stage in stages if OWN in stage],
    }
    return plot(machines, groups)


def read(text: str) -> dict[str, dict[str, float]]:
    """By machine and stage, how many times faster ours was.

    The `medium` networks; of `small` only whole grids, which `medium` does not time.
    """
    machines = {}
    for section in text.split("\n## ")[1:]:
        title = re.match(r"\S+ 2-core (?:AMD |Intel )?(.+?), one thread", section)
        rows = re.findall(r"^\| (\w+) \| (.+?) \| .* \| ([\d.]+) \|.*\|$", section, re.MULTILINE)
        ratios = {
            stage.replace(", beside", " beside").replace(*SHORT): float(ratio)
            for preset, stage, ratio in rows
            if preset == "medium" or stage == GRIDS
            if "memory" not in stage and "alone" not in stage
        }
        if title:
            machines[title[1]] = ratios
    return machines


def plot(machines: dict[str, dict[str, float]], groups: dict[str, list[str]]) -> str:
    height = TOP + ROW * sum(len(stages) + 1 for stages in groups.values()) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, (machine, colour) in enumerate(zip(machines, COLOURS, strict=True)):
        parts += [dot(LEFT + 10 + 190 * i, 17, colour), label(LEFT + 20 + 190 * i, 21, machine)]
    for tick in TICKS:
        x, colour = across(tick), "#777" if tick == 1 else "#ddd"
        parts.append(f'<path d="M{x:.1f} {TOP - 8}V{height - 14}" stroke="{colour}"/>')
        parts.append(label(x, TOP - 14, f"{tick:g}x", "middle"))
    y = TOP
    for title, stages in groups.items():
        y += ROW
        parts.append(label(14, y - 4, title, weight="bold"))
        for stage in stages:
            y += ROW
            parts.append(label(LEFT - 12, y - 4, stage, "end"))
            parts += [
                dot(across(ratios[stage]), y - 9, colour)
                for ratios, colour in zip(machines.values(), COLOURS, strict=True)
                if stage in ratios
            ]
    return "\n".join([*parts, "</svg>\n"])


def across(ratio: float) -> float:
    first, last = math.log(TICKS[0] * 0.85), math.log(TICKS[-1] * 1.2)
    return LEFT + WIDTH * (math.log(ratio) - first) / (last - first)


def dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{colour}" fill-opacity="0.85"/>'


def label(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y}" {style}>{text}</text>'


if __name__ == "__main__":
    PLOT.write_text(draw())
