"""The objective of a configuration: its losses with their hyperparameters, modifiers and inputs."""
