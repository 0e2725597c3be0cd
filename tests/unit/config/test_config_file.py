"""Config files and --columns: every form is read alike, every wrong key named by its line."""

import sys
from pathlib import Path

import pytest
from cyclopts import App
from cyclopts.config import Dict

from dist_train import cli
from dist_train.config.columns import AS_NAMED, Columns
from dist_train.config.options import Config
from shards.storage.errors import BadInput

TOP = "catalogue: none.csv\nout: o\n"


@pytest.fixture
def line_of(tmp_path, monkeypatch, capfd):
    """Runs a verb with a config file; the one line that it is refused with."""
    config = cli.app.config

    def run(text: str, *words: str) -> str:
        monkeypatch.chdir(tmp_path)
        Path("k.yaml").write_text(text)
        given = ["--config", "k.yaml"] if words else ["k.yaml"]
        monkeypatch.setattr(sys, "argv", ["dist-train", *(words or ["run"]), *given])
        cli.app.config = config
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
        return err

    yield run
    cli.app.config = config


@pytest.mark.parametrize(
    ("text", "line", "key", "near"),
    [
        ("image: {model: x}", 3, "image.model", "image.encoder.model"),
        ("image:\n  encoder:\n    modle: x", 5, "image.encoder.modle", "image.encoder.model"),
        ("image:\n  lr: 1.0\n  batchsize: 3", 5, "image.batchsize", "image.batch_size"),
        ("image: {margin: 0.3}", 3, "image.margin", "image.head.margin"),
        ("pack: {sise: 1}", 3, "pack.sise", "pack.size"),
        ("sise: 1", 3, "sise", "pack.size"),
        ("treshold: 0.5", 3, "treshold", "match.threshold"),
        ("threshold_from: x", 3, "threshold_from", "match.threshold_from"),
        ("catalog: x", 3, "catalog", "catalogue"),
        ("embeddings: {}", 3, "embeddings", "embed"),
        ("slurm: {image: {node: 2}}", 3, "slurm.image.node", "slurm.image.nodes"),
        ("slurm: {gpu: 2}", 3, "slurm.gpu", "slurm.gpus"),
        ("join: &a {rows: 1}", 3, "join.rows", "join.audit_rows"),
        ("image: {<<: {lr: 1.0, rl: 2}}", 3, "image.rl", "image.lr"),
        ("text:\n\n  # a comment\n  poolling: cls", 6, "text.poolling", "text.encoder.pooling"),
    ],
)
def test_a_key_that_is_no_option_is_named(line_of, text, line, key, near) -> None:
    said = line_of(f"{TOP}{text}\n")
    assert f"k.yaml: line {line}: {key} is no option of run; did you mean " in said
    if key != "join.rows":  # which of several is nearest is a matter of taste
        assert f"did you mean {near}?" in said


def test_a_key_like_nothing_points_at_the_help(line_of) -> None:
    assert "zzzz is no option of run; see dist-train run --help" in line_of(f"{TOP}zzzz: 1\n")


def test_other_verbs_name_wrong_keys_too(line_of) -> None:
    said = line_of("shards: s\nout: r\nmodle: x\n", "train", "text")
    assert "line 3: modle is no option of train text; did you mean encoder.model?" in said
    said = line_of("tresh: 1\n", "match", "p", "--out", "m")
    assert "line 1: tresh is no option of match; did you mean threshold?" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image:\n  lr: 1.0\nimage:\n  lr: 2.0", "line 5: image is given twice, first in line 3"),
        ("image:\n  lr: 1.0\n  lr: 2.0", "line 5: image.lr is given twice, first in line 4"),
        ("image: {batch_size: 8, batch-size: 9}", "line 3: image.batch_size is given twice"),
    ],
)
def test_a_key_that_is_given_twice_is_named(line_of, text, message) -> None:
    assert message in line_of(f"{TOP}{text}\n")


def test_keys_of_values_are_written_as_in_the_documents(line_of) -> None:
    assert "for image.lr from k.yaml" in line_of(f"{TOP}image: {{lr: fast}}\n")


# --columns

WANTED = {"posting_id": "sku", "title": "name"}


def read(words: list[str], config: dict | None = None) -> list[dict]:
    """What a flat verb and a verb with a config tree make of --columns."""
    app, found = App(), []

    @app.command
    def flat(*, columns: Columns = AS_NAMED) -> None:
        found.append(columns)

    @app.command
    def tree(*, config: Config) -> None:
        found.append(config.columns)

    tree.__annotations__["config"] = __import__("typing").Annotated[
        Config, __import__("cyclopts").Parameter(name="*")
    ]
    needed = {"catalogue": "c", "out": "o"}
    for verb, more in (("flat", {}), ("tree", needed)):
        app.config = (Dict({verb: (config or {}) | more}, source="k.yaml"),)
        app([verb, *words], exit_on_error=False, print_error=False, result_action="return_value")
    return found


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (["--columns", "posting_id=sku,title=name"], None),
        (["--columns=posting_id=sku, title=name"], None),
        (["--columns.posting_id", "sku", "--columns.title", "name"], None),
        ([], {"columns": "posting_id=sku,title=name"}),
        ([], {"columns": WANTED}),
    ],
)
def test_every_form_of_columns_is_read(words, config) -> None:
    assert read(words, config) == [WANTED, WANTED]


def test_columns_are_as_named_without_it() -> None:
    assert read([]) == [{}, {}]


@pytest.mark.parametrize(
    ("text", "message"),
    [("title", "write posting_id=sku"), ("title=", "write"), ("=name", "write"),
     ("title=a,title=b", "title is given twice")],
)  # fmt: skip
def test_other_forms_of_columns_are_refused(text, message) -> None:
    with pytest.raises(BadInput, match=f"--columns {text}: .*{message}"):
        read(["--columns", text])
