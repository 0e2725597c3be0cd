"""What this machine has, and what is wrong with it: every check, its finding and the remedy."""

import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE
from torch.utils.cpp_extension import get_default_build_root

from dist_train.config.options import Device, ImageTraining
from dist_train.doctor import machine, services, software
from dist_train.doctor.all_reduce import all_reduce
from dist_train.doctor.finding import Finding, fault
from shards.read.cache import cache_here

PORT = 29500
"""accelerate's and torchrun's, where none is named."""
AHEAD = 3
"""Batches of a worker at one time: two wait (prefetch), one is being made."""


def examine(device: Device, out: Path) -> list[Finding]:
    """Every finding of this machine, for stages that write into `out` on `device`."""
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    return [*_software(device, gpus), *_machine(out, max(1, gpus)), *_services(out),
            all_reduce(*(("nccl", gpus) if gpus else ("gloo", 2)))]  # fmt: skip


def _software(device: Device, gpus: int) -> list[Finding]:
    cards = software.nvidia_cards(Path("/sys/bus/pci/devices"))
    driver, answer = software.driver_cuda(), software.ask_driver()
    found = software.gpu(cards, driver, answer, torch.version.cuda, device)
    if found.level == "fine" and device == "cuda" and not gpus:
        found = fault("GPU", f"{found.said}; but torch sees none", "look at CUDA_VISIBLE_DEVICES")
    return [software.versions(), software.faiss_wheels(sys.path, gpus), found]


def _machine(out: Path, ranks: int) -> list[Finding]:
    build = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [
        machine.shared_memory(Path("/dev/shm"), ranks * loader_bytes(ImageTraining())),
        machine.open_files(resource.getrlimit(resource.RLIMIT_NOFILE)),
        machine.locked_memory(
            resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            len(list(Path("/sys/class/infiniband").glob("*"))),
        ),
        machine.free_disk(out),
        machine.writable("model cache", Path(HF_HUB_CACHE), "HF_HOME"),
        machine.writable("shard cache", cache_here().folder, "DIST_TRAIN_CACHE"),
        machine.writable("extensions", build, "TORCH_EXTENSIONS_DIR"),
        machine.extension_locks(build, time.time()),
        machine.port(os.environ.get("MASTER_PORT", str(PORT))),
    ]


def _services(out: Path) -> list[Finding]:
    found = [machine.writable("output", out, "--out")]
    if found[0].level == "fine":
        found.append(
            machine.clock(
                machine.ahead_of_files(machine.existing(out)), f"the file system of {out}"
            )
        )
    hub, ahead = services.hub(ENDPOINT, HF_HUB_OFFLINE)
    found += [hub] if ahead is None else [hub, machine.clock(ahead, "the hub")]
    configured = "SLURM_CONF" in os.environ or Path("/etc/slurm/slurm.conf").exists()
    sbatch = shutil.which("sbatch")
    answer = services.ask_controller() if sbatch else (1, "")
    return [*found, services.slurm(sbatch, answer, configured)]


def loader_bytes(config: ImageTraining) -> int:
    """Bytes of shared memory that one rank's loader fills, float32 photos on their way."""
    photo = 3 * config.encoder.image_size**2 * 4
    return config.workers * AHEAD * config.batch_size * photo
