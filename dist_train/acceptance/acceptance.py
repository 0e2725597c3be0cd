"""Check that every GPU path of a machine works; launch/gpu_acceptance.sh starts it.

Every CUDA path is compared with the CPU, then throughput with the device's limits; without a
network and within eight minutes. `--device cpu` runs the same checks without a GPU.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from cyclopts import App

from dist_train.acceptance.outcomes import Proof, Rate, Result
from shards.storage.errors import Failed, NoGPU
from shards.storage.files import write_json

BUDGET = 480.0
"""Seconds for all checks; one that has not begun by then counts as failed."""
app = App(help="Check every GPU path of this machine against the CPU, and how fast it is.")


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
    # Imported only now, as they take a while to load.
    from dist_train.acceptance.checks import checks

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


def run_check(name: str, check: Callable[[], Proof | Rate]) -> Result:
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
