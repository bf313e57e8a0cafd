"""`check_adapter`, peft's loaders and transformers' agree about damaged adapters; regular expressions have a bound."""

import contextlib
import json
import time

import damaged_files
import pytest
from damaged_files import Fuzz, Unwatched
from kinds import OPTIONS, adapter, base, fill
from mutations import PATTERNS
from peft import PeftModel, get_peft_model

from hf_sparse_peft import (
    FactoredConfig,
    KernelLoraConfig,
    MaskedLoraConfig,
    SparseLoraConfig,
    SpectralLoraConfig,
    StructuredConfig,
    hub,
)
from hf_sparse_peft.tuners.factored import FixedRank
from hf_sparse_peft.tuners.shared.file_check import CONFIG_FILE, WEIGHTS_FILE
from hf_sparse_peft.tuners.structured import PHM, Bottleneck
from hf_sparse_peft.utils.checksums import save_checked
from hf_sparse_peft.utils.file_length import read_safetensors

TUNERS = {
    "sparse_lora": lambda: SparseLoraConfig(**OPTIONS, density=0.1),
    "kernel_lora": lambda: KernelLoraConfig(**OPTIONS, kernel="mixed"),
    "spectral_lora": lambda: SpectralLoraConfig(**OPTIONS),
    "masked_lora": lambda: MaskedLoraConfig(**OPTIONS, mask="all"),
    "factored": lambda: FactoredConfig(target_modules=OPTIONS["target_modules"], rank=FixedRank(2)),
    "structured": lambda: StructuredConfig(
        target_modules=OPTIONS["target_modules"], form=Bottleneck(size=4, matrix=PHM(2))
    ),
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.filterwarnings("ignore")
def test_check_and_loaders_take_and_refuse_the_same_damaged_files(tuner, tmp_path, monkeypatch):
    monkeypatch.setattr(damaged_files, "at_most", lambda seconds: contextlib.nullcontext())  # no signals in a suite
    fuzz = Fuzz(adapter(tuner, TUNERS[tuner]), tmp_path, Unwatched(), every=10)
    for seed in range(100):
        fuzz.run(seed)
    assert fuzz.tally.faults == []
    assert fuzz.tally.refused > 50
    assert fuzz.tally.read > 0
    assert fuzz.tally.deep > 10  # of which every way to load was tried


@pytest.mark.filterwarnings("ignore")
def test_regular_expressions_of_a_config_take_bounded_time_in_check_and_loader(tmp_path):
    fill(get_peft_model(base(), TUNERS["sparse_lora"]())).save_pretrained(tmp_path)
    tensors, _ = read_safetensors(tmp_path / WEIGHTS_FILE)
    save_checked(tensors, tmp_path / WEIGHTS_FILE, {"format": "pt"})  # without digests of the options
    config, target = json.loads((tmp_path / CONFIG_FILE).read_text()), base()
    hub.check_adapter(tmp_path)
    refused = 0
    for option in ("target_modules", "rank_pattern"):
        for pattern in PATTERNS:
            given = pattern if option == "target_modules" else {pattern: 3}
            (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, option: given}))
            answers = []
            for load in (hub.check_adapter, lambda folder: PeftModel.from_pretrained(target, folder)):
                begin = time.process_time()
                try:
                    load(tmp_path)
                    answers.append(None)
                except ValueError as error:
                    answers.append(str(error))
                assert time.process_time() - begin < 5, (option, pattern[:20], load)
            if answers[0] is not None:
                refused += 1
                assert answers[1] is not None, f"the loader takes {option}={pattern[:20]!r}, which the check refuses"
    assert refused > 5
