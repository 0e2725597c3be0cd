"""Check that every GPU path of a machine works; launch/gpu_acceptance.sh starts it.

Every CUDA path is compared with the CPU, then throughput with the device's limits; without a
network and within eight minutes. `--device cpu` runs the same checks without a GPU.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from cyclopts import App

from dist_train.acceptance import correctness, speed
from dist_train.acceptance.correctness import Proof
from dist_train.acceptance.speed import Rate
from dist_train.matching.faiss_library import gpus
from shards.storage.errors import Failed, NoGPU
from shards.storage.files import write_json

BUDGET = 480.0
"""Seconds for all checks; one that has not begun by then counts as failed."""
Check = Callable[[], Proof | Rate]
app = App(help="Check every GPU path of this machine against the CPU, and how fast it is.")


@dataclass(frozen=True)
class Result:
    """One line of the table: a check, whether it passed, its value beside its limit, seconds."""

    name: str
    passed: bool
    message: str
    value: float = float("nan")
    unit: str = ""
    limit: float | None = None
    seconds: float = 0.0


@app.default
def main(*, device: Literal["cuda", "cpu"] = "cuda", out: Path | None = None) -> None:
    """Run all checks; print a table and write JSON.

    Parameters
    ----------
    device
        Device to check. cpu: try out the checks where there is no GPU.
    out
        JSON file to write.
    """
    results = accept(device)
    passed = all(result.passed for result in results)
    if out is not None:
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        about = {"device": name, "gpus": _world(device), "torch": torch.__version__}
        rows = [asdict(result) for result in results]
        write_json(out, about | {"passed": passed, "results": rows})
    print(table(results))
    if not passed:
        failed = ", ".join(result.name for result in results if not result.passed)
        raise Failed(f"not accepted: {failed}")


def accept(device: str) -> list[Result]:
    """Run every check on `device`. Raises NoGPU if it is cuda and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NoGPU("no GPU answers here: nothing to accept (DEVICE=cpu tries out the checks)")
    start, results = time.monotonic(), []
    for name, check in checks(torch.device(device), _world(device)):
        began = time.monotonic()
        if began - start > BUDGET:
            result = Result(name, False, f"not begun within {BUDGET:.0f} s")
        else:
            result = replace(run_check(name, check), seconds=time.monotonic() - began)
        results.append(result)
        print(f"{result.seconds:6.1f} s  {name}", file=sys.stderr)
    return results


def checks(device: torch.device, world: int) -> Iterator[tuple[str, Check]]:
    """Names and functions, correctness before speed; on 1, 2, 4, ... and all `world` ranks."""
    on_cpu = device.type == "cpu"
    for precision in ("fp32", "bf16"):
        yield f"image encoder {precision}", partial(correctness.image_encoder, device, precision)
        yield f"text encoder {precision}", partial(correctness.text_encoder, device, precision)
    for ranks in (*(2**n for n in range(world.bit_length()) if 2**n < world), world):
        yield f"head, {ranks} ranks", partial(correctness.head, device, ranks)
        for name in ("all_gather", "reduce_scatter"):
            yield f"{name}, {ranks} ranks", partial(correctness.collective, name, device, ranks)
    kinds = {"flat": "Flat", "IVF": "IVF64,Flat", "knn of tensors": ""}
    # Without FAISS for GPUs one check stands for all, and fails.
    for name, factory in kinds.items() if on_cpu or gpus() else [("", "Flat")]:
        yield f"FAISS {name}".strip(), partial(correctness.best_ten, device, factory)
    for engine in ("gemm", "faiss"):
        yield f"join by {engine}", partial(correctness.join, device, engine)

    size, numbers = (512, 1 << 22) if on_cpu else (8192, 1 << 28)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        yield f"product {name}", partial(speed.product, device, dtype, size)
    for name, from_host in (("memory", False), ("from host", True)):
        yield name, partial(speed.copy, device, numbers, from_host)
    model, batch = ("vit_tiny_patch16_224", 2) if on_cpu else ("vit_base_patch16_224", 64)
    for name, training in (("embed", False), ("train", True)):
        yield f"{name} {model}", partial(speed.encoder, device, model, batch, training)
    yield "join", partial(speed.join, device, size, 128 if on_cpu else 768)
    yield f"all_reduce, {world} ranks", partial(speed.all_reduce, device, world, numbers // 4)


def run_check(name: str, check: Check) -> Result:
    """The result of one check; an exception is a failure, so that it does not hide the others."""
    try:
        found = check()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:160]
        return Result(name, False, f"{type(error).__name__}: {first}")
    if isinstance(found, Proof):
        passed = found.difference <= found.allowed  # False for NaN
        return Result(name, passed, found.what, found.difference, "off", found.allowed)
    message = "" if found.limit is None else f"{found.value / found.limit:.0%} of the limit"
    return Result(name, found.value > 0, message, found.value, found.unit, found.limit)


def table(results: list[Result]) -> str:
    """The results as text, a line each."""
    width = max(len(result.name) for result in results)
    lines = []
    for r in results:
        limit = "" if r.limit is None else f"of {r.limit:.4g}"
        state = "ok  " if r.passed else "FAIL"
        line = f"{state}  {r.name:{width}}  {r.value:10.4g} {r.unit:9} {limit:10} {r.message}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _world(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else 2


if __name__ == "__main__":
    try:
        app()
    except (Failed, NoGPU) as error:
        print(f"gpu_acceptance: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
