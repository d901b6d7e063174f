"""From a configuration to the objective: losses with their hyperparameters, modifiers and inputs."""
