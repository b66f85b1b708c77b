"""The report of a synthetic run, written once."""

from pathlib import Path
from typing import Any

import pytest

from bmjax.report.page import write_report
from tests.report.synthetic import synthetic_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    directory = tmp_path_factory.mktemp("run")
    report = synthetic_run(directory)
    path = write_report(directory, report)
    assert path == directory / "report.html"
    return directory, report, path.read_text(encoding="utf-8")
