"""An encoder as a folder: save, load, and build the untrained one.

The folder opens with plain timm or transformers; ours beside their files are neck.safetensors,
dist_train.json and preprocessing.json.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dist_train.config.training import ImageEncoderOptions, TextEncoderOptions
from dist_train.config.values import Modality, result_options
from dist_train.encoders.image import ImageEncoder
from dist_train.encoders.text import TextEncoder
from shards.storage.errors import BadInput
from shards.storage.files import atomic_path, read_json, write_atomic, write_json

FORMAT = 1
Encoder = ImageEncoder | TextEncoder
OPTIONS = {"image": ImageEncoderOptions, "text": TextEncoderOptions}


def new_encoder(
    modality: Modality, options: ImageEncoderOptions | TextEncoderOptions, seed: int
) -> Encoder:
    """The encoder before training; its random parts are a function of the seed alone."""
    torch.manual_seed(seed)
    return _encoder(options)


def _encoder(options: ImageEncoderOptions | TextEncoderOptions) -> Encoder:
    if isinstance(options, ImageEncoderOptions):
        return ImageEncoder(options)
    return TextEncoder(options)


def save_encoder(encoder: Encoder, folder: Path, card: str) -> list[Path]:
    """Write the encoder's folder with `card` as its README; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save_library_files(folder)
    for name, module in (("model", encoder.backbone), ("neck", encoder.neck)):
        save_tensors(folder / f"{name}.safetensors", module.state_dict(), {"format": "pt"})
    modality = "image" if isinstance(encoder, ImageEncoder) else "text"
    ours = {"format": FORMAT, "modality": modality, "width": encoder.width}
    write_json(folder / "dist_train.json", ours | {"options": result_options(encoder.options)})
    write_json(folder / "preprocessing.json", encoder.preprocessing())
    write_atomic(folder / "README.md", card.encode())
    return sorted(path for path in folder.iterdir() if path.is_file())


def load_encoder(folder: Path, modality: Modality) -> Encoder:
    """Load an encoder folder in eval mode; BadInput when it is not of the modality `modality`."""
    ours = read_json(folder / "dist_train.json")
    if ours["format"] != FORMAT:
        raise BadInput(f"{folder}: encoder format {ours['format']}, this version reads {FORMAT}")
    if ours["modality"] != modality:
        raise BadInput(f"{folder}: an encoder of {ours['modality']}, wanted {modality}")
    local = ours["options"] | {"model": str(folder), "pretrained": True}
    encoder = _encoder(OPTIONS[modality](**local))
    encoder.neck.load_state_dict(load_file(folder / "neck.safetensors"))
    return encoder.eval()


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to the safetensors file `path`, atomically, each with separate memory."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=metadata)
