"""Beside or after pruning: corrections, retraining block by block, recovery, soups, edits of the spectrum, sizes."""
