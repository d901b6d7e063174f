"""The parts of `PreferenceTrainer`: data, scoring, steps, checkpoints, and checks."""
