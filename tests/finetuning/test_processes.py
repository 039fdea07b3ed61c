"""Trainings in processes of their own: what they say, and how they end."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adamerging.errors import AdamergingError, MissingExtraError, PlanError, UsageError
from adamerging.finetuning.processes import Say, in_processes
from interrupts import hear_interrupts


def work(say: Say, folder: Path, name: str) -> None:
    say(name, f"{torch.get_num_threads()} threads")
    (folder / f".{name}").write_text(str(os.getpid()))
    (folder / f".{name}").rename(folder / name)  # whole or not there: it may be ended at any time
    for _ in range(200):
        if name not in ("bad", "killed") or (folder / "long").exists():
            break
        time.sleep(0.1)
    if name == "bad":
        raise UsageError("task 'bad': no")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "long":
        time.sleep(60)


def run(folder: Path, *names: str) -> list[tuple[str, str]]:
    said: list[tuple[str, str]] = []
    calls = {name: (folder, name) for name in names}
    in_processes(work, calls, jobs=2, threads=1, say=lambda task, line: said.append((task, line)))
    return said


def ends(path: Path) -> bool:
    """Whether the process whose number is in a file ends within some seconds."""
    number = int(path.read_text())
    for _ in range(100):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_each_is_called_once_and_heard(tmp_path: Path) -> None:
    assert sorted(run(tmp_path, "a", "b", "c")) == [(name, "1 threads") for name in "abc"]


@pytest.mark.parametrize(("name", "said"), [("bad", "task 'bad': no"), ("killed", "fewer --jobs")])
def test_the_first_error_ends_the_others(tmp_path: Path, name: str, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(AdamergingError, match=said):
        run(tmp_path, "long", name)
    assert time.monotonic() - started < 50
    assert not (tmp_path / "long").exists() or ends(tmp_path / "long")


@pytest.mark.parametrize(
    "error",
    [MissingExtraError("peft", "lora", "an adapter"), PlanError(["one", "two"], "Do so."), UsageError("x")],
)
def test_errors_reach_another_process_as_they_are(error: AdamergingError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error)
    assert vars(found) == vars(error)


ALONE = """
import sys
from pathlib import Path
from test_processes import run

if __name__ == "__main__":
    run(Path(sys.argv[1]), "long", "short")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_they_end_with_their_parent_and_without_a_word(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    paths = [str(Path(__file__).parent), *sys.path]
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_interrupts,
    )  # fmt: skip
    while not ((tmp_path / "long").exists() and (tmp_path / "short").exists()):
        assert parent.poll() is None
        time.sleep(0.05)
    # As a terminal does it, Ctrl-C reaches the processes of the pool too; a kill the parent alone.
    (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
    said = parent.communicate(timeout=30)[1]
    assert parent.returncode in (-number, 1)
    assert said.count("Traceback") == (number == signal.SIGINT)  # the parent's own
    assert ends(tmp_path / "long")
