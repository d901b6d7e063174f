"""Speed and memory, measured in pairs: this trainer and TRL's on the same weights, the same tokens, the same process."""
