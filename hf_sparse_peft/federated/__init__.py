"""Floor 6: federated training, as plain functions over tensors and bytes; who sends them is no matter of theirs.

messages.py          safetensors with checksums, as bytes, read whole or refused
rounds.py            who takes part, which replies count, their shares
adapter_tensors.py   an adapter's tensors out of a model and into it
fedavg.py, factor_average.py      averages of adapters, with supports that moved and low-rank halves
feddip.py, feddip_messages.py     a global mask that grows sparser
"""

from .adapter_tensors import adapter_tensors, write_adapter_tensors
from .fedavg import AdapterUpdate, Averaged, adapter_message, fedavg, read_adapter_message
from .feddip import FedDIP, FedDIPUpdate, choose_masks, feddip_config, feddip_server_step, feddip_start, masks_of
from .feddip_messages import feddip_client_message, feddip_receive, feddip_server_message, read_feddip_message
from .messages import Message, pack, unpack
from .rounds import Round, choose_clients, collect

__all__ = [
    "AdapterUpdate",
    "Averaged",
    "FedDIP",
    "FedDIPUpdate",
    "Message",
    "Round",
    "adapter_message",
    "adapter_tensors",
    "choose_clients",
    "choose_masks",
    "collect",
    "fedavg",
    "feddip_client_message",
    "feddip_config",
    "feddip_receive",
    "feddip_server_message",
    "feddip_server_step",
    "feddip_start",
    "masks_of",
    "pack",
    "read_adapter_message",
    "read_feddip_message",
    "unpack",
    "write_adapter_tensors",
]
