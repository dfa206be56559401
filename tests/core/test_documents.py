"""What the documents say holds: links, tables of sizes, and commands."""

import re
import shlex
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from glm_image.glm_core import convert

from scripts import full_size
from scripts.plot_results import PLOT, draw

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document) -> None:
    links = re.findall(r"\]\(([^)]+)\)", document.read_text())
    for link in (link for link in links if ":" not in link):
        file, _, heading = link.partition("#")
        target = document.parent / unquote(file) if file else document
        assert target.exists(), link
        assert not heading or heading in headings(target.read_text()), link


def headings(text: str) -> set[str]:
    """The names by which GitHub links to a document's headings."""
    lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in lines}


def test_there_are_documents() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    assert {"README.md", "ARCHITECTURE.md", "docs/devices.md"} <= found


def test_the_plot_shows_the_results() -> None:
    assert PLOT.read_text() == draw(), "run python -m scripts.plot_results"


def test_the_code_in_architecture_is_the_examples() -> None:
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    section = architecture.split("## glm_core alone\n")[1].split("\n## ")[0]
    script = _lines((ROOT / "scripts" / "without_comfyui.py").read_text())
    blocks = re.findall(r"```python\n(.+?)```", section, re.DOTALL)
    assert blocks
    assert all(_lines(block) in script for block in blocks)


def _lines(code: str) -> str:
    """Without indentation, which a part of a class loses in a document."""
    return "".join(f"{line.strip()}\n" for line in code.splitlines())


# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "rows"),
    [
        ("README.md", full_size.card_rows),
        ("docs/install.md", full_size.download_rows),
        ("docs/smaller-weights.md", full_size.converted_rows),
    ],
)
def test_tables_of_sizes_are_those_that_are_computed(document, rows) -> None:
    computed = "\n".join(rows())
    assert f"|\n{computed}\n\n" in (ROOT / document).read_text(), "run python -m scripts.full_size"


def test_the_computed_sizes_are_those_of_the_published_parameters() -> None:
    published = {"ar": 10_114_245_632, "decoder": 6_926_882_880, "vae": 406_100_643}
    for name, count in published.items():
        assert full_size.component(name).nbytes == pytest.approx(2 * count, rel=1e-3)


# ---- commands ----------------------------------------------------------------------------------

PORTABLE = ".\\python_embeded\\python.exe -s "
PACK = "ComfyUI/custom_nodes/ComfyUI-GLM-Image"
SNAPSHOT = "ComfyUI/models/glm_image/GLM-Image"


def commands() -> list[list[str]]:
    """The words of every printed command that names this pack or the model, without repeats."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/install.md")]
    texts += [(ROOT / "docs" / "smaller-weights.md").read_text(), f"```\n{convert.EXAMPLES}```"]
    blocks = [block for text in texts for block in re.findall(r"```\n(.+?)```", text, re.DOTALL)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    plain = [line.replace(PORTABLE, "python ").replace("\\", "/") for line in lines]
    wanted = ("ComfyUI-GLM-Image", "glm_image")
    found = dict.fromkeys(line for line in plain if any(name in line for name in wanted))
    return [shlex.split(line) for line in found if not line.startswith("#")]


@pytest.fixture
def comfyui(tmp_path, monkeypatch) -> Path:
    """The folder that holds ComfyUI, after the lines that need a network."""
    (tmp_path / PACK).parent.mkdir(parents=True)
    (tmp_path / PACK).symlink_to(ROOT)
    shutil.copytree(ROOT / "tiny", tmp_path / SNAPSHOT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_printed_command_does_what_is_said(comfyui) -> None:
    printed = commands()
    assert sum("convert.py" in " ".join(words) for words in printed) == 3
    for words in printed:
        if words[0] == "git":
            assert words == ["git", "clone", "REPOSITORY_URL", PACK]
        elif "pip" in words:
            assert words[:-1] == ["python", "-m", "pip", "install", "-r"]
            assert Path(words[-1]).is_file()
        elif "download" in words:
            assert words[-1] == SNAPSHOT
        else:
            assert words[0] == "python"
            assert Path(words[1]).is_file()
            convert.main(words[2:])
    written = {file.name for file in Path(SNAPSHOT).glob("*.safetensors")}
    assert {f"GLM-Image_ar_{dtype}.safetensors" for dtype in ("int8", "int4")} <= written
