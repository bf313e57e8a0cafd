"""Every task type of peft trains the head of its task, and the file has it."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig

TASKS = {
    "SEQ_CLS": (BertForSequenceClassification, "classifier"),
    "TOKEN_CLS": (BertForTokenClassification, "classifier"),
    "QUESTION_ANS": (BertForQuestionAnswering, "qa_outputs"),
}
KINDS = {
    "sparse": lambda **o: SparseLoraConfig(r=0, density=0.2, target_modules=["query"], **o),
    "kernel": lambda **o: KernelLoraConfig(r=4, sparsity=0.5, target_modules=["query"], **o),
}


def bert(task):
    torch.manual_seed(0)
    return TASKS[task][0](
        BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )


@torch.no_grad()
def outputs(model):
    found = model.eval()(input_ids=torch.arange(1, 9)[None])
    return torch.cat([found[key].flatten() for key in found if key.endswith("logits")])


@torch.no_grad()
def moved(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_the_head_of_a_task_trains_and_is_in_the_file(task, kind, tmp_path):
    model = get_peft_model(bert(task), KINDS[kind](task_type=task))
    head = f"base_model.model.{TASKS[task][1]}.modules_to_save.default.weight"
    assert dict(model.named_parameters())[head].requires_grad
    expected = outputs(moved(model))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(bert(task), tmp_path)), expected)


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_one_config_of_a_task_serves_two_models_and_stays_as_it_was(task):
    config = KINDS["sparse"](task_type=task, modules_to_save=["pooler"])
    for _ in range(2):
        model = get_peft_model(bert(task), config)
        assert model.peft_config["default"].modules_to_save.count(TASKS[task][1]) == 1
    assert config.modules_to_save == ["pooler"]
    model.add_adapter("second", KINDS["sparse"](task_type=task))
    assert TASKS[task][1] in model.peft_config["second"].modules_to_save
