"""The chain of stage directories: from what each was made, what is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.distributed import stage
from shards.storage import stage_files
from shards.storage.errors import BadInput, Corrupt, Unfinished


def make(path: Path, kind: str, content: str = "x", parents: dict | None = None) -> Path:
    """A finished stage directory of one file."""
    stage_files.begin(path, kind, {"content": content}, parents or {})
    (path / "file.txt").write_text(content)
    stage_files.finish(path, {"files": 1}, [path / "file.txt"])
    return path


@pytest.fixture
def chain(tmp_path):
    """A shard set and a run made from it."""
    shards = make(tmp_path / "a/shards", "shard set")
    run = tmp_path / "b/run"
    return shards, make(run, stage.RUN, parents=stage.parents_for(run, shards=shards))


def test_parents_are_relative_paths_with_fingerprints(chain):
    shards, run = chain
    recorded = json.loads((run / "stage.json").read_text())["parents"]
    fingerprint = json.loads((shards / "manifest.json").read_text())["fingerprint"]
    assert recorded == {"shards": {"path": "../../a/shards", "fingerprint": fingerprint}}
    assert stage.parent(run, "shards") == shards.resolve()


def test_a_parent_not_given_is_not_recorded(chain):
    shards, run = chain
    assert set(stage.parents_for(run, shards=shards, image=None)) == {"shards"}


def test_paths_may_be_relative_to_where_one_stands(chain, tmp_path, monkeypatch):
    shards, run = chain
    monkeypatch.chdir(tmp_path / "b")
    assert stage.parents_for(Path("run"), shards=Path("../a/shards")) == stage.parents_for(
        run, shards=shards
    )
    assert stage.parent(Path("run"), "shards") == shards.resolve()


def test_the_whole_chain_may_be_moved_together(chain, tmp_path):
    (tmp_path / "moved").mkdir()
    for name in ("a", "b"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    found = stage.parent(tmp_path / "moved/b/run", "shards")
    assert found == (tmp_path / "moved/a/shards").resolve()


def test_a_parent_that_changed_is_refused(chain):
    shards, run = chain
    shutil.rmtree(shards)
    make(shards, "shard set", content="y")
    with pytest.raises(BadInput, match="was made from another shards than now lies at"):
        stage.parent(run, "shards")


def test_a_parent_that_is_gone_unfinished_or_foreign_is_refused(chain):
    shards, run = chain
    with pytest.raises(BadInput, match="was not made from any image"):
        stage.parent(run, "image")
    (shards / "manifest.json").unlink()
    with pytest.raises(Unfinished, match="shards: unfinished"):
        stage.parent(run, "shards")
    shutil.rmtree(shards)
    with pytest.raises(BadInput, match="shards: not a shard set directory"):
        stage.parent(run, "shards")
    make(shards, stage.RUN)
    with pytest.raises(BadInput, match="holds run, wanted shard set"):
        stage.parent(run, "shards")


@pytest.mark.parametrize("recorded", ["http://{}/x", "file:///x", "s3://secret/x", "/{}/a/shards"])
def test_an_address_that_only_the_directory_names_is_not_opened(chain, tmp_path, recorded):
    shards, run = chain
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        recorded = recorded.format(tmp_path if recorded.startswith("/") else address)
        path = run / "stage.json"
        stage_json = json.loads(path.read_text())
        stage_json["parents"]["shards"]["path"] = recorded
        path.write_text(json.dumps(stage_json))
        stage_files.finish(run, {"files": 1}, [run / "file.txt"])
        with pytest.raises(BadInput, match="opened only if you name it: --shards"):
            stage.parent(run, "shards")
        assert stage.parent_location(run, "shards", shards) == shards
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


def test_a_parent_that_the_user_names_must_be_the_recorded_one(chain, tmp_path):
    other = make(tmp_path / "other", "shard set", content="y")
    with pytest.raises(BadInput, match=f"another shards than now lies at {other}"):
        stage.parent_location(chain[1], "shards", other)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret", "x/../../y"])
def test_a_manifest_names_no_file_outside(chain, name):
    path = chain[0] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = next(iter(manifest["files"].values()))
    recorded = stage_files.read_stage(chain[0])
    manifest["fingerprint"] = stage_files.fingerprint_of(recorded, manifest["files"])
    path.write_text(json.dumps(manifest))
    with pytest.raises(Corrupt, match=r"manifest\.json: file .* has no path below it"):
        stage.parent(chain[1], "shards")


# What a killed attempt left


def killed() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    return process.pid


def test_the_next_attempt_clears_what_a_killed_one_left(tmp_path):
    out, left = tmp_path / "out", f"tmp-{os.uname().nodename}-{killed()}"
    out.mkdir()
    (out / f".stage.json.{left}").write_text("killed in its first write")
    assert not stage_files.begin(out, "x", {}, {})
    assert {path.name for path in out.iterdir()} == {"stage.json", "status.json"}
    for name in ("a/.part.npy", ".items.parquet", ".status.json", ".manifest.json"):
        (out / f"{name}.{left}").parent.mkdir(exist_ok=True)
        (out / f"{name}.{left}").touch()
    assert not stage_files.begin(out, "x", {}, {})
    assert {path.name for path in out.rglob("*")} == {"stage.json", "status.json", "a"}


def test_a_finished_stage_keeps_nothing_of_its_work(tmp_path):
    out = tmp_path / "out"
    make(out, "x")
    before = {path.name for path in out.iterdir()}
    (out / ".work" / "claims").mkdir(parents=True)
    (out / ".work" / "claims" / "00000").touch()
    (out / f".status.json.tmp-{os.uname().nodename}-{killed()}").touch()
    assert stage_files.begin(out, "x", {"content": "x"}, {})
    assert {path.name for path in out.iterdir()} == before


def test_parents_must_be_finished_and_of_their_kind(chain, tmp_path):
    shards, run = chain
    with pytest.raises(BadInput, match="holds shard set, wanted run"):
        stage.parents_for(tmp_path / "emb", shards=shards, image=shards)
    with pytest.raises(BadInput, match="nowhere: not a shard set directory"):
        stage.parents_for(tmp_path / "emb", shards=tmp_path / "nowhere")
    (run / "manifest.json").unlink()
    with pytest.raises(Unfinished, match="run: unfinished"):
        stage.parents_for(tmp_path / "emb", shards=shards, image=run)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="mine: holds files of something else"):
        stage_files.begin(tmp_path / "mine", stage.RUN, {}, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file: holds files of something else"):
        stage_files.begin(tmp_path / "file", stage.RUN, {}, {})
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_another_stage_config_or_parent_in_a_folder_is_refused_and_named(chain):
    _, run = chain
    recorded = json.loads((run / "stage.json").read_text())
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(BadInput, match="already holds run"):
        stage_files.begin(run, stage.INDEX, recorded["config"], recorded["parents"])
    with pytest.raises(BadInput, match="content 'x' there, 'z' requested"):
        stage_files.begin(run, stage.RUN, {"content": "z"}, recorded["parents"])
    other = {"shards": recorded["parents"]["shards"] | {"fingerprint": "0"}}
    with pytest.raises(BadInput, match=r"shards\.fingerprint"):
        stage_files.begin(run, stage.RUN, recorded["config"], other)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert stage_files.begin(run, stage.RUN, recorded["config"], recorded["parents"]) is True


def test_an_unfinished_stage_goes_on(tmp_path):
    for _ in range(2):
        assert stage_files.begin(tmp_path / "run", stage.RUN, {"a": 1}, {}) is False
        assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "running"


def test_a_finish_that_was_killed_before_its_status_counts_as_done(chain):
    _, run = chain
    recorded = json.loads((run / "stage.json").read_text())
    for left in ("running", "preempted", "failed"):
        stage_files.write_status(run, left)
        assert stage_files.begin(run, stage.RUN, recorded["config"], recorded["parents"]) is True
        assert stage_files.status_of(run) == "done"
        assert stage_files.faults_of(run) == []


def test_a_finished_stage_says_so_and_what_it_holds(tmp_path):
    out = make(tmp_path / "run", stage.RUN)
    recorded, status = (
        json.loads((out / name).read_text()) for name in ("stage.json", "status.json")
    )
    manifest = stage_files.open_finished(out, stage.RUN)
    assert (recorded["format"], manifest["format"], recorded["kind"]) == (1, 1, "run")
    assert (status["status"], status["reason"]) == ("done", "")
    x = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # sha256 of "x"
    assert manifest["files"] == {"file.txt": {"bytes": 1, "sha256": x}}
    assert manifest["counts"] == {"files": 1}
    assert stage_files.faults_of(out) == []


def test_what_was_changed_since_is_a_fault(tmp_path):
    out = make(tmp_path / "run", stage.RUN)
    manifest, recorded = (
        json.loads((out / name).read_text()) for name in ("manifest.json", "stage.json")
    )

    def faults_with(name, value):
        whole = (out / name).read_bytes()
        (out / name).write_text(json.dumps(value, indent=1) + "\n")
        try:
            return stage_files.faults_of(out)
        except Corrupt as fault:
            return [str(fault)]
        finally:
            (out / name).write_bytes(whole)

    def signed(value):
        body = {key: each for key, each in value.items() if key != "sha256"}
        return body | {"sha256": stage_files.sha256_json(body)}

    (fault,) = faults_with("stage.json", recorded | {"started": "1999"})
    assert "stage.json: content differs from what was written; restore it" in fault
    (fault,) = faults_with("status.json", {"status": "failed"})
    assert "status.json: is 'failed' although the stage is finished" in fault
    differs = "manifest.json: differs from its own sha256; restore it"
    assert differs in faults_with("manifest.json", manifest | {"counts": {"files": 2}})[0]
    assert differs in faults_with("manifest.json", manifest | {"sha256": "0" * 64})[0]
    other = {"file.txt": {"bytes": 2, "sha256": "0" * 64}}
    (fault,) = faults_with("manifest.json", signed(manifest | {"files": other}))
    assert "manifest.json: does not fit its fingerprint" in fault
    for lost in ("fingerprint", "counts", "files"):
        less = {key: value for key, value in manifest.items() if key != lost}
        (fault,) = faults_with("manifest.json", signed(less))
        assert "manifest.json: not a manifest.json of dist_train" in fault
    (fault,) = faults_with("manifest.json", [1])
    assert "not a manifest.json of dist_train" in fault
    assert stage_files.faults_of(out) == []


def test_a_file_that_changed_before_the_end_is_not_vouched_for(tmp_path):
    stage_files.begin(tmp_path / "run", stage.RUN, {}, {})
    file = tmp_path / "run" / "file.txt"
    file.write_text("x")
    x = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    with pytest.raises(Corrupt, match=r"file\.txt: has changed since it was written"):
        stage_files.finish(tmp_path / "run", {}, [file], {file: "0" * 64})
    assert not (tmp_path / "run" / "manifest.json").exists()
    stage_files.finish(tmp_path / "run", {}, [file], {file: x})


def test_another_format_is_refused(tmp_path):
    out = make(tmp_path / "run", stage.RUN)
    recorded = json.loads((out / "stage.json").read_text())
    (out / "stage.json").write_text(json.dumps(recorded | {"format": 2}))
    with pytest.raises(BadInput, match="run: format 2, this version reads 1"):
        stage_files.open_finished(out, stage.RUN)
    with pytest.raises(BadInput, match="run: format 2, this version writes 1"):
        stage_files.begin(out, stage.RUN, recorded["config"], recorded["parents"])


def test_a_folder_in_which_nothing_was_made_is_free_again(tmp_path):
    """After a stage that failed at once, or one that was killed behind its claim."""
    out = tmp_path / "run"
    for left in ("failed", ""):
        stage_files.begin(out, stage.RUN, {"a": 1}, {})
        stage_files.write_status(out, left, "mistyped")
        if not left:
            (out / "status.json").unlink()
        assert stage_files.begin(out, stage.INDEX, {"b": 2}, {}) is False
        assert json.loads((out / "stage.json").read_text())["kind"] == stage.INDEX
        shutil.rmtree(out)
    for left in ("running", "preempted", "failed"):
        stage_files.begin(out, stage.RUN, {"a": 1}, {})
        stage_files.write_status(out, left)
        if left == "failed":
            (out / "file.txt").write_text("made")
        with pytest.raises(BadInput, match="already holds run"):
            stage_files.begin(out, stage.INDEX, {"b": 2}, {})
        assert stage_files.begin(out, stage.RUN, {"a": 1}, {}) is False
        shutil.rmtree(out)
