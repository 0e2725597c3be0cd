"""Whether a machine's GPUs do all that is asked of them; launch/gpu_acceptance.sh starts it.

Every CUDA path beside the CPU's result, then throughput beside the device's limits; without a
network and within eight minutes. `--device cpu` runs the same logic where there is no GPU.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from cyclopts import App

from dist_train.acceptance.outcomes import Proof
from shards.storage.errors import Failed, NoGPU
from shards.storage.files import write_json

BUDGET = 480.0
"""Seconds for all; what has not begun by then counts as failed."""
app = App(help="Check every GPU path of this machine against the CPU, and how fast it is.")


@dataclass(frozen=True)
class Result:
    """One line: what was checked, whether it held, how it came out, and the seconds it took."""

    name: str
    passed: bool
    said: str
    value: float
    unit: str
    limit: float | None
    seconds: float


@app.default
def main(*, device: Literal["cuda", "cpu"] = "cuda", out: Path | None = None) -> None:
    """Print a table, and write JSON.

    Parameters
    ----------
    device
        cpu tries the logic itself.
    out
        File for the JSON.
    """
    results = accept(device)
    about = {"device": _device_name(device), "gpus": _world(device), "torch": torch.__version__}
    passed = all(result.passed for result in results)
    if out is not None:
        told = [asdict(result) for result in results]
        write_json(out, about | {"passed": passed, "results": told})
    print(table(results))
    if not passed:
        failed = ", ".join(result.name for result in results if not result.passed)
        raise Failed(f"not accepted: {failed}")


def accept(device: str) -> list[Result]:
    """Every check on `device`. Raises NoGPU where cuda is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NoGPU("no GPU answers here: nothing to accept (DEVICE=cpu tries the checks alone)")
    # Only now, as they take a while to load.
    from dist_train.acceptance.checks import checks

    began, results = time.monotonic(), []
    for name, check in checks(torch.device(device), _world(device)):
        late = time.monotonic() - began > BUDGET
        results.append(_late(name) if late else _run(name, check))
        print(f"{results[-1].seconds:6.1f} s  {name}", file=sys.stderr)
    return results


def _run(name: str, check: Callable[[], Any]) -> Result:
    began = time.monotonic()
    try:
        found = check()
    except Exception as error:  # one path that breaks must not hide the others
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        return Result(name, False, said, float("nan"), "", None, time.monotonic() - began)
    if isinstance(found, Proof):
        passed = found.difference <= found.allowed  # not-a-number does not pass
        return Result(name, passed, found.of, found.difference, "off", found.allowed,
                      time.monotonic() - began)  # fmt: skip
    said = "" if found.limit is None else f"{found.value / found.limit:.0%} of the limit"
    return Result(name, found.value > 0, said, found.value, found.unit, found.limit,
                  time.monotonic() - began)  # fmt: skip


def _late(name: str) -> Result:
    return Result(name, False, f"not begun within {BUDGET:.0f} s", float("nan"), "", None, 0.0)


def table(results: list[Result]) -> str:
    """For people."""
    wide = max(len(result.name) for result in results)
    lines = []
    for r in results:
        limit = "" if r.limit is None else f"of {r.limit:.4g}"
        lines.append(f"{'ok  ' if r.passed else 'FAIL'}  {r.name:{wide}}  {r.value:10.4g} "
                     f"{r.unit:9} {limit:10} {r.said}".rstrip())  # fmt: skip
    return "\n".join(lines)


def _world(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else 2


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


if __name__ == "__main__":
    try:
        app()
    except (Failed, NoGPU) as error:
        print(f"gpu_acceptance: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
