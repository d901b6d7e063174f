"""A script that runs `hf_prefopt train` with a LoRA adapter: the recommended recipe for a first run.

accelerate launch recipes/dpo_lora.py --config recipes/dpo_lora.yaml
accelerate launch recipes/dpo_lora.py --config recipes/dpo_lora.yaml --loss_type simpo --max_steps 5
"""

from hf_prefopt.commands.train import recipe

if __name__ == "__main__":
    recipe(use_peft=True)
