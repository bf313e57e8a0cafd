"""`python -m hf_sparse_peft`: the command line `sparse-peft`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
