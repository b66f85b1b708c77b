"""The process of the program: limits, streams, and what runs in it. Never returns to the server.

A program that reads stdin runs as `__main__`, as a user would start it. One whose functions are called runs as the
module `solution`, so that its main block stays out of the way. Its tests are a module apart, with built-ins from
before the program, and write a random token after the last test. The token waits in a pipe until then: no exit, however
early, and no output can stand for it. A program written against this very file could still read that pipe.
"""

import ast
import atexit
import builtins
import contextlib
import gc
import importlib.util
import json
import os
import resource
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmjax.teach.judges.sandbox import isolate

PROCESSES = 64
STACK_BYTES = 120 * 2**20  # what the kernel leaves free below the main thread's stack
ADDRESS_SPACE_BEYOND_MEMORY = 2**30  # libraries and the stacks of threads map more than they use
READY = b"ready\n"  # what a report begins with: what follows is the program's doing
TOKEN_BYTES = 32
_MODULE, _TESTS_MODULE = "solution", "test_solution"
_STREAMS = (("stdin", "r", "surrogateescape"), ("stdout", "w", "surrogateescape"), ("stderr", "w", "backslashreplace"))
# What sites for contests import before a solution that is called: LeetCode's answers rely on it.
_CONTEST_IMPORTS = """
import bisect, collections, copy, functools, heapq, itertools, json, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, floor, gcd, inf, log, log2, log10, perm, pi, sqrt
from typing import *
"""


def prepare(job: dict[str, Any], descriptors: list[int], folder: str, user: int | None, path: list[str]) -> Any:
    """Turn this forked process into the job's; return a function that runs it.

    Arguments:
        job: see `client.Job`.
        descriptors: of stdin, stdout, stderr, the report and the token.
        folder: the current folder of the program.
        user: see `isolate.unprivileged_user`.
        path: the interpreter's own `sys.path`.
    """
    os.setsid()
    os.chdir(folder)
    Path("main.py").write_text(job["source"], encoding="utf-8", errors="replace")
    os.chmod("main.py", 0o644)
    # 0, 1 and 2 are the program's streams, 3 and 4 the report and the token; nothing else stays open.
    high = [os.dup2(descriptor, 100 + n) for n, descriptor in enumerate(descriptors)]
    for n, descriptor in enumerate(high):
        os.dup2(descriptor, n, inheritable=n < 3)
    os.closerange(5, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 2**16 else 2**16)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())

    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, int(job["seconds"] * job["parts"]) + 2)
    _limit(resource.RLIMIT_AS, job["memory_bytes"] + ADDRESS_SPACE_BEYOND_MEMORY)
    _limit(resource.RLIMIT_FSIZE, job["output_bytes"])
    _limit(resource.RLIMIT_NOFILE, 256)
    _limit(resource.RLIMIT_NPROC, PROCESSES + job["other_tasks"])
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    isolate.drop_rights(user)
    isolate.die_with_parent(signal.SIGKILL)  # a change of user would have undone it

    os.environ.update(HOME=folder, TMPDIR=folder)
    sys.path[:] = [folder, *path]
    sys.argv[:] = ["main.py", *job["arguments"]]
    # Streams anew: those of the server remember what its descriptors were.
    for descriptor, (name, mode, errors) in enumerate(_STREAMS):
        buffering = 1 if name == "stderr" else -1
        stream = open(descriptor, mode, buffering, "utf-8", errors, "\n", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    run: dict[str, Callable[[], Any]] = {
        "stream": lambda: _module(job, "__main__", folder),
        "asserts": lambda: _run_tests(job, folder),
        "calls": lambda: _run_calls(job, folder),
    }
    for name, text in job["files"].items():
        Path(name).write_text(text, encoding="utf-8", errors="surrogateescape")
    os.write(3, READY)
    if job["kind"] == "stream":
        os.closerange(3, 5)
    return lambda: _run_to_end(run[job["kind"]])


def _run_to_end(run: Callable[[], Any]) -> None:
    """Run the program and end the process as Python ends.

    Taking the interpreter apart costs more than most programs. So its parts that a program can notice are done here:
    threads are joined, exit functions run, files flushed that nobody closed.
    """
    leave, code = os._exit, 0
    try:
        run()
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        code = error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:
            code = 120
    with contextlib.suppress(BaseException):
        names = vars(sys.modules["__main__"])
        names.update(dict.fromkeys(names.keys() - {"__builtins__"}))
        gc.collect()
        sys.__stdout__.flush()  # type: ignore[union-attr]
    leave(code)


def _limit(kind: int, value: int) -> None:
    """Set both limits, or what is left of them: no one may raise a hard limit, and some systems lack a kind."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, value))


def _module(job: dict[str, Any], name: str, folder: str, preamble: str = "") -> types.ModuleType:
    """Run the program as a module of this name and return it."""
    module = types.ModuleType(name)
    module.__file__ = os.path.join(folder, "main.py")
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    if preamble:
        exec(compile(preamble, "preamble.py", "exec"), module.__dict__)
    exec(compile(job["source"], module.__file__, "exec"), module.__dict__)
    return module


def _solution(job: dict[str, Any], folder: str, preamble: str) -> dict[str, Any]:
    """Run the program as a module to call, and return its names.

    A program that exits, or asks for input, at its end has defined its functions before.
    """
    with contextlib.suppress(SystemExit, EOFError):
        _module(job, _MODULE, folder, preamble)
    return sys.modules[_MODULE].__dict__


class _Report:
    """Lines for the supervisor, who sees that the job goes on, and for the client."""

    def __init__(self) -> None:
        self.process, self.write, self.read, self.dumps = os.getpid(), os.write, os.read, json.dumps
        self.getpid, self.leave = os.getpid, os._exit

    def line(self, **values: Any) -> None:
        if self.getpid() == self.process:
            self.write(3, self.dumps(values).encode() + b"\n")

    def token(self) -> None:
        if self.getpid() == self.process:
            self.write(3, self.read(4, TOKEN_BYTES))


def _describe(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


# Programs that are tested with asserts


def _run_tests(job: dict[str, Any], folder: str) -> None:
    # All that decides is made ready before the program runs, which may replace whatever it can name.
    report, pristine, execute = _Report(), dict(vars(builtins)), exec
    trees = [ast.parse(text) for text in job["tests"]]
    entry_point = job["entry_point"]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)} | {entry_point}
    codes = [compile(ast.fix_missing_locations(_Comparisons().visit(tree)), "tests.py", "exec") for tree in trees]

    # A class for a contest's site relies on what the site imports.
    for_contest = "class Solution" in job["source"] and "Solution" not in used
    names = _solution(job, folder, job["preamble"] + (_CONTEST_IMPORTS if for_contest else ""))
    names.update(_methods(names, used))
    # The tests see the program's names, but its versions of built-ins only where they are what is tested.
    tested = {name for name in used & names.keys() if name not in pristine}
    hidden = {name for name in names if name in pristine and name != entry_point} if tested else set()
    module = types.ModuleType(_TESTS_MODULE)
    sys.modules[_TESTS_MODULE] = module
    scope = module.__dict__
    scope.update({name: value for name, value in names.items() if name not in hidden})
    scope.update(__builtins__=pristine, __name__=_TESTS_MODULE, __equal__=_equality(names, used))

    for number, (tree, code) in enumerate(zip(trees, codes, strict=True)):
        try:
            if missing := _missing_module(tree, names):
                report.line(missing=missing)
                report.leave(1)
            execute(code, scope)
            _call_test_functions(tree, scope, entry_point)
        except BaseException as error:
            report.line(failed=number, error=_describe(error))
            raise
        # Names that a test defines are the program's too, as if both were one file.
        names.update({name: value for name, value in scope.items() if name not in names and name not in pristine})
        report.line(passed=number)
    report.token()
    report.leave(0)


def _methods(names: dict[str, Any], used: set[str | None]) -> dict[str, Any]:
    """Return what tests call by its name and only the contest's class `Solution` defines, each call on a new object."""

    owner = names.get("Solution")
    if not isinstance(owner, type):
        return {}

    def of_class(name: str, owner: type = owner) -> Callable[..., Any]:
        return lambda *arguments, **keywords: getattr(owner(), name)(*arguments, **keywords)

    defined_here = {name for name, value in names.items() if getattr(value, "__module__", None) == _MODULE}
    missing = {name for name in used if name and name not in defined_here and not hasattr(builtins, name)}
    return {name: of_class(name) for name in missing if callable(getattr(owner, name, None))}


def _call_test_functions(tree: ast.Module, scope: dict[str, Any], entry_point: str | None) -> None:
    """Call what a test only defines: check(candidate), test functions, and cases of unittest."""
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name not in called:
            if node.name == "check":
                scope["check"](eval(entry_point or "", scope))
            elif node.name.startswith("test"):
                scope[node.name]()
        elif isinstance(node, ast.ClassDef):
            import unittest

            if issubclass(scope[node.name], unittest.TestCase):
                suite = unittest.defaultTestLoader.loadTestsFromTestCase(scope[node.name])
                result = suite.run(unittest.TestResult())
                if not result.wasSuccessful() or not result.testsRun:
                    problems = [text for _, text in result.errors + result.failures]
                    raise AssertionError(problems[0].strip().splitlines()[-1] if problems else "no test ran")


def _missing_module(tree: ast.Module, names: dict[str, Any]) -> str | None:
    """Return a module that a test imports and nobody has.

    `from solution import f`, whatever a test calls that file, imports the program.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules, wanted = [alias.name for alias in node.names], None
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules, wanted = [node.module], {alias.name for alias in node.names} - {"*"}
        else:
            continue
        for name in (module.partition(".")[0] for module in modules):
            if name in sys.modules or importlib.util.find_spec(name) is not None:
                continue
            if wanted is None or not wanted <= names.keys():
                return name
            sys.modules[name] = sys.modules[_MODULE]
    return None


class _Comparisons(ast.NodeTransformer):
    """Writes `a == b` as `__equal__(a, b)`, and `a != b` as its opposite."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
            return node
        call = ast.Call(ast.Name("__equal__", ast.Load()), [node.left, node.comparators[0]], [])
        equal = isinstance(node.ops[0], ast.Eq)
        return ast.copy_location(call if equal else ast.UnaryOp(ast.Not(), call), node)


def _equality(names: dict[str, Any], used: set[str]) -> Callable[[Any, Any], Any]:
    """Return the equality of tests: a class of the program that says it equals everything equals no plain value.

    names: of the program. used: names in the tests; a class that they name may compare as it likes.
    """

    def defined_here(value: Any, depth: int = 0) -> bool:
        kind = type(value)
        if kind in (list, tuple, set, frozenset, deque) and depth < 4 and len(value) < 10_000:
            return any(defined_here(element, depth + 1) for element in value)
        if kind is dict and depth < 4 and len(value) < 10_000:
            return any(defined_here(element, depth + 1) for pair in value.items() for element in pair)
        method = kind.__eq__
        is_own = isinstance(method, types.FunctionType) and method.__globals__ is names
        return is_own and kind.__name__ not in used

    def equal(left: Any, right: Any) -> Any:
        return defined_here(left) == defined_here(right) and left == right

    return equal


# Programs of which a function is called


def _run_calls(job: dict[str, Any], folder: str) -> None:
    report = _Report()
    names = _solution(job, folder, _CONTEST_IMPORTS)
    name, owner = job["name"], names.get("Solution")
    # The function may stand alone or be a method of the contest's class, whose every call gets an object of its own.
    of_class = isinstance(owner, type) and hasattr(owner, name)
    if not of_class and not callable(names.get(name)):
        report.line(failed=0, error=f"the program defines no '{name}'")
        sys.exit(1)
    for number, case in enumerate(job["cases"]):
        try:
            function = getattr(owner(), name) if of_class and owner is not None else names[name]
            value = function(**case) if isinstance(case, dict) else function(*case)
            report.line(value=_plain(value))
        except BaseException as error:
            report.line(failed=number, error=_describe(error))
            raise
    report.leave(0)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: sequences as lists, numbers of numpy as Python's."""
    if isinstance(value, list | tuple | deque | range | types.GeneratorType | map | filter | zip):
        return [_plain(element) for element in value]
    if isinstance(value, dict):
        return {key if isinstance(key, str) else json.dumps(_plain(key)): _plain(item) for key, item in value.items()}
    if type(value).__module__ == "numpy":
        return _plain(value.tolist())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the function returns a {type(value).__name__}")
