"""From a data set's rows to batches of prompt groups."""
