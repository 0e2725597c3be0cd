"""The command line: help, YAML, and bad input in one line with exit code 2."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_train import __version__, cli
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from tests.support.catalogues import labelled_text

Said = Callable[..., tuple[object, str, str]]
Refused = Callable[..., str]
VERBS = (
    "demo", "generate", "pack", "verify", "train image", "train text", "embed", "index", "join",
    "match", "evaluate", "report", "run", "submit", "status",
)  # fmt: skip


def dist_train(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dist_train", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"} | environment,
    )  # fmt: skip


def only_line(code: object, out: str, err: str) -> str:
    """The one line that a refused command says."""
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("dist-train: ")
    return err


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Said]:
    """Runs a command in this process; its exit code and what it printed."""
    config = cli.app.config

    def run(folder: Path, *arguments: object) -> tuple[object, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["dist-train", *map(str, arguments)])
        cli.app.config = config
        capfd.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        return code, *capfd.readouterr()

    yield run
    cli.app.config = config


@pytest.fixture
def refused(said: Said) -> Refused:
    """Runs a command in this process; the one line that it is refused with."""
    return lambda *arguments: only_line(*said(*arguments))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "c.csv").write_text("posting_id,title,label_group\n1,a,g\n2,b,g\n3,c,h\n")
    return tmp_path


# ── help


def test_help_lists_every_verb(tmp_path: Path) -> None:
    done = dist_train(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for verb in VERBS:
        assert f" {verb.split()[0]} " in done.stdout


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked")
def test_no_verb_at_all_shows_the_help(said: Said, tmp_path: Path) -> None:
    assert said(tmp_path) == said(tmp_path, "--help")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_shows_defaults(said: Said, tmp_path: Path, verb: str) -> None:
    code, out, err = said(tmp_path, *verb.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: dist-train {verb}")
    assert "--config" in out
    if verb not in ("verify", "evaluate", "report", "status"):
        assert "[default: " in out
        assert "[required]" in out or verb == "demo"


def test_version(said: Said, tmp_path: Path) -> None:
    assert said(tmp_path, "--version") == (0, f"{__version__}\n", "")


def test_help_does_not_wait_for_heavy_libraries(tmp_path: Path) -> None:
    code = "import sys, dist_train.cli; print({'torch', 'timm', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ── processes of their own


@pytest.mark.parametrize(
    ("content", "arguments", "what"),
    [
        ("id,title\n1,a\n", "pack c.csv --out s", "c.csv: no column posting_id"),
        ("posting_id,title\n1,a\n", "pack c.csv --out s --sise 5", "Did you mean --size?"),
        ("sise: 5\n", "pack c.csv --out s --config c.csv", "c.csv: line 1: sise is no"),
    ],
)
def test_a_refused_process_ends_with_one_line_and_code_2(
    tmp_path: Path, content: str, arguments: str, what: str
) -> None:
    (tmp_path / "c.csv").write_text(content)
    done = dist_train(tmp_path, *arguments.split())
    assert what in only_line(done.returncode, done.stdout, done.stderr)
    assert not (tmp_path / "s").exists()


def test_a_process_that_packs_ends_with_code_0(here: Path) -> None:
    done = dist_train(here, "pack", "c.csv", "--out", "s")
    assert done.returncode == 0, done.stderr
    assert "3 postings packed, 0 rejected" in done.stdout


# ── what is asked of the command line


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("pack c.csv --out s --sise 5", "--sise. Did you mean --size?"),
        ("pakc c.csv --out s", '"pakc". Did you mean "pack"?'),
        ("train imgae --out s", '"imgae". Did you mean "image"?'),
        ("pack c.csv --out s --size big", '--size: unable to convert "big" into int'),
        ("pack c.csv", "--out requires an argument"),
        ("pack --out s", "CATALOGUE requires an argument"),
        ("pack c.csv --out s --size 0", "size: 0, must be at least 1"),
        ("pack c.csv --out s --columns title", "--columns title: write posting_id=sku,title=name"),
        ("train text --shards s --out r --batch-size 10 --accumulation 3",
         "batch_size 10 is no multiple of accumulation 3"),
        ("train text --shards s --out r --head.loss cosine", "cosine"),
        ("train text --shards s --out r --encoder.modle x", "Did you mean --encoder.model?"),
        ("join e --index i --out p --engine brute", "brute"),
        ("match p --out m --threshold 2", "threshold: 2"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(refused: Refused, here: Path, arguments: str, what: str) -> None:
    assert what in refused(here, *arguments.split())
    assert not (here / "s").exists()


# ── what is asked of a catalogue


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("id,title\n1,a\n", "c.csv: no column posting_id (found: id, title)"),
        (
            "posting_id,title\n1,a\n2,b\n1,c\n",
            "c.csv: row 3: posting_id '1' stands already in row 1",
        ),
        ("posting_id,title\n1,a\n,b\n", "c.csv: row 2: posting_id is empty"),
        ("posting_id,image\n1,a.jpg\n", "--images DIR"),
    ],
)
def test_wrong_catalogues_are_named(refused: Refused, here: Path, content: str, what: str) -> None:
    (here / "c.csv").write_text(content)
    assert what in refused(here, "pack", "c.csv", "--out", "s")
    # Nothing but the note of what failed, and the folder is free for a catalogue that is right.
    left = {path.name for path in here.glob("s/*")}
    assert left <= {"stage.json", "status.json"}
    (here / "c.csv").write_text("posting_id,title\n1,a\n2,b\n")
    assert pack(here / "c.csv", None, here / "s", PackOptions())["packed"] == 2


def test_a_missing_catalogue_and_a_foreign_folder_are_named(refused: Refused, here: Path) -> None:
    assert "none.csv: not found" in refused(here, "pack", "none.csv", "--out", "s")
    (here / "o").mkdir()
    (here / "o" / "thesis.txt").write_text("mine")
    line = refused(here, "pack", "c.csv", "--out", "o")
    assert "o: holds files of something else; name a new or an empty folder" in line


def test_a_folder_below_a_file_is_named(refused: Refused, here: Path) -> None:
    assert "c.csv" in refused(here, "pack", "c.csv", "--out", "c.csv/s")


def test_pack_verify_and_a_damaged_shard(said: Said, refused: Refused, here: Path) -> None:
    code, out, err = said(here, "pack", "c.csv", "--out", "s", "--size", "32")
    assert (code, "3 postings packed, 0 rejected" in out) == (0, True), err
    assert said(here, "verify", "s") == (0, "s: complete and unchanged\n", "")
    line = refused(here, "pack", "c.csv", "--out", "s", "--size", "33")
    assert "size 32 there, 33 requested" in line
    tar = next((here / "s").glob("*/*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1])
    assert str(tar.relative_to(here)) in refused(here, "verify", "s")
    (here / "s" / "manifest.json").unlink()
    assert "s: unfinished" in refused(here, "verify", "s")
    assert "c.csv: not a shard set" in refused(here, "verify", "c.csv")


# ── YAML


def yaml(folder: Path, content: str | bytes) -> str:
    (folder / "k.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return "k.yaml"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("sise: 5\n", "sise"),
        ("size: [5\n", "k.yaml: not YAML"),
        ("size: big\n", "unable to convert"),
        ("hello\n", "must be a mapping"),
        ("- size\n", "must be a mapping"),
        (b"size: 5 # \xff\xfe\n", "k.yaml"),
        ("size: 0\n", "size: 0, must be at least 1"),
        ("size: {a: 1}\n", "size"),
    ],
)
def test_wrong_config_files_are_named(
    refused: Refused, here: Path, content: str | bytes, what: str
) -> None:
    line = refused(here, "pack", "c.csv", "--out", "s", "--config", yaml(here, content))
    assert what in line
    if "must be at least" not in what:  # a value out of range is named by its option
        assert "k.yaml" in line
    assert not (here / "s").exists()


@pytest.mark.parametrize(
    "command", ["run none.yaml", "pack c.csv --out s --config none.yaml", "run --config none.yaml"]
)
def test_a_missing_config_file_is_named(refused: Refused, here: Path, command: str) -> None:
    assert "none.yaml: no such config file" in refused(here, *command.split())


def config_of(shards: Path) -> dict:
    return json.loads((shards / "stage.json").read_text())["config"]


def test_yaml_fills_options_and_the_command_line_goes_before_it(said: Said, here: Path) -> None:
    options = yaml(here, "size: 33\nseed: 7\nout: s\nkeep: true\nquality: 80\n")
    code, _, err = said(here, "pack", "c.csv", "--config", options, "--quality", "70")
    assert code == 0, err
    config = config_of(here / "s")
    assert (config["size"], config["seed"], config["keep"], config["quality"]) == (33, 7, True, 70)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("pack: {size: 0}", "size: 0"),
        ("embed: {batch_size: 0}", "batch_size: 0"),
        ("index: {image_weight: 7}", "image_weight: 7"),
        ("join: {neighbours: -1}", "neighbours: -1"),
        ("match: {threshold: 2}", "threshold: 2"),
        ("image: {head: {scale: 100}}", "head.scale: 100"),
        ("text: {lr: -1e-4}", "lr: -0.0001"),
        ("pack: {sise: 1}", "mean pack.size?"),
        ("embed: {dtype: float8}", "float8"),
        ("index: {modalty: text}", "mean index.modality?"),
        ("join: {engin: gemm}", "mean join.engine?"),
        ("match: {treshold: 0.5}", "mean match.threshold?"),
        ("image: {encoder: {modle: x}}", "mean image.encoder.model?"),
        ("encoders: [sound]", "sound"),
        ("embeddings: {}", "embeddings"),
    ],
)
def test_nested_options_of_run_are_not_dropped(
    refused: Refused, here: Path, options: str, what: str
) -> None:
    """Also where the key is the name of a verb: pack, embed, index, join, match."""
    content = f"catalogue: c.csv\nout: o\n{options}\n"
    assert what in refused(here, "run", yaml(here, content))
    assert not (here / "o").exists()


def test_what_run_needs_is_named(refused: Refused, here: Path) -> None:
    assert "--out" in refused(here, "run", yaml(here, "catalogue: c.csv\n"))
    assert "--catalogue" in refused(here, "run", yaml(here, "out: o\n"))
    assert "run" in refused(here, "run")


def test_nested_options_of_a_training_are_filled(refused: Refused, here: Path) -> None:
    content = "shards: s\nout: r\nhead: {scale: 100}\n"
    assert "head.scale: 100" in refused(here, "train", "text", "--config", yaml(here, content))
    content = "shards: s\nout: r\nencoder: {poling: cls}\n"
    line = refused(here, "train", "image", "--config", yaml(here, content))
    assert "did you mean encoder.pooling?" in line


def test_times_and_accounts_are_as_they_are_written(
    here: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YAML 1.1 reads 12:00:00 to the base of 60, and 0123 to that of 8."""
    monkeypatch.setenv("PATH", str(here))  # no sbatch
    (here / "c.csv").write_text(labelled_text())
    (here / "c.yaml").write_text(
        "catalogue: c.csv\nout: runs\nmatch: {threshold: 5e-1}\n"
        "slurm: {time: 12:00:00, account: 0123, nodes: 2, pack: {time: 1:30}}\n"
    )
    code, _, err = said(here, "submit", "c.yaml", "--dry-run")
    assert code == 0, err
    dry = here / "runs" / "slurm" / "dry-run"
    image, pack = ((dry / f"{name}.sbatch").read_text() for name in ("02-image", "01-pack"))
    assert "--time=12:00:00" in image
    assert "--account=0123" in image
    assert "--nodes=2" in image
    assert "--time=1:30" in pack
