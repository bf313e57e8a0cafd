"""What a step really takes, counted by hooks on a model with weights, to hold estimates against."""

from __future__ import annotations

import copy

import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_sparse_peft import SparseLoraConfig

SEQ, BATCH = 24, 2
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "entries": lambda: SparseLoraConfig(r=0, density=0.05, target_modules="all-linear"),
    "grid": lambda: SparseLoraConfig(
        r=0, density=0.02, target_modules="all-linear", pattern={"type": "grid", "rows": 0.25, "columns": 0.25}
    ),
    "blocks": lambda: SparseLoraConfig(
        r=0, density=0.15, granularity="block", block_size=8, target_modules="all-linear"
    ),
    "rows": lambda: SparseLoraConfig(r=0, density=0.1, granularity="row", target_modules="all-linear"),
    "columns": lambda: SparseLoraConfig(r=0, density=0.1, granularity="column", target_modules="all-linear"),
    "diagonal": lambda: SparseLoraConfig(
        r=0, density=1.0, granularity="diagonal", diagonal_blocks=3, target_modules="all-linear"
    ),
    "subnet": lambda: SparseLoraConfig(r=0, density=0.05, granularity="subnet", target_modules="all-linear"),
    "hybrid": lambda: SparseLoraConfig(r=4, density=0.05, target_modules="all-linear"),
}


def storages(tensors) -> dict[int, int]:
    """Address of each storage -> its bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def constants(model):
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if torch.is_tensor(t))
            state = state.state2


def measured(base, config) -> dict[str, int]:
    """Bytes at rest, of what autograd packs in one step, of gradients, and of AdamW's state."""
    model = get_peft_model(base, copy.deepcopy(config)).train()
    ids = torch.randint(1, tiny.VOCAB, (BATCH, SEQ))
    model(input_ids=ids, labels=ids).loss.backward()  # supports are chosen and decoded
    model.zero_grad(set_to_none=True)
    at_rest = storages([*model.parameters(), *model.buffers(), *constants(model)])
    packed: dict[int, int] = {}

    def pack(tensor):
        for part in [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]:
            packed.update({key: size for key, size in storages([part]).items() if key not in at_rest})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    packed_bytes = sum(packed.values())
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = [t for one in optimizer.state.values() for t in one.values()]
    return {
        "at_rest": sum(at_rest.values()),
        "saved": packed_bytes,
        "gradients": sum(parameter.grad.nbytes for parameter in trained),
        "optimizer": sum(t.nbytes for t in state),
    }
