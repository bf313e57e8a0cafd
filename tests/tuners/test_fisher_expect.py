"""The true Fisher information (`mode="expect"`), against float64 sums over labels written from the formula."""

import pytest
import torch
from peft import get_peft_model
from support_codes import read_codes
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from tuner_toolbox import tiny_llama, token_ids

from hf_sparse_peft import SparseLoraConfig, initialize_support, methods
from hf_sparse_peft.tuners import adapter_layers

LABELS, EXAMPLES = 3, 6
TARGETS = ["query", "value", "output.dense"]


def tiny_bert(labels=LABELS, **options):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
            num_labels=labels, max_position_embeddings=16, **options,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model


def batches(size=2, labels=None):
    ids = token_ids(EXAMPLES, 7, 1) % 40
    found = [{"input_ids": part} for part in ids.split(size)]
    for number, batch in enumerate(found):
        if labels is not None:
            batch["labels"] = labels[number * size : (number + 1) * size]
    return found


def expect(**overrides):
    options = {"examples": EXAMPLES, "mode": "expect", **overrides.pop("options", {})}
    return SparseLoraConfig(
        **{
            "r": 0, "density": 0.1, "target_modules": TARGETS, "criterion": {"type": "fisher", **options},
            "task_type": "SEQ_CLS", **overrides,
        }
    )  # fmt: skip


def supports(model):
    return {layer.module_name: read_codes(layer.sparse_lora_support["default"]) for layer in adapter_layers(model)}


def chosen(config, data, base=None):
    model = get_peft_model(tiny_bert() if base is None else base, config)
    initialize_support(model, data, show_progress=False)
    return supports(model)


def true_fisher(plain, names):
    """sum_i sum_y p(y|x_i) (d -log p(y|x_i) / dw)^2, one forward and one backward for each i and y."""
    plain = plain.double().eval()
    found = dict.fromkeys(names, 0.0)
    for ids in batches(1):
        for label in range(LABELS):
            plain.zero_grad()
            log_p = plain(**ids).logits[0].log_softmax(-1)
            (-log_p[label]).backward()
            for name in names:
                gradient = plain.get_submodule(name).weight.grad.reshape(-1)
                found[name] = found[name] + log_p[label].detach().exp() * gradient**2
    return found


@pytest.mark.parametrize("size", [1, 4])
def test_supports_are_the_best_entries_by_the_true_fisher_information(size):
    labels = torch.arange(EXAMPLES) % LABELS
    found = chosen(expect(), batches(size))
    assert chosen(expect(), batches(size, labels)) == found  # the data's labels are not asked
    reference = true_fisher(tiny_bert(), list(found))
    for name, units in found.items():
        assert units == reference[name].topk(len(units)).indices.sort().values.tolist()
    empirical = chosen(expect(options={"mode": "square"}), batches(size, labels))
    assert empirical != found


def test_one_linear_layer_gives_the_closed_form():
    class Softmax(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(6, 4, bias=False)

        def forward(self, x=None, **unused):
            return SequenceClassifierOutput(logits=self.lin(x))

    torch.manual_seed(0)
    base, x = Softmax(), torch.randn(9, 6)
    p = (x.double() @ base.lin.weight.detach().double().t()).softmax(-1)
    closed = ((p * (1 - p)).t() @ x.double() ** 2).reshape(-1)  # sum_i p_ic (1 - p_ic) x_ij^2
    config = expect(target_modules=["lin"], density=0.3, task_type=None, options={"examples": 9})
    found = chosen(config, [{"x": x}], base)["lin"]
    assert found == closed.topk(7).indices.sort().values.tolist()


def test_fish_by_expectation_pays_for_the_head_and_works_on_nf4(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "pooler"],
    )  # fmt: skip
    base = BertForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=nf4, device_map="cpu", dtype=torch.float32
    )
    config = methods.get(
        "fish", density=0.1, mode="expect", examples=EXAMPLES, target_modules=TARGETS, task_type="SEQ_CLS"
    ).config
    found = chosen(config, batches(), base)
    targeted = 32 * 32 * 3 + 32 * 48
    assert sum(map(len, found.values())) == int(0.1 * targeted) - (32 * LABELS + LABELS)


def test_models_without_few_labels_are_refused_with_the_mend():
    def refused(match, base, config=None, data=None):
        with pytest.raises(ValueError, match=match):
            chosen(config or expect(), data or batches(), base)

    refused(r"logits for one example have shape \(1, 1\).*mode='square'", tiny_bert(labels=1))
    refused(r"problem is regression", tiny_bert(problem_type="regression"))
    refused(r"problem is multi_label_classification", tiny_bert(problem_type="multi_label_classification"))
    refused(r"several labels at once", tiny_bert(), data=batches(2, torch.ones(EXAMPLES, LABELS)))
    refused(r"this model has 40, above max_labels=32. Raise", tiny_bert(labels=40))
    assert chosen(expect(options={"max_labels": 40}), batches(), tiny_bert(labels=40))
    words = expect(target_modules=["q_proj"], task_type="CAUSAL_LM")
    refused(r"logits for one example have shape \(1, 7, ", tiny_llama(), words)
    model = get_peft_model(tiny_bert(), expect())
    with pytest.raises(ValueError, match=r"compute_loss would not be asked"):
        initialize_support(model, batches(), compute_loss=lambda model, batch: None)
    with pytest.raises(ValueError, match=r"max_labels=1"):
        expect(options={"max_labels": 1})
