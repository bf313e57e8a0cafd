"""Layers and blocks of a base, and what reaches them: inputs, statistics, batches, the dense model's weights."""
