"""Compute the log-probs of scored tokens from a model and a batch."""
