"""Nothing writes into a base weight in forward or backward: not for a moment, in no thread, through no alias."""

import copy
import os
import signal
import threading
import time

import pytest
import tiny
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers

IDS = torch.arange(1, 13).view(2, 6)
GRANULARITIES = ("entry", "block", "row", "column")


def storage_of(tensor):
    return tensor.untyped_storage().data_ptr()


class NoWritesInto(TorchDispatchMode):
    """Fails at any operation that has a tensor of these storages as an output or writes to it in place."""

    def __init__(self, tensors):
        super().__init__()
        self.storages = {storage_of(tensor) for tensor in tensors}
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = kwargs.get(argument.name, args[position] if position < len(args) else None)
            for tensor in given if isinstance(given, (list, tuple)) else [given]:
                if torch.is_tensor(tensor):
                    self.seen += 1
                    assert storage_of(tensor) not in self.storages, f"{func} writes into a base tensor"
        return func(*args, **kwargs)


def base_tensors(model):
    """Everything that is not an adapter's: weights, packed weights and their scales, embeddings, buffers."""
    ours = ("sparse_lora_", "kernel_lora_")
    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if not any(part in n for part in ours)}
    for name, tensor in list(tensors.items()):
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            tensors[f"{name}.absmax"] = state.absmax
    return tensors


def snapshot(tensors):
    return {n: (t._version, t.detach().clone()) for n, t in tensors.items()}


def assert_untouched(tensors, before):
    for name, tensor in tensors.items():
        version, bits = before[name]
        assert tensor._version == version, f"{name} was written to"
        assert torch.equal(tensor.detach(), bits), f"{name} has other bits"


def adapted(kind, granularity, r=0, second=None, **options):
    targets = ["c_attn", "c_fc"] if kind == "conv1d" else ["q_proj", "v_proj", "down_proj"]
    cut = {"block_size": 8, "density": 0.3, "target_modules": targets, "init_weights": False, **options}
    model = get_peft_model(tiny.base(kind, layers=1), SparseLoraConfig(r=r, granularity=granularity, **cut))
    if second is not None:
        model.add_adapter("second", SparseLoraConfig(r=2, granularity=second, **{**cut, "seed": 5}))
        model.base_model.set_adapter(["default", "second"])
    return model


def run(model):
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        model.eval()(input_ids=IDS)


def assert_only_read(model):
    tensors = base_tensors(model)
    before, guard = snapshot(tensors), NoWritesInto(tensors.values())
    with guard:
        run(model)
    assert guard.seen, "the guard saw no write at all, not even to activations"
    assert_untouched(tensors, before)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters()), "nothing was trained"


@pytest.mark.parametrize("copied", [False, True], ids=["product", "copy"])
@pytest.mark.parametrize("r", [0, 2], ids=["sparse", "hybrid"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "conv1d"])
def test_forward_and_backward_never_write_into_the_base(kind, granularity, r, copied, monkeypatch):
    if copied:  # what many tokens would choose
        monkeypatch.setattr("hf_sparse_peft.ops.core.runs_beside", lambda *_, **__: False)
    assert_only_read(adapted(kind, granularity, r))


@pytest.mark.parametrize("pair", [("entry", "entry"), ("row", "block"), ("column", "entry")], ids="-".join)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_two_active_adapters_never_write_into_the_base(kind, pair):
    assert_only_read(adapted(kind, pair[0], 2, second=pair[1]))


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_kernel_adapters_never_write_into_the_base(kind):
    config = KernelLoraConfig(r=4, sparsity=0.5, target_modules=["q_proj"], init_weights=False)
    assert_only_read(get_peft_model(tiny.base(kind, layers=1), config))


def test_gradient_checkpointing_and_autocast_never_write_into_the_base():
    model = adapted("fp32", "entry", 2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16):
        assert_only_read(model)


def test_a_compiled_step_leaves_versions_and_bits_of_the_base():
    model = adapted("fp32", "entry", 2)
    tensors = base_tensors(model)
    before = snapshot(tensors)
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager")(input_ids=IDS, labels=IDS).loss.backward()
    assert_untouched(tensors, before)
    assert all(p.grad is not None for n, p in model.named_parameters() if "values" in n)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="presses the key from a forked process")
def test_ctrl_c_at_any_moment_of_a_step_leaves_every_base_bit():
    model = adapted("bf16", "entry")
    tensors = base_tensors(model)
    before, handler, interrupted, stepping = snapshot(tensors), signal.getsignal(signal.SIGINT), 0, False

    def press(*_):
        if stepping:  # elsewhere it would end pytest, or its worker
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        for attempt in range(12):
            child = os.fork()
            if child == 0:
                time.sleep(0.001 + 0.0007 * attempt)
                while True:  # Python drops what is raised in a callback of a weak reference
                    os.kill(os.getppid(), signal.SIGINT)
                    time.sleep(1)
            try:
                stepping = True
                while True:
                    model(input_ids=IDS, labels=IDS).loss.backward()
            except KeyboardInterrupt:
                stepping = False
                interrupted += 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert_untouched(tensors, before)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert interrupted == 12


@pytest.mark.parametrize("granularity", ["entry", "row"])
def test_another_thread_that_reads_weights_sees_the_base_only(granularity):
    model = adapted("fp32", granularity).eval()
    weights = [layer.get_base_layer().weight for layer in adapter_layers(model)]
    before, stop, foreign, reads = [w.detach().clone() for w in weights], threading.Event(), [], []

    def save_again_and_again():
        while not stop.is_set():
            for weight, bits in zip(weights, before, strict=True):
                reads.append(1)
                if not torch.equal(weight.detach().clone(), bits):
                    foreign.append(1)

    reader = threading.Thread(target=save_again_and_again)
    reader.start()
    with torch.no_grad():
        for _ in range(15):
            model(input_ids=IDS)
    stop.set()
    reader.join()
    assert reads
    assert not foreign


def test_a_mixed_batch_gets_the_plain_base_beside_a_thread_that_runs_the_adapter():
    model = adapted("fp32", "entry").eval()
    with torch.no_grad():
        with model.disable_adapter():
            plain = model(input_ids=IDS).logits[1]
        own, stop = model(input_ids=IDS).logits[0], threading.Event()

        def other():
            with torch.no_grad():
                while not stop.is_set():
                    model(input_ids=IDS)

        thread = threading.Thread(target=other)
        thread.start()
        try:
            for _ in range(10):
                mixed = model(input_ids=IDS, adapter_names=["default", "__base__"]).logits
                torch.testing.assert_close(mixed[1], plain, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(mixed[0], own, rtol=1e-5, atol=1e-5)
        finally:
            stop.set()
            thread.join()
    assert (own - plain).abs().max() > 0.01


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_read_only_mapped_base_trains_and_runs(granularity, tmp_path):
    model = adapted("fp32", granularity, 2)
    expected = model(input_ids=IDS).logits
    for number, layer in enumerate(adapter_layers(model)):
        base = layer.get_base_layer()
        path = tmp_path / f"{number}.bin"
        path.write_bytes(base.weight.detach().numpy().tobytes())
        base.weight = torch.nn.Parameter(read_only(path, base.weight.shape), requires_grad=False)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    run(model)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.merge_adapter()  # into memory of its own
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()


def read_only(path, shape):
    """A tensor whose memory the operating system guards: any write to it ends the process."""
    import mmap
    import warnings

    with path.open("rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["fp32", "conv1d", "nf4"])
def test_a_base_edited_between_forward_and_backward_is_refused_as_autograd_does(kind, granularity):
    model = adapted(kind, granularity)
    model.enable_input_require_grads()
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        adapter_layers(model)[0].get_base_layer().weight.zero_()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version"):
        loss.backward()


def test_a_base_edited_after_the_backward_pass_is_nobodys_business():
    model = adapted("fp32", "entry")
    model.enable_input_require_grads()
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            adapter_layers(model)[0].get_base_layer().weight.mul_(0.5)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_merging_between_forward_and_backward_changes_no_gradient(kind):
    grads = []
    for merges in (False, True):
        model = adapted(kind, "entry", seed=1)
        copy_values(model)
        loss = model(input_ids=IDS, labels=IDS).loss
        if merges:
            model.merge_adapter()
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def copy_values(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_two_threads_generating_at_once_get_what_each_gets_alone():
    model = adapted("fp32", "entry").eval()
    prompts = [torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]

    def generate(prompt):
        return model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)

    alone, results = [generate(prompt) for prompt in prompts], {0: [], 1: []}
    threads = [
        threading.Thread(target=lambda i=i: results[i].extend(generate(prompts[i]) for _ in range(3))) for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(results[i]) == 3 and all(torch.equal(r, alone[i]) for r in results[i]) for i in (0, 1))


def test_two_forwards_before_a_backward_and_an_evaluation_between_change_no_gradient():
    model = adapted("fp32", "entry", 2)
    ids = [torch.randint(1, 40, (1, 6), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    grads = {}
    for order in ("one by one", "together"):
        model.zero_grad()
        if order == "one by one":
            for batch in ids:
                model(input_ids=batch, labels=batch).loss.backward()
        else:
            losses = [model(input_ids=batch, labels=batch).loss for batch in ids]
            with torch.no_grad():
                model(input_ids=ids[0])
            for loss in losses:
                loss.backward()
        grads[order] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(grads["one by one"][name], grad) for name, grad in grads["together"].items())


def test_deep_copies_and_casts_share_nothing_with_the_original():
    model = adapted("fp32", "entry", 2).eval()
    expected = model(input_ids=IDS).logits
    other, half = copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)
    for parameter in other.parameters():
        parameter.data.zero_()
    half(input_ids=IDS)
    assert torch.equal(model(input_ids=IDS).logits, expected)
