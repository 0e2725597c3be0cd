"""An encoder as one ONNX file: from prepared inputs to unit vectors, for serving without torch."""

import importlib.util
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dist_train.distributed.stage import RUN
from dist_train.encoders.encoder import Encoder, ImageEncoder, load_encoder
from dist_train.encoders.source import OURS
from shards.read.location import Folder
from shards.storage.errors import BadInput
from shards.storage.files import atomic_path

NEEDED = ("onnx", "onnxscript")
INPUTS = {"image": ["pixels"], "text": ["tokens", "mask"]}


class _UnitVectors(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.encoder(*inputs), dim=1)


def export_onnx(run: Path, file: Path) -> None:
    """Write the encoder of the finished `run` as ONNX to `file`, weights inside.

    Inputs `pixels` (b, 3, S, S) float32, or `tokens` and `mask` (b, T) int64; output `vectors`
    (b, D) float32 of length one; b and T are free. How to prepare the inputs is in the encoder's
    preprocessing.json and tokenizer files. Raises BadInput when a package that it needs is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"export needs the packages {' and '.join(NEEDED)}: pip install .[onnx]")
    modality = Folder(run, RUN).json(f"encoder/{OURS}")["modality"]
    encoder = load_encoder(run / "encoder", modality)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch = torch.export.Dim("batch")
    if isinstance(encoder, ImageEncoder):
        size = encoder.options.image_size
        example, free = (torch.zeros(2, 3, size, size),), ({0: batch},)
    else:
        # Two tensors: of one given twice the exporter makes a single input.
        example = tuple(torch.ones(2, 7, dtype=torch.int64) for _ in INPUTS[modality])
        free = ({0: batch, 1: torch.export.Dim("length", min=2, max=512)},) * 2
    program = torch.onnx.export(
        _UnitVectors(encoder).eval(),
        example,
        dynamo=True,
        verbose=False,
        dynamic_shapes=(free,),
        input_names=INPUTS[modality],
        output_names=["vectors"],
    )
    assert program is not None
    with atomic_path(file) as temporary:
        program.save(temporary, external_data=False)
