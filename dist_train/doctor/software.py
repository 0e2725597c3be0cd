"""Checks of what is installed: versions, the FAISS wheels, the GPU driver and torch's build."""

import ctypes
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from dist_train.doctor.finding import Finding, fault, note

PACKAGES = ("torch", "torchvision", "accelerate", "deepspeed", "timm", "transformers", "numpy")
OLDEST_TORCH = (2, 10)
"""Older ones read weights unsafely even with weights_only=True (CVE-2026-24747)."""
NVIDIA, DISPLAY = "0x10de", "0x03"


def versions() -> Finding:
    """The versions of Python and of the libraries that everything needs."""
    known, missing = [f"Python {platform.python_version()}"], []
    for name in PACKAGES:
        try:
            known.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return fault("versions", f"{', '.join(missing)}: not installed", "bash launch/setup.sh")
    message, torch = ", ".join(known), version("torch")
    if tuple(int(part) for part in torch.split(".")[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return fault("versions", message, f"torch {torch} reads weights unsafely; install {wanted}")
    return Finding("versions", message)


def faiss_wheels(path: list[str], gpus: int) -> Finding:
    """Whether the folders of `path` hold exactly one FAISS package, and the right one."""
    wheels = {
        f"{dist.name} {dist.version}"
        for dist in distributions(path=path)
        if dist.name.lower().replace("_", "-").startswith("faiss-")
    }
    installed, clean = ", ".join(sorted(wheels)), "pip uninstall -y faiss-cpu faiss-gpu"
    if not wheels:
        return fault("FAISS", "not installed", "pip install -e '.[cpu]', or '.[gpu]'")
    if len(wheels) > 1:
        return fault(
            "FAISS",
            f"{installed}: both own the folder faiss/, and the later one overwrote the other",
            f"{clean}, then pip install -e '.[{'gpu' if gpus else 'cpu'}]'",
        )
    if gpus and "faiss-gpu" not in installed:
        message = f"{installed}: IVF is trained and searched on the CPU"
        return note("FAISS", message, f"{clean}, then pip install -e '.[gpu]'")
    return Finding("FAISS", installed)


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver can run; None without a driver."""
    try:
        library, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10


def gpu(bus: Path, driver: tuple[int, int] | None, build: str | None, device: str) -> Finding:
    """Whether torch can use the GPU.

    From the cards on the PCI `bus` (sysfs' folder bus/pci/devices), nvidia-smi, the newest CUDA of
    the `driver`, the CUDA version of torch's `build` and the option --device.
    """
    cards = 0
    for card in bus.glob("*"):
        with suppress(OSError):
            vendor, kind = ((card / name).read_text() for name in ("vendor", "class"))
            cards += vendor.startswith(NVIDIA) and kind.startswith(DISPLAY)
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answers, names = False, ""
    try:
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=60)
        answers, names = done.returncode == 0, (done.stdout + done.stderr).strip()
        reason = f"nvidia-smi: {names[:120]}"
    except (FileNotFoundError, NotADirectoryError):
        reason = "nvidia-smi is not installed"
    except subprocess.TimeoutExpired:
        reason = "nvidia-smi: no answer in 60 s"
    if not cards and not answers:
        if device == "cuda":
            remedy = "request a node with GPUs (--gres=gpu:N)"
            return fault("GPU", "no NVIDIA card here, and --device cuda", remedy)
        return Finding("GPU", "no NVIDIA card; everything runs on the CPU")
    if driver is None or not answers:
        return fault(
            "GPU",
            f"{cards} NVIDIA cards on the bus, but no driver answers ({reason})",
            "install the driver, or load its module (modprobe nvidia); a container needs the "
            "driver of its host: --gpus all (Docker), --nv (Apptainer)",
        )
    names, newest = "; ".join(names.splitlines()), f"{driver[0]}.{driver[1]}"
    if build is None:
        return fault("GPU", f"{names}, but torch is built for the CPU", "install torch with CUDA")
    if int(build.split(".")[0]) > driver[0]:
        message = f"torch is built for CUDA {build}, the driver supports up to {newest}"
        return fault("GPU", message, "install a newer driver, or torch for an older CUDA")
    return Finding("GPU", f"{names}; torch for CUDA {build}, driver for {newest}")
