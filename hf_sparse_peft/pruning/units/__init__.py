"""Heads, channels and layers: where their weights lie, which are kept, masks on them, slices without the others."""
