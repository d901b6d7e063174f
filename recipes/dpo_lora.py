"""`hf_prefopt train` as a script that trains a LoRA adapter: the recipe to start from.

accelerate launch recipes/dpo_lora.py --config recipes/dpo_lora.yaml
accelerate launch recipes/dpo_lora.py --config recipes/dpo_lora.yaml --loss_type simpo --max_steps 5
"""

from hf_prefopt.commands.train import recipe

if __name__ == "__main__":
    recipe(use_peft=True)
