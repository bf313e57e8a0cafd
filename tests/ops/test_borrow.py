"""The frozen weight is lent for one product and is nobody else's to see: not processes, threads, graphs or copies."""

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.ops import DenseSource, Plan, may_borrow, sources, sparse_linear

ROWS, COLS = 24, 16


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Each test decides anew who owns the right to borrow."""
    monkeypatch.setattr(sources, "_state", sources._BorrowState())


def product(weight):
    """Run one product and tell what the weight looked like while it ran."""
    seen = []

    x = torch.randn(3, COLS, dtype=weight.dtype)
    units = torch.tensor([1, 5, 40], dtype=torch.int32)
    plan = Plan(ROWS, COLS, weight.dtype, DenseSource(weight))
    original = torch.nn.functional.linear

    def linear(*args):
        seen.append(weight.detach().clone())
        return original(*args)

    torch.nn.functional.linear = linear
    try:
        y = sparse_linear(x, plan, values=torch.ones(3), units=units)
    finally:
        torch.nn.functional.linear = original
    dense = weight.detach().clone().view(-1)
    dense[units.long()] += 1
    torch.testing.assert_close(y, x @ dense.view(ROWS, COLS).t())
    return seen[0]


def test_a_plain_weight_is_borrowed_and_comes_back():
    weight = torch.randn(ROWS, COLS)
    before = weight.clone()
    assert not torch.equal(product(weight), before)
    assert torch.equal(weight, before)


def shared(weight):
    return weight.share_memory_()


def inference(weight):
    with torch.inference_mode():
        return weight.clone()


def part_of_a_flat_buffer(weight):
    return torch.cat([weight.view(-1), torch.zeros(8)])[: ROWS * COLS].view(ROWS, COLS)


def zero_partitioned(weight):
    weight.ds_id = 3
    return weight


class Guarded(torch.Tensor):
    """Stands for DTensor and others that look after their own storage."""


@pytest.mark.parametrize(
    "make",
    [shared, inference, part_of_a_flat_buffer, zero_partitioned, lambda w: w.as_subclass(Guarded)],
    ids=["shared between processes", "inference tensor", "flat buffer", "ZeRO", "subclass"],
)
def test_weights_that_others_may_read_are_cloned_instead(make):
    weight = make(torch.randn(ROWS, COLS))
    assert not may_borrow(weight, threading.get_ident())
    if type(weight) is torch.Tensor:
        assert torch.equal(product(weight), weight)


def test_a_second_thread_ends_borrowing_for_everyone():
    weight = torch.randn(ROWS, COLS)
    assert may_borrow(weight, threading.get_ident())
    answers = []
    other = threading.Thread(target=lambda: answers.append(may_borrow(weight, threading.get_ident())))
    other.start()
    other.join()
    assert answers == [False]
    assert not may_borrow(weight, threading.get_ident())


def test_a_thread_that_ended_leaves_the_right_to_the_next():
    weight = torch.randn(ROWS, COLS)
    first = threading.Thread(target=lambda: may_borrow(weight, threading.get_ident()))
    first.start()
    first.join()
    assert may_borrow(weight, threading.get_ident())


def adapted(tie=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        tie_word_embeddings=tie,
    )
    targets = ["q_proj", "v_proj", "down_proj"] + ["lm_head"] * tie
    options = {"density": 0.1, "target_modules": targets, "init_weights": False}
    return get_peft_model(LlamaForCausalLM(config), SparseLoraConfig(r=2, **options)).eval()


def test_two_threads_generating_at_once_get_what_each_gets_alone():
    model = adapted()
    prompts = [torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]

    def generate(prompt):
        return model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)

    alone = [generate(prompt) for prompt in prompts]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    threads = [
        threading.Thread(target=lambda i=i: results[i].extend(generate(prompts[i]) for _ in range(4))) for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(results[i]) == 4
        assert all(torch.equal(result, alone[i]) for result in results[i])


def test_a_tied_head_reads_the_untouched_embedding_in_the_same_forward():
    model = adapted(tie=True)
    embedding = model.get_input_embeddings().weight
    before, version = embedding.clone(), embedding._version
    ids = torch.arange(8).view(1, 8)
    first = model(input_ids=ids, labels=ids)
    first.loss.backward()
    assert torch.equal(embedding, before)
    assert embedding._version == version
    assert torch.equal(model(input_ids=ids).logits, first.logits)


def test_two_forwards_before_a_backward_and_an_evaluation_between_change_no_gradient():
    model = adapted()
    ids = [torch.randint(0, 40, (1, 6), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
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
    reference = grads["one by one"]
    assert all(torch.equal(reference[name], grad) for name, grad in grads["together"].items())


def test_deep_copies_and_casts_share_nothing_with_the_original():
    model = adapted()
    ids = torch.arange(6).view(1, 6)
    expected = model(input_ids=ids).logits
    other = copy.deepcopy(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for parameter in other.parameters():
        parameter.data.zero_()
    half(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, expected)
