"""The text of `hf_prefopt train --help`: three example commands, and the settings that are used most.

`--help-all` prints every option.
"""

HELP = """\
usage: hf_prefopt train [--config FILE ...] [--setting value ...]

Train a model on preference data: a LoRA adapter (--use_peft true), a LoRA adapter on a 4-bit model, or all weights.

  hf_prefopt train --config dpo_lora --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct
  hf_prefopt train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name pairs.jsonl --use_peft true
  hf_prefopt train --config mine.yaml --config simpo --max_steps 100

On several GPUs: accelerate launch -m hf_prefopt train ...

Files
  --config FILE ...         YAML files or recipes; later ones override earlier ones, the command line overrides all
  --list, --copy NAME [TO]  list the recipes, losses and engine configurations of the package; copy one
Data
  --dataset_name DATA       a name on the Hub, a folder, a file (.jsonl, .csv, .parquet), or a pattern
  --datasets ...            a mixture of several datasets
  --test_split_size 0.05    hold out a share of the rows to evaluate
  --column_mapping JSON     your name of each standard column: '{"prompt": "question"}'
  --max_length 1024         the maximum number of tokens of prompt and response together
  --train_rows, --eval_rows use N rows, drawn at random
Model
  --model_name_or_path NAME a name on the Hub, or a folder; --model is short for it
  --use_peft true           train an adapter; --lora_r 16, --lora_alpha 32, --lora_target_modules all-linear
  --load_in_4bit true       with an adapter: load its base model in 4 bits
  --dtype bfloat16          the dtype of the loaded weights (default: float32)
Loss
  --loss_type dpo           one or more losses; `hf_prefopt losses` lists them; --loss_weights 1 0.1
  --beta, --loss_params     hyperparameters; each loss has its published defaults
  --precompute_ref_log_probs true   compute the reference once, and cache its log-probs
Training
  --learning_rate LR        1e-4 for an adapter, 1e-6 for all weights
  --num_train_epochs, --max_steps, --per_device_train_batch_size, --gradient_accumulation_steps
  --max_tokens_per_batch N  limit the tokens of a forward pass, and so its memory
  --eval_on_start true, --eval_strategy, --save_strategy, --resume_from_checkpoint true
Results
  --output_dir DIR          default: runs/LOSS; train.yaml in it has the settings and the command
  --report_to wandb         or tensorboard, ...; --push_to_hub --hub_model_id NAME pushes the result

--help-all shows every option, --traceback the traceback of an error. docs/settings.md describes the settings.
"""
