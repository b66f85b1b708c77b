"""Reads the tests of a program from a reference, in the shapes in which data sets have them.

    asserts      a list of lines, or one text: MBPP's test_list with test_setup_code and test_imports, HumanEval's
                 test with entry_point and prompt, functions `test_*`, unittest's cases
    streams      {input, output}, {inputs: [...], outputs: [...]}, texts or lists of lines: APPS, TACO, Codeforces;
                 public_tests, private_tests and generated_tests of CodeContests
    calls        the same with fn_name, or func_name in metadata: arguments as a list, a mapping, or lines of JSON

A list holds any of them, as do keys such as `tests`, `test_cases` or `input_output`. All of it may be JSON text. Beside
the tests: `seconds` (or time_limit, timeout) of CPU for each, `memory_mib` (or memory_limit), `tolerance`, `checker`.
"""

import ast
import builtins
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bmjax.config import UserError, nearest
from bmjax.teach.judges.python_source import UNREADABLE, literal, parse, try_parse

_CONTAINERS = (
    "tests", "test", "test_list", "test_cases", "testcases", "unit_tests", "input_output", "public_tests",
    "private_tests", "generated_tests", "public_test_cases", "private_test_cases", "official_tests",
    "verification_info",
)  # fmt: skip
_MANY_PAIRS = {"public_tests", "private_tests", "generated_tests"}  # {input: [...], output: [...]} are many there
_INPUTS, _OUTPUTS = ("inputs", "input", "stdin"), ("outputs", "output", "expected_output", "stdout", "expected")
_NAMES = ("fn_name", "func_name", "function_name", "method_name")
_SETUPS = ("test_imports", "test_setup_code", "setup_code")
_PROMPTS = ("prompt", "starter_code")
_SECONDS = (
    "seconds", "time_limit", "timeout", "cpu_seconds", "time_limit_seconds", "time_limit_s", "timeout_seconds",
    "time_limit_ms", "timeout_ms",
)  # fmt: skip
_MEMORY = ("memory_mib", "memory_mb", "memory_limit", "memory_limit_mb", "memory_limit_bytes")
_TOLERANCES = (
    "tolerance", "abs_tolerance", "rel_tolerance", "absolute_tolerance", "relative_tolerance", "abs_tol", "rel_tol",
    "epsilon", "eps",
)  # fmt: skip
_CHECKERS = ("checker", "generated_checker")
_LIMITS = (*_SECONDS, *_MEMORY, *_TOLERANCES, *_CHECKERS)
_STANDARD_CHECKERS = {"", "exact", "diff", "lines", "tokens", "standard", "default", "lcmp", "wcmp", "ncmp", "fcmp"}
_ANY_CASE_CHECKERS = {"yesno", "nyesno", "ignore_case", "case_insensitive"}
_ROLES = {
    "input.txt": ("input", "inp", "stdin", "input_data", "input_text", "test_input"),
    "correct_output.txt": ("expected", "correct", "reference", "answer", "expected_output", "correct_output", "gold"),
    "solution_output.txt": ("output", "actual", "printed", "stdout", "solution_output", "got", "participant_output"),
}
_EXPECTED = "expected asserts, {input, output}, {inputs: [...], outputs: [...]} or a list of these"


@dataclass(frozen=True)
class Stream:
    """What a program reads, and what it has to print."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class Call:
    """Arguments of a function, by position or by name, and what it may return: any of `expected`."""

    arguments: list[Any] | dict[str, Any]
    expected: tuple[Any, ...]


@dataclass
class Suite:
    """All tests of one program, and what holds for them.

    setup, asserts: Python that runs after the program. preamble: what the problem's prompt defines before it asks.
    prompt: the prompt as it stands. entry_point: what `check(candidate)` is called with. name: what the calls call.
    checker: a program that decides about an output, run with the paths of input, expected and printed text.
    """

    streams: list[Stream] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    asserts: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    name: str = ""
    entry_point: str | None = None
    prompt: str = ""
    preamble: str = ""
    seconds: float | None = None
    memory_mib: float | None = None
    tolerance: float | None = None
    ignore_case: bool = False
    checker: str | None = None
    functional: bool = False

    @property
    def count(self) -> int:
        return len(self.streams) + len(self.calls) + len(self.asserts)

    @property
    def names(self) -> set[str]:
        """What the tests use of a program."""
        names = {self.name, "Solution"} if self.calls else set()
        for text in [self.entry_point] if self.entry_point else self.asserts:
            nodes = [node for node in ast.walk(parse(text)) if isinstance(node, ast.Name)]
            names |= {node.id for node in nodes} - {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
        return names - set(dir(builtins))


def has_tests(reference: Any) -> bool:
    """Return whether a reference has the shape of a program's tests, readable or not."""
    value = _from_json(reference) if isinstance(reference, str) else reference
    if isinstance(value, Mapping):
        return any(key in value for key in _CONTAINERS) or _is_pair(value)
    if isinstance(value, list):
        return bool(value) and all(
            (isinstance(test, Mapping) and has_tests(test)) or (isinstance(test, str) and _asserts_something(test))
            for test in value
        )
    return isinstance(value, str) and _asserts_something(value)


def read_tests(reference: Any) -> Suite:
    """Return the tests of a reference. Raises UserError where their shape is none that can be run."""
    suite = Suite()
    value = _from_json(reference) if isinstance(reference, str) else reference
    _read(value, suite, "reference")
    suite.preamble = _before_entry(suite)
    defines_check = any(re.search(r"^def check\(", text, re.MULTILINE) for text in suite.asserts)
    if defines_check and suite.entry_point is None:
        called = any(re.search(r"^check\(", text, re.MULTILINE) for text in suite.asserts)
        suite.entry_point = _last_function(suite.prompt)
        if suite.entry_point is None and not called:
            raise UserError(
                "reference: found check(candidate) without 'entry_point', expected the function's name there"
            )
    return suite


def _read(value: Any, suite: Suite, key: str, many_pairs: bool = False) -> None:
    """Add the tests of one value to the suite."""
    if isinstance(value, str):
        parsed = _from_json(value)
        if not isinstance(parsed, str):
            _read(parsed, suite, key, many_pairs)
        elif value.strip():
            suite.asserts.append(_python(value, key))
    elif isinstance(value, Mapping):
        _read_settings(value, suite)
        containers = [name for name in _CONTAINERS if value.get(name)]
        if _is_pair(value):
            _read_pairs(value, suite, key, many_pairs)
        for name in containers:
            _read(value[name], suite, name, name in _MANY_PAIRS)
        if not _is_pair(value) and not any(name in value for name in _CONTAINERS):
            raise UserError(f"{key}: found keys {sorted(map(str, value))[:6]}, {_EXPECTED}")
    elif isinstance(value, list | tuple):
        for test in value:
            _read(test, suite, key)
    elif value is not None:
        raise UserError(f"{key}: found {type(value).__name__} {str(value)[:40]!r}, {_EXPECTED}")


def _read_settings(value: Mapping[str, Any], suite: Suite) -> None:
    """Read what stands beside tests: names, setup, limits, the checker."""
    metadata = value.get("metadata")
    metadata = _from_json(metadata) if isinstance(metadata, str) else metadata
    for source in (value, metadata if isinstance(metadata, Mapping) else {}):
        suite.name = next((str(source[key]) for key in _NAMES if source.get(key)), suite.name)
    suite.entry_point = value.get("entry_point") or suite.entry_point
    if suite.entry_point is not None and not _parses(suite.entry_point):
        raise UserError(f"entry_point: found {suite.entry_point!r}, expected the name of a function")
    for key in _SETUPS:
        texts = value.get(key) or []
        suite.setup += [_python(text, key, False) for text in ([texts] if isinstance(texts, str) else texts) if text]
    suite.prompt = next((str(value[key]) for key in _PROMPTS if value.get(key)), suite.prompt)
    kind = str(value.get("testtype") or value.get("type") or "").lower()
    suite.functional = suite.functional or kind in ("functional", "function_call", "call", "call_based", "function")
    if str(value.get("input_mode") or "stdio") not in ("stdio", "stdin"):
        raise UserError(f"input_mode: found {value['input_mode']!r}, expected stdio")

    for key in value:
        # A row has many keys. A number under a name that is nearly a limit's is a slip.
        hint = nearest(str(key), list(_LIMITS)) if key not in _LIMITS and isinstance(value[key], int | float) else ""
        if "did you mean" in hint:
            raise UserError(f"reference: unknown key '{key}'{hint}")
    for key in _SECONDS:
        if value.get(key) is not None:
            seconds = _amount(
                value[key], key, {"ms": 1e-3, "milli": 1e-3, "min": 60.0}, 1e-3 if key.endswith("ms") else 1.0
            )
            suite.seconds = max(seconds, suite.seconds or 0.0)
    for key in _MEMORY:
        if value.get(key):
            unit = 2.0**-20 if key.endswith("bytes") else 1.0
            memory = _amount(value[key], key, {"g": 1024.0, "k": 1 / 1024, "byte": 2.0**-20}, unit)
            suite.memory_mib = memory if memory < 2**20 else memory / 2**20  # a limit in bytes, whatever the key
    for key in _TOLERANCES:
        if value.get(key) is not None:
            suite.tolerance = _amount(value[key], key, {}, 1.0)
    for key in _CHECKERS:
        if value.get(key) is not None:
            _read_checker(value[key], suite, key)


def _read_checker(value: Any, suite: Suite, key: str) -> None:
    """Read how outputs are compared: within a tolerance, in any case, or by a program of its own."""
    if isinstance(value, Mapping):
        source = next((value[name] for name in ("source", "code", "program") if value.get(name)), None)
        name = next((value[name] for name in ("type", "name", "kind") if value.get(name)), "")
        tolerance = next((value[name] for name in _TOLERANCES if value.get(name) is not None), None)
        if tolerance is not None:
            suite.tolerance = _amount(tolerance, key, {}, 1.0)
        elif source or name:
            _read_checker(source or name, suite, key)
        else:
            raise UserError(f"{key}: found keys {sorted(map(str, value))[:6]}, expected 'tolerance' or 'source'")
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        suite.tolerance = _amount(value, key, {}, 1.0)
        return
    text = str(value).strip()
    word = text.lower()
    testlib = re.fullmatch(r"rcmp(\d+)", word)
    number = re.search(r"(?:tol\w*|float\w*|eps\w*|abs\w*|rel\w*)\W+(\d+(?:\.\d+)?(?:e-?\d+)?)$", word)
    if testlib:
        suite.tolerance = 10.0 ** -int(testlib[1])
    elif number:
        suite.tolerance = _amount(number[1], key, {}, 1.0)
    elif word in _ANY_CASE_CHECKERS:
        suite.ignore_case = True
    elif word not in _STANDARD_CHECKERS:
        suite.checker = _checker_program(text, key)


def _checker_program(text: str, key: str) -> str:
    """Return a checker's source; where it only defines a function, with a call of it."""
    tree = try_parse(text)
    code = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    if tree is None or not any(isinstance(node, code) for node in tree.body):
        raise UserError(f"{key}: found {text[:60]!r}, expected a tolerance or a Python program")
    last = tree.body[-1]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check")]
    if not functions or not isinstance(last, ast.FunctionDef | ast.Import | ast.ImportFrom | ast.Assign):
        return text
    parameters = [argument.arg for argument in functions[-1].args.args]
    files = [next((file for file, names in _ROLES.items() if name in names), None) for name in parameters]
    if None in files or not files:
        raise UserError(
            f"{key}: found {functions[-1].name}({', '.join(parameters)}), expected (input, expected, output)"
        )
    texts = ", ".join(f"open({file!r}).read()" for file in files)
    return f"{text}\n\nprint(int(bool({functions[-1].name}({texts}))))\n"


def _is_pair(value: Mapping[str, Any]) -> bool:
    return any(key in value for key in _INPUTS) and any(key in value for key in _OUTPUTS)


def _read_pairs(value: Mapping[str, Any], suite: Suite, key: str, many_pairs: bool) -> None:
    """Read {input, output}, {inputs, outputs} and their kin."""
    left, right = next(name for name in _INPUTS if name in value), next(name for name in _OUTPUTS if name in value)
    many = many_pairs or left == "inputs" or right == "outputs"
    inputs, outputs = value[left], value[right]
    if many and isinstance(inputs, str) and isinstance(outputs, str):
        inputs, outputs = _from_json(inputs), _from_json(outputs)
    if not many:
        inputs, outputs = [inputs], [outputs]
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple) or len(inputs) != len(outputs):
        sizes = [len(side) if isinstance(side, list | tuple) else type(side).__name__ for side in (inputs, outputs)]
        raise UserError(f"{key}: found {sizes[0]} {left} and {sizes[1]} {right}, expected two lists of the same length")
    if suite.functional and not suite.name:
        suite.name = _last_function(suite.prompt) or ""
        if not suite.name:
            raise UserError(f"{key}: found tests that call a function, expected its name in 'fn_name'")
    kind = str(value.get("testtype") or value.get("type") or "").lower()
    if suite.name and not kind.startswith("std"):
        # Some data sets wrap every result in a list of one.
        wrapped = many and all(isinstance(output, list) and len(output) == 1 for output in outputs)
        suite.calls += [_call(a, b, wrapped, key) for a, b in zip(inputs, outputs, strict=True)]
    else:
        suite.streams += [Stream(_lines(a, left), _lines(b, right)) for a, b in zip(inputs, outputs, strict=True)]


def _call(arguments: Any, output: Any, wrapped: bool, key: str) -> Call:
    """Read one call: arguments as a list, a mapping, or text with one argument in JSON a line."""
    expected: tuple[Any, ...] = (output, output[0]) if wrapped else (output,)
    if isinstance(arguments, str):
        try:
            arguments = [json.loads(line) for line in arguments.split("\n") if line.strip()]
        except ValueError:
            raise UserError(f"{key}: found arguments {arguments[:60]!r}, expected one in JSON a line") from None
        if isinstance(output, str):
            parsed = _from_json_any(output)
            expected = (parsed,) if parsed is not None or output.strip() == "null" else (output,)
    elif isinstance(output, str) and (parsed := _from_json_any(output)) is not None and not isinstance(parsed, str):
        expected = (*expected, parsed)
    if not isinstance(arguments, list | tuple | dict):
        raise UserError(f"{key}: found arguments {str(arguments)[:60]!r}, expected a list of them")
    return Call(arguments if isinstance(arguments, dict) else list(arguments), expected)


def _lines(value: Any, key: str) -> str:
    """Return the text of a stream: as it is, or its lines joined."""
    if isinstance(value, list | tuple):
        return "\n".join(_words(line, key) for line in value)
    return "" if value is None else _words(value, key)


def _words(value: Any, key: str) -> str:
    if isinstance(value, list | tuple) and all(isinstance(word, str | int | float) for word in value):
        return " ".join(map(str, value))
    if not isinstance(value, str | int | float):
        raise UserError(f"{key}: found {type(value).__name__} {str(value)[:40]!r}, expected text or lines of text")
    return str(value).replace("\r\n", "\n")


def _python(text: str, key: str, asserting: bool = True) -> str:
    """Return Python that tests something, ready to run."""
    text = text.replace("\r\n", "\n")
    if try_parse(text) is None:
        raise UserError(f"{key}: found {text.strip()[:60]!r}, which is neither Python nor JSON, {_EXPECTED}")
    if asserting and not _asserts_something(text, by_calls=True):
        raise UserError(f"{key}: found {text.strip()[:60]!r}, which asserts nothing, {_EXPECTED}")
    return text


def _asserts_something(text: str, by_calls: bool = False) -> bool:
    """Return whether a text is Python that can fail: by an assertion or, where that is enough, by a call of a check."""
    if not re.search("assert|check", text, re.IGNORECASE):
        return False
    tree = try_parse(text.replace("\r\n", "\n"))
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Raise) and node.exc is not None and "AssertionError" in ast.unparse(node.exc):
            return True
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name.startswith("assert") or (by_calls and name.startswith("check")):
                return True
    return False


def _before_entry(suite: Suite) -> str:
    """Return what the prompt defines before the function it asks for: imports and helpers that tests rely on."""
    tree = _parse_prompt(suite.prompt)
    if tree is None:
        return ""
    ends = [n for n, node in enumerate(tree.body) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return ast.unparse(ast.Module(tree.body[: ends[-1] if ends else len(tree.body)], []))


def _last_function(prompt: str) -> str | None:
    """Return the name of the last function of a prompt: of its last class, where it ends in one."""
    tree = _parse_prompt(prompt)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] if tree else []
    return max(functions, key=lambda node: node.lineno).name if functions else None


def _parse_prompt(prompt: str) -> ast.Module | None:
    text = prompt.replace("\r\n", "\n").rstrip()
    return next((tree for end in ("", "\n    pass", "\n        pass") if (tree := try_parse(text + end))), None)


def _parses(text: Any) -> bool:
    return isinstance(text, str) and try_parse(text) is not None


def _from_json(text: str) -> Any:
    """Return what JSON text, or Python's own way to write it, holds; the text itself where it is neither."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return literal(text)
    except UNREADABLE:
        return text


def _from_json_any(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _amount(value: Any, key: str, units: Mapping[str, float], unit: float) -> float:
    """Return a number above 0, in the key's unit: 2, "2 seconds", {"seconds": 2, "nanos": 0}."""
    number: float | None = None
    if isinstance(value, Mapping) and "seconds" in value:
        number = float(value["seconds"] or 0) + float(value.get("nanos") or 0) * 1e-9
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) * unit
    elif isinstance(value, str) and (
        match := re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]-?\d+)?)\s*([A-Za-z]*)\s*", value)
    ):
        unit = next((factor for name, factor in units.items() if match[2].lower().startswith(name)), unit)
        number = float(match[1]) * unit
    if number is None or not 0 < number < float("inf"):
        raise UserError(f"{key}: found {str(value)[:40]!r}, expected a number above 0")
    return number
