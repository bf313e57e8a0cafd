"""Parties on tiny models, and a simulation of them by Flower: `python flower_simulation.py OUT KIND` writes the global
tensors and Flower's metrics to the folder OUT. Client 2 has no power in round 1."""

import json
import sys
from pathlib import Path

import tiny
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from hf_sparse_peft import Controller, SparseLoraConfig
from hf_sparse_peft.federated import (
    FedAvgParty,
    FedDIP,
    FedDIPParty,
    Ferret,
    FerretParty,
    adapter_tensors,
    feddip_config,
)

ROUNDS, CLIENTS = 3, 3
TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def party_of(kind, server=False):
    torch.manual_seed(0)
    if kind == "fedavg":
        config = SparseLoraConfig(r=0, density=0.2, criterion="magnitude", **TARGETS)
        return FedAvgParty(get_peft_model(tiny.llama(), config), server=server)
    model = get_peft_model(tiny.llama(), feddip_config(**TARGETS))
    if kind == "feddip":
        options = {"first_mask": "magnitude", "final_sparsity": 0.8, "reconfigure_every": 1, "segments": 3}
        return FedDIPParty(model, FedDIP(rounds=ROUNDS, **options), server=server)
    # All blocks have all bases: what is chosen else follows from names, and Flower draws those of nodes.
    return FerretParty(model, Ferret(bases=30, least=30, draw="round"), server=server)


class Noted:
    """The party notes the round that it is in."""

    number = -1

    def local(self, client, number, data, train):
        self.number = number
        return super().local(client, number, data, train)


def noted(kind):
    party = party_of(kind)
    party.__class__ = type(type(party).__name__, (Noted, type(party)), {})
    return party


def train(party, rule, part, number):
    """Two steps on the client's own data."""
    if (part, number) == (2, 1):
        raise RuntimeError("no power")
    data = tiny.TokenData(16, seed=part)
    optimizer = torch.optim.SGD([p for p in party.model.parameters() if p.requires_grad], lr=0.3)
    with Controller(party.model, optimizer, 2, rule=rule) as rules:
        for at in range(2):
            rows = [data[i] for i in range(8 * at, 8 * at + 8)]
            rules.before_step()
            party.model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss.backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
    return 16 + part


def main(out, kind):
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from hf_sparse_peft.integrations import flower

    server_app, party, found = ServerApp(), party_of(kind, server=True), {}

    @server_app.main()
    def serve(grid, context):
        found["result"] = flower.start(party, grid, ROUNDS, available=CLIENTS)

    def local(party, rule, context):
        return train(party, rule, int(context.node_config["partition-id"]), party.number)

    client_app = flower.client_app(lambda context: noted(kind), local)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": 1}}
    run_simulation(server_app=server_app, client_app=client_app, num_supernodes=CLIENTS, backend_config=resources)
    metrics = {str(number): dict(one) for number, one in found["result"].train_metrics_clientapp.items()}
    out = Path(out)
    save_file(adapter_tensors(party.model), out / "tensors.safetensors")
    (out / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(*sys.argv[1:])
