"""The command line: each verb parses its options and makes one call.

Heavy libraries are imported by the verb that needs them, so that --help answers at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from dist_train import __version__, cli_pipeline, command
from dist_train.config.columns import AS_NAMED, Columns
from dist_train.config.options import EmbedConfig, IndexConfig, JoinConfig, MatchConfig
from dist_train.config.training import ImageTraining, TextTraining
from shards.photos.options import PackOptions
from shards.read.remote import shown
from shards.storage.errors import BadInput

if TYPE_CHECKING:
    from shards.pack.pack import Counts

Flat = Parameter(name="*")
Shards = Annotated[
    str,
    Parameter(
        help="A shard set: its folder, or its address (https://, s3://, gs://, whatever fsspec "
        "opens)."
    ),
]
RunFolder = Annotated[
    Path, Parameter(help="Folder for the run. The same command resumes where it stopped.")
]
app = App(
    name="dist-train",
    help="Find which postings of a catalogue are the same product.",
    help_epilogue="Every verb takes --config FILE.yaml for any of its options.",
    version=__version__,
)
train_app = App(name="train", help="Fine-tune an encoder on the products of a shard set.")
app.command(train_app)
for verb in ("demo", "run", "plan", "submit", "status", "doctor"):
    app.command(getattr(cli_pipeline, verb))
command.add_config_option(app)


@app.command
def generate(
    *, items: int, out: Path, seed: int = 1, photos: bool = True, workers: int = 1
) -> None:
    """Generate a synthetic catalogue with photos, titles and product labels.

    Args:
        items: Number of postings.
        out: Folder for catalogue.csv and images/.
        seed: Another seed gives another catalogue; the same seed the same bytes.
        photos: Paint a photo for each posting.
        workers: Processes that paint photos.
    """
    from dist_train.synthetic import catalogue

    catalogue.generate(out, items, seed=seed, photos=photos, workers=workers)


@app.command
def pack(
    catalogue: Path,
    /,
    *,
    out: Path,
    images: Path | None = None,
    columns: Columns = AS_NAMED,
    task: int = 0,
    of: int = 1,
    options: Annotated[PackOptions, Flat] = PackOptions(),
) -> None:
    """Pack a catalogue and its photos into a shard set, which all other stages read.

    The same command resumes where it stopped.

    Args:
        catalogue: CSV, TSV, Parquet or JSON Lines file with the columns posting_id, image, title,
            label_group.
        out: Folder for the shard set.
        images: Folder that the photo paths of the catalogue are relative to.
        columns: Names of the columns where they differ, such as posting_id=sku,title=name.
        task: Number of this pack among those that share the work, from 0 to OF - 1. In a Slurm
            array: --task $SLURM_ARRAY_TASK_ID.
        of: Number of packs that share the work, started in any order on one or several machines.
    """
    from shards.pack import pack

    counts = pack.pack(catalogue, images, out, options, columns, pack.Task(task, of))
    if counts is None:  # other packs are still building; what is missing was logged
        return
    _print_counts(f"{counts['packed']} postings packed", out, counts)


@app.command
def verify(shards: Shards, /, *, workers: int = 1) -> None:
    """Compare every byte of a shard set with the checksums written when it was packed.

    Args:
        workers: Processes that read.
    """
    from shards.read.verify import verify as faults_of

    faults = faults_of(shards, workers)
    if faults:
        raise BadInput("\n".join(faults))
    print(f"{shown(shards)}: complete and unchanged")


@app.command
def index_tars(
    folder: Path, /, *, columns: Columns = AS_NAMED, leave: str = "", workers: int = 1
) -> None:
    """Make existing WebDataset tars a shard set without rewriting them.

    Args:
        folder: Folder with the tars, at any depth; tars in folders train, val and test are of that
            split.
        columns: Names in the json members where they differ, such as
            posting_id=sku,label_group=product.
        leave: Suffixes of members that are not read, such as npy,depth.png.
        workers: Processes that read.
    """
    from shards.pack.index_tars import index_tars as adopt

    ignored = [suffix for suffix in leave.split(",") if suffix]
    counts = adopt(folder, columns, ignored, workers)
    done = f"{counts['packed']} items in {counts['indexed_tars']} tars indexed"
    _print_counts(done, folder, counts)


@train_app.command
def image(
    *, shards: Shards, out: RunFolder, options: Annotated[ImageTraining, Flat] = ImageTraining()
) -> None:
    """Fine-tune the image encoder on the products of a shard set."""
    from dist_train.training.loop import train

    train("image", shards, out, options)


@train_app.command
def text(
    *, shards: Shards, out: RunFolder, options: Annotated[TextTraining, Flat] = TextTraining()
) -> None:
    """Fine-tune the text encoder on the products of a shard set."""
    from dist_train.training.loop import train

    train("text", shards, out, options)


@app.command
def export(run: Path, /, *, onnx: Path) -> None:
    """Export the encoder of a finished run to ONNX, for use outside PyTorch.

    Args:
        run: Folder of a finished train image or train text.
        onnx: File to write. The model maps prepared pixels or tokens to vectors of length one.
    """
    from dist_train.encoders.onnx import export_onnx

    export_onnx(run, onnx)
    print(f"{onnx}: written")


@app.command
def embed(
    *,
    shards: Shards,
    out: Path,
    image: Path | None = None,
    text: Path | None = None,
    options: Annotated[EmbedConfig, Flat] = EmbedConfig(),
) -> None:
    """Compute the image and text vectors of every item of a shard set.

    Give --image, --text or both. The same command resumes where it stopped.

    Args:
        out: Folder for the embedding set.
        image: Folder of a finished train image, whose encoder is used.
        text: Folder of a finished train text, whose encoder is used.
    """
    from dist_train.embedding import embed as stage

    stage.embed(shards, out, options, image, text)


@app.command
def index(
    embeddings: Path, /, *, out: Path, options: Annotated[IndexConfig, Flat] = IndexConfig()
) -> None:
    """Build a sharded FAISS index over an embedding set.

    Args:
        embeddings: Folder of an embedding set.
        out: Folder for the index. The same command resumes where it stopped.
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
    options: Annotated[JoinConfig, Flat] = JoinConfig(),
) -> None:
    """Find every pair of items down to a score floor, and the nearest neighbours of each item.

    Args:
        embeddings: Folder of an embedding set.
        index: Folder of the index over it.
        out: Folder for the pairs. Several of these commands may work on it together, started at any
            time; the same command resumes where it stopped.
    """
    from dist_train.matching.build_pairs import build_pairs

    build_pairs(embeddings, index, out, options)


@app.command
def match(
    pairs: Path, /, *, out: Path, options: Annotated[MatchConfig, Flat] = MatchConfig()
) -> None:
    """Decide which of the scored pairs are matches, and write matches and groups.

    Args:
        pairs: Folder that join has written.
        out: Folder for the matches. To try another threshold give another folder: it takes seconds.
    """
    from dist_train.decisions import match as stage

    stage.match(pairs, out, options)


@app.command
def evaluate(matches: Path, /, *, compare: tuple[str, ...] = ()) -> None:
    """Score matches on the test products, beside baselines that need no encoder.

    Args:
        matches: Folder that match has written.
        compare: Other embedding sets over the same shards, scored beside it: FOLDER, or
            NAME=FOLDER.
    """
    from dist_train.decisions import score
    from dist_train.evaluation.scores import score_table

    others = {name: Path(path or name) for name, _, path in (c.partition("=") for c in compare)}
    print(score_table(score.evaluate(matches, others)))


@app.command
def report(matches: Path, /) -> None:
    """Write report.html: scores, curves and photos of matches, in one file.

    Args:
        matches: Folder that match has written.
    """
    from dist_train.report.html import write_report

    print(write_report(matches))


def main() -> None:
    """Parse, call, and end with the exit code of the outcome."""
    command.call(app)


def _print_counts(done: str, shards: Path, counts: "Counts") -> None:
    from shards.pack.items import describe_near_duplicates

    print(
        f"{done}, {counts['rejected']} rejected, {counts['with_reason']} with a remark (column "
        f"reason of {shards / 'items.parquet'}); {counts['products']['train']} products to train on"
    )
    print(describe_near_duplicates(counts["near_duplicates"], shards))
