"""What a later stage would fail for is found after the pack at the latest, in run, plan, submit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dist_train.config.options import Config, IndexConfig, MatchConfig
from dist_train.config.slurm import SlurmConfig, SlurmJob
from dist_train.config.training import (
    HeadOptions,
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
)
from dist_train.planning.plan import plan
from dist_train.planning.preflight import check_encoder, check_match_files
from dist_train.slurm.submit import submit
from dist_train.stage_graph import run
from shards.storage.errors import BadInput
from tests.support.catalogues import labelled_text

COMMON = {"batch_size": 4, "workers": 0, "device": "cpu", "precision": "fp32", "epochs": 1.0}


@pytest.fixture
def config(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Titles of five products."""
    monkeypatch.chdir(tmp_path)
    Path("c.csv").write_text(labelled_text("posting_id,photo,title,label_group"))
    text = TextTraining(encoder=TextEncoderOptions(model=str(tiny_bert)), **COMMON)
    return Config(catalogue=Path("c.csv"), out=Path("o"), encoders=("text",), text=text)


def with_labels(labels: str) -> None:
    """A catalogue of one posting for each label; 0 and 2 train, 3 is val, 1 test, - is none."""
    rows = [f"{n},title {n},{label.strip('-')}" for n, label in enumerate(labels)]
    Path("c.csv").write_text("\n".join(["posting_id,title,label_group", *rows]))


def refused(config: Config, message: str) -> None:
    """run, plan and submit say so; no stage after the pack has begun."""
    for verb in (run, lambda config: plan(config, 1), lambda config: submit(config, dry_run=True)):
        with pytest.raises(BadInput, match=message) as error:
            verb(config)
        assert "\n" not in str(error.value)
    assert {path.name for path in Path("o").glob("*")} <= {"shards", "slurm"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("----", "0 label groups to train text on, there must be two.*text.epochs to 0"),
        ("0033", "1 label groups to train text on"),
        ("3311", "0 label groups to train text on"),
    ],
)
def test_too_few_labels(config: Config, labels: str, message: str) -> None:
    with_labels(labels)
    refused(config, message)


def test_a_threshold_that_is_given_needs_no_val_labels(config: Config) -> None:
    with_labels("002211")
    submit(replace(config, match=MatchConfig(threshold=0.7)), dry_run=True)
    path = Path("t.json")
    path.write_text(json.dumps({"threshold": 0.7, "weights": {"text": 1.0}}))
    submit(replace(config, match=MatchConfig(threshold_from=path)), dry_run=True)


def test_without_training_no_label_is_needed(config: Config) -> None:
    with_labels("----")
    untrained = replace(config, text=replace(config.text, epochs=0.0))
    submit(untrained, dry_run=True)
    submit(replace(untrained, match=MatchConfig(threshold=0.7)), dry_run=True)


@pytest.mark.parametrize("given", [None, 0.7])
def test_a_run_without_labels_ends_with_a_report(
    config: Config, given: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    with_labels("----")
    untrained = replace(config, text=replace(config.text, epochs=0.0))
    assert run(replace(untrained, match=MatchConfig(threshold=given))) is None
    assert Path("o/matches/report.html").exists()
    assert run(replace(untrained, match=MatchConfig(threshold=given))) is None  # all is done
    reason = "no threshold can be chosen on the val split: no item has a label_group"
    assert (reason in caplog.text) == (given is None)


def test_a_modality_that_no_posting_has(config: Config, tiny_vit: Path) -> None:
    image = ImageTraining(encoder=ImageEncoderOptions(model=str(tiny_vit), image_size=32), **COMMON)
    both = replace(config, encoders=("image", "text"), image=image)
    refused(both, "no posting has a photo; leave image out of encoders")


def test_a_threshold_of_another_score(config: Config) -> None:
    Path("t.json").write_text('{"threshold": 0.7, "weights": {"image": 0.5, "text": 0.5}}')
    refused(replace(config, match=MatchConfig(threshold_from=Path("t.json"))), "another|belongs to")
    assert not Path("o").exists()


@pytest.mark.parametrize("option", ["must_link", "cannot_link"])
def test_links_of_a_posting_that_is_not_in_the_catalogue(config: Config, option: str) -> None:
    Path("links.csv").write_text("posting_id_1,posting_id_2\n0,1\n0,nobody\n")
    linked = replace(config, match=MatchConfig(**{option: Path("links.csv")}))
    refused(linked, r"links\.csv: row 2: posting_id_2 'nobody' is not a posting_id")
    assert not Path("o/shards").exists()


def test_a_column_to_compare_that_the_catalogue_lacks(config: Config) -> None:
    """By its name in the embedding set; our own columns are none to compare."""
    rows = Path("c.csv").read_text().splitlines()
    header = rows[0] + ",brand,status"
    Path("c.csv").write_text("\n".join([header, *(f"{row},x,y" for row in rows[1:])]))
    for name in ("price", "label_group", "status", "title"):
        message = f"--features {name}: c.csv has no such .* it has .*brand, catalogue_status"
        refused(replace(config, match=MatchConfig(features=(name,))), message)
    known = MatchConfig(features=("brand", "catalogue_status"))
    submit(replace(config, match=known), dry_run=True)


def test_a_posting_id_that_stands_twice_is_linked_by_its_first_row(config: Config) -> None:
    """What else is to be said of it, pack says."""
    with Path("c.csv").open("a") as file:
        file.write("9,9.jpg,title 9,1\n")
    Path("links.csv").write_text("posting_id_1,posting_id_2\n0,9\n")
    check_match_files(replace(config, match=MatchConfig(must_link=Path("links.csv"))))


def test_a_batch_of_one_item_a_pass(config: Config) -> None:
    refused(replace(config, text=replace(config.text, accumulation=4)), "text: .*one item a pass")
    assert not Path("o/shards").exists()  # known before the pack


def test_a_batch_that_the_processes_do_not_divide(config: Config) -> None:
    slurm = SlurmConfig(text=SlurmJob(nodes=3, processes=1))
    with pytest.raises(BadInput, match="text: batch_size 4 does not divide among 3 processes"):
        submit(replace(config, slurm=slurm), dry_run=True)
    with pytest.raises(BadInput, match="text: batch_size 4 does not divide among 3 processes"):
        plan(config, 3)


def test_a_launcher_that_no_training_follows(config: Config) -> None:
    path = Path("fsdp.yaml")
    for strategy in ("FSDP", "MEGATRON_LM"):
        path.write_text(f"distributed_type: {strategy}\n")
        with pytest.raises(BadInput, match=rf"fsdp\.yaml: distributed_type {strategy}"):
            submit(replace(config, slurm=SlurmConfig(accelerate=path)), dry_run=True)
    path.write_text("distributed_type: MULTI_GPU\n")
    submit(replace(config, slurm=SlurmConfig(accelerate=path)), dry_run=True)


def test_an_index_of_a_modality_without_encoder() -> None:
    for modality in ("image", "both"):
        with pytest.raises(BadInput, match=f"index.modality {modality}: encoders has no image"):
            Config(
                catalogue=Path("c"), out=Path("o"), encoders=("text",),
                index=IndexConfig(modality=modality),
            )  # fmt: skip


# Encoders


def broken_bert(tiny_bert: Path, folder: Path, damage: str) -> Path:
    shutil.copytree(tiny_bert, folder)
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "NaN":
        tensors = load_file(weights)
        for name in tensors:
            if name.endswith("layer.1.output.dense.weight"):
                tensors[name][:] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        (folder / damage).unlink()
    return folder


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "cut", "NaN"])
def test_a_text_model_that_cannot_be_used(config, tiny_bert, tmp_path, damage) -> None:
    """Its training comes second: the image encoder would be trained for hours before it."""
    folder = broken_bert(tiny_bert, tmp_path / "broken", damage)
    text = replace(config.text, encoder=TextEncoderOptions(model=str(folder)))
    for verb in (run, lambda config: plan(config, 1)):
        with pytest.raises(BadInput, match=r"encoder\.model .*broken"):
            verb(replace(config, text=text))
    assert {path.name for path in Path("o").glob("*")} <= {"shards"}


@pytest.mark.parametrize("model", ["./nowhere", "$NOWHERE/bert"])
def test_a_model_that_is_not_there(config, model) -> None:
    text = replace(config.text, encoder=TextEncoderOptions(model=model))
    with pytest.raises(BadInput, match="model"):
        run(replace(config, text=text))
    assert {path.name for path in Path("o").glob("*")} <= {"shards"}


def test_sizes_that_do_not_fit_the_model(tiny_vit, tiny_bert) -> None:
    with pytest.raises(BadInput):
        check_encoder(ImageTraining(encoder=ImageEncoderOptions(model=str(tiny_vit), image_size=3)))
    long = TextEncoderOptions(model=str(tiny_bert), max_length=4096)
    with pytest.raises(BadInput, match="max_length"):
        check_encoder(TextTraining(encoder=long))


def test_encoders_that_fit(tiny_vit, tiny_bert) -> None:
    for epochs in (0.0, 1.0):
        image = ImageEncoderOptions(model=str(tiny_vit), image_size=32)
        assert check_encoder(ImageTraining(encoder=image, epochs=epochs)) == 32
        text = TextEncoderOptions(model=str(tiny_bert))
        assert check_encoder(TextTraining(encoder=text, epochs=epochs)) == 32


def test_a_head_that_grows_from_nothing_and_an_index_that_faiss_does_not_know(config) -> None:
    grown = replace(config.text, head=HeadOptions(grow_from=Path("none")))
    with pytest.raises(BadInput, match="none: has no checkpoint to grow from"):
        run(replace(config, text=grown))
    with pytest.raises(BadInput, match="--kind Flatt: FAISS cannot make it"):
        run(replace(config, index=IndexConfig(kind="Flatt")))
    assert {path.name for path in Path("o").glob("*")} <= {"shards"}


def test_other_options_than_a_begun_stage_has(config) -> None:
    """Found at once, not when the stages before it are done."""
    Path("o/index").mkdir(parents=True)
    told = {"format": 1, "kind": "index", "config": {"kind": "IVF"}, "parents": {}}
    Path("o/index/stage.json").write_text(json.dumps(told))
    Path("o/index/status.json").write_text('{"status": "preempted"}')
    with pytest.raises(BadInput, match="was begun with other options"):
        run(config)
    assert not Path("o/shards").exists()
