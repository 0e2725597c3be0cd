"""Checkpoints: complete or absent, hashed, without pickle, loadable by any number of ranks.

step-00001000/encoder.safetensors          weights and buffers
              optimizer.safetensors        AdamW's moments by parameter name
              head-<first>-<last>.safetensors   centres and moments of these classes
              state.json                   step, position, seed
              manifest.json                sizes and sha256 of all of them, written last
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dist_train.heads.class_parallel import MarginHead
from dist_train.runtime import Runtime
from dist_train.training.optimizer_state import load_moments, moments
from shards.errors import BadInput, Corrupt
from shards.files import atomic_path, read_json, sha256_file, sync, write_json

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, keep: int, runtime: Runtime) -> None:
        self.folder, self.keep, self.runtime = run / "checkpoints", keep, runtime

    def save(self, training: Any, step: int) -> None:
        """Write the checkpoint of `step`; all ranks call it at the same step."""
        final = self.folder / f"step-{step:08d}"
        if final.exists():
            return
        temporary = self.folder / f".{final.name}.tmp"
        encoder_moments = moments(training.prepared, training.optimizer)
        if self.runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _save(temporary / "encoder.safetensors", training.encoder.state_dict())
            _save(temporary / "optimizer.safetensors", encoder_moments)
            state = {"format": FORMAT, "step": step, "position": step * training.batch_size}
            write_json(temporary / "state.json", state | {"classes": training.head.classes})
        self.runtime.barrier()
        _save_head(temporary, training.head, training.head_optimizer)
        self.runtime.barrier()
        if self.runtime.is_main:
            _seal(temporary)
            os.replace(temporary, final)
            sync(self.folder)
            self._remove_old()
        self.runtime.barrier()

    def load_newest(self, training: Any) -> int:
        """Load the newest whole checkpoint, or nothing; the step to go on with."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            fault = self.runtime.tell_all(_fault(folder) if self.runtime.is_main else "")
            if not fault:
                return _load(folder, training)
            log.warning("%s: %s; it is removed, going back to the one before", folder, fault)
            self.runtime.barrier()
            if self.runtime.is_main:
                shutil.rmtree(folder)
        return 0

    def _remove_old(self) -> None:
        unfinished = self.folder.glob(".step-*.tmp")
        for folder in [*sorted(self.folder.glob("step-*"))[: -self.keep], *unfinished]:
            shutil.rmtree(folder)


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary)


def _save_head(folder: Path, head: MarginHead, optimizer: torch.optim.Optimizer) -> None:
    if head.last == head.first:
        return
    state = optimizer.state[head.weight]
    tensors = {"weight": head.weight} | {name: state[name] for name in MOMENTS if name in state}
    _save(folder / f"head-{head.first}-{head.last}.safetensors", tensors)


def _seal(folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    write_json(folder / "manifest.json", {"format": FORMAT, "files": files})


def _fault(folder: Path) -> str:
    """What is wrong with a checkpoint; empty when it is whole."""
    try:
        manifest = read_json(folder / "manifest.json")
    except BadInput as error:
        return str(error)
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != facts["bytes"]:
            return f"{path}: missing or cut short"
        if sha256_file(path) != facts["sha256"]:
            return f"{path}: bytes differ from their sha256"
    return ""


def _load(folder: Path, training: Any) -> int:
    state = read_json(folder / "state.json")
    if state["format"] != FORMAT or state["classes"] != training.head.classes:
        raise BadInput(f"{folder}: of another format or number of classes; start a new run")
    step = int(state["step"])
    training.encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    load_moments(
        training.prepared, training.optimizer, load_file(folder / "optimizer.safetensors"), step
    )
    _load_head(folder, training.head, training.head_optimizer, step)
    log.info("%s: going on from step %d", folder, step)
    return step


def _load_head(folder: Path, head: MarginHead, optimizer: torch.optim.Optimizer, step: int) -> None:
    rows: dict[str, Callable[[], torch.Tensor]] = {"weight": lambda: head.weight.data}
    if step and head.last > head.first:
        state = {name: torch.zeros_like(head.weight) for name in MOMENTS}
        optimizer.state[head.weight] = {"step": torch.tensor(float(step)), **state}
        rows |= {name: (lambda name=name: state[name]) for name in MOMENTS}
    filled = 0
    for path in folder.glob("head-*.safetensors"):
        first, last = (int(number) for number in path.stem.split("-")[1:])
        low, high = max(first, head.first), min(last, head.last)
        if low >= high:
            continue
        with safe_open(path, "pt") as file:
            for name, target in rows.items():
                part = file.get_slice(name)[low - first : high - first]
                target()[low - head.first : high - head.first] = part
        filled += high - low
    if filled != head.last - head.first:
        raise Corrupt(f"{folder}: {filled} of the classes {head.first} to {head.last} found")
