"""The layers of `PreferenceTrainer` beneath its loss: checkpoints, data, evaluation, steps."""
