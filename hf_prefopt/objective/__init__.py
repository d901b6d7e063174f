"""The objective that a configuration defines: its losses, with their hyperparameters, modifiers and inputs."""
