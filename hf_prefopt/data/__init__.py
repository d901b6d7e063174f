"""Convert the rows of a dataset to batches of prompt groups."""
