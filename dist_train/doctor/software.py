"""Checks of what is installed: versions, the FAISS wheels, the GPU driver beside torch's build."""

import ctypes
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from dist_train.doctor.finding import Finding, fault, note

PACKAGES = ("torch", "torchvision", "accelerate", "deepspeed", "timm", "transformers", "numpy")
OLDEST_TORCH = (2, 10)
"""Older ones read weights unsafely even with weights_only=True (CVE-2026-24747)."""
NVIDIA, DISPLAY = "0x10de", "0x03"


def versions() -> Finding:
    """Of Python and the libraries that all is built on."""
    told, missing = [f"Python {platform.python_version()}"], []
    for name in PACKAGES:
        try:
            told.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return fault("versions", f"{', '.join(missing)}: not installed", "bash launch/setup.sh")
    return torch_is_safe(version("torch"), ", ".join(told))


def torch_is_safe(torch: str, told: str) -> Finding:
    """`torch` is a version; `told` is what is said of all."""
    if tuple(int(part) for part in torch.split(".")[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return fault("versions", told, f"torch {torch} reads weights unsafely; install {wanted}")
    return Finding("versions", told)


def faiss_wheels(path: list[str], gpus: int) -> Finding:
    """Of the packages below the folders of `path`: exactly one FAISS, and the right one."""
    wheels = {
        f"{dist.name} {dist.version}"
        for dist in distributions(path=path)
        if dist.name.lower().replace("_", "-").startswith("faiss-")
    }
    told, clean = ", ".join(sorted(wheels)), "pip uninstall -y faiss-cpu faiss-gpu"
    if not wheels:
        return fault("FAISS", "not installed", "pip install -e '.[cpu]', or '.[gpu]'")
    if len(wheels) > 1:
        return fault(
            "FAISS",
            f"{told}: both own the folder faiss/, and the later one overwrote the other",
            f"{clean}, then pip install -e '.[{'gpu' if gpus else 'cpu'}]'",
        )
    if gpus and "faiss-gpu" not in told:
        return note("FAISS", f"{told}: IVF is trained and searched on the CPU",
                    f"{clean}, then pip install -e '.[gpu]'")  # fmt: skip
    return Finding("FAISS", told)


def nvidia_cards(bus: Path) -> int:
    """NVIDIA display and compute cards on a PCI bus, as `bus` (sysfs' bus/pci/devices) tells."""
    return sum(
        _read(card / "vendor") == NVIDIA and _read(card / "class").startswith(DISPLAY)
        for card in bus.glob("*")
    )


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver can run; None without a driver."""
    try:
        library, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10


def ask_driver(command: str = "nvidia-smi") -> tuple[int, str] | None:
    """Exit code and answer of nvidia-smi; None where there is none."""
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run([command, *query], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except subprocess.TimeoutExpired:
        return 124, "no answer in 60 s"
    return done.returncode, (done.stdout + done.stderr).strip()


def gpu(
    cards: int, driver: tuple[int, int] | None, answer: tuple[int, str] | None,
    build: str | None, wanted: str,
) -> Finding:  # fmt: skip
    """From `cards` on the bus, the driver's CUDA and `answer`, torch's CUDA `build`, --device."""
    answers = answer is not None and answer[0] == 0
    if not cards and not answers:
        if wanted == "cuda":
            return fault("GPU", "no NVIDIA card here, and --device cuda",
                         "ask for a node with GPUs (--gres=gpu:N)")  # fmt: skip
        return Finding("GPU", "no NVIDIA card; everything runs on the CPU")
    if driver is None or not answers:
        said = "nvidia-smi is not there" if answer is None else f"nvidia-smi: {answer[1][:120]}"
        return fault(
            "GPU",
            f"{cards} NVIDIA cards on the bus, but no driver answers ({said})",
            "install the driver, or load its module (modprobe nvidia); a container needs the "
            "driver of its host: --gpus all (Docker), --nv (Apptainer)",
        )
    told = "; ".join(answer[1].splitlines()) if answer else ""
    if build is None:
        return fault("GPU", f"{told}, but torch is built for the CPU", "install torch with CUDA")
    if tuple(int(part) for part in build.split("."))[:1] > driver[:1]:
        return fault("GPU", f"torch is built for CUDA {build}, the driver knows {driver[0]}."
                     f"{driver[1]}", "a newer driver, or torch for an older CUDA")  # fmt: skip
    return Finding("GPU", f"{told}; torch for CUDA {build}, driver for {driver[0]}.{driver[1]}")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
