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
        help="A shard set, as pack or index-tars writes it: its folder, or its address (https://, "
        "s3://, gs://, whatever fsspec opens)."
    ),
]
RunFolder = Annotated[
    Path,
    Parameter(
        help="Folder for the training: its encoder, checkpoints and metrics. The same command "
        "resumes where it stopped; other options need another folder."
    ),
]
app = App(
    name="dist-train",
    help="Find which postings of a catalogue are the same product. The stages in their order: "
    "pack, train image, train text, embed, index, join, match, evaluate, report. run does all.",
    help_epilogue="Every verb takes --config FILE.yaml for any of its options. Exit codes: 0 done, "
    "1 failed, 2 bad input, 3 stopped and resumable, 4 no GPU where one was requested.",
    version=__version__,
    default_parameter=Parameter(negative_iterable=(), show_default=command.format_default),
)
train_app = App(name="train", help="Fine-tune an encoder on the products of a shard set.")
app.command(train_app)
for verb in ("demo", "status", "doctor"):
    app.command(getattr(cli_pipeline, verb))
for verb in command.CONFIG_FIRST:
    usage = f"Usage: dist-train {verb} CONFIG.yaml [OPTIONS]"
    app.command(getattr(cli_pipeline, verb), usage=usage)
command.add_config_option(app)


@app.command
def generate(
    *, items: int, out: Path, seed: int = 1, photos: bool = True, workers: int = 1
) -> None:
    """Generate a synthetic catalogue with photos, titles and product labels.

    Args:
        items: Number of postings.
        out: Folder for catalogue.csv and images/.
        seed: Random seed. The same seed writes exactly the same files; another one another
            catalogue.
        photos: Draw a photo for each posting. Without photos the catalogue is for text alone, and
            fast.
        workers: Processes that draw photos: up to the number of CPU cores.
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
    """Pack a catalogue and its photos into a shard set, which train and embed read.

    Products are split by a hash of their label into train (60 %), val (20 %) and test (20 %), so
    that all postings of a product are in one split; postings without a label are in none. A posting
    whose photo cannot be used keeps its title; items.parquet holds the reason. The same command
    resumes where it stopped.

    Args:
        catalogue: CSV, TSV, Parquet or JSON Lines file, a posting a row, with the columns
            posting_id, image, title and label_group. label_group is the known product of a posting;
            training, the choice of a threshold and scores need some, and it may be empty. Where
            products have a split already: split (train, val or test).
        out: Folder for the shard set.
        images: Folder that the paths in the column image are relative to. Needed if the catalogue
            names photos.
        columns: Your names of columns that are not called posting_id, image, title and label_group,
            as OURS=YOURS: posting_id=sku,title=name.
        task: Part of the work that this command does, from 0 to OF - 1. In a Slurm array: --task
            $SLURM_ARRAY_TASK_ID.
        of: Number of commands that share the work, each with its own task and the same out, started
            in any order on machines that share the folder. The last to end completes the set.
    """
    from shards.pack import pack

    counts = pack.pack(catalogue, images, out, options, columns, pack.Task(task, of))
    if counts is None:  # other packs are still building; what is missing was logged
        return
    _print_counts(f"{counts['packed']} postings packed", out, counts)


@app.command
def verify(shards: Shards, /, *, workers: int = 1) -> None:
    """Compare every byte of a shard set with its checksums, for example after it was copied.

    Prints what differs or is missing; the exit code is then 2.

    Args:
        workers: Processes that read: up to the number of CPU cores.
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

    A sample is KEY.jpg (or png, webp) and KEY.json with title and label_group, or KEY.txt with the
    title. Writes an index beside each tar, and items.parquet and the other files of a shard set
    into the folder.

    Args:
        folder: Folder with the tars, at any depth. Tars in folders train, val and test, or with
            such a word in their name, are of that split; others are split by product as pack does.
        columns: Your names of keys in the JSON files that are not called posting_id, title and
            label_group, as OURS=YOURS: posting_id=sku,label_group=product.
        leave: Files in the tars that are left unread: endings, names or patterns, such as
            npy,depth.png,README,draft_*.
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
    """Fine-tune the image encoder to separate the products of the train split.

    embed takes the folder as --image. On several GPUs: accelerate launch -m dist_train train image.
    """
    from dist_train.training.loop import train

    train("image", shards, out, options)


@train_app.command
def text(
    *, shards: Shards, out: RunFolder, options: Annotated[TextTraining, Flat] = TextTraining()
) -> None:
    """Fine-tune the text encoder to separate the products of the train split.

    embed takes the folder as --text. On several GPUs: accelerate launch -m dist_train train text.
    """
    from dist_train.training.loop import train

    train("text", shards, out, options)


@app.command
def export(run: Path, /, *, onnx: Path) -> None:
    """Export a trained encoder to ONNX, for use outside PyTorch.

    Args:
        run: Folder that train image or train text has written.
        onnx: File to write. The model maps batches of prepared pixels or of tokens to unit vectors;
            README.md in the encoder folder says how they are prepared.
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
        out: Folder for the vectors of all items, the embedding set, which index and join read.
        image: Folder that train image has written (for an encoder as it is: train image --epochs
            0).
        text: Folder that train text has written.
    """
    from dist_train.embedding import embed as stage

    stage.embed(shards, out, options, image, text)


@app.command
def index(
    embeddings: Path, /, *, out: Path, options: Annotated[IndexConfig, Flat] = IndexConfig()
) -> None:
    """Build a FAISS index, in one or more files, over an embedding set.

    It also fixes how a pair is scored (--modality, --image-weight), so join needs it.

    Args:
        embeddings: Folder that embed has written.
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

    The score of a pair is the weighted mean of its image and text cosines, from -1 to 1; the score
    floor is the lowest score that is kept.

    Args:
        embeddings: Folder that embed has written.
        index: Folder that index has written for these embeddings.
        out: Folder for the pairs. To share the work start the same command several times, on
            machines that share the folder; the same command also resumes where it stopped.
    """
    from dist_train.matching.build_pairs import build_pairs

    build_pairs(embeddings, index, out, options)


@app.command
def match(
    pairs: Path, /, *, out: Path, options: Annotated[MatchConfig, Flat] = MatchConfig()
) -> None:
    """Decide which of the scored pairs are matches, and write matches and groups.

    A group is a set of postings that matches connect.

    Args:
        pairs: Folder that join has written.
        out: Folder for matches.parquet, groups.parquet and submission.csv. Another threshold needs
            another folder, and seconds: the pairs are used again.
    """
    from dist_train.decisions import match as stage

    stage.match(pairs, out, options)


@app.command
def evaluate(matches: Path, /, *, compare: tuple[str, ...] = ()) -> None:
    """Compare matches with the labels of the test products, beside baselines without an encoder.

    Prints mean F1 per item with its 95 % interval, precision and recall, and writes metrics.json.
    Baselines are the posting itself, the same photo, and similar titles.

    Args:
        matches: Folder that match has written.
        compare: Folder of another embedding set over the same shards that is evaluated too, as
            FOLDER or NAME=FOLDER. Give the option again for several.
    """
    from dist_train.decisions import score
    from dist_train.evaluation.scores import score_table

    others = {name: Path(path or name) for name, _, path in (c.partition("=") for c in compare)}
    print(score_table(score.evaluate(matches, others)))


@app.command
def report(matches: Path, /, *, shards: str | None = None) -> None:
    """Write report.html into the folder of the matches: scores, curves and photos, in one file.

    Scores are shown if evaluate has run before.

    Args:
        matches: Folder that match has written.
        shards: The shard set with the photos, where it does not lie as it did beside the
            embedding set. An address is opened only if it is given here.
    """
    from dist_train.report.html import write_report

    print(write_report(matches, shards))


# The help lists complete pipelines first, then the stages in their order.
PIPELINES = ("demo", "run", "plan", "submit", "status", "doctor", "generate")
STAGES = ("pack", "index-tars", "verify", "train", "embed", "index", "join", "match", "evaluate")
for position, verb in enumerate((*PIPELINES, *STAGES, "report", "export")):
    app[verb].sort_key = position


def main() -> None:
    """Parse, call, and end with the exit code of the outcome."""
    command.call(app)


def _print_counts(done: str, shards: Path, counts: "Counts") -> None:
    from shards.pack.items import describe_near_duplicates, describe_remarks

    print(
        f"{done}, {counts['rejected']} rejected, {counts['with_reason']} with a remark"
        f"; {counts['products']['train']} products to train on"
    )
    if remarks := describe_remarks(shards):
        print(f"remarks, each in {shards / 'remarks.csv'}:", *remarks, sep="\n  ")
    print(describe_near_duplicates(counts["near_duplicates"], shards))
