"""Leaves out what installed packages say at every start. Imported first: bitsandbytes speaks when it is imported."""

import logging
import warnings

# Its optional `kernels` package serves 4-bit inference on CPUs with AVX512-bf16, from a hub; training does not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft 0.21 reads the old name of `is_activation_checkpointing`.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# trl 1.16 calls the old names of `activation_checkpointing_enable` and its opposite around every forward.
warnings.filterwarnings("ignore", "`gradient_checkpointing(_enable|_disable)?` is deprecated", FutureWarning)
# trl casts adapters over 4-bit bases to bf16, and this package takes it back, which it says once.
warnings.filterwarnings("ignore", "The values of adapter 'default' were cast to torch.bfloat16")
# trl's reference is meant to start as the policy's copy.
warnings.filterwarnings("ignore", "Adapter 'ref' was added with the config object of adapter 'default'")
