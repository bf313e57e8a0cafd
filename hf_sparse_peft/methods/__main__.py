"""`python -m hf_sparse_peft.methods`: the method table of README."""

from . import markdown_table

print(markdown_table())
