"""`hf_prefopt train` as a script that trains a LoRA adapter on a model held in 4 bits (QLoRA).

The reference is that same model with the adapter off. On a CPU the 4-bit layers are slow: try it with few rows.

    accelerate launch recipes/qlora.py --config recipes/qlora.yaml
"""

from hf_prefopt.commands.train import recipe

if __name__ == "__main__":
    recipe(use_peft=True, load_in_4bit=True)
