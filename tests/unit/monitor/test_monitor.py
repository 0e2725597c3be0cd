"""metrics.jsonl and TensorBoard: the same values in both, one curve over several attempts."""

import json
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_train.monitor.metrics import Metrics, read_metrics


def live(run, start: int, stop: int, offset: float) -> None:
    """One attempt: a row of train a step, of val every second step, then a kill without close."""
    metrics = Metrics(run, start)
    for step in range(start + 1, stop + 1):
        metrics.write(step, "train", {"loss": step / 7 + offset, "lr": 1e-5 * step})
        if step % 2 == 0:
            metrics.write(step, "val", {"f1": offset})
    metrics.close()


def test_rows_are_json_lines_with_named_scalars(tmp_path):
    live(tmp_path, 0, 2, 0.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "train/loss": 1 / 7, "train/lr": 1e-5}
    assert json.loads(lines[2]) == {"step": 2, "val/f1": 0.0}
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines]


def test_rows_are_there_while_it_runs(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, "train", {"loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 0.5}]
    metrics.close()


def test_a_resumed_run_drops_the_rows_after_its_step(tmp_path):
    live(tmp_path, 0, 9, 0.0)
    live(tmp_path, 4, 6, 100.0)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["val/f1"] for row in rows if "val/f1" in row] == [0.0, 0.0, 100.0]
    assert [row["train/loss"] > 50 for row in rows if "train/loss" in row] == [False] * 4 + [
        True
    ] * 2


def test_a_last_line_that_was_cut_is_left_out(tmp_path):
    live(tmp_path, 0, 4, 0.0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    rows = read_metrics(tmp_path)
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last) - 1):
        path.write_text(whole[: -len(last)] + last[:cut])
        assert read_metrics(tmp_path) == rows[:-1]
    live(tmp_path, 4, 5, 0.0)
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[:-1] == rows[:-1]
    assert again[-1]["step"] == 5


def test_what_is_no_number_is_left_out_so_that_every_line_is_json(tmp_path):
    metrics = Metrics(tmp_path, 0)
    values = {"loss": float("nan"), "grad_norm": float("inf"), "skipped": 1}
    metrics.write(1, "train", values)
    metrics.close()

    def refuse(word: str):
        raise AssertionError(f"{word} is no JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "train/skipped": 1}
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/skipped"]


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_holds_the_same_values_and_does_not_fork(tmp_path):
    live(tmp_path, 0, 9, 0.0)
    time.sleep(1.1)  # event files are told apart, and put in order, by the second
    live(tmp_path, 4, 6, 100.0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/lr", "val/f1"}
    rows = read_metrics(tmp_path)
    for name in ("train/loss", "train/lr", "val/f1"):
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        written = [(row["step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in shown] == [step for step, _ in written]
        for (_, a), (_, b) in zip(shown, written, strict=True):
            assert abs(a - b) <= 1e-6 * max(1, abs(b))  # float32 in the event file
