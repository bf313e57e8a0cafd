"""`python -m hf_sparse_peft.methods`: the method table of docs/methods.md."""

from . import markdown_table

print(markdown_table())
