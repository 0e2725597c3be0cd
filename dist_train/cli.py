"""The verbs: parsing and a call. Heavy imports wait until a verb needs them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from dist_train import __version__, command
from dist_train import cli_operations as verbs
from dist_train.config.options import (
    Config,
    EmbedConfig,
    ImageTraining,
    IndexConfig,
    JoinConfig,
    MatchConfig,
    TextTraining,
)
from shards.photos.options import PackOptions
from shards.read.remote import shown
from shards.storage.errors import BadInput, Failed

Flat = Parameter(name="*")
app = App(
    name="dist-train",
    help="Find which postings of a catalogue are the same product.",
    help_epilogue="Every verb takes --config FILE.yaml for any of its options.",
    version=__version__,
)
train_app = App(name="train", help="Fine-tune an encoder on the products of a shard set.")
app.command(train_app)
for verb in (verbs.doctor, verbs.submit, verbs.status):
    app.command(verb)
command.take_config(app)


@app.command
def demo(*, out: Path = Path("demo"), items: int = 2000) -> None:
    """A generated catalogue through every stage.

    Parameters
    ----------
    out
        Folder for the catalogue and all stages.
    items
        Postings to generate.
    """
    from dist_train.synthetic.demo import demo_config

    _run(demo_config(out, items))


@app.command
def generate(
    *, items: int, out: Path, seed: int = 1, photos: bool = True, workers: int = 1
) -> None:
    """Write a generated catalogue (version 1).

    Parameters
    ----------
    items
        Postings.
    out
        Folder for catalogue.csv and images/.
    seed
        Another seed, another catalogue.
    photos
        Paint a photo for each posting.
    workers
        Processes.
    """
    from dist_train.synthetic import catalogue

    catalogue.generate(out, items, seed=seed, photos=photos, workers=workers)


@app.command
def pack(
    catalogue: Path, /, *, out: Path, images: Path | None = None, columns: str = "",
    task: int = 0, of: int = 1,
    options: Annotated[PackOptions, Flat] = PackOptions(),  # noqa: B008
) -> None:  # fmt: skip
    """Pack a catalogue and its photos into a shard set.

    Parameters
    ----------
    catalogue
        CSV, TSV, Parquet or JSON Lines with posting_id, image, title, label_group.
    out
        Folder for the shard set.
    images
        Folder that the catalogue's photo paths start from.
    columns
        Other names for the columns: posting_id=sku,title=name.
    task
        Which part of the shards to build, 0 to OF - 1: --task $SLURM_ARRAY_TASK_ID.
    of
        Packs that share the work, started in any order, on one machine or on several.
    """
    from shards.pack import pack

    part = pack.Task(task, of)
    counts = pack.pack(catalogue, images, out, options, _columns(columns), part)
    if counts is None:  # others still build; what is missing was logged
        return
    print(
        f"{counts['packed']} postings packed, {counts['rejected']} rejected, "
        f"{counts['with_reason']} with a remark (column reason of {out / 'items.parquet'}); "
        f"{counts['products']['train']} products to train on"
    )
    _print_twins(out, counts)


@app.command
def verify(shards: str, /, *, workers: int = 1) -> None:
    """Compare every byte of a shard set with what was packed.

    Parameters
    ----------
    workers
        Processes that read.
    """
    from shards.read.verify import verify as faults_of

    faults = faults_of(shards, workers)
    if faults:
        raise BadInput("\n".join(faults))
    print(f"{shown(shards)}: whole")


@app.command
def index_tars(folder: Path, /, *, columns: str = "", leave: str = "", workers: int = 1) -> None:
    """Make a folder of WebDataset tars that others made a shard set, where they lie.

    Parameters
    ----------
    folder
        Tars in it or below it; in folders train, val and test they are of that split.
    columns
        Other names in the json members: posting_id=sku,title=name,label_group=product.
    leave
        Suffixes of members to leave unread: npy,depth.png.
    workers
        Processes that read.
    """
    from shards.pack.index_tars import index_tars as adopt

    left = [suffix for suffix in leave.split(",") if suffix]
    counts = adopt(folder, _columns(columns), left, workers)
    print(
        f"{counts['packed']} items in {counts['indexed_tars']} tars indexed, "
        f"{counts['rejected']} rejected, {counts['with_reason']} with a remark (column reason of "
        f"{folder / 'items.parquet'}); {counts['products']['train']} products to train on"
    )
    _print_twins(folder, counts)


@train_app.command
def image(
    *,
    shards: str,
    out: Path,
    options: Annotated[ImageTraining, Flat] = ImageTraining(),  # noqa: B008
) -> None:
    """Train the image encoder.

    Parameters
    ----------
    shards
        A shard set: its folder, or its address (https://, s3://, gs://, whatever fsspec opens).
    out
        Folder for the run; the same command goes on where it stopped.
    """
    from dist_train.training.loop import train

    train("image", shards, out, options)


@train_app.command
def text(
    *,
    shards: str,
    out: Path,
    options: Annotated[TextTraining, Flat] = TextTraining(),  # noqa: B008
) -> None:
    """Train the text encoder.

    Parameters
    ----------
    shards
        A shard set: its folder, or its address (https://, s3://, gs://, whatever fsspec opens).
    out
        Folder for the run; the same command goes on where it stopped.
    """
    from dist_train.training.loop import train

    train("text", shards, out, options)


@app.command
def export(run: Path, /, *, onnx: Path) -> None:
    """Write the encoder of a finished run as ONNX.

    Parameters
    ----------
    run
        A run.
    onnx
        The file to write: prepared inputs to vectors of length one.
    """
    from dist_train.encoders.onnx import export_onnx

    export_onnx(run, onnx)
    print(f"{onnx}: written")


@app.command
def embed(
    *, shards: str, out: Path, image: Path | None = None, text: Path | None = None,
    options: Annotated[EmbedConfig, Flat] = EmbedConfig(),  # noqa: B008
) -> None:  # fmt: skip
    """Turn every item of a shard set into vectors.

    Parameters
    ----------
    shards
        A shard set: its folder, or its address (https://, s3://, gs://, whatever fsspec opens).
    out
        Folder for the embedding set.
    image
        Run of an image encoder.
    text
        Run of a text encoder.
    """
    from dist_train.embedding import embed as stage

    stage.embed(shards, out, options, image, text)


@app.command
def index(
    embeddings: Path,
    /,
    *,
    out: Path,
    options: Annotated[IndexConfig, Flat] = IndexConfig(),  # noqa: B008
) -> None:
    """Build the sharded FAISS index over an embedding set.

    Parameters
    ----------
    embeddings
        An embedding set.
    out
        Folder for the index.
    """
    from dist_train.matching.index import build_index

    build_index(embeddings, out, options)


@app.command
def join(
    embeddings: Path,
    /,
    *,
    index: Path,
    out: Path,
    options: Annotated[JoinConfig, Flat] = JoinConfig(),  # noqa: B008
) -> None:
    """Find every pair of items down to a score floor, and the nearest items of each.

    Parameters
    ----------
    embeddings
        An embedding set.
    index
        The index over it.
    out
        Folder for the pairs; any number of these commands may work on one folder.
    """
    from dist_train.matching.build_pairs import build_pairs

    build_pairs(embeddings, index, out, options)


@app.command
def match(
    pairs: Path,
    /,
    *,
    out: Path,
    options: Annotated[MatchConfig, Flat] = MatchConfig(),  # noqa: B008
) -> None:
    """Choose the threshold, and write matches and groups.

    Parameters
    ----------
    pairs
        A folder that join has written.
    out
        Folder for the matches; another threshold goes into another folder.
    """
    from dist_train.decisions import match as stage

    stage.match(pairs, out, options)


@app.command
def evaluate(matches: Path, /, *, compare: tuple[str, ...] = ()) -> None:
    """Score matches on the test products, beside their floors.

    Parameters
    ----------
    matches
        A match directory.
    compare
        Other embedding sets over the same shards, scored beside it: FOLDER, or NAME=FOLDER.
    """
    from dist_train.decisions import score
    from dist_train.evaluation.scores import score_table

    others = {name: Path(path or name) for name, _, path in (c.partition("=") for c in compare)}
    print(score_table(score.evaluate(matches, others)))


@app.command
def report(matches: Path, /) -> None:
    """Write report.html into a match directory."""
    from dist_train.report.html import write_report

    print(write_report(matches))


@app.command
def run(*, config: Annotated[Config, Flat]) -> None:
    """Take a catalogue through every stage on this machine: dist-train run CONFIG.yaml."""
    _run(config)


@app.command
def plan(*, config: Annotated[Config, Flat], processes: int = 0, json: bool = False) -> None:
    """Compute what each stage will take, before anything runs: dist-train plan CONFIG.yaml.

    It prints seconds, memory of a rank and bytes on disk, and for what does not fit the setting
    that makes it fit; then the exit code is 1.

    Parameters
    ----------
    processes
        Ranks that the stages will run on, all on this machine; 0: one for each GPU, or one.
    json
        Print JSON instead of a table.
    """
    from dataclasses import asdict
    from json import dumps as as_json

    from dist_train.planning.plan import plan as plan_stages

    found = plan_stages(config, processes)
    print(as_json(asdict(found), indent=1, ensure_ascii=False) if json else found)
    if found.misfits:
        raise Failed(f"{len(found.misfits)} things do not fit, see above")


def main() -> None:
    """Parse, call, and end with the exit code of the outcome."""
    command.call(app)


def _run(config: Config) -> None:
    from dist_train import pipeline
    from dist_train.evaluation.scores import score_table

    scores = pipeline.run(config)
    if scores is not None:
        print(score_table(scores))
    print(f"report: {config.out / 'matches' / 'report.html'}")


def _print_twins(shards: Path, counts: Mapping[str, Any]) -> None:
    from shards.duplicates.label_noise import describe_near_duplicates
    from shards.tar.layout import LABEL_NOISE

    print(describe_near_duplicates(counts["twins"], shards / LABEL_NOISE))


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise BadInput(f"--columns {text}: write posting_id=sku,title=name")
    return {ours: theirs for ours, _, theirs in pairs}
