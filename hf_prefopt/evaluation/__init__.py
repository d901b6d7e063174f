"""Evaluations in addition to the loss: answers to problems with known solutions."""
