"""A script that runs `hf_prefopt train` with a LoRA adapter on a 4-bit model (QLoRA).

The reference is the 4-bit model with its adapter disabled. The 4-bit layers are slow on a CPU, so use few rows there.

    accelerate launch recipes/qlora.py --config recipes/qlora.yaml
"""

from hf_prefopt.commands.train import recipe

if __name__ == "__main__":
    recipe(use_peft=True, load_in_4bit=True)
