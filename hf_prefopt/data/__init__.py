"""Convert the rows of a dataset to batches of prompts with their responses."""
