"""What leaves after training. Cards, the Hub, checks of adapter files, and exports to other formats.

adapter_card, adapter_summary            what an adapter is, for people
save_adapter, push_to_hub                the folder with its card, whole or not at all
check_adapter                            every tensor of a folder, without its base
write_checksums                          those of weights that another program wrote
combine_adapters                         a weighted sum of adapter folders as a new one
evaluate_adapter                         tasks of lm-evaluation-harness
export_lora, export_shira                formats of upstream peft
export_lora_for_llama_cpp                a LoRA that llama.cpp's converter reads
export_patch and others of patches/      new values of a checkpoint's entries, for engines that patch what they serve
merge_to_dense                           a model without adapters and quantisation
load_adapter                             a folder or Hub repo on its base: labels, rows, quantisation as it was trained
register_cards                           lets peft's own save and push write our card
register_saving                          lets peft's own save write whole files only
"""

from .adapter_report import ModuleGroup
from .card import adapter_card
from .check import AdapterReport, ModuleReport, check_adapter
from .combining import combine_adapters
from .dense import merge_to_dense
from .evaluation import Evaluation, evaluate_adapter
from .export import LoraExport, export_lora, export_shira
from .llama_cpp import LlamaCppExport, export_lora_for_llama_cpp
from .loading import load_adapter, read_config
from .patches import (
    Patch,
    PatchExport,
    WeightPatch,
    apply_patch,
    export_patch,
    import_patch,
    make_patch,
    patch_between,
    read_patch,
    read_slime_delta,
    revert_patch,
    swap_patch,
    to_vllm_patches,
    write_patch,
    write_slime_delta,
)
from .push import push_to_hub, register_cards
from .saving import register_saving, save_adapter, write_checksums
from .summary import adapter_summary

__all__ = [
    "AdapterReport",
    "Evaluation",
    "LlamaCppExport",
    "LoraExport",
    "ModuleGroup",
    "ModuleReport",
    "Patch",
    "PatchExport",
    "WeightPatch",
    "adapter_card",
    "adapter_summary",
    "apply_patch",
    "check_adapter",
    "combine_adapters",
    "evaluate_adapter",
    "export_lora",
    "export_lora_for_llama_cpp",
    "export_patch",
    "export_shira",
    "import_patch",
    "load_adapter",
    "make_patch",
    "merge_to_dense",
    "patch_between",
    "push_to_hub",
    "read_config",
    "read_patch",
    "read_slime_delta",
    "register_cards",
    "register_saving",
    "revert_patch",
    "save_adapter",
    "swap_patch",
    "to_vllm_patches",
    "write_checksums",
    "write_patch",
    "write_slime_delta",
]
