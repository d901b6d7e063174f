"""Evaluations in addition to the loss: compare generated answers with known solutions."""
