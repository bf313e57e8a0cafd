import pytest
from tuner_toolbox import make_base, tiny_llama


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def base_of(llama_folder):
    """`base_of(kind)`: a fresh tiny model of that kind."""
    return lambda kind="fp32": make_base(kind, llama_folder)
