"""The code of README and docs: it runs, or says why not; commands, keys and recipes are read.

A fence of Python or of a shell stands behind `<!-- not run: REASON -->`, or it runs here, in a directory with a tiny
model at runs/demo/merged/hf. Fences of one page share their names, as the cells of a notebook do.
"""

import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

import bmjax
from bmjax.cli.commands import COMMANDS
from bmjax.cli.main import main
from bmjax.cli.parser import parse
from bmjax.evaluate.settings import EvalSettings
from bmjax.evaluate.tasks import TASKS
from bmjax.merge.methods import METHODS
from bmjax.merge.recipe.calibration import CALIBRATED
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.pipeline.settings import RunSettings
from bmjax.teach.settings import CollectSettings

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MARK = r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?"
FENCE = re.compile(MARK + r"```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def fences(page: Path, *kinds: str) -> list[tuple[str | None, str]]:
    """(reason for not running, code) of a page's fences of these kinds."""
    matches = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [(match["reason"], match["code"]) for match in matches if match["kind"] in kinds]


def commands(code: str) -> list[list[str]]:
    """The words of every bmjax command in a shell's code."""
    lines = re.findall(r"^bmjax (.*)$", code.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(re.split(r" [<>&|](?: |$)", line)[0], comments=True) for line in lines]


def running(kind: str) -> list[Path]:
    return [page for page in PAGES if any(reason is None for reason, _ in fences(page, kind))]


@pytest.fixture
def workplace(tmp_path, student, monkeypatch):
    """A directory with a model where the demo leaves it; what a page registers is gone afterwards."""
    shutil.copytree(student, tmp_path / "runs" / "demo" / "merged" / "hf")
    monkeypatch.chdir(tmp_path)
    kept = [(table, dict(table)) for table in (METHODS, TASKS)]
    yield tmp_path
    for table, rows in kept:
        table.clear()
        table.update(rows)


@pytest.mark.parametrize("page", running("python"), ids=lambda page: page.name)
def test_python_of_a_page_runs(page, workplace):
    names = {"__name__": page.stem}
    for reason, code in fences(page, "python"):
        if reason is None:
            exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("page", running("bash"), ids=lambda page: page.name)
def test_commands_of_a_page_run(page, workplace, capsys):
    for reason, code in fences(page, "bash", "sh"):
        if reason is None:
            lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
            assert len(commands(code)) == len(lines), f"a line is no bmjax command: {lines}"
            for words in commands(code):
                assert main(words) == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_commands_of_a_page_are_read(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for _, code in fences(page, "bash", "sh"):
        for words in commands(code):
            command, options = parse(COMMANDS, words)
            if command.settings is None or "config" not in options:
                continue
            settings = command.settings_class()
            if Path(options.config).exists():
                settings.read(options.config, options.overrides)
            keys = {override.split("=")[0].split(".")[0] for override in options.overrides}
            assert keys <= {*settings.model_fields}, words


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_configs_of_a_page_are_read(page):
    for _, code in fences(page, "yaml"):
        values = yaml.safe_load(code)
        if isinstance(values, dict) and values.keys() & {"merge_method", "steps", "slices"}:
            read_recipe(values)
        elif isinstance(values, dict) and {"student", "domains"} <= values.keys():
            RunSettings.read(values)
        elif isinstance(values, dict) and {"problems", "teacher"} <= values.keys():
            CollectSettings.read(values)
        elif isinstance(values, dict) and {"model", "tasks"} <= values.keys():
            EvalSettings.read(values)


@pytest.fixture
def readers_folder(workplace, student):
    """A clone's directory as the README's reader has it: his models and rows, those of the hub in small, the demo's."""
    recipe, *_ = (code for _, code in fences(README, "yaml"))
    row, *_ = (code for _, code in fences(README, "json"))
    (workplace / "recipe.yaml").write_text(recipe)
    (workplace / "rows.jsonl").write_text(row * 3)
    values = yaml.safe_load(recipe)
    own_rows = yaml.safe_load((ROOT / "configs" / "train_own_rows.yaml").read_text())
    (workplace / "configs").mkdir()
    # One device: compiling for eight takes twice the time.
    (workplace / "configs" / "train_own_rows.yaml").write_text(yaml.safe_dump(own_rows | {"mesh": {"fsdp": 1}}))
    for name in (values["base_model"], *values["models"], own_rows["student"]):
        shutil.copytree(student, workplace / name)
    return workplace


def test_code_of_the_readme_runs(readers_folder, capsys):
    """Merging and training from the shell and from Python; the demo's answer depends on the demo's model."""
    words = [words for _, code in fences(README, "bash") for words in commands(code) if words[0] in ("merge", "train")]
    assert [command for command, *_ in words] == ["merge", "merge", "train"] and "--check" in words[0]
    for line in words:
        assert main(line) == 0, (line, capsys.readouterr().err)
        assert ("--check" in line) == (not (readers_folder / "OUT").exists())
    ((_, code),) = fences(README, "python")
    assert set(re.findall(r"bmjax\.(\w+)\(", code)) <= set(bmjax.__all__)
    exec(compile(code, README.name, "exec"), {})
    assert (readers_folder / "merged" / "config.json").exists()
    assert (readers_folder / "runs" / "math" / "hf" / "config.json").exists()


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_other_words_of_a_shell_name_what_there_is(page):
    extras = set(PROJECT["optional-dependencies"])
    for _, code in fences(page, "bash", "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line, comments=True) or [""]
            if program.startswith("./scripts/"):
                assert (ROOT / program).exists(), line
            for named in (word for word in words if program == "pip" and word.startswith(".[")):
                assert set(named[2:-1].split(",")) <= extras, line


def test_a_fence_of_the_readme_is_pasted_whole():
    """One installation in a fence: a reader of a fence that held three had CUDA's libraries and the TPU's, too."""
    for _, code in fences(README, "bash"):
        assert code.count("pip install") <= 1, code


def test_every_method_has_a_formula():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table, formulas = text.split("## Notation")
    for name in (*METHODS, *CALIBRATED):
        assert f"`{name}`" in table, name
        assert f"`{name}`" in formulas, name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_whole(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert cells[0]["source"][0].startswith("# ") and any(cell["outputs"] for cell in code)
    for cell in code:
        compile("".join(cell["source"]), notebook.name, "exec")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs(notebook, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.name, "exec"), names)


def test_the_reference_has_every_key_and_option():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = module.pages()
    for name, command in COMMANDS.items():
        assert f"## bmjax {name}\n" in pages["reference/commands.md"]
        for option in command.options:
            assert f"| `{', '.join(option.flags)}" in pages["reference/commands.md"]
        if command.settings is not None:
            page = pages[f"reference/{'train' if name == 'plan' else name}.md"]
            for key, field in command.settings_class().model_fields.items():
                (row,) = re.findall(rf"^\| `{key}`.*$", page.split("\n## ")[0], re.MULTILINE)
                assert field.description is None or field.description.split()[0].strip("`'*") in row
    for name in METHODS:
        assert f"## {name}\n" in pages["reference/methods.md"]
    # Braces at a cell's end would be taken for attributes and vanish.
    assert not re.search(r"\{[^}|`]*\} \|$", "\n".join(pages.values()), re.MULTILINE)


def test_the_site_builds_without_a_warning(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    build.build(config)
    assert (tmp_path / "site" / "reference" / "train.html").exists()
