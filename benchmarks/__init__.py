"""Paired measurements of speed and memory: our trainer and TRL's, with the same weights and tokens, in one process."""
