"""What `hf_prefopt train` is made of: its options, its YAML files, its data, and what it keeps of a run."""
