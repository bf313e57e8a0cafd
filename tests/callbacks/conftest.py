import pytest
import torch
import transformers


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet():
    # Trainer warns about two callbacks of one class, which the watchers of these tests are on purpose.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
