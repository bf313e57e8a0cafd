"""What every tuner shares: config, layer, model, merging, files."""
