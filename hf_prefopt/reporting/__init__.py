"""The output of a run: metrics, tables, plots, the model card and the report."""
