"""What goes: scores of entries and of units, patterns of zeros, the influence of a block."""
