"""Fisher information against closed forms, and soups against the rule of the recipe."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.merging import fisher_importance, greedy_soup, merge_adapters
from hf_sparse_peft.tuners import adapter_layers


class Classifier(nn.Module):
    """Two classes, logits W x, W = 0 `[2, 1]`."""

    def __init__(self, start=0.0, inputs=1):
        super().__init__()
        self.head = nn.Linear(inputs, 2, bias=False)
        nn.init.constant_(self.head.weight, start)
        with torch.no_grad():
            self.head.weight += start * torch.arange(2 * inputs).view(2, inputs)

    def forward(self, x, labels=None):
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits, "loss": loss}


def test_the_expected_fisher_of_two_classes_at_zero_is_one_and_not_the_square_of_a_sum():
    model = get_peft_model(Classifier(), SparseLoraConfig(r=0, density=1.0, target_modules=["head"]))
    batch = {"x": torch.tensor([[2.0]]), "labels": torch.tensor([0])}
    (found,) = fisher_importance(model, [batch], mode="expect", show_progress=False).values()
    torch.testing.assert_close(found, torch.ones(2))


def test_of_logistic_regression_it_is_the_analytic_one_at_the_adapters_entries():
    base = Classifier(0.3, inputs=3)
    model = get_peft_model(base, SparseLoraConfig(r=0, density=0.5, criterion="random", target_modules=["head"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.2)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    batches = [{"x": x[:4], "labels": torch.zeros(4, dtype=torch.long)}, {"x": x[4:], "labels": torch.ones(2).long()}]
    (layer,) = adapter_layers(model)
    W = (layer.dense_base_weight() + layer.get_delta_weight("default")).detach().double()
    p = (x.double() @ W.t()).softmax(1)
    analytic = torch.einsum("nc,ni->ci", p * (1 - p), x.double().square()) / 6
    positions = layer.pieces("default")[0].entries()[0].long()
    (found,) = fisher_importance(model, batches, mode="expect", show_progress=False).values()
    torch.testing.assert_close(found.double(), analytic.reshape(-1)[positions], atol=1e-5, rtol=1e-4)


def test_fisher_merging_of_files_weighs_entries_and_factors_alike(base, adapter, updates, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folders = [adapter("entries"), adapter("lora", 1)]
    rows = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    importance = []
    for folder in folders:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
        batches = [{"input_ids": rows[:2], "labels": rows[:2]}, {"input_ids": rows[2:], "labels": rows[2:]}]
        importance.append(fisher_importance(model, batches, examples=4, show_progress=False))
    report = merge_adapters(
        folders, tmp_path / "m", "fisher", importance=importance, rank=32, normalise_importance=False,
        show_progress=False,
    )  # fmt: skip
    assert max(report.errors.values()) < 1e-4
    found, first, second = (updates(folder) for folder in (tmp_path / "m", *folders))
    for name, update in found.items():
        F1, F2 = torch.zeros_like(update), importance[1][name].double()
        F1[first[name] != 0] = importance[0][name].double()
        assert F2.shape == update.shape
        total = F1 + F2
        expected = torch.where(total > 0, (F1 * first[name] + F2 * second[name]) / total.clamp_min(1e-300), 0.0)
        torch.testing.assert_close(update, expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=r"importance\[0\]"):
        merge_adapters(
            folders, tmp_path / "x", "fisher", show_progress=False,
            importance=[{name: torch.ones(3) for name in importance[0]}, importance[1]],
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


def several(*values, seeds=None, **options):
    """A model with adapters that hold a value everywhere on their supports."""
    model = None
    for at, value in enumerate(values):
        config = SparseLoraConfig(
            r=0, density=0.1, criterion="random", target_modules=["q_proj"], seed=(seeds or [0] * 9)[at], **options
        )
        name = f"a{at}"
        model = get_peft_model(tiny.llama(layers=1), config, name) if model is None else model
        if name not in model.peft_config:
            model.add_adapter(name, config)
        with torch.no_grad():
            for layer in adapter_layers(model):
                layer.sparse_lora_values[name].fill_(value)
    return model


def held_value(model):
    (layer,) = adapter_layers(model)
    return float(layer.pieces(model.active_adapter)[0].values.mean())


def test_a_greedy_soup_takes_what_does_not_lower_the_metric_and_never_falls_below_the_best():
    model = several(1.0, 3.0, 8.0, 3.2)
    soup = greedy_soup(model, ["a0", "a1", "a2", "a3"], lambda m: -abs(held_value(m) - 2.2), show_progress=False)
    # metrics: -1.2, -0.8, -5.8, -1.0; 3.0, then with 3.2: 3.1 falls; with 1.0: 2.0 rises; with 8.0: 4.0 falls
    assert soup.metrics == pytest.approx([-1.2, -0.8, -5.8, -1.0])
    assert soup.members == [1, 0]
    assert soup.metric == pytest.approx(-0.2)
    assert model.active_adapter == "soup"
    assert held_value(model) == pytest.approx(2.0)
    assert sorted(model.peft_config) == ["a0", "a1", "a2", "a3", "soup"]
    (layer,) = adapter_layers(model)
    assert torch.equal(layer.pieces("soup")[0].units.long(), layer.pieces("a0")[0].units.long())  # zeros are kept


@pytest.mark.parametrize(("strict", "members"), [(False, [0, 1, 2]), (True, [0])])
def test_a_constant_metric_keeps_all_or_with_strict_one(strict, members):
    model = several(1.0, 2.0, 3.0)
    soup = greedy_soup(model, ["a0", "a1", "a2"], lambda m: 1.0, strict=strict, show_progress=False)
    assert soup.members == members


def test_a_soup_that_fails_leaves_the_adapters_that_were_there():
    model = several(1.0, 2.0, seeds=[0, 1])
    model.set_adapter("a1")
    with pytest.raises(ValueError, match="same_support"):
        greedy_soup(model, ["a0", "a1"], lambda m: 1.0, same_support=True, show_progress=False)
    calls = []

    def fails(m):
        calls.append(m.active_adapter)
        if len(calls) == 3:
            raise RuntimeError("out of data")
        return 1.0

    with pytest.warns(UserWarning, match="other entries"), pytest.raises(RuntimeError, match="out of data"):
        greedy_soup(model, ["a0", "a1"], fails, show_progress=False)
    assert calls == ["a0", "a1", "soup_on_trial"]
    assert sorted(model.peft_config) == ["a0", "a1"]
    assert model.active_adapters == ["a1"]
    for adapters, said in ((["a0"], "two or more"), (["a0", "b"], "unknown"), (["a0", "a0"], "each once")):
        with pytest.raises(ValueError, match=said):
            greedy_soup(model, adapters, lambda m: 1.0, show_progress=False)
    with pytest.warns(UserWarning, match="other entries"), pytest.raises(ValueError, match="nan"):
        greedy_soup(model, ["a0", "a1"], lambda m: float("nan"), show_progress=False)


def test_a_mean_of_files_with_one_support_keeps_it_and_of_others_is_refused(adapter, tmp_path):
    merge_adapters([adapter("entries")] * 2, tmp_path / "one", "soup", same_support=True, show_progress=False)
    with pytest.raises(ValueError, match="same_support=True"):
        merge_adapters(
            [adapter("entries"), adapter("entries", 1)], tmp_path / "x", "soup", same_support=True, show_progress=False
        )
    with pytest.warns(UserWarning, match="other entries"):
        merge_adapters([adapter("entries"), adapter("entries", 1)], tmp_path / "two", "soup", show_progress=False)


def test_importance_of_a_lora_on_a_classifier_is_dense_and_asks_for_the_active_adapter():
    model = get_peft_model(
        tiny.llama(LlamaForSequenceClassification, layers=1), LoraConfig(r=2, target_modules=["q_proj"])
    )
    batch = {"input_ids": torch.arange(1, 9)[None], "labels": torch.tensor([1])}
    (found,) = fisher_importance(model, [batch], show_progress=False).values()
    assert tuple(found.shape) == (32, 32)
    assert bool((found >= 0).all())
    assert bool(found.any())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="are active"):
        fisher_importance(model, [batch], show_progress=False)
