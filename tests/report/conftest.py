"""One realistic run, saved and drawn once for all tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample import make_run, save_run

from adamerging.report.load import Run, load_run
from adamerging.report.page import Page, make_page


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run. Read only."""
    return save_run(tmp_path_factory.mktemp("report") / "run", make_run(2))


@pytest.fixture(scope="session")
def run(run_folder: Path) -> Run:
    return load_run(run_folder)


@pytest.fixture(scope="session")
def page(run: Run) -> Page:
    return make_page(run)
