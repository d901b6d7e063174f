"""Evaluations beside the loss: answers to problems with known solutions."""
