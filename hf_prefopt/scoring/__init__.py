"""From a model and a batch to the log-probs of the scored tokens."""
