"""What holds around every verb: how it ends, with and without a launcher, and --config FILE."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from cyclopts import App

from dist_train import command
from shards.storage.errors import (
    BadInput,
    CacheFull,
    Corrupt,
    Failed,
    NoGPU,
    Stopped,
    Unfinished,
    Unreachable,
)

Ended = tuple[int, str]
CODES = {
    Stopped: 3, BadInput: 2, Unfinished: 2, Corrupt: 2, Failed: 1, Unreachable: 1, CacheFull: 1,
    NoGPU: 4,
}  # fmt: skip
"""As docs and README name them."""


pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Calls a verb with words; the exit code, and what it said of errors."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(verb: Callable[..., None], *words: str, name: str = "verb") -> Ended:
        app = App(name="dist-train")
        app.command(verb, name=name)
        command.add_config_option(app)
        monkeypatch.setattr(sys, "argv", ["dist-train", name, *words])
        capfd.readouterr()
        try:
            command.call(app)
        except SystemExit as ended:
            return int(ended.code or 0), capfd.readouterr().err
        return 0, capfd.readouterr().err

    return call


def raising(error: BaseException) -> Callable[[], None]:
    def verb() -> None:
        raise error

    return verb


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_each_ending_has_its_exit_code(ended, kind: type[Exception]) -> None:
    assert ended(raising(kind("so it is"))) == (CODES[kind], "dist-train: so it is\n")


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_a_launcher_hears_a_fault_but_no_stop(
    ended, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """torchrun ends all ranks for any code but 0, and says that the command failed."""
    monkeypatch.setenv("RANK", "3")
    code = 0 if kind is Stopped else CODES[kind]
    assert ended(raising(kind("so it is"))) == (code, "dist-train [rank 3]: so it is\n")


def test_a_good_end_and_a_wrong_word(ended) -> None:
    def verb(*, size: int = 3) -> None:
        print(size)

    assert ended(verb) == (0, "")
    code, said = ended(verb, "--sise", "4")
    assert code == 2
    assert said.count("\n") == 1
    assert "--size" in said


def test_what_is_no_ending_of_ours_keeps_its_traceback(ended) -> None:
    with pytest.raises(ZeroDivisionError):
        ended(raising(ZeroDivisionError("a fault of the program")))


@pytest.mark.parametrize("rank", [None, "0"])
def test_the_group_is_left_at_every_end_that_all_ranks_come_to(
    ended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str | None
) -> None:
    """Else gloo's threads abort the interpreter. After a fault others may never come."""
    if rank:
        monkeypatch.setenv("RANK", rank)
    for number, (error, stays) in enumerate([(None, False), (Stopped("now"), False),
                                             (Failed("lost"), True)]):  # fmt: skip
        where = f"file://{tmp_path}/group-{number}"
        dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
        try:
            ended(raising(error) if error else lambda: None)
            assert dist.is_initialized() == stays
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def test_progress_is_shown(ended) -> None:
    """Of ours, on stderr with the time; other libraries only warn."""
    root, level = logging.getLogger(), logging.getLogger("dist_train").level
    handlers, root.handlers = root.handlers, []
    try:

        def verb() -> None:
            for name in ("dist_train.somewhere", "shards", "timm"):
                logging.getLogger(name).info("from %s", name)

        _, said = ended(verb)
    finally:
        root.handlers = handlers
        logging.getLogger("dist_train").setLevel(level)
    assert [line.split(" ", 1)[1] for line in said.splitlines()] == [
        "from dist_train.somewhere", "from shards"
    ]  # fmt: skip


# ── --config


@pytest.fixture
def given(ended, tmp_path: Path):
    """The options that a verb has from a config file and from words after it."""

    def call(name: str, *words: str, text: str, **kinds: Any) -> dict[str, Any]:
        got: dict[str, Any] = {}
        (tmp_path / "k.yaml").write_text(text)

        def verb(*args: str, a: str = "", b: int = 0, c: float = 0.0, d: bool = False) -> None:
            got.update(args=args, a=a, b=b, c=c, d=d)

        words = tuple(w.replace("FILE", str(tmp_path / "k.yaml")) for w in words)
        assert ended(verb, *words, name=name) == (0, "")
        return got

    return call


@pytest.mark.parametrize("verb", ["run", "plan", "submit"])
def test_the_first_word_of_some_verbs_is_the_config_file(given, verb: str) -> None:
    text = "a: x\nb: 5\n"
    wanted = {"args": (), "a": "x", "b": 5, "c": 0.0, "d": False}
    assert given(verb, "FILE", text=text) == wanted
    assert given(verb, "--config", "FILE", text=text) == wanted
    assert given(verb, "FILE", "--b", "6", text=text) == wanted | {"b": 6}
    assert given(verb, "--b", "6", text=text) == wanted | {"a": "", "b": 6}


def test_the_first_word_of_the_others_is_their_own(given) -> None:
    assert given("pack", "FILE", text="b: 5\n")["b"] == 0
    assert given("pack", "word", "--config", "FILE", text="b: 5\n")["args"] == ("word",)
    assert given("pack", "--config", "FILE", text="")["b"] == 0


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("a: 12:00:00", "a", "12:00:00"), ("a: 0123", "a", "0123"), ("a: 1.2.3", "a", "1.2.3"),
        ("b: 0", "b", 0), ("b: -12", "b", -12), ("b: 1_000", "b", 1000), ("b: +7", "b", 7),
        ("c: 1e-4", "c", 1e-4), ("c: 1E3", "c", 1000.0), ("c: .5", "c", 0.5), ("c: -2.", "c", -2.0),
        ("c: 3", "c", 3.0), ("d: true", "d", True),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(given, text: str, name: str, value: Any) -> None:
    found = given("run", "FILE", text=text)[name]
    assert found == value
    assert type(found) is type(value)


def run_unread(*words: str, unbuffered: bool) -> subprocess.CompletedProcess[str]:
    """A verb whose output nobody reads, as behind `| head` when that has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
    with os.fdopen(writer, "w") as output:
        return subprocess.run(
            [sys.executable, "-m", "dist_train", *words], env=env, text=True, check=False,
            stdout=output, stderr=subprocess.PIPE, cwd=Path(__file__).parents[3],
        )  # fmt: skip


@pytest.mark.parametrize("unbuffered", [True, False])
def test_an_output_that_nobody_reads_is_no_failure(tmp_path: Path, unbuffered: bool) -> None:
    (tmp_path / "c.csv").write_text("posting_id,title\n1,a\n2,b\n")
    words = ("pack", str(tmp_path / "c.csv"), "--out", str(tmp_path / "out"))
    for line in (words, ("verify", str(tmp_path / "out"))):
        done = run_unread(*line, unbuffered=unbuffered)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr


def test_another_pipe_that_breaks_is_a_failure(ended) -> None:
    with pytest.raises(BrokenPipeError):
        ended(raising(BrokenPipeError("of a worker")))
