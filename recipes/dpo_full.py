"""A script that runs `hf_prefopt train` on all weights. The reference is a frozen copy of the weights in memory.

accelerate launch recipes/dpo_full.py --config recipes/dpo_full.yaml
"""

from hf_prefopt.commands.train import recipe

if __name__ == "__main__":
    recipe(use_peft=False)
