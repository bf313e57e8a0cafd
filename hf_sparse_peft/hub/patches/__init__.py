"""Weight patches: an adapter's support as new values of a checkpoint, for engines that patch what they serve.

weight_patch.py      `Patch`: names, shapes, flat indices and values, in the checkpoint's coordinates
checkpoint_names.py  where a parameter of a model lies in its checkpoint, by transformers' own conversions
base_values.py       the checkpoint's values: a model's weights, or safetensors files
making.py            adapter -> `Patch`
applying.py          `Patch` -> a plain model in place, and back to the bit
importing.py         `Patch` -> adapter
positions.py         sorted positions at 2 + log2(gap) bits each, or as runs
patch_files.py       `Patch` <-> safetensors
slime.py             `Patch` <-> delta directories of slime and SGLang
exporting.py         `export_patch`
"""

from .applying import apply_patch, revert_patch, swap_patch
from .exporting import PatchExport, export_patch
from .importing import import_patch
from .making import make_patch, patch_between
from .patch_files import read_patch, write_patch
from .slime import read_slime_delta, write_slime_delta
from .weight_patch import Patch, WeightPatch, to_vllm_patches

__all__ = [
    "Patch",
    "PatchExport",
    "WeightPatch",
    "apply_patch",
    "export_patch",
    "import_patch",
    "make_patch",
    "patch_between",
    "read_patch",
    "read_slime_delta",
    "revert_patch",
    "swap_patch",
    "to_vllm_patches",
    "write_patch",
    "write_slime_delta",
]
