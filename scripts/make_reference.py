#!/usr/bin/env python
"""Make the site's pages that come from the code: commands, settings, merge methods, the Python interface, notebooks.

    python scripts/make_reference.py FOLDER    # the pages as Markdown files

MkDocs runs it as a hook (mkdocs.yml). Nothing of it is stored in the repository. It also turns formulas into MathML,
which browsers draw without a script.
"""

import base64
import html
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pydantic import AliasChoices  # noqa: E402
from pydantic_core import PydanticUndefined  # noqa: E402

import bmjax  # noqa: E402
from bmjax.cli.commands import COMMANDS  # noqa: E402
from bmjax.config import Settings, _block_type, type_name  # noqa: E402
from bmjax.demo.settings import DemoSettings  # noqa: E402
from bmjax.generate.settings import ChatSettings, ServeSettings  # noqa: E402
from bmjax.merge.methods import METHODS  # noqa: E402
from bmjax.merge.recipe.calibration import CALIBRATED, CalibrationSettings  # noqa: E402
from bmjax.teach.settings import JudgeSettings  # noqa: E402

# Settings of the commands whose row in the table of commands names none.
SETTINGS = {"demo": DemoSettings, "judge": JudgeSettings, "serve": ServeSettings, "chat": ChatSettings}
PYTHON = {
    "Models": ["bmjax.api.Model", "bmjax.api.load", "bmjax.api.save", "bmjax.api.generate"],
    "Commands": [
        "bmjax.calibrate.dispatch.merge", "bmjax.api.train", "bmjax.api.run", "bmjax.api.collect", "bmjax.api.rejudge",
        "bmjax.api.select", "bmjax.api.evaluate", "bmjax.api.plan", "bmjax.api.convert",
    ],
    "Rows and answers": ["bmjax.branch.examples.tokenize", "bmjax.teach.judges.judge.judge"],
    "Inside a program of yours": [
        "bmjax.merge.engine.trees.merge_trees", "bmjax.generate.engine.Engine", "bmjax.generate.requests.Request",
        "bmjax.generate.requests.Sampling",
    ],
}  # fmt: skip


def pages() -> dict[str, str]:
    """Return the Markdown of every generated page by its path in the site."""
    made = {
        "reference/commands.md": commands_page(),
        "reference/methods.md": methods_page(),
        "reference/calibration.md": settings_page(
            "calibration", f"Parameters of {', '.join(f'`{name}`' for name in CALIBRATED)}.", CalibrationSettings
        ),
        "reference/python.md": python_page(),
        "changes.md": re.sub(r"\]\(docs/", "](", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")),
    }
    for name, command in COMMANDS.items():
        if name in ("plan", "merge"):  # the keys of train; parameters of methods
            continue
        if settings := SETTINGS.get(name) or (command.settings and command.settings_class()):
            intro = f"The keys of [`bmjax {name}`](commands.md#bmjax-{name}), in a YAML file or as `key=value`."
            if name == "demo":
                intro += " All others are those of [`bmjax run`](run.md)."
            made[f"reference/{name}.md"] = settings_page(name, intro, settings)
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook)
    return made


def commands_page() -> str:
    lines = ["# Commands", "", "Words may stand in any order. `bmjax COMMAND --help` prints the same.", ""]
    lines += ["| command | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#bmjax-{name}) | {cell(command.summary)} |" for name, command in COMMANDS.items()]
    for name, command in COMMANDS.items():
        help_text = command.help_texts()[0]
        lines += ["", f"## bmjax {name}", "", "```text", command.usage, "```", "", "```text", help_text, "```"]
        if command.options:
            lines += ["", "| option | meaning |", "|---|---|"]
            for option in command.options:
                flags = ", ".join(option.flags)
                metavar = option.keywords.get("metavar") or ()
                words = " ".join([flags, *([metavar] if isinstance(metavar, str) else metavar)])
                lines.append(f"| {code(words)} | {cell(option.keywords['help'])} |")
        if name == "merge":
            lines += ["", "Methods and their parameters: [merge methods](methods.md)."]
        elif command.settings or name in SETTINGS:
            page = "train" if name == "plan" else name
            lines += ["", f"Keys: [settings of `{page}`]({page}.md)."]
    return "\n".join(lines) + "\n"


def settings_page(name: str, intro: str, settings: type[Settings]) -> str:
    lines = [f"# Settings of {name}", "", intro]
    for title, block in blocks(settings):
        if title:
            lines += ["", f"## {title}", "", " ".join((block.__doc__ or "").split())]
        lines += ["", *settings_table(block)]
    return "\n".join(lines) + "\n"


def blocks(settings: type[Settings], prefix: str = "") -> Iterator[tuple[str, type[Settings]]]:
    """Yield a settings class and the classes of its blocks, each with the key that leads to it."""
    yield prefix.removesuffix("."), settings
    for name, field in settings.model_fields.items():
        if block := _block_type(field.annotation):
            infix = f"{name}.NAME." if typing.get_origin(field.annotation) is dict else f"{name}."
            yield from blocks(block, prefix + infix)


def settings_table(settings: type[Settings]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in settings.model_fields.items():
        default = field.default if field.default_factory is None else field.default_factory()  # type: ignore[call-arg]
        if default is PydanticUndefined:
            text = "required"
        elif isinstance(default, Settings):
            text = "its own keys"
        elif default is None or isinstance(default, bool):
            text = f"`{'null' if default is None else str(default).lower()}`"
        else:
            text = code(str(default)) if str(default) else "empty"
        alias = field.validation_alias
        names = [*dict.fromkeys([name, *map(str, alias.choices if isinstance(alias, AliasChoices) else ())])]
        shown = " or ".join(f"`{key}`" for key in names)
        kind = cell(type_name(field.annotation))
        lines.append(f"| {shown} | {kind} | {text} | {cell(field.description or '')} |")
    return lines


def methods_page() -> str:
    lines = ["# Merge methods and their parameters", "", "Formulas: [merge methods](../methods.md). A parameter marked"]
    lines += [r"\* may be given for each model. Those that look at data have [a page of their own](calibration.md)."]
    for method in METHODS.values():
        least, most = method.branches
        count = f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"
        base = "`base_model` and " if method.base == "required" else ""
        lines += ["", f"## {method.name}", "", f"Takes {base}{count} model{'s' * (count != '1')}.", ""]
        lines += [html.escape(method.summary, quote=False).replace("*", r"\*").replace("_", r"\_").replace("|", r"\|")]
        if method.parameters:
            lines += ["", "| parameter | default | takes | meaning |", "|---|---|---|---|"]
        for p in method.parameters.values():
            default = p.default[0] if isinstance(p.default, tuple) else p.default
            text = "required" if default is inspect.Parameter.empty else f"`{str(default).lower()}`"
            star = r"\*" if p.about.per_model else ""
            lines.append(f"| `{p.name}`{star} | {text} | {cell(p.expected)} | {cell(p.about.text)} |")
    return "\n".join(lines) + "\n"


def python_page() -> str:
    lines = ["# Python", "", "All but the last section is `bmjax.NAME`, too. All raise `bmjax.UserError`, one line,"]
    lines += ["for what a user can mend."]
    for title, names in PYTHON.items():
        lines += ["", f"## {title}"]
        for name in names:
            members = "[logits, loss]" if name.endswith(".Model") else "[submit, cancel, step]" if name.endswith(
                "Engine") else "false"  # fmt: skip
            lines += ["", f"::: {name}", "    options:", "      heading_level: 3", f"      members: {members}"]
    return "\n".join(lines) + "\n"


def notebook_page(file: Path) -> str:
    """Return a notebook's cells, with the outputs that are stored in it."""
    parts = []
    for block in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(block["source"])
        if block["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in block["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                image = base64.b64decode(data["image/png"])
                parts.append(f'<img alt="figure" src="data:image/png;base64,{base64.b64encode(image).decode()}">')
            elif text := "".join(output.get("text", data.get("text/plain", []))):
                parts.append(f'```text title="prints"\n{text.rstrip()}\n```')
    where = f"This page is `docs/notebooks/{file.name}`, which runs top to bottom on a CPU."
    title, _, rest = parts[0].partition("\n")
    return "\n\n".join([title, where, rest.strip(), *parts[1:]]) + "\n"


def cell(text: str) -> str:
    """Return text for a cell of a table; braces at its end would be read as attributes."""
    parts = " ".join(text.split()).replace("|", r"\|").split("`")
    for number in range(0, len(parts), 2):  # outside of code
        parts[number] = parts[number].replace("<", "&lt;").replace("*", r"\*").replace("{", "&#123;")
    return "`".join(parts)


def code(text: str) -> str:
    """Return text as code in a cell of a table."""
    return f"`{' '.join(text.split())}`".replace("|", r"\|")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages; a hook of MkDocs."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to notebooks lead to their pages; a hook of MkDocs."""
    return re.sub(r"\]\(((?:notebooks/)?\w+)\.ipynb\)", r"](\1.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn a page's formulas into MathML; a hook of MkDocs."""
    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _formula, html, flags=re.DOTALL)


def _formula(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    return convert(html.unescape(match[3].strip()), display="block" if match[2] == "[" else "inline")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for path, text in pages().items():
        file = Path(sys.argv[1]) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    print(f"{sys.argv[1]}: pages of bmjax {bmjax.__version__} written")
