"""Writes a training run's components to `tiny/`: one file of weights each, 30 MB in all."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, GlmImageForConditionalGeneration

from .autoregressive import ar_config
from .stage import STAGES
from .tokenizer import IMAGE_END, VISUAL

ROOT = Path(__file__).resolve().parent.parent
FLOAT32 = ("text_encoder",)
WEIGHTS = "*.safetensors"
MODEL_INDEX = {
    "_class_name": "GlmImagePipeline",
    "processor": ["transformers", "GlmImageProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "ByT5Tokenizer"],
    "transformer": ["diffusers", "GlmImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"],
}


def assemble(folder: Path, target: Path) -> None:
    """Write the components that a run has trained into `target`; its other files stay.

    Weights are bfloat16, except the glyph encoder's, which are float32 as on the hub.

    Raises:
        FileNotFoundError: a stage has not finished training, and `target` is no checkpoint yet.
    """
    trained = [name for name in STAGES if (folder / name / "summary.json").is_file()]
    missing = set(STAGES) - set(trained)
    if missing and not (trained and (target / "model_index.json").is_file()):
        names = ", ".join(name for name in STAGES if name in missing)
        raise FileNotFoundError(f"{folder} lacks {names}: train these stages first.")
    snapshot = folder / "snapshot"
    if ar := [name for name in ("autoregressive", "vision") if name in trained]:
        _join_ar(folder, ar, target).save_pretrained(snapshot / "vision_language_encoder")
    for name in (name for name in MODEL_INDEX if (snapshot / name).is_dir()):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(snapshot / name, target / name, ignore=shutil.ignore_patterns(WEIGHTS))
        for file in (snapshot / name).glob(WEIGHTS):
            dtype = torch.float32 if name in FLOAT32 else torch.bfloat16
            _store(file, target / name / file.name, dtype)
    (target / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def _join_ar(folder: Path, stages: list[str], target: Path) -> GlmImageForConditionalGeneration:
    """The AR model with the weights of these stages; others come from `target`.

    The stage autoregressive trains the text model and the head, vision the tower and the quantiser.
    """
    model = GlmImageForConditionalGeneration(ar_config())
    files = [folder / stage / "weights.safetensors" for stage in stages]
    if len(stages) < 2:
        files = [*(target / "vision_language_encoder").glob(WEIGHTS), *files]
    weights = {}
    for file in files:
        weights |= load_file(file)
    model.load_state_dict(weights)
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
