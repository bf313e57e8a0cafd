"""Pages of docs: their examples run, what they quote is in the code, and they build without a warning."""

import ast
import re
import subprocess
import sys

import markdown_pages
import pytest
from markdown_pages import ROOT

from hf_sparse_peft import methods

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if markdown_pages.blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_a_page_run_as_printed_without_a_warning(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert markdown_pages.run(page, {} if page.stem == "start" else markdown_pages.reader()) == []


def test_the_tables_of_methods_are_the_registrys(tmp_path):
    from hf_sparse_peft.methods.__main__ import write

    page = tmp_path / "methods.md"
    page.write_text((DOCS / "methods.md").read_text())
    write(page)
    assert page.read_text() == (DOCS / "methods.md").read_text(), "run python -m hf_sparse_peft.methods docs/methods.md"
    assert methods.markdown_table() in page.read_text()
    assert methods.claims_table() in page.read_text()


def test_the_table_of_whole_weight_methods_is_the_registrys():
    page = (DOCS / "optimizers.md").read_text()
    assert methods.whole_table() in page, "run python -m hf_sparse_peft.methods docs/optimizers.md"


def test_methods_that_pages_name_exist():
    known = set(methods.names())
    named = re.findall(r"^\| [^|]+ \| ([^|]+) \|", (DOCS / "choosing.md").read_text(), re.M)
    found = [name for cell in named for name in re.findall(r"`([a-z][a-z0-9-]*)`", cell)]
    assert found
    assert set(found) <= known


def test_messages_that_troubleshooting_quotes_are_in_the_code():
    quoted = re.findall(r'^\| "(.+?)" \|', (DOCS / "troubleshooting.md").read_text(), re.M)
    said = {
        node.value
        for file in (ROOT / "hf_sparse_peft").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert len(quoted) > 10
    assert [message for message in quoted if not any(message in text for text in said)] == []


def test_pages_build_with_their_reference_and_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "tuners.html").read_text()
    assert "Rank of the low-rank half; 0 leaves it out." in reference
