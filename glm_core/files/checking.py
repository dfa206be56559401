"""Whether a model on disk is whole: every file that a loader needs, by its header and size.

No weight is read. What is wrong is collected, a sentence for each file, while a loader stops at the
first.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ar.model import ARConfig, ARModel
from ..ar.prompt import PromptTokenizer
from ..decoder.model import Decoder, DecoderConfig
from ..decoder.schedule import ScheduleConfig
from ..errors import GLMImageError, shown
from ..glyph.encoder import GlyphConfig, GlyphEncoder
from ..vae import AutoencoderKL, VAEConfig
from ..vision.encoder import OTHER_PREFIXES, VISION_PREFIXES, VisionConfig, VisionEncoder
from .component import COMPONENTS, FORMAT, Component
from .headers import mentions, read_header
from .hub_cache import repository_of
from .json_files import is_file, read_json
from .listing import list_folder
from .model_folder import SUFFIX, components_in, single_files, weight_files
from .opening import HUB_NAME, open_component
from .saved import CONFIG
from .weight_dtypes import stored_format

NETWORKS: dict[str, list[tuple[type[nn.Module], Any, tuple[str, ...]]]] = {
    "ar": [(ARModel, ARConfig, VISION_PREFIXES), (VisionEncoder, VisionConfig, OTHER_PREFIXES)],
    "decoder": [(Decoder, DecoderConfig, ())],
    "glyph": [(GlyphEncoder, GlyphConfig, ())],
    "vae": [(AutoencoderKL, VAEConfig, ())],
}
"""The networks of a component, their configs, and the prefixes of keys that they leave out."""
COMPANIONS = {"ar": ("processor",), "decoder": ("scheduler",)}
POINTER = b"version https://git-lfs"
MAX_LEFTOVERS = 10_000  # entries that are looked at


@dataclass
class Report:
    """What was found.

    Args:
        good: a line for each component that is whole.
        problems: a sentence for each file that is missing or broken.
        leftovers: parts of interrupted downloads.
        nbytes: of the weights that are whole.
    """

    good: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    nbytes: int = 0

    def add(self, component: str, path: Path) -> None:
        """Open a component, compare its weights with its networks, and note the outcome."""
        try:
            found = open_component(path, component)
            _compare(found)
        except GLMImageError as error:
            self.problems.append(error.sentence)
            return
        self.nbytes += found.nbytes
        files = len({info.file for info in found.tensors.values()})
        self.good.append(
            f"{found.title:17} {found.nbytes / 1e9:5.1f} GB  {stored_format(found):10} "
            f"{files} {'file' if files == 1 else 'files'} in {found.path}"
        )


def check_model(path: Path) -> Report:
    """Check a snapshot's folder, a folder of single files, or one single file."""
    report = Report()
    if not path.is_dir():
        _check_file(path, report)
        return report
    files = weight_files(list_folder(path).files)
    for file in files:
        if not components_in(file) and _is_ours(file, report.problems):
            report.problems.append(f"{file} is broken; convert the snapshot again.")
    present = [name for name in COMPONENTS if _has(path, name)]
    if not present and not report.problems:
        report.problems.append(
            f"{path} holds no part of GLM-Image; give the folder of {HUB_NAME} or of files that "
            "were converted from it."
        )
        return report
    for name, kind in COMPONENTS.items():
        for file in single_files(path, name):
            report.add(name, file)
        if (path / kind.folder).is_dir():
            _check_subfolder(path, name, report)
        elif name not in present:
            report.problems.append(
                f"The {kind.title} is missing: {path} has neither the folder {kind.folder} nor a "
                "file that holds it."
            )
    report.leftovers += _leftovers(path)
    report.problems = list(dict.fromkeys(report.problems))
    return report


def _has(folder: Path, component: str) -> bool:
    return (folder / COMPONENTS[component].folder).is_dir() or bool(single_files(folder, component))


def _check_file(file: Path, report: Report) -> None:
    components = components_in(file)
    for name in components:
        report.add(name, file)
    if components:
        return
    try:
        read_header(file)
    except GLMImageError as error:
        report.problems.append(error.sentence)
    else:
        report.problems.append(f"{file} holds no part of GLM-Image; choose another file.")


def _is_ours(file: Path, problems: list[str]) -> bool:
    """Whether a file's header names GLM-Image. A file without a header is a problem."""
    try:
        return mentions(file, FORMAT, CONFIG)
    except GLMImageError as error:
        problems.append(error.sentence)
        return False


def _compare(component: Component) -> None:
    """
    Raises:
        GLMImageError: a config is broken, or the weights do not fit it.
    """
    for network, config, ignored in NETWORKS[component.name]:
        with torch.device("meta"):
            state = network(config.from_dict(component.config)).state_dict()
        component.check({key: value.shape for key, value in state.items()}, ignored)
    if component.scheduler is not None:
        ScheduleConfig.from_dict(component.scheduler)
    if component.processor is not None:
        files = component.processor
        PromptTokenizer(files.tokenizer, files.tokenizer_config, files.chat_template)


# ---- hub snapshots -----------------------------------------------------------------------------


def _check_subfolder(snapshot: Path, name: str, report: Report) -> None:
    kind = COMPONENTS[name]
    folder = snapshot / kind.folder
    parts = [folder, *(snapshot / part for part in COMPANIONS.get(name, ()))]
    files = [file for part in parts for file in list_folder(part).files]
    found = [_pointer(file) for file in files if _is_pointer(file)]
    found += _missing_beside(snapshot, name) if not found else []
    found += _shards(folder / f"{kind.stem}{SUFFIX}.index.json")
    if found:
        report.problems += found
    else:
        report.add(name, snapshot)


def _pointer(file: Path) -> str:
    return f"{file} is a git-lfs pointer, not the file itself; fetch it (git lfs pull)."


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:  # a link to nowhere: it is missing
        return False


def _missing_beside(snapshot: Path, name: str) -> Iterator[str]:
    """Sentences about the small files that a component is loaded with."""
    needed = [f"{COMPONENTS[name].folder}/config.json"]
    if name == "ar":
        needed += ["processor/tokenizer.json", "processor/tokenizer_config.json"]
    if name == "decoder":
        needed += ["scheduler/scheduler_config.json", "vae/config.json"]
    for file in (snapshot / part for part in needed):
        if not is_file(file):
            yield f"{file} is missing; download it."


def _shards(index: Path) -> Iterator[str]:
    """Sentences about each shard that an index names and that is missing or broken."""
    if not is_file(index):
        return
    try:
        names = read_json(index).get("weight_map")
    except GLMImageError as error:
        yield error.sentence
        return
    if not isinstance(names, dict):
        return
    for name in sorted({name for name in names.values() if isinstance(name, str)}):
        shard = index.parent / name
        if not is_file(shard):
            yield f"{shown(str(shard))} is missing; download it."
            continue
        if _is_pointer(shard):  # said already
            continue
        try:
            read_header(shard)
        except GLMImageError as error:
            yield error.sentence


def _leftovers(folder: Path) -> Iterable[Path]:
    """Files of downloads that have not ended, as the hubs' own programs name them."""
    repository = repository_of(folder)
    roots = [folder] + ([repository / "blobs"] if repository else [])
    for root in roots:
        for number, file in enumerate(root.rglob("*")):
            if number == MAX_LEFTOVERS:
                break
            if file.suffix == ".incomplete" or file.parent.name == "._____temp":
                yield file
