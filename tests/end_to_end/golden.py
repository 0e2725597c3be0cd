"""The golden run: a catalogue of 300 postings through every stage, and what is noted of it.

    python -m tests.end_to_end.golden        records golden.json anew: say in the commit why

Its values are of postings, scores and weights, not of our files: what reads a stage's files is in
the section "How the files lie" alone, what starts the stages in "The stages".

Float32 is compared with the same values on every machine. What bfloat16 gives differs from one
kind of processor to the next about as much as from float32, so it is noted kind by kind.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from tests.support.launching import ROOT, command, environment

GOLDEN = Path(__file__).with_name("golden.json")
RECORDING = "RECORD_GOLDEN"
ONEDNN = "ONEDNN_MAX_CPU_ISA"
STEPS, BATCH, TRAINED_ON = 20, 24, 184
MODALITIES = ("image", "text")
ENGINES = ("gemm", "faiss")
PAIRS = 200
"""So many of the best pairs are noted."""
BF16 = ("amx_bf16", "avx512_bf16")

# ---- The stages -----------------------------------------------------------------------------


def run_stages(
    world: int, catalogue: Path, encoders: dict[str, Path], out: Path, others: Sequence[str] = ()
) -> None:
    """Every stage into `out` in float32, and trainings and vectors in the `others` precisions."""
    shards, embedding, matches = out / "shards", out / "fp32-embedding", out / "matches-gemm"
    pack = ["pack", catalogue / "catalogue.csv", "--images", catalogue / "images", "--out", shards,
            "--size", 48, "--shard-items", 64, "--workers", world]  # fmt: skip
    verbs = [v for precision in ("fp32", *others) for v in _learning(precision, encoders, out)]
    verbs.append(["index", embedding, "--out", out / "index", "--image-weight", 0.6])
    for engine in ENGINES:
        joined = out / f"pairs-{engine}"
        arguments = ["join", embedding, "--index", out / "index", "--engine", engine]
        verbs += [
            [*arguments, "--out", joined],
            ["match", joined, "--out", out / f"matches-{engine}"],
        ]
    ends = [["evaluate", matches], ["report", matches]]
    # What is one process by itself shares one with the others where these are one as well.
    for part in [[pack, *verbs, *ends]] if world == 1 else [[pack], verbs, ends]:
        start(world if part is verbs else 1, part)


def _learning(precision: str, encoders: dict[str, Path], out: Path) -> list[list[object]]:
    """Both trainings of 20 steps and the embedding."""
    shards, runs = (
        out / "shards",
        {modality: out / f"{precision}-{modality}" for modality in MODALITIES},
    )
    trainings = [
        ["train", modality, "--shards", shards, "--out", runs[modality],
         "--encoder.model", encoders[modality],
         *(["--encoder.image-size", 32] if modality == "image" else []), "--batch-size", BATCH,
         "--epochs", STEPS * BATCH / TRAINED_ON, "--lr", 5e-5, "--validate-every", 0,
         "--precision", precision, "--workers", 0, "--log-every", 1]
        for modality in MODALITIES
    ]  # fmt: skip
    dtype = "float32" if precision == "fp32" else "float16"
    given = [word for modality in MODALITIES for word in (f"--{modality}", runs[modality])]
    embed = ["embed", "--shards", shards, *given, "--out", out / f"{precision}-embedding",
             "--precision", precision, "--dtype", dtype, "--workers", 0]  # fmt: skip
    return [*trainings, embed]


def start(world: int, verbs: list[list[object]]) -> None:
    """Run verbs one after the other in `world` processes that stay."""
    arguments = command(world, json.dumps([[str(word) for word in verb] for verb in verbs]))
    arguments[arguments.index("dist_train")] = "tests.end_to_end.golden"
    done = subprocess.run(arguments, cwd=ROOT, env=environment(), text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout


def run_verbs(verbs: list[list[str]]) -> None:
    """Verbs in this process, the group of all ranks being left at the end."""
    import torch.distributed as dist

    from dist_train.cli import app

    for arguments in verbs:
        app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ---- How the files lie ----------------------------------------------------------------------


def tars(out: Path) -> dict[str, str]:
    """sha256 of the tars of each split, one after the other."""
    found = {}
    for folder in sorted({tar.parent for tar in (out / "shards").rglob("*.tar")}):
        digest = hashlib.sha256()
        for tar in sorted(folder.glob("*.tar")):
            digest.update(tar.read_bytes())
        found[folder.name] = digest.hexdigest()
    return found


def items(out: Path) -> pd.DataFrame:
    """A row a posting, in the catalogue's order, under our column names."""
    table = pd.read_parquet(out / "shards" / "items.parquet")
    names = {"label_group": "label_group", "split": "split", "class_id": "class", "shard": "tar",
             "slot": "place", "status": "status", "reason": "reason", "sha256": "photo",
             "phash": "looks", "width": "width", "height": "height",
             "photo_group": "near_duplicates"}  # fmt: skip
    return table.set_index("posting_id")[list(names)].rename(columns=names)


def weights(out: Path, precision: str, modality: str) -> dict[str, np.ndarray]:
    """The encoder after the last step, its neck, and the class centres."""
    run = out / f"{precision}-{modality}"
    found = load_file(run / "encoder" / "model.safetensors")
    found |= {f"neck.{k}": v for k, v in load_file(run / "encoder" / "neck.safetensors").items()}
    newest = max((run / "checkpoints").iterdir())
    parts = [load_file(part)["weight"] for part in sorted(newest.glob("head-*.safetensors"))]
    return found | {"centres": np.concatenate(parts)}


def curves(out: Path, precision: str, modality: str) -> dict[str, list[float]]:
    """The loss of every step, and F1 on the val products before and after."""
    lines = (out / f"{precision}-{modality}" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        name: [row[key] for row in rows if key in row]
        for name, key in (("loss", "train/loss"), ("val F1", "val/f1"))
    }


def vectors(out: Path, precision: str) -> dict[str, pd.DataFrame]:
    """Per modality, a row of D numbers a posting."""
    folder = out / f"{precision}-embedding"
    table = pd.read_parquet(folder / "items.parquet")
    table = table[table.row >= 0].sort_values("row")
    return {
        modality: pd.DataFrame(
            np.concatenate([np.load(part) for part in sorted(folder.glob(f"{modality}-*.npy"))]),
            index=table.posting_id,
        ).astype(float)
        for modality in MODALITIES
    }


def pairs(out: Path, engine: str = "gemm") -> pd.DataFrame:
    """posting, other, score and that of each modality, of every pair that was kept."""
    found = pd.concat(
        [pd.read_parquet(p) for p in sorted((out / f"pairs-{engine}/pairs").iterdir())]
    )
    postings = vectors(out, "fp32")["image"].index.to_numpy()
    return pd.DataFrame(
        {"posting": postings[found.i], "other": postings[found.j], "score": found.score.to_numpy(),
         "image": found.score_image.to_numpy(), "text": found.score_text.to_numpy()}
    )  # fmt: skip


def matches(out: Path, engine: str = "gemm") -> dict[str, list[str]]:
    """The matches of every posting, without itself."""
    table = pd.read_parquet(out / f"matches-{engine}" / "matches.parquet")
    return {row.posting_id: list(row.matches)[1:] for row in table.itertuples()}


def groups(out: Path) -> list[int]:
    """The number of every posting's group, in the catalogue's order."""
    return pd.read_parquet(out / "matches-gemm" / "groups.parquet").group_id.tolist()


def threshold(out: Path) -> float:
    return json.loads((out / "matches-gemm" / "threshold.json").read_text())["threshold"]


def figures(out: Path) -> dict[str, Any]:
    """What evaluate says: counts, and figures by matcher and by difference of two."""
    metrics = json.loads((out / "matches-gemm" / "metrics.json").read_text())
    rows = {row["name"]: _numbers(row) for row in metrics["rows"]}
    rows |= {f"{row['of']} over {row['over']}": _numbers(row) for row in metrics["differences"]}
    by_size = {f"{row['size_from']} to {row['size_to']}": _numbers(row)
               for row in metrics["by_group_size"]}  # fmt: skip
    delivered = metrics["delivered"]
    files = {row["name"]: _numbers(row) for row in delivered["rows"]}
    files |= {f"{row['of']} over {row['over']}": _numbers(row) for row in delivered["differences"]}
    return {"counts": _numbers(metrics), "rows": rows, "by group size": by_size,
            "delivered": {"counts": _numbers(delivered), "rows": files}}  # fmt: skip


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "format"}


def report(out: Path) -> dict[str, Any]:
    """How many pictures it holds, and of which postings it speaks."""
    page = (out / "matches-gemm" / "report.html").read_text()
    postings = sorted(set(re.findall(r"\bp\d{8}\b", page)))
    return {"pictures": page.count("data:image/jpeg"), "postings": sha256(postings)}


# ---- What is noted --------------------------------------------------------------------------


def facts(out: Path, precision: str = "fp32") -> dict[str, Any]:
    """Of a training and its vectors."""
    noted: dict[str, Any] = {"weights": {}, "curves": {}, "vectors": {}}
    for modality in MODALITIES:
        found = weights(out, precision, modality)
        noted["weights"][modality] = {name: summary(name, found[name]) for name in sorted(found)}
        noted["curves"][modality] = curves(out, precision, modality)
        rows = vectors(out, precision)[modality]
        noted["vectors"][modality] = (rows @ signs("vectors", rows.shape[1])).to_dict()
    return noted


def results(out: Path) -> dict[str, Any]:
    """Of what was packed, matched and scored."""
    table = items(out)
    packed = table[table.status == "packed"].sort_values(["split", "tar", "place"])
    places = packed[["split", "tar", "place", "class"]].reset_index()
    best = pairs(out).sort_values("score", ascending=False)[:PAIRS]
    return {
        "tars": tars(out),
        "items": sha256(table.reset_index().astype(str).to_numpy().tolist()),
        "plan": sha256(places.astype(str).to_numpy().tolist()),
        "pairs": {f"{p.posting} {p.other}": [p.score, p.image, p.text] for p in best.itertuples()},
        "matches": {posting: found for posting, found in matches(out).items() if found},
        "groups": groups(out),
        "threshold": threshold(out),
        "figures": figures(out),
        "report": report(out),
    }


def bfloat16_of_this_processor() -> str | None:
    """Who makes it and which instructions multiply bfloat16; None where none do."""
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines()
                if ":" in line)  # fmt: skip
    facts = {name.strip(): value.split() for name, value in facts.items()}
    known = BF16 if ONEDNN not in os.environ else BF16[1:]
    have = [name for name in known if name in facts.get("flags", ())]
    return f"{facts['vendor_id'][0]} {have[0]}" if have else None


def differences(golden: Any, found: Any, tolerance: float, where: str = "") -> list[str]:
    """Every value of `found` that is not that of `golden`, numbers beyond `tolerance`."""
    if isinstance(golden, dict) and isinstance(found, dict) and golden.keys() == found.keys():
        parts = [(golden[key], found[key], f"{where} / {key}") for key in golden]
    elif isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        parts = [
            (*both, f"{where} [{k}]") for k, both in enumerate(zip(golden, found, strict=True))
        ]
    elif isinstance(golden, float) and isinstance(found, int | float):
        near = abs(golden - found) <= tolerance
        return [] if near else [f"{where}: {found!r}, was {golden!r}"]
    else:
        return [] if golden == found else [f"{where}: {found!r:.200}, was {golden!r:.200}"]
    return [
        line for one, other, place in parts for line in differences(one, other, tolerance, place)
    ]


def read_golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


def write_golden(noted: dict[str, Any]) -> None:
    """A line for each part, floats to nine digits."""
    lines = [f"{json.dumps(part)}: {json.dumps(_shorter(value))}" for part, value in noted.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _shorter(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shorter(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shorter(inner) for inner in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def summary(name: str, tensor: np.ndarray) -> list[float]:
    """Root mean square, and two random sums, of the spread of one number."""
    values = tensor.astype(float).ravel()
    sums = [values @ signs(f"{name} {k}", len(values)) for k in range(2)]
    return [float(x) / len(values) ** 0.5 for x in (np.linalg.norm(values), *sums)]


def signs(name: str, size: int) -> np.ndarray:
    """1 or -1, the same on every machine and for every version of NumPy."""
    return 1.0 - 2 * (np.random.PCG64(zlib.crc32(name.encode())).random_raw(size) >> 63)


def plain_weights(folder: Path) -> Path:
    """Give the encoder in `folder` weights that owe nothing to torch's random numbers."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(tensor.size) >> 11
        uniform = (2 * (bits * 2.0**-53) - 1).reshape(tensor.shape)
        if tensor.ndim > 1:
            tensors[name] = (uniform * (3 / tensor.shape[-1]) ** 0.5).astype(tensor.dtype)
        elif tensor.dtype == np.float32:
            tensors[name] = np.full_like(tensor, name.endswith("weight"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_verbs(json.loads(sys.argv[1]))
    else:  # and what a processor gives that has the older instructions alone
        test = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(Path(__file__).with_name("test_golden.py")),
        ]
        for more in ({}, {ONEDNN: "AVX512_CORE_BF16"}):
            subprocess.run(test, env=os.environ | {RECORDING: "1"} | more, check=True)
