"""What every test shares: an offline session, real data where it is at hand, and no silent skips of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before anything imports torch, transformers or huggingface_hub; subprocesses inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: one thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MKL_NUM_THREADS"] = "1"

DATA_VARIABLE = "ADAMERGING_DATA"


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread_per_worker() -> None:
    """Hold torch to one thread under xdist, also where it read the environment before we wrote it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; the test is skipped where the variable that names it is unset."""
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        pytest.skip(f"set {DATA_VARIABLE} to the folder with text/ and vision/ to run this test")
    root = Path(value).expanduser().resolve()
    if not root.is_dir():
        pytest.fail(f"{DATA_VARIABLE}={value} is no folder")
    return root


@pytest.fixture(scope="session")
def data_set(data_dir: Path) -> Callable[[str], Path]:
    """`data_set("text/trec")`: that set's folder; a set that is missing fails, it never skips."""

    def find(name: str) -> Path:
        folder = data_dir / name
        if not folder.is_dir():
            pytest.fail(f"{DATA_VARIABLE}={data_dir} has no {name}/")
        return folder

    return find


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT in `base` and its experts `sst2`, `trec` and `agnews`. Read only."""
    from models import as_sentence_encoder, save_bert, save_expert

    root = tmp_path_factory.mktemp("family")
    base = save_bert(root / "base")
    as_sentence_encoder(base)
    for seed, name in enumerate(("sst2", "trec", "agnews"), 1):
        save_expert(root / name, base, seed, labels=1 + seed)
    return root


@dataclass(frozen=True)
class Ended:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """`cli("merge", base, ...)`: the console script in this process."""
    from adamerging.cli import main

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["adamerging", *map(str, arguments)])
        monkeypatch.delenv("COLUMNS", raising=False)  # set by xdist
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def _skips_for_data(session: pytest.Session) -> list[str]:
    """Ids of the tests that were skipped with a reason that names the data variable."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # an xdist worker: the controller has every report
        return []
    return [r.nodeid for r in reporter.stats.get("skipped", []) if DATA_VARIABLE in str(r.longrepr)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With the variable set, a test that skipped for want of data fails the session."""
    if os.environ.get(DATA_VARIABLE) and _skips_for_data(session):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why the session failed although no test did."""
    session = terminalreporter._session
    if os.environ.get(DATA_VARIABLE) and session is not None and (skipped := _skips_for_data(session)):
        terminalreporter.section("skipped although the data is set", red=True)
        terminalreporter.write_line(f"{DATA_VARIABLE} is set, yet these skipped for want of data:", red=True)
        for nodeid in skipped:
            terminalreporter.write_line(f"  {nodeid}")
