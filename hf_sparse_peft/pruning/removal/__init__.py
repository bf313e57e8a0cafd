"""Removing it: block by block with checkpoints, over all layers at once, whole blocks, or for as long as code runs."""
