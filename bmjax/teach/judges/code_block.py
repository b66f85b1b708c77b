"""Finds the program in a reply: which of its code blocks a reader would run.

Fences are read by markdown's rules, by markdown-it. Then: the last Python block that is a program, else the last block
that parses as Python, else the reply itself if it parses. Blocks of output, shell lines, sessions with `>>>` are no
programs. Where the last block uses names of earlier ones, those precede it, as in a notebook.
"""

import ast
import builtins
import functools
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from bmjax.teach.judges.python_source import UNREADABLE, parse, try_parse

_LONGEST_REPLY = 1_000_000  # characters; the end is read

_PYTHON = re.compile(r"^[\W_]*(i?python|py|pypy|cpython|sage)[\s_-]*[\d.]*(?![A-Za-z-])", re.IGNORECASE)
_SESSION = re.compile(r"^[\W_]*(pycon|python-repl|python-console|doctest|python-traceback|pytb)", re.IGNORECASE)
_NOTEBOOK_LINE = re.compile(r"^\s*([!%]|\$ |(python3? -m )?(pip3?|conda|apt|apt-get|uv|poetry) (install|add) )")
_CODE_WORD = re.compile(r"^\s*(def|class|import|from|for|while|if|print|return|try|with)\b", re.MULTILINE)
_ANY_FENCE = re.compile(r"^[ \t>]*(`{3,}|~{3,})")
_FENCES_IN_DOCSTRINGS = 10
_CODE_KEYS = ("code", "python", "program", "solution", "answer", "python_code", "source", "completion", "final_answer")
# What a program without fences begins with.
_FIRST_LINE = re.compile(
    r"(?:import \w|from [\w.]+ import\b|(?:async )?def \w+\(|class \w+\s*[:(]|@\w"
    r"|[A-Za-z_]\w*(?:\s*,\s*[A-Za-z_]\w*)*\s*=\s*\S"
    r"|(?:for|while|if|with|try)\b.*:\s*$|print\(|sys\.|input\()"
)
_MOST_RUNS = 40
_LONGEST_UNFENCED = 100_000
_FENCE_LINE = re.compile(r"^[ \t>]*(`{3,}|~{3,})[ \t]*$")
# A fence that markdown does not see: after text on its line.
_LATE_FENCE = re.compile(r"(?<=[^\s`~])[ \t]*(`{3,}|~{3,})(?=[ \t]*(?:i?python|py|pypy)[\d. ]*\n)", re.IGNORECASE)
_DOCUMENT = re.compile(r"^\s*(markdown|md|)\s*$", re.IGNORECASE)
_LINE_OF_CODE = re.compile(r"```(?:python3?|py)[ \t]+([^\n`]+)```", re.IGNORECASE)

_MARKED = re.compile(
    r"(?:<(code|python)>|\[(PYTHON)\]|\\begin\{(verbatim|lstlisting|minted)\}(?:\[[^\]\n]*\]|\{\w+\})*)\n?(.{1,100000}?)"
    r"(?:</\1>|\[/\2\]|\\end\{\3\})",
    re.DOTALL,
)

_READS_INPUT = re.compile(r"\binput\b|\bstdin\b|\bopen\(0|\bos\.read\(|\bfileinput\b")
_PRINTS = re.compile(r"\bprint\(|\bstdout\b|\bwrite\(")


@functools.cache
def _markdown() -> Any:
    """Return the parser of blocks. Imported late: most commands judge no program."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").disable(["html_block", "lheading", "reference", "inline", "text_join"])


@dataclass(frozen=True)
class Block:
    """A fenced block: what follows the fence on its line, the code, and whether the fence was closed."""

    info: str
    code: str
    closed: bool

    @property
    def is_python(self) -> bool:
        return bool(_PYTHON.match(self.info)) and not _SESSION.match(self.info)


def find_program(reply: str, names: Collection[str] = (), reads_input: bool = False) -> str | None:
    """Return the source of the program in a reply, or None.

    Arguments:
        reply: Markdown, after the reasoning.
        names: what the tests call. A block that defines one of them is preferred to later ones that define none.
        reads_input: whether the tests have input. A block that reads it and prints is preferred to later ones that
            do not.
    """
    text = reply.replace("\r\n", "\n").replace("\r", "\n")[-_LONGEST_REPLY:].strip("\ufeff\n")
    # <answer>```python ... ```</answer>, and [BEGIN] ... [DONE] of MBPP's prompts.
    text = re.sub(r"(?<![`~])(`{3,}|~{3,})[ \t]{0,9}(</\w{1,20}>)", r"\1\n\2", text)
    if "```" not in text:
        text = re.sub(r"^[ \t]*\[DONE\].*", "", text.rpartition("[BEGIN]\n")[2], flags=re.DOTALL | re.MULTILINE)
    if (inside := _in_json(text)) is not None:
        return find_program(inside, names, reads_input)
    blocks = code_blocks(text)
    python = [code for block in blocks if block.is_python and (code := _program_of(block)) is not None]
    others = [block for block in blocks if not block.is_python and not _SESSION.match(block.info)]
    # A block without a language comes before one of another language that happens to parse.
    others.sort(key=lambda block: not block.info.strip())
    candidates = python or [
        code for block in reversed(others) if (code := _program_of(block)) is not None and _is_program(code)
    ]
    if candidates:
        return _choose(candidates, names, reads_input)
    sessions = [code for block in blocks if (code := _session_code(block.code))]
    if sessions:
        return sessions[-1]
    if blocks:
        objects = (inside for block in reversed(blocks) if (inside := _in_json(block.code)) is not None)
        return next((program for code in objects if (program := find_program(code, names, reads_input))), None)
    if _is_program(text):
        return text
    # Blocks of other markup, then code that is only indented.
    marked = [found[4].strip("\n") for found in _MARKED.finditer(text)]
    indented = [token.content for token in _markdown().parse(text) if token.type == "code_block"]
    parts = [*reversed(marked), *reversed(indented), *reversed(re.findall(r"`([^`\n]{5,1000})`", text))]
    return next((code for code in parts if _is_program(code)), None) or _between_prose(text, names)


def _in_json(text: str) -> str | None:
    """Return the program that JSON holds: a string, or the value of an object's key such as `code`."""
    text = text.strip()
    if text[:1] + text[-1:] not in ('""', "{}"):
        return None
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        named = [value[key] for key in value if key.casefold() in _CODE_KEYS]
        texts = [text for text in [*named, *value.values()] if isinstance(text, str)]
        value = next((text for text in texts if "```" in text or _is_program(text)), None)
    return value if isinstance(value, str) else None


def _between_prose(text: str, names: Collection[str]) -> str | None:
    """Return the longest run of lines that is Python: a program between sentences, without fences."""
    if len(text) > _LONGEST_UNFENCED:
        return None
    lines = text.split("\n")
    starts = [n for n, line in enumerate(lines) if _FIRST_LINE.match(line)]
    runs: list[str] = []
    after, to_parse = 0, 10 * _LONGEST_UNFENCED
    for start in starts[:_MOST_RUNS]:
        if start < after or to_parse < 0:
            continue
        end = len(lines)
        # The parser says at which line the text stops to be Python; the prose may have begun some lines before.
        for _ in range(_MOST_RUNS):
            run = "\n".join(lines[start:end])
            to_parse -= len(run)
            line = _error_line(run) if to_parse > 0 else 1
            if line is None:
                break
            end = min(end - 1, start + line - 1) if line > 1 else start
            if end <= start:
                break
        if end > start and _is_program(run):
            # "Done" after the code is a word, though it is Python too.
            last = parse(run).body[-1]
            if isinstance(last, ast.Expr) and isinstance(last.value, ast.Name):
                run = "\n".join(lines[start : start + last.lineno - 1])
            runs.append(run.rstrip() + "\n")
            after = end
    useful = [run for run in runs if not names or _defined(run) & set(names)]
    if not useful:
        return None
    return _choose(runs, names, False) if len(runs) > 1 and names else max(useful, key=len)


def _error_line(code: str) -> int | None:
    """Return the line of a text's first error, None where it is Python."""
    try:
        parse(code)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None


def code_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a text in order, those inside lists, quotes and indented code too."""
    blocks = _fences(text)
    if any(block.is_python for block in blocks):
        return blocks
    mended = _LATE_FENCE.sub(r"\n\1", text)
    if mended != text:
        return _fences(mended)
    lines = [Block("python", match[1] + "\n", True) for match in _LINE_OF_CODE.finditer(text)]
    return lines or blocks


def parses(code: str) -> bool:
    """Return whether a text is Python."""
    return try_parse(code) is not None


def goes_on(code: str) -> bool:
    """Return whether a text is the body of a function, for it returns outside of one, or no Python at all."""
    tree = try_parse(code)
    unseen: list[ast.AST] = [] if tree is None else list(tree.body)
    while unseen:
        node = unseen.pop()
        if isinstance(node, ast.Return):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            unseen += ast.iter_child_nodes(node)
    return tree is None


def _fences(text: str, depth: int = 0) -> list[Block]:
    blocks: list[Block] = []
    if "```" not in text and "~~~" not in text:
        return blocks
    lines = text.split("\n")
    end_of_block = 0
    for token in _markdown().parse(text):
        if token.map is None or token.map[0] < end_of_block:
            continue
        first, after = token.map
        if token.type == "code_block" and depth == 0:
            # Code that is indented too far for a fence to count; writers of lists mean one all the same.
            blocks += _fences(token.content, depth + 1)
        elif token.type == "fence":
            closing = lines[after - 1] if after - 1 > first else ""
            closed = bool(_FENCE_LINE.match(closing)) and closing.strip(" \t>").startswith(token.markup)
            block = Block(token.info, token.content, closed)
            if block.is_python and not parses(block.code):
                block, after = _extended(block, lines, after)
            end_of_block = after
            inner = _fences(token.content, depth + 1) if depth == 0 and _DOCUMENT.match(block.info) else []
            blocks += inner or [block]
    return blocks


def _extended(block: Block, lines: list[str], after: int) -> tuple[Block, int]:
    """Return the block up to the first later fence that makes it Python: a docstring may hold fences itself."""
    code = block.code
    if not block.closed:
        shorter = re.sub(r"`{3,}\s*$", "", code)
        return (Block(block.info, shorter, True) if parses(shorter) else block), after
    # Only an open string can go on behind a fence.
    if "triple-quoted" not in _syntax_error(code):
        return block, after
    tried = 0
    for line in range(after, len(lines)):
        if _ANY_FENCE.match(lines[line]) and tried < _FENCES_IN_DOCSTRINGS:
            tried += 1
            longer = code + "\n".join(lines[after - 1 : line]) + "\n"
            if parses(longer):
                return Block(block.info, longer, True), line + 1
    return block, after


def _syntax_error(code: str) -> str:
    try:
        parse(code)
    except UNREADABLE as error:
        return str(error)
    return ""


def _program_of(block: Block) -> str | None:
    """Return the code of a block as a program, or None where it is something else.

    A closed block that looks like code is a program even where it does not parse: its author handed it in.
    """
    code = block.code
    if not code.strip() or code.lstrip().startswith(">>> "):
        return None
    if parses(code):
        return code
    lines = [line for line in code.split("\n") if not _NOTEBOOK_LINE.match(line)]
    without = "\n".join(lines)
    if parses(without):
        return without if without.strip() else None
    if not block.is_python or not block.closed:
        return None
    return code if _CODE_WORD.search(without) else None


def _session_code(code: str) -> str | None:
    """Return what was typed in a session with `>>>`, where it defines something."""
    lines = code.split("\n")
    typed = "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")) or line in (">>>", "..."))
    tree = try_parse(typed) if typed.strip() else None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return typed if tree and any(isinstance(node, kinds) for node in tree.body) else None


def _choose(candidates: list[str], names: Collection[str], reads_input: bool) -> str:
    """Return the last candidate that serves the tests, with earlier ones whose names it uses before it."""
    defined = [_defined(code) for code in candidates]
    last = len(candidates) - 1
    if names:
        last = max((n for n, bound in enumerate(defined) if bound & set(names)), default=last)
    elif reads_input:
        whole = (n for n, code in enumerate(candidates) if _READS_INPUT.search(code) and _PRINTS.search(code))
        last = max(whole, default=last)
    parts, missing = [candidates[last]], _missing([candidates[last]])
    for n in range(last - 1, -1, -1):
        if missing & defined[n] and parses(candidates[n]):
            parts.insert(0, candidates[n])
            missing = _missing(parts)
    return "\n\n".join(parts)


def _is_program(code: str) -> bool:
    """Return whether a text is Python that does something: prose of one word and printed values parse too."""
    tree = try_parse(code)
    if tree is None:
        return False
    plain = (ast.Constant, ast.Name, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.UnaryOp, ast.BinOp, ast.Compare,
             ast.Attribute, ast.Subscript, ast.BoolOp)  # fmt: skip
    values = (node.value if isinstance(node, ast.Expr | ast.AnnAssign) else node for node in tree.body)
    return any(value is not None and not isinstance(value, plain) for value in values)


def _bound(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that some of the nodes bind."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
    return names


def _defined(code: str) -> set[str]:
    """Return the names that a program binds outside its functions and classes, and the methods of its classes."""
    tree = try_parse(code)
    if tree is None:
        return set(re.findall(r"^\s*(?:def|class)\s+(\w+)", code, re.MULTILINE))
    nodes: list[ast.AST] = []
    unseen: list[ast.AST] = list(tree.body)
    methods: set[str] = set()
    while unseen:
        node = unseen.pop()
        nodes.append(node)
        if isinstance(node, ast.ClassDef):
            methods |= {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            unseen += ast.iter_child_nodes(node)
    return _bound(nodes) | methods


def _missing(parts: list[str]) -> set[str]:
    """Return the names that programs read and none of them binds."""
    trees = [tree for code in parts if (tree := try_parse(code))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in nodes):
        return set()
    return read - _bound(nodes) - set(dir(builtins))
