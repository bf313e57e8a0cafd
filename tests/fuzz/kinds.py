"""What the package reads: one valid example of every kind of file, its reader, and what a reading means."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from hf_sparse_peft import (
    FactoredConfig,
    KernelLoraConfig,
    MaskedLoraConfig,
    SparseLoraConfig,
    SpectralLoraConfig,
    StructuredConfig,
    federated,
    hub,
    load_support,
    merging,
    save_support,
)
from hf_sparse_peft.merging.binary import read_binary
from hf_sparse_peft.merging.ternary import read_ternary
from hf_sparse_peft.optim import zeroth_order_log
from hf_sparse_peft.pruning.reading.block_inputs import digest
from hf_sparse_peft.pruning.removal.walk_checkpoint import WalkCheckpoint
from hf_sparse_peft.pruning.repair.reconstruction_checkpoint import ReconstructionCheckpoint
from hf_sparse_peft.pruning.units.kept_units import KeptOfBlock, KeptUnits
from hf_sparse_peft.training import telemetry
from hf_sparse_peft.training.record_log import RecordLog
from hf_sparse_peft.tuners import FactorMaskConfig, adapter_layers
from hf_sparse_peft.tuners.factored import FixedRank
from hf_sparse_peft.tuners.masked_lora import save_masks, set_masks
from hf_sparse_peft.tuners.shared.file_check import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from hf_sparse_peft.tuners.spectral_lora import RandomBases
from hf_sparse_peft.tuners.structured import PHM, Bottleneck
from hf_sparse_peft.utils.parts import UnknownPart

HIDDEN = 16
Q = "model.layers.0.self_attn.q_proj"
BASE_NAMES = [f"base_model.model.{Q}.base_layer.weight", "base_model.model.lm_head.weight", "lm_head.weight",
              "base_model.model.model.embed_tokens.weight", f"base_model.model.{Q}.sparse_lora_A.mine"]  # fmt: skip
OPTIONS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def base(cls: type = LlamaForCausalLM, **options: Any):
    """A Llama of one layer, the same one at every call."""
    return tiny.llama(cls, layers=1, hidden=HIDDEN, **options).eval()


@torch.no_grad()
def fill(model):
    """Give what trains values other than the first ones."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def content(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest of tensors by name."""
    found = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(tensors, key=lambda one: one[0]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def state(model) -> str:
    """Everything a refused file could have left in a model."""
    modules = [(name, type(module).__name__, module.training) for name, module in model.named_modules()]
    flags = [(name, one.requires_grad) for name, one in model.named_parameters()]
    configs = {name: str(one.to_dict()) for name, one in (getattr(model, "peft_config", None) or {}).items()}
    return content(model.state_dict().items()) + str(hash((str(modules), str(flags), str(configs))))


@dataclass
class Kind:
    """One kind of file."""

    name: str
    build: Callable[[Path], Any]
    """Writes a valid one into an empty folder."""
    read: Callable[[Path], str]
    """Reads it; what it means, as a string that is another one for another meaning. `ValueError` refuses."""
    deep: Callable[[Path, str | None], None] = lambda folder, meaning: None
    """Reads it by every other way there is, and asserts that they agree: `meaning` None means that it was refused."""
    models: Callable[[], list] = list
    """Models that a refused file must leave alone."""
    never_refuses: bool = False
    """A diagnostic: it is read as far as it can be, and stops nothing."""
    names: list[str] = field(default_factory=list)
    """Names that a refusal may give, beside those of the files and of tensors in them."""


# Adapters


def adapter(name: str, config: Callable[[], Any], make: Callable[[], Any] = base) -> Kind:
    """An adapter's folder: the check, peft's loader, a second adapter, and transformers' loader."""
    fresh = make()
    before = state(fresh)
    names = list(type(config()).__dataclass_fields__)

    def build(folder: Path) -> None:
        fill(get_peft_model(make(), config())).save_pretrained(folder)
        (folder / "README.md").unlink()

    def read(folder: Path) -> str:
        file = read_adapter(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        options = file.config.option_checksums()
        # A rule for ranks or a criterion that is unknown here changes nothing of what was trained by it.
        unknown = {option for option in options if isinstance(getattr(file.config, option), UnknownPart)}
        known.update({option: digits for option, digits in options.items() if option not in {*known, *unknown}})
        options.update({option: known.get(option) for option in unknown})
        return content(file.tensors.items()) + json.dumps(options, sort_keys=True)

    known: dict[str, str] = {}

    def deep(folder: Path, meaning: str | None) -> None:
        holder = get_peft_model(copy.deepcopy(fresh), config(), adapter_name="mine")
        held = state(holder)
        ways = {
            "check_adapter": (None, lambda: hub.check_adapter(folder)),
            "from_pretrained": (fresh, lambda: PeftModel.from_pretrained(fresh, folder)),
            "load_adapter": (holder, lambda: holder.load_adapter(folder, "new")),
            "transformers": (fresh, lambda: fresh.load_adapter(str(folder))),
        }
        for way, (model, load) in ways.items():
            target = copy.deepcopy(fresh) if meaning is not None and model is fresh else model
            if target is not model:  # a whole file changes what it is loaded into
                load = {
                    "from_pretrained": lambda target=target: PeftModel.from_pretrained(target, folder),
                    "transformers": lambda target=target: target.load_adapter(str(folder)),
                }[way]
            try:
                load()
                refused = None
            except ValueError as error:
                refused = str(error)
            if meaning is None:
                assert refused is not None, f"{way} takes what the check refuses"
            if refused is not None and model is not None:
                kept = state(target) == (held if target is holder else before)
                assert kept, f"{way} refused, and changed the model: {refused[:200]}"
            # What only the base knows: a module that it has not, weights of another shape.
            about_base = refused is not None and way != "check_adapter"
            assert meaning is None or refused is None or about_base, f"{way} refuses what is read: {refused[:200]}"

    return Kind(name, build, read, deep, names=names)


def _sparse(**options: Any) -> Callable[[], SparseLoraConfig]:
    return lambda: SparseLoraConfig(**{**OPTIONS, "density": 0.1, **options})


# Files beside adapters


def support() -> Kind:
    """A file of supports alone."""
    model = get_peft_model(base(), _sparse(criterion="given", density=0.1)())

    def build(folder: Path) -> None:
        save_support(get_peft_model(base(), _sparse()()), folder / "support.safetensors")

    def read(folder: Path) -> str:
        target = model
        load_support(target, folder / "support.safetensors")
        units = {layer.module_name: layer.units("default") for layer in adapter_layers(target)}
        holder[0] = copy.deepcopy(pristine)
        return content(units.items())

    pristine = copy.deepcopy(model)
    holder = [model]

    def read_fresh(folder: Path) -> str:
        nonlocal model
        model = holder[0]
        return read(folder)

    return Kind("support", build, read_fresh, models=lambda: [holder[0]], names=[Q])


def masks(groups: tuple[int, int] | None) -> Kind:
    """A file of what was removed from a base, as bits or as codes of N:M."""
    model = get_peft_model(base(), MaskedLoraConfig(**OPTIONS, mask="given", masks_base=True))

    def removed() -> dict[str, torch.Tensor]:
        generator, found = torch.Generator().manual_seed(2), {}
        for layer in adapter_layers(model):
            gone = torch.rand(layer.out_features, layer.in_features // 4, 4, generator=generator).argsort(-1) < 2
            bits = gone.reshape(-1, 8).to(torch.uint8)
            found[layer.module_name] = (bits << torch.arange(8)).sum(-1).to(torch.uint8)
        return found

    def build(folder: Path) -> None:
        save_masks(removed(), folder / "masks.safetensors", groups)

    def read(folder: Path) -> str:
        set_masks(model, folder / "masks.safetensors")
        found = content(model.state_dict().items())
        for name, tensor in pristine.items():
            model.get_buffer(name).copy_(tensor)
        return found

    pristine = {name: one.clone() for name, one in model.named_buffers() if "mask" in name}
    return Kind(f"masks {groups or 'bits'}", build, read, models=lambda: [model], names=["removed", Q])


def kept_units() -> Kind:
    """What slices a model."""

    def build(folder: Path) -> None:
        block = KeptOfBlock(torch.tensor([0, 2]), torch.arange(3, 40), 4, 48)
        KeptUnits({f"model.layers.{at}": block for at in range(3)}).save(folder / "kept_units.safetensors")

    def read(folder: Path) -> str:
        return json.dumps(KeptUnits.load(folder / "kept_units.safetensors").to_dict(), sort_keys=True)

    return Kind("kept units", build, read)


def patch(format: str) -> Kind:
    """New values of a checkpoint's entries: one file, or the delta directory of another engine."""
    server = base()
    model = fill(get_peft_model(base(), _sparse(r=0, bias="none")()))

    def build(folder: Path) -> None:
        done = hub.export_patch(model, folder.parent / "out", format, base=base())
        for file in Path(done.path).iterdir() if Path(done.path).is_dir() else [Path(done.path)]:
            file.replace(folder / file.name)

    def read(folder: Path) -> str:
        found = hub.read_slime_delta(folder, server) if format == "slime" else hub.read_patch(folder)
        return content([(f"{w.name} {w.shape}", w.values) for w in found.weights]) + content(
            [(w.name, w.indices) for w in found.weights if w.indices is not None]
        )

    def deep(folder: Path, meaning: str | None) -> None:
        if format == "slime":
            return
        target, before = server if meaning is None else copy.deepcopy(server), state(server)
        try:
            hub.apply_patch(target, folder)
        except ValueError:
            assert state(target) == before, "apply_patch refused, and changed the model"
        else:
            assert meaning is not None, "apply_patch takes what read_patch refuses"

    about = ["compression_format", "checksum", "delta_encoding", "weight_map", "metadata"]
    return Kind(f"patch {format}", build, read, deep, lambda: [server], names=about)


def zeroth_order() -> Kind:
    """The log of a zeroth-order run, from which weights are made again."""
    model = base()
    names = [name for name, _ in list(model.named_parameters())[:3]]
    pristine = {name: one.detach().clone() for name, one in model.named_parameters()}

    def build(folder: Path) -> None:
        parameters = [(name, one) for name, one in model.named_parameters() if name in names]
        optimizer = zeroth_order_log.ZerothOrderSGD(
            [{"params": parameters, "weight_decay": 0.0}], lr=1e-3, epsilon=1e-3, seed=3
        )
        log = zeroth_order_log.ZerothOrderLog(folder / "zeroth_order.log", optimizer)
        for at in range(6):
            log.append({"update": at, "passes": 1, "projected_gradient": 0.3 * at - 1, "lr": [1e-3]})

    def read(folder: Path) -> str:
        steps = zeroth_order_log.replay(model, folder / "zeroth_order.log")
        if steps != 6:  # a log that was cut between two steps is one of a shorter run, and says so
            restore()
            raise ValueError(f"zeroth_order.log: {steps} steps")
        found = content(model.named_parameters())
        restore()
        return found

    @torch.no_grad()
    def restore() -> None:
        for name, one in model.named_parameters():
            one.copy_(pristine[name])

    return Kind("zeroth-order log", build, read, models=lambda: [model], names=names)


def diagnostics() -> Kind:
    """Telemetry and its state in checkpoints."""
    model = get_peft_model(base(), _sparse()())
    callback = telemetry.SupportTelemetryCallback(every=1)
    check = telemetry._record_check(model)
    spaces = telemetry._spaces(model)

    def build(folder: Path) -> None:
        record = {"step": 0, **{name: {} for name in telemetry._BY_MODULE}, "model": {"density": 0.1}}
        for key, space in spaces:
            record.setdefault(telemetry._field(space), {})[key] = space.count
            record.setdefault(telemetry.NUMBERS + space.kind, {})[key] = space.count
        lines = [json.dumps({**record, "step": at}) for at in range(4)]
        (folder / "support_telemetry.jsonl").write_text("\n".join(lines) + "\n")
        tracked = {f"{key}/{name}": t.cpu().clone().contiguous() for key, space in spaces
                   for name, t in telemetry.SupportTracker(space, 0).state().items() if space.unit_entries}  # fmt: skip
        telemetry.save_file(tracked, folder / telemetry.STATE_FILE)

    def read(folder: Path) -> str:
        log = RecordLog(folder / "support_telemetry.jsonl", check)
        callback._log = log
        records = log.read(10)
        saved = callback._read_state(folder / telemetry.STATE_FILE)
        for key, space in spaces:
            if space.unit_entries:
                known = {n: saved[f"{key}/{n}"] for n in ("initial", "recorded", "entered") if f"{key}/{n}" in saved}
                tracker = telemetry.SupportTracker(space, 4, known)
                tracker.counts(), tracker.ages(5, None), tracker.follow(5)
        return str(len(records))

    return Kind("telemetry", build, read, models=lambda: [model], never_refuses=True)


# Folders of walks


def _block() -> types.SimpleNamespace:
    weights = {name: torch.randn(6, 8, generator=torch.Generator().manual_seed(at)) for at, name in enumerate("ab")}
    layers = [types.SimpleNamespace(name=name, weight=lambda name=name: weights[name]) for name in weights]
    return types.SimpleNamespace(name="block", layers=layers, weights=weights)


def walk() -> Kind:
    """A block that a pruning walk finished."""
    block = _block()

    def build(folder: Path) -> None:
        checkpoint = WalkCheckpoint(folder, "data")
        checkpoint.begin({"method": "wanda", "density": 0.5}, block.layers)
        done = {}
        for name, weight in block.weights.items():
            gone = weight > 0
            done[name] = (weight.masked_fill(gone, 0), gone)
        checkpoint.save(0, block, done)

    def read(folder: Path) -> str:
        checkpoint = WalkCheckpoint(folder, "data")
        checkpoint.begin({"method": "wanda", "density": 0.5}, block.layers)
        found = checkpoint.load(0, block)
        return content((f"{name}{at}", one) for name, pair in found.items() for at, one in enumerate(pair))

    return Kind("pruning walk", build, read, names=["a", "b"])


def reconstruction() -> Kind:
    """A block that a reconstruction tuned."""
    trained = torch.nn.ParameterDict({name: torch.nn.Parameter(weight) for name, weight in _block().weights.items()})
    first = {name: one.detach().clone() for name, one in trained.items()}

    def checkpoint(folder: Path) -> ReconstructionCheckpoint:
        found = ReconstructionCheckpoint(folder, {"steps": 3})
        found.begin("data")
        found.start(dict(trained.items()))
        return found

    def build(folder: Path) -> None:
        tuned = {name: torch.nn.Parameter(one + 1) for name, one in first.items()}
        checkpoint(folder).save(0, tuned, (2.0, 1.0))

    def read(folder: Path) -> str:
        errors = checkpoint(folder).load(0, dict(trained.items()))
        found = f"{errors}{content(trained.items())}"
        with torch.no_grad():
            for name, one in trained.items():
                one.copy_(first[name])
        return found

    return Kind("reconstruction", build, read, models=lambda: [trained], names=["a", "b", "reconstruction"])


def compeft() -> Kind:
    """A file of ternary codes. What it holds is larger than the file."""

    def build(folder: Path) -> None:
        config = SparseLoraConfig(**{**OPTIONS, "density": 0.3, "criterion": "random"})
        fill(get_peft_model(base(), config)).save_pretrained(folder / "adapter")
        merging.compress_adapter(folder / "adapter", folder / "a.compeft", density=0.5, show_progress=False)
        shutil.rmtree(folder / "adapter")

    def read(folder: Path) -> str:
        compact, pieces = read_ternary(folder / "a.compeft")
        dense = {}
        for name, found in pieces.items():
            dense[name] = torch.zeros(compact.shapes[name])
            for piece in found:
                piece.add_(dense[name])
        return content(dense.items()) + content(compact.others.items()) + json.dumps(compact.about, sort_keys=True)

    def deep(folder: Path, meaning: str | None) -> None:
        _decoded(merging.decompress_adapter, folder, "a.compeft", meaning)

    return Kind("compeft", build, read, deep, names=[Q, Q.replace("q_proj", "v_proj")])


def bitdelta() -> Kind:
    """A file of signs."""

    def build(folder: Path) -> None:
        config = SparseLoraConfig(r=0, density=0.3, criterion="random", target_modules=["q_proj", "v_proj"])
        fill(get_peft_model(base(), config)).save_pretrained(folder / "adapter")
        merging.binarise_adapter(folder / "adapter", folder / "a.bitdelta", groups=2, show_progress=False)
        shutil.rmtree(folder / "adapter")

    def read(folder: Path) -> str:
        compact, updates = read_binary(folder / "a.bitdelta")
        dense = {name: update().dense() for name, update in updates.items()}
        return content(dense.items()) + content(compact.others.items()) + json.dumps(compact.about, sort_keys=True)

    def deep(folder: Path, meaning: str | None) -> None:
        _decoded(merging.restore_adapter, folder, "a.bitdelta", meaning)

    return Kind("bitdelta", build, read, deep, names=[Q, Q.replace("q_proj", "v_proj")])


def _decoded(write: Callable[..., Any], folder: Path, file: str, meaning: str | None) -> None:
    """A codec's file through what writes an adapter out of it: refused as its reader refuses, nothing left behind."""
    out = folder.parent / "decoded"
    try:
        write(folder / file, out, show_progress=False)
    except ValueError:
        assert meaning is None, f"{write.__name__} refuses what is read"
        assert not out.exists(), f"{write.__name__} refused, and left a folder"
    else:
        assert meaning is not None, f"{write.__name__} takes what the reader refuses"
        hub.check_adapter(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


# Messages between a server and clients


def _reply(name: str, pack: Callable[[], bytes], read: Callable[[bytes], str], **options: Any) -> Kind:
    """A message, as the bytes that a file holds; a refusal names its sender."""
    return Kind(
        f"message: {name}",
        lambda folder: (folder / "message.safetensors").write_bytes(pack()),
        lambda folder: read((folder / "message.safetensors").read_bytes()),
        names=["'server'", "'a'", "message of server", "message of a"],
        **options,
    )


def adapter_message() -> Kind:
    """A whole adapter, of which tensors that the receiver knows are left out."""
    model = get_peft_model(base(), _sparse()())
    known = {name: one.clone() for name, one in federated.adapter_tensors(model).items()}
    fill(model)

    def read(data: bytes) -> str:
        found = federated.read_adapter_message(data, "a", known, number=3, config=model.peft_config["default"])
        return content(found.tensors.items()) + str(found.examples)

    def pack() -> bytes:
        return federated.adapter_message(model, 3, client="a", examples=7, known=known)

    return _reply("adapter", pack, read, models=lambda: [model])


def _feddip() -> tuple[federated.FedDIP, Any]:
    options = federated.FedDIP(rounds=10, reconfigure_every=1, first_mask="magnitude")
    model = get_peft_model(base(), federated.feddip_config(target_modules=OPTIONS["target_modules"]))
    federated.feddip_start(model, options)
    return options, model


def feddip_reply() -> Kind:
    """Values that a client of FedDIP trained."""
    options, server = _feddip()

    def read(data: bytes) -> str:
        found = federated.read_feddip_message(server, data, "a", options, 3)
        return content(found.values.items()) + content(found.others.items()) + str(found.examples)

    return _reply(
        "FedDIP, reply",
        lambda: federated.feddip_client_message(server, options, 3, "a", 7),
        read,
        models=lambda: [server],
    )


def feddip_model() -> Kind:
    """FedDIP's global model: values, and masks in bits."""
    (options, server), (_, client) = _feddip(), _feddip()
    fill(server)
    first = copy.deepcopy(client.state_dict())

    def read(data: bytes) -> str:
        federated.feddip_receive(client, data, options, 3, "a")
        found = content(client.state_dict().items())
        client.load_state_dict(first)
        return found

    return _reply(
        "FedDIP, model",
        lambda: federated.feddip_server_message(server, options, 3),
        read,
        models=lambda: [client],
    )


def _ferret() -> tuple[federated.Ferret, dict[str, torch.Tensor], federated.FerretUpdate]:
    options, generator = federated.Ferret(bases=8, least=3), torch.Generator().manual_seed(4)
    known = {name: torch.randn(12, 10, generator=generator) for name in ("w", "x")}
    update = {name: 0.1 * torch.randn(12, 10, generator=generator) for name in known}
    return options, known, federated.project(update, options, 3, "a", 7)


def ferret_reply() -> Kind:
    """Coordinates of a client of Ferret."""
    options, known, _ = _ferret()
    after = {name: one + 0.1 for name, one in known.items()}

    def read(data: bytes) -> str:
        found = federated.read_ferret_message(data, "a", known, options, 3)
        return content((str(at), one) for at, one in enumerate(found.coordinates)) + str((found.examples, found.seed))

    return _reply("Ferret, reply", lambda: federated.ferret_client_message(known, after, options, 3, "a", 7), read)


def ferret_round() -> Kind:
    """Coordinates that a server of Ferret applied, for all clients."""
    options, known, update = _ferret()
    _, terms = federated.ferret_server_step(known, [update], [1.0], options)

    def read(data: bytes) -> str:
        return content(federated.ferret_receive(known, data, options, 3).items())

    return _reply("Ferret, round", lambda: federated.ferret_server_message(terms, 3, options.step), read)


def several_messages() -> Kind:
    """Messages of several rounds in one."""
    held = [federated.pack("any", {"x": torch.full((3,), float(at))}) for at in range(3)]

    def read(data: bytes) -> str:
        return content((str(at), federated.unpack(one, "a").tensors["x"])
                       for at, one in enumerate(federated.unpack_all(data, "a")))  # fmt: skip

    return _reply("several", lambda: federated.pack_all(held), read)


MESSAGES = (adapter_message, feddip_reply, feddip_model, ferret_reply, ferret_round, several_messages)


def kinds() -> list[Kind]:
    """All of them."""
    classifier = lambda: base(LlamaForSequenceClassification, num_labels=3)  # noqa: E731
    rows = _sparse(granularity="row", density=0.2, modules_to_save=["score"])
    subnet = _sparse(granularity="subnet", rank_pattern={"q_proj": 1}, alpha_pattern={"v_proj": 3.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            adapter("sparse_lora entries", _sparse()),
            adapter("sparse_lora rows, head", rows, classifier), adapter("sparse_lora subnet, patterns", subnet),
            adapter("sparse_lora factor masks", _sparse(density=0.0, factor_masks=FactorMaskConfig())),
            adapter("kernel_lora", lambda: KernelLoraConfig(**OPTIONS, kernel="mixed")),
            adapter("spectral_lora", lambda: SpectralLoraConfig(**OPTIONS)),
            adapter("spectral_lora random", lambda: SpectralLoraConfig(**OPTIONS, bases=RandomBases())),
            adapter("masked_lora", lambda: MaskedLoraConfig(**OPTIONS, mask="all")),
            adapter(
                "structured",
                lambda: StructuredConfig(target_modules=OPTIONS["target_modules"], form=Bottleneck(2, matrix=PHM(2))),
            ),
            adapter("factored", lambda: FactoredConfig(target_modules=OPTIONS["target_modules"], rank=FixedRank(2))),
            support(), masks(None), masks((2, 4)), kept_units(), patch("vllm"), patch("slime"), zeroth_order(),
            diagnostics(), walk(), reconstruction(),
            compeft(), bitdelta(), *(message() for message in MESSAGES),
        ]  # fmt: skip


__all__ = ["BASE_NAMES", "Kind", "digest", "kinds", "state"]
