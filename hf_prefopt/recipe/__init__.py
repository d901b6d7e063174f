"""The parts of `hf_prefopt train`: options, YAML files, data, and the files that a run saves."""
