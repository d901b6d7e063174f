"""What people see of a run: metrics, tables, plots, the model card."""
