"""Verbs on directories of another kind, unfinished ones and models that are not there."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_train import cli
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.storage import stage_files

Refused = Callable[..., str]


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Refused]:
    """Runs a command in this process (importing torch takes seconds); the one line it says."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(*arguments: object, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["dist-train", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert ended.value.code == code, err
        lines = [line for line in err.splitlines() if line]
        assert len(lines) == 1, err
        assert lines[0].startswith("dist-train: ")
        assert out == ""
        return lines[0]

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of titles."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = [f"p{n},title {n},g{n // 2}" for n in range(80)]
    (folder / "c.csv").write_text("\n".join(["posting_id,title,label_group", *rows]))
    pack(folder / "c.csv", None, folder / "s", PackOptions())
    return folder / "s"


def stage(path: Path, kind: str, finished: bool = True, **parents: Path) -> Path:
    """A stage directory that holds nothing."""
    known = {
        name: {
            "path": os.path.relpath(parent, path),
            "fingerprint": stage_files.open_finished(
                parent, stage_files.read_json(parent / "stage.json")["kind"]
            )["fingerprint"],
        }
        for name, parent in parents.items()
    }
    stage_files.begin(path, kind, {}, known)
    if finished:
        stage_files.finish(path, {}, [])
    return path


# ── directories


def test_stages_refuse_an_unfinished_shard_set(refused: Refused, tmp_path: Path) -> None:
    unfinished = stage(tmp_path / "s", "shard set", finished=False)
    more = ["--shards", unfinished, "--out", tmp_path / "o"]
    for verb in (["train", "image"], ["train", "text"], ["embed", "--image", tmp_path]):
        assert f"{unfinished}: unfinished" in refused(*verb, *more)
    assert not (tmp_path / "o").exists()


def test_stages_refuse_directories_of_another_kind(
    refused: Refused, labelled: Path, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "o"]
    wrong = f"{labelled}: holds shard set, wanted"
    assert f"{wrong} run" in refused("embed", "--shards", labelled, "--text", labelled, *out)
    assert f"{wrong} embedding set" in refused("index", labelled, *out)
    assert f"{wrong} embedding set" in refused("join", labelled, "--index", labelled, *out)
    assert f"{wrong} pairs" in refused("match", labelled, *out)
    assert f"{wrong} matches" in refused("evaluate", labelled)
    assert str(labelled) in refused("report", labelled)
    run = stage(tmp_path / "run", "run")
    for verb in (["train", "text"], ["embed", "--text", run]):
        assert f"{run}: holds run, wanted shard set" in refused(*verb, "--shards", run, *out)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("verb", ["evaluate", "report", "index", "verify"])
def test_stages_refuse_what_is_no_directory_of_ours(
    refused: Refused, tmp_path: Path, verb: str
) -> None:
    more = ["--out", tmp_path / "o"] if verb == "index" else []
    for path in (tmp_path, tmp_path / "none"):
        assert str(path) in refused(verb, path, *more)


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_an_unfinished_match_directory_is_refused_as_such(
    refused: Refused, tmp_path: Path, verb: str
) -> None:
    pairs = stage(tmp_path / "p", "pairs")
    matches = stage(tmp_path / "m", "matches", finished=False, pairs=pairs)
    assert f"{matches}: unfinished" in refused(verb, matches)


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_an_index_is_no_match_directory(refused: Refused, tmp_path: Path, verb: str) -> None:
    embedding = stage(tmp_path / "e", "embedding set")
    index = stage(tmp_path / "i", "index", embedding=embedding)
    assert f"{index}: holds index, wanted matches" in refused(verb, index)
    assert not (index / "report.html").exists()


def test_join_refuses_the_index_of_another_set(refused: Refused, tmp_path: Path) -> None:
    one, other = (stage(tmp_path / name, "embedding set") for name in "ab")
    index = stage(tmp_path / "i", "index", embedding=other)
    said = refused("join", one, "--index", index, "--out", tmp_path / "o")
    assert f"{index}: is over another embedding set than {one}" in said


def test_embed_asks_for_a_run(refused: Refused, labelled: Path, tmp_path: Path) -> None:
    assert "--image RUN or --text RUN" in refused("embed", "--shards", labelled, "--out", tmp_path)


def test_an_output_folder_of_something_else_is_refused(
    refused: Refused, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("mine")
    said = refused("train", "text", "--shards", labelled, "--out", tmp_path / "o")
    assert f"{tmp_path / 'o'}: holds files of something else" in said
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["thesis.txt"]


# ── training


def test_training_without_labels_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("posting_id,title\n1,a\n2,b\n")
    pack(tmp_path / "c.csv", None, tmp_path / "s", PackOptions())
    said = refused("train", "text", "--shards", tmp_path / "s", "--out", tmp_path / "r")
    assert f"{tmp_path / 's'}: 0 label groups to train on" in said


def test_training_on_photos_that_are_not_there_is_refused(
    refused: Refused, labelled: Path, tmp_path: Path
) -> None:
    said = refused("train", "image", "--shards", labelled, "--out", tmp_path / "r")
    assert f"{labelled}: no training item has a" in said


@pytest.mark.parametrize("model", ["no-such/model", "bert-base-uncased"])
def test_a_text_model_that_is_nowhere_says_how_to_name_a_folder(
    refused: Refused, labelled: Path, tmp_path: Path, model: str
) -> None:
    said = refused("train", "text", "--shards", labelled, "--out", tmp_path / "r",
                   "--encoder.model", model)  # fmt: skip
    assert f"encoder.model {model}" in said
    assert "--encoder.model FOLDER" in said


@pytest.mark.parametrize("model", ["vit_base_patch16_224", "no_such_model", "hf-hub:no/such"])
def test_an_image_model_that_is_nowhere_says_how_to_name_a_folder(
    refused: Refused, shard_set: Path, tmp_path: Path, model: str
) -> None:
    said = refused("train", "image", "--shards", shard_set, "--out", tmp_path / "r",
                   "--encoder.model", model)  # fmt: skip
    assert f"encoder.model {model}" in said
    assert "--encoder.model FOLDER" in said


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_folder_that_holds_no_model_is_named(
    refused: Refused, shard_set: Path, tmp_path: Path, modality: str
) -> None:
    (tmp_path / "empty").mkdir()
    for number, model in enumerate((tmp_path / "empty", tmp_path / "none")):
        said = refused("train", modality, "--shards", shard_set, "--out", tmp_path / f"r{number}",
                       "--encoder.model", model)  # fmt: skip
        assert str(model) in said


def test_a_corrected_command_may_use_the_same_folder(
    refused: Refused, labelled: Path, tmp_path: Path
) -> None:
    """Nothing was made by the first one, so it must not claim the folder."""
    command = ["train", "text", "--shards", labelled, "--out", tmp_path / "r", "--encoder.model"]
    refused(*command, "no-such/model")
    assert "encoder.model another/model" in refused(*command, "another/model")


# ── as a process of its own


def test_a_gpu_that_is_not_there_ends_in_exit_code_4(labelled: Path, tmp_path: Path) -> None:
    arguments = ["embed", "--shards", labelled, "--image", tmp_path, "--out", tmp_path / "o",
                 "--device", "cuda"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1
    assert "--device cuda: no GPU answers" in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.full
def test_a_missing_model_is_one_line_of_a_process(labelled: Path, tmp_path: Path) -> None:
    arguments = ["train", "text", "--shards", labelled, "--out", tmp_path / "r", "--workers", "0",
                 "--encoder.model", "no-such/model"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "--encoder.model FOLDER" in done.stderr
