"""README is executed, not believed."""

import re
from pathlib import Path

import markdown_pages
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_examples_run_one_after_the_other_as_printed_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert markdown_pages.run(ROOT / "README.md", markdown_pages.reader()) == []
    assert Path("as-lora/adapter_model.safetensors").exists()
    assert Path("as-dense-model/model.safetensors").exists()


def test_pages_that_readme_links_exist():
    linked = re.findall(r"\]\(((?!http)[^)#]+)", README)
    assert len(linked) > 10
    assert [path for path in linked if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("marker", ["run", "test"])
def test_both_commands_are_single_lines_that_install_torch_first_and_only_constrained_versions(marker):
    command = re.search(rf"<!-- {marker} command -->\s*```bash\n(.+?)\n```", README, re.S).group(1)
    assert "\n" not in command
    assert command.startswith("pip install -c constraints.txt torch==2.13.0 && pip install -c constraints.txt -e ")
