"""`python -m scripts COMMAND`: makes the environment that the command needs and runs it in it."""

import os
import subprocess
import sys
from pathlib import Path

from . import environment

MODULES = {  # these need the tests' environment but no browser
    "bench": "bench", "train": "training", "evaluate": "evaluation.run",
    "pictures": "scripts.pictures", "simulated-cards": "scripts.simulated_cards",
}  # fmt: skip
COMMANDS = ("demo", "serve", "soak", "fleet-demo", "test", "fuzz", "lint", "workflows", *MODULES)

FUZZED = "tests/core/test_readers.py"
FUZZ_TIMES = "200"  # as many inputs as in the suite: about an hour

# The tests of one file share a server or a training run, so they stay in one process.
PARALLEL = ("--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile", "--no-loadscope-reorder")


def main(command: str, arguments: list[str]) -> None:
    if command in ("demo", "serve", "soak", "fleet-demo"):
        module = f"scripts.{command.replace('-', '_')}"
        _become(environment.host().python, module, arguments)
    python = environment.test_python()
    if command == "lint":
        if subprocess.run([str(python), "-m", "ruff", "check", "."], check=False).returncode:
            raise SystemExit(1)
        _become(python, "ruff", ["format", "--check", "."])
    if module := MODULES.get(command):
        _become(python, module, arguments)
    if command == "fuzz":
        os.environ["FUZZ_TIMES"] = arguments[0] if arguments else FUZZ_TIMES
        _become(python, "pytest", [FUZZED])
    os.environ["CHROMIUM"] = environment.chromium()
    if command == "workflows":
        _become(python, "scripts.workflows", arguments)
    environment.service_python()  # before processes that run at the same time need it
    _become(python, "pytest", arguments or [*PARALLEL, "tests"])


def _become(python: Path, module: str, arguments: list[str]) -> None:
    os.chdir(environment.ROOT)
    os.execv(python, [str(python), "-m", module, *arguments])


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(f"usage: python -m scripts {{{','.join(COMMANDS)}}} [ARGUMENT ...]")
    main(sys.argv[1], sys.argv[2:])
