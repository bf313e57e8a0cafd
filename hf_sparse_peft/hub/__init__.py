"""What leaves after training. Cards, the Hub, checks of adapter files, and exports to other formats.

adapter_card, adapter_summary            what an adapter is, for people
save_adapter, push_to_hub                the folder with its card, whole or not at all
check_adapter                            every tensor of a folder, without its base
export_lora, export_shira                formats of upstream peft
merge_to_dense                           a model without adapters and quantisation
register_cards                           lets peft's own save and push write our card
register_saving                          lets peft's own save write whole files only
"""

from .card import adapter_card
from .check import AdapterReport, ModuleReport, check_adapter
from .dense import merge_to_dense
from .export import LoraExport, export_lora, export_shira
from .push import push_to_hub, register_cards
from .saving import register_saving, save_adapter
from .summary import adapter_summary

__all__ = [
    "AdapterReport",
    "LoraExport",
    "ModuleReport",
    "adapter_card",
    "adapter_summary",
    "check_adapter",
    "export_lora",
    "export_shira",
    "merge_to_dense",
    "push_to_hub",
    "register_cards",
    "register_saving",
    "save_adapter",
]
