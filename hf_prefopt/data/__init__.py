"""Convert the rows of a data set to batches of prompt groups."""
