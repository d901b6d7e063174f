"""Paired measurements of speed and memory: this trainer and TRL's, with the same weights, tokens and process."""
