"""Leaves out what installed packages say at every start. Imported first: bitsandbytes speaks when it is imported."""

import logging
import warnings

# Its optional `kernels` package serves 4-bit inference on CPUs with AVX512-bf16, from a hub; training does not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft 0.21 reads the old name of `is_activation_checkpointing`.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
