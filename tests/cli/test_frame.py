"""How commands begin and end: exit codes, messages, JSON, completion."""

import warnings

import pytest
import typer

from hf_sparse_peft import cli
from hf_sparse_peft.cli.errors import in_flags


@pytest.fixture
def fails(monkeypatch):
    """Enters a verb that fails as it is told, for the length of a test."""
    before = list(cli.app.registered_commands)

    def enter(error, **options):
        @cli.verb("fail", **options)
        def fail(rank: int = 1, scale_all: float = 1.0, folder: str = typer.Argument("here")) -> None:
            """Fail."""
            raise error

    yield enter
    cli.app.registered_commands[:] = before


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, ImportError])
def test_a_users_mistake_ends_with_status_1_and_one_line(error, fails, capsys):
    fails(error("rank=3 is too large."))
    assert cli.main(["fail"]) == 1
    assert capsys.readouterr().err == "sparse-peft fail: --rank 3 is too large.\n"


def test_an_error_of_the_program_is_not_hidden(fails):
    fails(KeyError("a bug"))
    with pytest.raises(KeyError):
        cli.main(["fail"])


def test_traceback_is_shown_on_request(fails, capsys):
    fails(ValueError("no"))
    assert cli.main(["--traceback", "fail"]) == 1
    assert "raise error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["expo"], "Did you mean 'export'?"),
        (["inspect"], "ADAPTER"),
        (["inspect", "a", "--jso"], "--json"),
        (["export", "a", "b", "--to", "onnx"], "onnx"),
        (["intruders", "a", "--k", "many"], "--k"),
        (["export", "a", "b", "--to", "lora", "--uniform-rank", "0"], "'largest'"),
    ],
)
def test_a_wrong_command_ends_with_status_2_and_names_the_word(command, said, capsys):
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "--help'." in err
    assert "Traceback" not in err


def test_without_a_command_the_help_is_shown_and_the_status_is_2(capsys):
    assert cli.main([]) == 2
    shown = "".join(capsys.readouterr())
    assert "inspect" in shown
    assert "Try" not in shown


def test_errors_name_flags_where_functions_name_arguments(fails, capsys):
    fails(ValueError("x"))
    command = typer.main.get_command(cli.app).commands["fail"]
    cases = {
        "rank=3 is too large; Pass rank=8.": "--rank 3 is too large; Pass --rank 8.",
        "scale_all='much' is no number": "--scale-all much is no number",
        "folder='/a b' is no folder": "'/a b' is no folder",
        "path='/a b' is empty": "'/a b' is empty",
        "call fit(rank=8)": "call fit(rank=8)",
        "use hub.export_lora(model, 'a', rank=8) or merge_to_dense.": "use 'sparse-peft export --to lora --rank 8' or "
        "'sparse-peft export --to dense'.",
        "lora_rank=3 and SparseLoraConfig.rank=3": "lora_rank=3 and SparseLoraConfig.rank=3",
        "Pass rank= to cut it": "Pass --rank to cut it",
    }
    assert {text: in_flags(text, command) for text in cases} == cases
    assert in_flags("r=3 is odd", command, {"r": "--rank"}) == "--rank 3 is odd"


def test_a_warning_is_one_line_without_the_place_in_the_source(fails, capsys):
    fails(ValueError())  # for its clean-up

    @cli.verb("warn")
    def warn() -> None:
        """Warn."""
        print(warnings.formatwarning("look out", UserWarning, "file.py", 3))

    before = warnings.formatwarning
    assert cli.main(["warn"]) == 0
    assert capsys.readouterr().out.strip() == "warning: look out"
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("exp", "export"),
        ("methods rig", "rigl"),
        ("export --to gg", "gguf-lora"),
        ("combine --type dare_t", "dare_ties"),
    ],
)
def test_shells_complete_verbs_methods_and_choices(line, expected, monkeypatch, capsys):
    monkeypatch.setenv("_SPARSE_PEFT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"sparse-peft {line}")
    monkeypatch.setenv("COMP_CWORD", str(len(line.split())))
    assert cli.main([]) == 0
    assert expected in capsys.readouterr().out.split()
