import pytest
import transformers


@pytest.fixture(autouse=True)
def _quiet():
    # Trainer warns about two callbacks of one class, which the watchers of these tests are on purpose.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)
