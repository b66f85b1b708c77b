"""README and docs: short enough, every link leads somewhere, every file and command that they name exists."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from bmjax.chat.forms import read_conversation
from bmjax.cli.commands import COMMANDS
from bmjax.errors import UserError
from bmjax.io.model_files import QUANTIZED_TENSORS
from bmjax.teach.adapters.table import ADAPTERS
from bmjax.teach.traces import FORMS, read_traces

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for name in re.findall(r"`((?:bmjax|configs|scripts|tests|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert "NAME" in name or (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_commands_and_configs_exist(page):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for command, words in re.findall(r"^bmjax (\S+)(.*)$", block, re.MULTILINE):
            assert command in COMMANDS, command
            for config in re.findall(r"configs/[\w./-]+\.yaml", words):
                assert (ROOT / config).exists(), config


def test_the_workflow_runs_what_is_here_on_every_python_of_the_package():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    assert jobs["usual"]["strategy"]["matrix"]["python"] == pythons
    for job in jobs.values():
        (command,) = [step["run"] for step in job["steps"] if "run" in step]
        assert (ROOT / command.split()[0]).exists()
    assert jobs["slow"]["steps"][-1]["run"].endswith("-m slow")


def test_architecture_names_every_folder():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for folder in sorted(path.parent.name for path in (ROOT / "bmjax").glob("*/__init__.py")):
        assert f"`{folder}/`" in text, folder


def table_after(marker: str, page: str = "training.md") -> list[list[str]]:
    """The cells of the table that follows a comment in a page, without its header."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split(marker, 1)[1]
    lines = text.split("\n\n", 1)[0].strip().splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("marker", ["<!-- forms of rows", "<!-- parts of rows"])
def test_rows_of_the_tables_are_read_as_they_say(marker):
    rows = table_after(marker)
    assert len(rows) >= 6
    for cells in rows:
        conversation = read_conversation(json.loads(cells[1].strip("`")), cells[0])
        assert any(conversation.targets) and conversation.messages[-1]["content"].endswith("4")
        texts = " ".join(message["content"] for message in conversation.messages)
        assert ("<think>" in texts) == ("reasoning" in cells[0])
        assert (conversation.messages[0]["role"] == "system") == (cells[0] == "system prompt")
        assert (conversation.tools is not None) == (cells[0] == "tools")


def test_rows_of_the_table_of_refused_forms_are_refused():
    rows = table_after("<!-- refused rows")
    assert [cells[0] for cells in rows] == ["bare text", "tokens"]
    for form, row, _ in rows:
        with pytest.raises(UserError, match="expected messages, "):
            read_conversation(json.loads(row.strip("`")), form)


def test_the_table_of_students_names_every_scheme_that_is_refused():
    text = " ".join(cell for cells in table_after("<!-- forms of students") for cell in cells)
    for scheme in ("bitsandbytes", "GPTQ", "AWQ", "FP8", "LoRA", "GGUF", "pickled"):
        assert scheme in text
    assert set(re.findall(r"GPTQ|AWQ|bitsandbytes|FP8", " ".join(QUANTIZED_TENSORS.values()))) <= set(
        re.findall(r"\w+", text)
    )


def test_the_table_of_adapters_lists_them_as_they_are():
    rows = table_after("<!-- adapters:", "data.md")
    assert [cells[0].strip("`") for cells in rows] == list(ADAPTERS)
    for (_, data_sets, columns, _), adapter in zip(rows, ADAPTERS.values(), strict=True):
        assert data_sets == (", ".join(adapter.hub) or "-")
        assert [re.findall(r"`([^`]+)`", part) for part in columns.split(" or ")] == [*map(list, adapter.columns)]


def test_rows_of_the_table_of_traces_are_read_as_they_say(tmp_path):
    rows = table_after("<!-- forms of traces:", "data.md")
    assert {cells[0] for cells in rows} == {form.name for form in FORMS}
    for name, _, row in rows:
        file, lines = tmp_path / "rows.jsonl", []
        file.write_text(row.strip("`").replace("\\|", "|") + "\n")
        (record,) = read_traces([str(file)], domain="sums", log=lines.append)
        assert (record.prompt, record.reasoning, record.response) == ("2 + 2?", "two and two", "4")
        assert record.finish_reason == "stop" and any(line.endswith(f"of the form {name}") for line in lines)


def test_messages_of_troubleshooting_exist():
    rows = re.findall(
        r"^\| (`[^|]+) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) >= 25
    sources = " ".join(file.read_text(encoding="utf-8") for file in (ROOT / "bmjax").rglob("*.py"))
    # A message may be written over several lines of the source.
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    for message in re.findall(r"`([^`]+)`", " ".join(rows)):
        assert message in joined, message
