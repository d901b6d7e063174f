"""Speed and memory, measured in pairs: this trainer and TRL's, with the same weights, tokens and process."""
