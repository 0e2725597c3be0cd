"""Every option of run, submit, plan, doctor and status: another value, another effect.

The tables name every option; one that a verb gets and a table lacks fails here.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from dist_train import cli
from dist_train.config.options import Config
from dist_train.config.slurm import SlurmConfig
from dist_train.decisions import pair_model
from dist_train.doctor import doctor as examination
from dist_train.doctor.finding import Finding, fault
from dist_train.planning import plan as planning
from tests.support.catalogues import labelled_text
from tests.support.recorded_programs import call_verb

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")
Verb = Callable[..., tuple[int, str, str]]

HEAD = {
    "loss": "cosface", "margin": 0.4, "margin_of_largest": 0.2, "gradient": "detached",
    "centres": 2, "sample": 0.5, "scale": 30.0, "ramp": 0.2, "lr": 0.004, "warmup": 0.05,
    "start": "means", "grow_from": "runs/before", "chunk": 512,
}  # fmt: skip
TRAINING = {
    "epochs": 3.5, "batch_size": 96, "accumulation": 3, "order": "window", "lr": 7e-5,
    "layer_decay": 0.75, "freeze": 0.1, "weight_decay": 0.05, "clip": 1.5,
    "schedule": "one-cycle", "warmup": 0.3, "head": HEAD, "ema": 0.9, "keep_best": False,
    "patience": 3, "precision": "fp32", "gradient_checkpointing": True, "compile": True,
    "checkpoint_every": 50, "keep": 4, "grace": 30.0, "validate_every": 0.5, "log_every": 7,
    "workers": 2, "max_unreadable": 0.2, "max_skipped": 9, "compare_every": 11, "seed": 5,
    "device": "cpu",
}  # fmt: skip
PIPELINE = {
    "pack": {
        "size": 256, "quality": 80, "keep": True, "max_pixels": 1_000_000, "photos": False,
        "follow_links": True, "max_title": 100, "shard_items": 50, "seed": 3, "workers": 2,
    },
    "image": TRAINING | {
        "encoder": {"model": "resnet18", "pretrained": False, "pooling": "gem", "image_size": 96,
                    "decode": "exact", "neck": False},
        "min_crop": 0.25, "jitter": 0.1, "erase": 0.5, "rand_augment": "rand-m7", "mixup": 0.2,
        "cutmix": 1.0,
    },
    "text": TRAINING | {
        "encoder": {"model": "bert", "pretrained": False, "pooling": "cls", "max_length": 32,
                    "dropout": 0.1, "neck": False, "prefix": "query: ",
                    "trust_remote_code": True},
        "seed": 6,
    },
    "embed": {"dtype": "float32", "precision": "fp32", "batch_size": 8, "max_unreadable": 0.3,
              "workers": 1, "trust_remote_code": True, "device": "cpu"},
    "index": {"modality": "image", "image_weight": 0.7, "kind": "Flat", "memory": "2GB",
              "recall_rows": 50},
    "join": {"engine": "gemm", "pairs_per_item": 10.0, "max_score_floor": 0.4, "neighbours": 3,
             "memory": "3GB", "audit_rows": 20, "device": "cpu"},
    "match": {"threshold": 0.5, "plain": True, "candidates": 30, "features": ["brand", "size"],
              "max_group": 9, "must_link": "same.csv", "cannot_link": "different.csv"},
}  # fmt: skip
"""Every option of every stage, each with another value than its default."""
ELSEWHERE = {"photos_per_product": {"order": "global", "photos_per_product": 2},
             "threshold_from": {"threshold": None, "threshold_from": "t.json"},
             "precision": {"threshold": None, "precision": 0.9}}  # fmt: skip
"""Options that do not go with another of the table: what changes when they are given."""
SECTIONS = ["pack", "image", "text", "embed", "index", "join", "match", "evaluate", "report"]
JOB = {
    "partition": "p1", "account": "a1", "qos": "q1", "nodes": 2, "gpus": 3, "processes": 4,
    "cpus": 5, "mem": "6G", "time": "7:00", "sbatch": ["--exclude=node7"],
}  # fmt: skip
SLURM = JOB | {
    "setup": ["module load cuda"], "container": "apptainer exec image.sif", "srun": ["--mpi=none"],
    "accelerate": "mine.yaml", "stop_before": 99, "max_requeues": 7,
}  # fmt: skip
TOP = {"catalogue": "c.csv", "out": "runs/pipeline", "images": "photos",
       "columns": {"posting_id": "sku", "title": "name", "label_group": "product"},
       "encoders": ["text", "image"], "compare": ["random"]}  # fmt: skip


def options_of(verb: str) -> set[str]:
    """The names of what a verb takes: --image.head.lr is image.head.lr."""
    found = cli.app[verb].assemble_argument_collection(parse_docstring=False)
    return {one.name.lstrip("-").replace("-", "_").lower() for one in found
            if not is_dataclass(one.hint) and not one.children}  # fmt: skip


def leaves(tree: dict[str, Any], before: str = "") -> Iterator[str]:
    """The names of the options of a tree."""
    for name, value in tree.items():
        if isinstance(value, dict) and name != "columns":
            yield from leaves(value, f"{before}{name}.")
        else:
            yield before + name


def at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def plain(value: Any) -> Any:
    """As YAML holds it."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def pipeline_options() -> set[str]:
    """Of the tables, but for Slurm's."""
    own = {f"image.{name}" for name in ELSEWHERE if name == "photos_per_product"}
    own |= {"text.photos_per_product", "match.threshold_from", "match.precision"}
    return own | set(leaves(PIPELINE)) | set(leaves(TOP))


def slurm_options() -> set[str]:
    sections = {f.name for f in fields(SlurmConfig) if is_dataclass(f.default_factory)}
    assert sections == set(SECTIONS)
    names = {*JOB, "tasks"}
    own = {f"slurm.{section}.{name}" for section in sections for name in names}
    return own | {f"slurm.{name}" for name in (*SLURM, "tasks")}


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capfd, tmp_path: Path) -> Verb:
    """Runs a verb in this process, in a folder with a catalogue, where there is no Slurm."""
    monkeypatch.chdir(tmp_path)
    header, *rows = labelled_text("sku,image,name,product").splitlines()
    lines = [f"{header},brand,size", *(f"{row},b,{len(row)}" for row in rows)]
    Path("c.csv").write_text("\n".join(lines))
    for number, name in enumerate(("same.csv", "different.csv")):
        Path(name).write_text(f"posting_id_1,posting_id_2\n{number},{number + 1}\n")
    Path("mine.yaml").write_text("compute_environment: MINE\n")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return lambda *words: call_verb(monkeypatch, capfd, *words)


def write(tree: dict[str, Any], path: str = "k.yaml") -> str:
    Path(path).write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


# ── the tables


def test_every_value_of_the_table_is_another_than_the_default() -> None:
    default = plain(asdict(Config(catalogue=Path("x"), out=Path("y"))))
    for tree in (PIPELINE, {"slurm": SLURM}, TOP):
        for path in leaves(tree):
            assert at(tree, path) != at(default, path), path


@pytest.mark.parametrize("name", ["run", "submit", "plan"])
def test_the_tables_name_every_option_of_the_road(name: str) -> None:
    more = {"submit": {"dry_run"}, "plan": set(PLAN)}.get(name, set())
    assert options_of(name) == pipeline_options() | slurm_options() | more


def test_the_tables_name_every_option_of_the_others() -> None:
    assert options_of("doctor") == {"out", "device", "json"}
    assert options_of("status") == {"folder"}


# ── run: each stage gets what the config says


@dataclass
class Call:
    """A stage that was called."""

    stage: str
    given: list[Any]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Stands in for every stage of `run`, and writes down what it is called with."""
    calls: list[Call] = []

    def recorder(name: str) -> Callable[..., Any]:
        def record(*given: Any, **more: Any) -> Any:
            calls.append(Call(name, [plain(asdict(one)) if is_dataclass(one) else plain(one)
                                     for one in (*given, *more.values())]))  # fmt: skip
            return Path("report.html") if name == "write_report" else None

        return record

    for module in (
        "shards.pack.pack.pack", "dist_train.training.loop.train",
        "dist_train.embedding.embed.embed",
        "dist_train.matching.index.build_index", "dist_train.matching.build_pairs.build_pairs",
        "dist_train.decisions.match.match", "dist_train.decisions.score.evaluate",
        "dist_train.report.html.write_report",
    ):  # fmt: skip
        monkeypatch.setattr(module, recorder(module.rpartition(".")[2]))
    # Nothing is packed that it could read.
    monkeypatch.setattr("dist_train.planning.preflight.check_after_pack", lambda *given: None)
    return calls


def holds(given: Any, wanted: dict[str, Any]) -> bool:
    """Options with all these values."""
    if not isinstance(given, dict) or not wanted.keys() <= given.keys():
        return False
    return all(
        holds(given[name], value) if isinstance(value, dict) else given[name] == value
        for name, value in wanted.items()
    )


def test_every_option_of_run_reaches_its_stage(verb: Verb, stages: list[Call]) -> None:
    code, out, err = verb("run", write(TOP | PIPELINE))
    assert code == 0, err
    assert "report: runs/pipeline/matches/report.html" in out
    where = "runs/pipeline"
    pack, text, image, embed, *compared, index, join, match, evaluate, report = stages
    assert pack.given[:3] == ["c.csv", "photos", f"{where}/shards"]
    assert holds(pack.given[3], PIPELINE["pack"])
    assert pack.given[4] == TOP["columns"]
    for call, modality in ((text, "text"), (image, "image")):
        assert call.given[:3] == [modality, f"{where}/shards", f"{where}/{modality}"]
        assert holds(call.given[3], PIPELINE[modality]), modality
    assert embed.given[:2] == [f"{where}/shards", f"{where}/embedding"]
    assert holds(embed.given[2], PIPELINE["embed"])
    assert embed.given[3:] == [f"{where}/image", f"{where}/text"]
    assert [call.stage for call in compared] == ["train", "train", "embed"]
    for call, modality in zip(compared[:2], ("text", "image"), strict=True):
        assert call.given[:3] == [modality, f"{where}/shards", f"{where}/random-{modality}"]
        assert holds(call.given[3], PIPELINE[modality] | {"epochs": 0.0})
    assert index.given[:2] == [f"{where}/embedding", f"{where}/index"]
    assert holds(index.given[2], PIPELINE["index"])
    assert join.given[:3] == [f"{where}/{name}" for name in ("embedding", "index", "pairs")]
    assert holds(join.given[3], PIPELINE["join"])
    assert match.given[:2] == [f"{where}/pairs", f"{where}/matches"]
    assert holds(match.given[2], PIPELINE["match"])
    assert evaluate.given == [f"{where}/matches", {"random": f"{where}/random-embedding"}]
    assert report.given == [f"{where}/matches"]
    calls = ("pack", "train", "train", "embed", "train", "train", "embed", "build_index",
             "build_pairs", "match", "evaluate", "write_report")  # fmt: skip
    assert tuple(call.stage for call in stages) == calls


def test_options_of_run_that_do_not_go_with_others(verb: Verb, stages: list[Call]) -> None:
    columns = {"columns": {"posting_id": "sku", "title": "name"}}
    given: dict[str, Any] = {"catalogue": "c.csv", "out": "o", "encoders": ["image"]} | columns
    given |= {"image": {"photos_per_product": 2}, "match": {"threshold_from": "t.json"}}
    Path("t.json").write_text('{"threshold": 0.7, "weights": {"image": 1.0}}')
    assert verb("run", write(given))[0] == 0
    pack, train, embed, *_ = stages
    assert (pack.given[1], pack.given[4]) == (None, columns["columns"])
    assert train.given[3]["photos_per_product"] == 2
    assert embed.given[3:] == ["o/image", None]
    join, match = (call for call in stages if call.stage in ("build_pairs", "match"))
    assert join.given[3]["max_score_floor"] == match.given[2]["threshold"] == 0.7
    stages.clear()
    given = {"catalogue": "c.csv", "out": "o", "encoders": ["text"],
             "text": {"photos_per_product": 2}, "compare": ["untrained"]} | columns  # fmt: skip
    assert verb("run", write(given))[0] == 0
    assert [call.given[3]["photos_per_product"] for call in stages if call.stage == "train"] == [
        2, 2
    ]  # fmt: skip
    assert verb("run", write(given | {"match": ELSEWHERE["precision"]}))[0] == 0
    assert holds(stages[-2].given[2], ELSEWHERE["precision"])
    untrained = [call for call in stages if call.stage == "train"][1].given[3]
    assert (untrained["epochs"], untrained["encoder"]["pretrained"]) == (0.0, True)


def test_without_test_products_run_scores_nothing(verb: Verb, stages: list[Call]) -> None:
    given = {"catalogue": "c.csv", "out": "o", "columns": TOP["columns"]}
    for label in ("", "g"):  # g is a product to train on
        stages.clear()
        Path("c.csv").write_text(f"sku,name,product\n1,a,{label}\n2,b,{label}\n")
        assert verb("run", write(given))[0] == 0
        assert [call.stage for call in stages][-2:] == ["match", "write_report"]


def test_run_under_a_launcher_is_refused(
    verb: Verb, stages: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    code, _, err = verb("run", write({"catalogue": "c.csv", "out": "o"}))
    assert (code, "run starts its stages itself" in err) == (2, True)
    assert not stages


# ── submit: each script and each file of options says what the config says


def scripts(folder: str = "runs/pipeline") -> dict[str, str]:
    """The scripts of a dry run, by the name of the stage."""
    dry = Path(folder) / "slurm" / "dry-run"
    return {path.stem[3:]: path.read_text() for path in dry.glob("*.sbatch")}


def asked(text: str) -> dict[str, str]:
    """What a script asks Slurm for, and what it exports."""
    found = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    return found | dict(re.findall(r"^export (\w+)=(.*)$", text, re.MULTILINE))


def command(text: str) -> str:
    """What a script starts."""
    return " ".join(text[text.index("exec bash ") :].replace("\\\n", "").split()[3:])


FILES = {"pack": "pack", "image": "image", "text": "text", "embed": "embedding",
         "index": "index", "join": "join", "match": "match"}  # fmt: skip


def test_every_option_of_a_stage_reaches_the_file_that_its_job_reads(verb: Verb) -> None:
    code, out, err = verb("submit", write(TOP | PIPELINE), "--dry-run")
    assert code == 0, err
    assert "not checked by sbatch" in out
    dry = Path("runs/pipeline/slurm/dry-run")
    for section, name in FILES.items():
        assert holds(yaml.safe_load((dry / f"{name}.yaml").read_text()), PIPELINE[section]), section
    other = TOP | PIPELINE | {"out": "runs/other"}
    for section in ("image", "text"):
        given = PIPELINE[section] | ELSEWHERE["photos_per_product"]
        assert verb("submit", write(other | {section: given}), "--dry-run")[0] == 0
        file = Path("runs/other/slurm/dry-run") / f"{section}.yaml"
        assert holds(yaml.safe_load(file.read_text()), given)
    Path("t.json").write_text('{"threshold": 0.7, "weights": {"image": 1.0}}')
    given = {"threshold_from": "t.json"}
    assert verb("submit", write(other | {"match": given}), "--dry-run")[0] == 0
    file = Path("runs/other/slurm/dry-run/match.yaml")
    written = yaml.safe_load(file.read_text())
    assert (written["threshold"], "threshold_from" in written) == (0.7, False)
    assert verb("submit", write(other | {"match": ELSEWHERE["precision"]}), "--dry-run")[0] == 0
    assert yaml.safe_load(file.read_text())["precision"] == 0.9


def test_a_pair_model_of_another_match_reaches_the_match(verb: Verb, stages: list[Call]) -> None:
    """The threshold beside it is of a probability, so the join goes by that of the score alone."""
    same = np.arange(200) % 2 == 0
    folds = np.stack([np.arange(200) % 5, np.full(200, -1)], axis=1)
    model = pair_model.fit(pd.DataFrame({"score": same + 0.0}), same, folds, queries=9, products=5)
    model.save(Path("pair_model.json"))
    known = {"form": "pair model", "threshold": 0.6, "score_threshold": 0.7}
    Path("t.json").write_text(json.dumps(known | {"weights": {"image": 1.0}}))
    columns = {"columns": {"posting_id": "sku", "title": "name"}}
    given = {"catalogue": "c.csv", "out": "o", "encoders": ["image"], "images": "photos"} | columns
    given |= {"match": {"threshold_from": "t.json"}, "image": {"epochs": 0}}
    assert verb("run", write(given))[0] == 0
    join, match = (call for call in stages if call.stage in ("build_pairs", "match"))
    assert join.given[3]["max_score_floor"] == 0.7
    assert (match.given[2]["threshold"], match.given[2]["threshold_from"]) == (None, "t.json")
    code, *said = verb("submit", write(given | {"out": "other"}), "--dry-run")
    assert code == 0, said
    written = yaml.safe_load(Path("other/slurm/dry-run/match.yaml").read_text())
    assert (written["threshold_from"], "threshold" in written) == ("t.json", False)


def test_the_options_above_the_stages_reach_the_commands(verb: Verb) -> None:
    given = TOP | PIPELINE | {"slurm": {"pack": {"tasks": 1}}}
    assert verb("submit", write(given), "--dry-run")[0] == 0
    found = {name: command(text) for name, text in scripts().items()}
    where, dry = "runs/pipeline", "runs/pipeline/slurm/dry-run"
    assert found == {
        "pack": f"pack c.csv --out {where}/shards --images photos --columns "
        f"posting_id=sku,title=name,label_group=product --config {dry}/pack.yaml",
        "text": f"train text --shards {where}/shards --out {where}/text --config {dry}/text.yaml",
        "image": f"train image --shards {where}/shards --out {where}/image "
        f"--config {dry}/image.yaml",
        "embedding": f"embed --shards {where}/shards --out {where}/embedding "
        f"--text {where}/text --image {where}/image --config {dry}/embedding.yaml",
        "random-text": f"train text --shards {where}/shards --out {where}/random-text "
        f"--config {dry}/random-text.yaml",
        "random-image": f"train image --shards {where}/shards --out {where}/random-image "
        f"--config {dry}/random-image.yaml",
        "random-embedding": f"embed --shards {where}/shards --out {where}/random-embedding "
        f"--text {where}/random-text --image {where}/random-image "
        f"--config {dry}/random-embedding.yaml",
        "index": f"index {where}/embedding --out {where}/index --config {dry}/index.yaml",
        "join": f"join {where}/embedding --index {where}/index --out {where}/pairs "
        f"--config {dry}/join.yaml",
        "match": f"match {where}/pairs --out {where}/matches --config {dry}/match.yaml",
        "evaluate": f"evaluate {where}/matches --compare random={where}/random-embedding",
        "report": f"report {where}/matches",
    }  # fmt: skip
    random = yaml.safe_load((Path(dry) / "random-image.yaml").read_text())
    assert (random["epochs"], random["encoder"]["pretrained"]) == (0.0, False)


def test_every_option_of_slurm_reaches_the_scripts(verb: Verb) -> None:
    given = {
        "catalogue": "c.csv",
        "out": "runs/pipeline",
        "columns": TOP["columns"],
        "slurm": SLURM,
    }
    assert verb("submit", write(given), "--dry-run")[0] == 0
    text = scripts()["image"]
    found = asked(text)
    assert {
        "partition": "p1", "account": "a1", "qos": "q1", "nodes": "2", "ntasks-per-node": "1",
        "gres": "gpu:3", "cpus-per-task": "5", "mem": "6G", "time": "7:00", "exclude": "node7",
        "signal": "B:USR1@99", "GPUS": "4", "MAX_REQUEUES": "7", "SRUN_OPTIONS": "--mpi=none",
        "CONTAINER": "'apptainer exec image.sif'", "requeue": "",
    }.items() <= found.items()  # fmt: skip
    assert "VENV" not in found, "the container has its own"
    assert "\nmodule load cuda\n" in text
    assert Path(found["ACCELERATE_CONFIG"]).read_text() == Path("mine.yaml").read_text()
    plain_given = given | {"slurm": {}, "out": "runs/plain"}
    assert verb("submit", write(plain_given), "--dry-run")[0] == 0
    bare = asked(scripts("runs/plain")["image"])
    assert not {"partition", "account", "qos", "gres", "cpus-per-task", "mem", "time", "exclude",
                "SRUN_OPTIONS", "CONTAINER", "array"} & bare.keys()  # fmt: skip
    assert {"nodes": "1", "signal": "B:USR1@180", "GPUS": "1",
            "MAX_REQUEUES": "20"}.items() <= bare.items()  # fmt: skip
    assert "VENV" in bare
    code, _, err = verb("submit", write(given | {"slurm": {"tasks": 2}}), "--dry-run")
    assert (code, "slurm.tasks: only for pack and join" in err) == (2, True)


def test_every_option_of_a_stage_of_slurm_reaches_its_script_alone(verb: Verb) -> None:
    """Each section has values of its own, and goes before the section above it."""
    own: dict[str, Any] = {}
    for number, section in enumerate(SECTIONS, 11):
        own[section] = {
            "partition": f"p{number}", "account": f"a{number}", "qos": f"q{number}",
            "nodes": number, "gpus": number + 20, "processes": number + 40, "cpus": number + 60,
            "mem": f"{number}M", "time": f"{number}:00", "sbatch": [f"--nice={number}"],
        }  # fmt: skip
        if section in ("pack", "join"):
            own[section]["tasks"] = number + 80
    given = {"catalogue": "c.csv", "out": "runs/pipeline", "columns": TOP["columns"]}
    for section in ("image", "text"):  # batches that so many processes divide
        given[section] = {"batch_size": own[section]["nodes"] * own[section]["processes"]}
    assert verb("submit", write(given | {"slurm": JOB | own}), "--dry-run")[0] == 0
    names = {name: FILES.get(name, name) for name in SECTIONS}
    for number, section in enumerate(SECTIONS, 11):
        found = asked(scripts()[names[section]])
        wanted = {
            "partition": f"p{number}", "account": f"a{number}", "qos": f"q{number}",
            "nodes": str(number), "gres": f"gpu:{number + 20}", "GPUS": str(number + 40),
            "cpus-per-task": str(number + 60), "mem": f"{number}M", "time": f"{number}:00",
            "nice": str(number),
        }  # fmt: skip
        if section in ("pack", "join"):
            wanted["array"] = f"0-{number + 79}"
        assert wanted.items() <= found.items(), section
        assert ("array" in found) == ("array" in wanted)
    tasks = f"--task %a --of {own['pack']['tasks']}"
    assert tasks in command(scripts()["pack"])
    for section in set(SECTIONS) - {"pack", "join"}:
        refused = given | {"slurm": {section: {"tasks": 2}}}
        assert verb("submit", write(refused), "--dry-run")[0] == 2


def test_a_dry_run_of_submit_is_one(verb: Verb) -> None:
    given = write({"catalogue": "c.csv", "out": "o", "columns": TOP["columns"]})
    code, _, err = verb("submit", given)
    assert (code, "sbatch" in err) == (2, True)
    assert not Path("o").exists()
    assert verb("submit", given, "--dry-run")[0] == 0
    assert scripts("o")


# ── plan


PLAN = {"processes": ("ranks", 1, 3), "json": ()}
"""Options of plan beside the config's; tests/unit/planning/test_plan.py tells what ranks do."""


def test_every_option_of_plan_has_an_effect(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def record(config: Config, processes: int) -> planning.Plan:
        asked_for.append((config, processes))
        stage = planning.StageCost("pack", 1, 1.0, 7.0, 5.0)
        return planning.Plan("cpu", max(1, processes), 9.0, stages=[stage])

    monkeypatch.setattr(planning, "plan", record)
    given = write(TOP | PIPELINE | {"slurm": SLURM})
    code, out, _ = verb("plan", given)
    assert code == 0
    assert out.splitlines()[-1] == "everything fits"
    code, out, _ = verb("plan", given, "--processes", 3, "--json")
    assert code == 0
    assert json.loads(out)["stages"] == [
        {"stage": "pack", "ranks": 1, "seconds": 1, "memory_bytes": 7, "disk_bytes": 5, "note": ""}
    ]
    assert json.loads(out)["ranks"] == 3
    (config, first), (_, second) = asked_for
    assert (first, second) == (0, 3)
    tree = plain(asdict(config))
    assert holds(tree, TOP | PIPELINE | {"slurm": SLURM})


def test_a_plan_that_does_not_fit_ends_with_1(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = planning.StageCost("pack", 1, 1.0, 7.0, 5.0)
    found = planning.Plan("cpu", 1, 9.0, stages=[stage], misfits=["a needs more", "b needs more"])
    monkeypatch.setattr(planning, "plan", lambda *_: found)
    code, out, err = verb("plan", write(TOP))
    assert (code, "2 things do not fit, see above" in err) == (1, True)
    assert out.splitlines()[-2:] == ["does not fit: a needs more", "does not fit: b needs more"]


# ── doctor


@pytest.mark.parametrize("level", ["fine", "note", "fault"])
def test_every_option_of_doctor_has_an_effect(
    verb: Verb, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    asked_for = []

    def examine(device: str, out: Path) -> list[Finding]:
        asked_for.append((device, out))
        return [Finding("disk", "full of room"), fault("port", "taken", "free it")][
            : 2 if level == "fault" else 1
        ] + [Finding("hub", "is there", level)] * (level != "fault")  # fmt: skip

    monkeypatch.setattr(examination, "examine", examine)
    code, out, err = verb("doctor")
    assert code == (1 if level == "fault" else 0)
    assert ("1 faults, see above" in err) == (level == "fault")
    assert out.splitlines()[0].split() == ["fine", "disk", "full", "of", "room"]
    code, out, _ = verb("doctor", "--out", "runs", "--device", "cuda", "--json")
    assert code == (1 if level == "fault" else 0)
    assert json.loads(out)["fine"] == (level != "fault")
    findings = json.loads(out)["findings"]
    assert findings[0]["message"] == "full of room"
    port = {"name": "port", "message": "taken", "level": "fault", "remedy": "free it"}
    assert findings[1:] == [port] or level != "fault"
    assert asked_for == [("auto", Path()), ("cuda", Path("runs"))]
