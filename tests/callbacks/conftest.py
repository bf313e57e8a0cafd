import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_trainer(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
