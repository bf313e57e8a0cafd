"""Floor 6: federated training, as plain functions over tensors and bytes; who sends them is no matter of theirs.

messages.py          safetensors with checksums, as bytes, read whole or refused
rounds.py            who takes part, which replies count, their shares
adapter_tensors.py   an adapter's tensors out of a model and into it
fedavg.py, factor_average.py      averages of adapters, with supports that moved and low-rank halves
feddip.py, feddip_messages.py     a global mask that grows sparser
parties.py           each method's functions in order, with what is remembered between rounds
ferret.py, ferret_messages.py     updates as coordinates in random bases      seeded_bases.py    these bases
"""

from .adapter_tensors import adapter_tensors, write_adapter_tensors
from .fedavg import AdapterUpdate, Averaged, adapter_message, fedavg, read_adapter_message
from .feddip import FedDIP, FedDIPUpdate, choose_masks, feddip_config, feddip_server_step, feddip_start, masks_of
from .feddip_messages import feddip_client_message, feddip_receive, feddip_server_message, read_feddip_message
from .ferret import Ferret, FerretUpdate, Pool, Term, ferret_server_step, project, reconstruct
from .ferret_messages import ferret_client_message, ferret_receive, ferret_server_message, read_ferret_message
from .messages import Message, pack, pack_all, unpack, unpack_all
from .parties import PARTIES, FedAvgParty, FedDIPParty, FerretParty, Party
from .rounds import Round, choose_clients, collect

__all__ = [
    "PARTIES",
    "AdapterUpdate",
    "Averaged",
    "FedAvgParty",
    "FedDIP",
    "FedDIPParty",
    "FedDIPUpdate",
    "Ferret",
    "FerretParty",
    "FerretUpdate",
    "Message",
    "Party",
    "Pool",
    "Round",
    "Term",
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
    "ferret_client_message",
    "ferret_receive",
    "ferret_server_message",
    "ferret_server_step",
    "masks_of",
    "pack",
    "pack_all",
    "project",
    "read_adapter_message",
    "read_feddip_message",
    "read_ferret_message",
    "reconstruct",
    "unpack",
    "unpack_all",
    "write_adapter_tensors",
]
