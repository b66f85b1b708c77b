"""`bmjax demo`: writes problems as JSONL and a tokenizer, serves a teacher on this machine, and calls `bmjax run`.

The run gets a config of public keys only: files of rows, a tokenizer's directory and an endpoint's URL.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bmjax.config import read_yaml
from bmjax.demo.problems import make_problems, solve
from bmjax.demo.settings import DemoSettings, ProblemSettings
from bmjax.demo.teacher import MODEL, DemoTeacher
from bmjax.demo.tokenizer import train_tokenizer
from bmjax.io.jsonl import write_jsonl
from bmjax.log import Log, write_line
from bmjax.pipeline.phases import run
from bmjax.pipeline.settings import RunSettings
from bmjax.pipeline.stages import Stage, Stages

CONFIG = Path(__file__).with_name("demo.yaml")
OUTPUT = "runs/demo"
# A letter in the demo's mathematics is no choice, and what a program prints is text.
_JUDGES = {"math": {"judge": "math"}, "code": {"judge": "exact"}}


def run_demo(
    output: str | Path | None = None, overrides: Sequence[str] = (), log: Log = write_line, config: str | Path = CONFIG
) -> dict[str, Any]:
    """Run, or continue, the demo.

    Arguments:
        output: the run's directory; default: the config's, else runs/demo.
        overrides: `key.sub=value`, of the demo's keys and of those of `bmjax run`.
        log: gets a line for every stage and remark.
        config: YAML with keys of both kinds.

    Returns: the content of report.json.
    Raises: UserError for a wrong key or value.
    """
    values = read_yaml(config)
    keys = DemoSettings.model_fields.keys()
    for_demo = [o for o in overrides if o.partition("=")[0].strip().split(".")[0] in keys]
    demo = DemoSettings.read({key: values.pop(key) for key in keys & values.keys()}, for_demo)
    output = output or next((o.partition("=")[2] for o in overrides if o.startswith("output=")), None)
    directory = Path(output or values.get("output") or OUTPUT)
    files = directory / "demo"
    values["model"] = {"tokenizer": str(files / "tokenizer")} | values["model"]
    rows = ("problems", "backbone", "validation", "test")
    values["domains"] = {
        domain: {name: {"data": str(files / domain / f"{name}.jsonl")} for name in rows} | _JUDGES.get(domain, {})
        for domain in demo.problems
    }
    with DemoTeacher() as teacher:
        endpoint = {"base_url": teacher.base_url, "model": MODEL, "extra": {"mistakes": demo.mistakes.model_dump()}}
        values["teacher"] = endpoint | values.get("teacher", {})
        settings = RunSettings.read(values, [o for o in overrides if o not in for_demo])
        return run(settings, directory, log, partial(write_inputs, demo, settings.seed, directory, log))


def write_inputs(demo: DemoSettings, seed: int, directory: Path, log: Log) -> None:
    """Write DIR/demo: every domain's rows, and the tokenizer trained on the backbone's. What is there already stays."""
    stages, files = Stages(directory, log), directory / "demo"
    for name, settings in demo.problems.items():
        inputs: partial[list[Any]] = partial(list, [settings.model_dump(), seed])
        work = partial(write_problems, name, settings, files / name, seed)
        stages.run(Stage(f"demo/{name}", inputs, (), (f"demo/{name}",), work))

    def write_tokenizer() -> None:
        rows = [files / name / "backbone.jsonl" for name in demo.problems]
        train_tokenizer(rows, demo.vocab_size).save_pretrained(str(files / "tokenizer"))

    after = tuple(f"demo/{name}" for name in demo.problems)
    stages.run(Stage("demo/tokenizer", lambda: demo.vocab_size, after, ("demo/tokenizer",), write_tokenizer))


def write_problems(domain: str, settings: ProblemSettings, folder: Path, seed: int) -> None:
    """Write a domain's rows. The splits never share a prompt; the backbone's problems are not asked again."""
    backbone = make_problems(domain, settings.backbone_count, seed, settings.backbone_levels)
    known = {problem.prompt for problem in backbone}
    asked = make_problems(domain, settings.count, seed + 1, settings.levels, exclude=known)
    validation = make_problems(domain, settings.validation, seed, settings.levels, split="val")
    test = make_problems(domain, settings.test, seed, settings.levels, split="test")
    write_jsonl(folder / "problems.jsonl", map(asdict, asked))
    for name, problems in (("backbone", backbone), ("validation", validation), ("test", test)):
        solved = ((problem, solve(problem.prompt)) for problem in problems)
        rows = (
            {"prompt": p.prompt, "reference": p.reference, "reasoning": s.reasoning, "response": s.answer}
            for p, s in solved
        )
        write_jsonl(folder / f"{name}.jsonl", rows)
