"""The layers of `PreferenceTrainer` beneath its step: checkpoints, data, evaluation."""
