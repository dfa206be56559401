"""From a training run to `tiny/`: a file of weights a component, 27 MB in all."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, GlmImageForConditionalGeneration

from scripts.random_checkpoint import MODEL_INDEX

from .autoregressive import ar_config
from .stage import STAGES
from .tokenizer import IMAGE_END, VISUAL

ROOT = Path(__file__).resolve().parent.parent
FLOAT32 = ("text_encoder",)
WEIGHTS = "*.safetensors"


def assemble(folder: Path, target: Path) -> None:
    """Put a run's components into `target`; what else lies there stays.

    Weights are in bfloat16, but for the glyph encoder's, which are in float32 as on the hub.

    Raises:
        FileNotFoundError: a stage has not been trained to its end.
    """
    missing = [name for name in STAGES if not (folder / name / "summary.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: train these stages first.")
    snapshot = folder / "snapshot"
    _join_ar(folder).save_pretrained(snapshot / "vision_language_encoder")
    for name in (name for name in MODEL_INDEX if not name.startswith("_")):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(snapshot / name, target / name, ignore=shutil.ignore_patterns(WEIGHTS))
        for file in (snapshot / name).glob(WEIGHTS):
            dtype = torch.float32 if name in FLOAT32 else torch.bfloat16
            _store(file, target / name / file.name, dtype)
    (target / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def _join_ar(folder: Path) -> GlmImageForConditionalGeneration:
    """The text model and head of one stage, and the tower and quantiser of another."""
    model = GlmImageForConditionalGeneration(ar_config())
    stages = ("autoregressive", "vision")
    parts = [load_file(folder / stage / "weights.safetensors") for stage in stages]
    model.load_state_dict(parts[0] | parts[1])
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.9, top_p=0.75, top_k=VISUAL,
        eos_token_id=IMAGE_END, pad_token_id=IMAGE_END,
    )  # fmt: skip
    return model.to(torch.bfloat16)


def _store(source: Path, target: Path, dtype: torch.dtype) -> None:
    weights = {key: weight.to(dtype) for key, weight in load_file(source).items()}
    save_file(weights, target, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.assemble", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "tiny")
    parser.add_argument("--target", type=Path, default=ROOT / "tiny")
    given = parser.parse_args()
    try:
        assemble(given.folder, given.target)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
