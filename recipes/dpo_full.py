"""`hf_prefopt train` as a script that trains all weights; the reference is a frozen copy, in memory alone.

accelerate launch recipes/dpo_full.py --config recipes/dpo_full.yaml
"""

from hf_prefopt.commands.train import recipe

if __name__ == "__main__":
    recipe(use_peft=False)
