"""The reference: a model, or a cache of its log-probs."""
