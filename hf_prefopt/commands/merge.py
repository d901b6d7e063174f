"""Merge a trained adapter into its base model, and check that the merged model equals the trained model.

    hf_prefopt merge runs/dpo_lora --to runs/dpo_lora-merged
    vllm serve runs/dpo_lora-merged

Each changed weight becomes W + ΔW in float32 and is rounded once to the dtype of the base model. The merged model is
then loaded from its folder, and its log-probs for eight evaluation rows are compared with the log-probs of the base
model with its adapter. If they differ by more than rounding explains, the exit code is 1 and no model is saved.
"""

from argparse import ArgumentParser, Namespace

from hf_prefopt.folders import check_folder
from hf_prefopt.serving.merge import merge_adapter

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `merge`."""
    parser.usage = "%(prog)s RUN --to FOLDER [options]"
    parser.add_argument("run", metavar="RUN", help="the folder of a run or checkpoint, or an adapter on the Hub")
    parser.add_argument("--to", "--output_dir", required=True, metavar="FOLDER", help="the new folder for the model")
    parser.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the adapter names)")
    parser.add_argument(
        "--adapter",
        nargs="+",
        default=[],
        metavar="NAME",
        help="subfolders of RUN with the adapters to merge; their changes are added (default: the adapter in RUN)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="the dtype of the merged model (default: the base checkpoint's)",
    )
    parser.add_argument(
        "--max-shard-size",
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="the maximum size of a safetensors file (default: 5GB)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")


def run(options: Namespace) -> int:
    """Merge the adapter, and print a line for each step. Raises `ValueError` if the merge or its check fails."""
    check_folder("to", options.to)
    merged = merge_adapter(
        options.run,
        options.to,
        options.base,
        options.adapter,
        options.dtype,
        options.max_shard_size,
        options.trust_remote_code,
        say=lambda line: print(line, flush=True),
    )
    print(f"merged model: {merged.folder}\nserve it: vllm serve {merged.folder}")
    return 0
