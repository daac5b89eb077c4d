"""``bitsmith evaluate`` on image folders, beside the same images as arrays.

    python -m benchmarks.evaluate folders resnet20 DIR               writes the images out, and says how to use them
    python -m benchmarks.evaluate compare [--nets ...] [--csv FILE]  runs both ways; the numbers must agree

CIFAR-10 (ResNet-20): the first 1,000 training images calibrate, all test images judge, as PNG. The ImageNet sample
(MobileNetV1 0.25, depthwise): a seeded 100 calibrate, the other 900 judge, as the JPEG files that they are, resized
and cropped by the command; since each part lacks classes, a label map says which folder is which class.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import data
from benchmarks.accuracy import commit

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HALF = "0.5,0.5,0.5"
# MODEL, its weights, and what has to be said of its images; ResNet-20's mean and std are the command's own.
NETS = {
    "resnet20": (
        "benchmarks/nets/resnet_cifar.py:resnet20",
        "cifar10_resnet20_akamaster.safetensors",
        ("--resize", "0", "--crop", "0"),
    ),
    "mobilenet_v1_025": (
        "benchmarks/nets/mobilenet_v1_025.py:MobileNetV1",
        "imagenet_mobilenet_v1_0.25_224.safetensors",
        ("--resize", "256", "--crop", "224", "--mean", HALF, "--std", HALF),
    ),
}
_PER_TENSOR = ("--weight-quant-granularity", "per_tensor")
RUNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "resnet20": (
        (),
        ("--weight-bit-width", "4", "--gptq"),
        ("--target-backend", "fx", *_PER_TENSOR),
    ),
    "mobilenet_v1_025": (
        (),
        (*_PER_TENSOR, "--graph-eq-iterations", "20", "--graph-eq-merge-bias", "--gptq"),
    ),
}
FIELDS = ("net", "options", "path", "calibration_samples", "judged_samples", "float_top1", "simulated_top1",
          "agreement", "output_sqnr_db", "seed", "commit", "bitsmith")  # fmt: skip


def write_folders(net: str, folder: Path) -> None:
    """``folder/calibration`` and ``folder/validation``, one sub-folder per class; a label map where one is needed."""
    (_write_cifar if net == "resnet20" else _write_imagenet)(folder)


def _write_cifar(folder: Path) -> None:
    for part, split, count in (("calibration", "train", 1000), ("validation", "test", 10_000)):
        images, labels = data.cifar10(split)
        for index, (pixels, label) in enumerate(zip(images[:count], labels[:count])):
            place = folder / part / CIFAR_CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{index:05}.png", compress_level=1)


def _write_imagenet(folder: Path) -> None:
    first, _ = data.seeded_split(1000, 100)
    calibrate = set(first.tolist())
    lines = []
    with tarfile.open(data.data_file("imagenet_sample1000_256.tar")) as tar:
        for member in sorted((m for m in tar if m.isfile()), key=lambda m: m.name):
            name = Path(member.name).name
            index, synset = int(name[:3]), name.split("_")[1]
            place = folder / ("calibration" if index in calibrate else "validation") / synset
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
            lines.append(f"{synset} {index}\n")
    (folder / "classes.txt").write_text("".join(lines))


def write_arrays(net: str, folder: Path) -> None:
    """The same images decoded by ``benchmarks.data``, as uint8 in ``.npz`` files, in the order of the folders."""
    if net == "resnet20":
        parts = {part: tuple(values[:n] for values in data.cifar10(split))
                 for part, split, n in (("calibration", "train", 1000), ("validation", "test", 10_000))}  # fmt: skip
    else:
        images, labels = data.imagenet_sample(224)
        first, rest = data.seeded_split(len(images), 100)
        parts = {"calibration": (images[first], labels[first]), "validation": (images[rest], labels[rest])}
    for part, (x, y) in parts.items():
        order = np.argsort(y, kind="stable")
        np.savez(folder / f"{part}.npz", x=x[order], y=y[order])


def command(net: str, folder: Path, path: str, options: tuple[str, ...]) -> list[str]:
    """The arguments of ``bitsmith evaluate`` for this net, its images as ``folders`` or ``arrays``, and options."""
    model, weights, images = NETS[net]
    suffix = "" if path == "folders" else ".npz"
    places = [f"--{part}-dir={folder / part}{suffix}" for part in ("calibration", "validation")]
    if path == "arrays":
        images = images[images.index("--mean") :] if "--mean" in images else ()
    elif (folder / "classes.txt").exists():
        images = (*images, "--label-map", str(folder / "classes.txt"))
    return ["evaluate", model, "--weights", str(data.data_file(weights)), *places, *images, *options]


def evaluate(net: str, folder: Path, path: str, options: tuple[str, ...]) -> dict[str, object]:
    """One row: what the command line prints as JSON."""
    arguments = command(net, folder, path, options)
    run = [sys.executable, "-c", "from bitsmith.cli import main; main()", *arguments, "--json", "-q"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=data.ROOT)
    if done.returncode:
        raise SystemExit(f"bitsmith {' '.join(arguments)}\n{done.stderr}")
    result = json.loads(done.stdout)
    exact, simulated = result["metrics"]["float"], result["metrics"]["simulated"]
    from bitsmith import __version__

    return {
        "net": net, "options": " ".join(options), "path": path, "calibration_samples": result["report"]["samples"],
        "judged_samples": simulated["samples"], "float_top1": round(exact["top1"], 2),
        "simulated_top1": round(simulated["top1"], 2), "agreement": round(simulated["agreement"], 3),
        "output_sqnr_db": round(simulated["sqnr_db"], 4), "seed": 0,
        "commit": commit(), "bitsmith": __version__,
    }  # fmt: skip


def compare(nets: list[str], path: Path | None) -> None:
    """Every run of these nets both ways, as a table, and as CSV row by row."""
    print(f"{'net':18}{'images as':10}{'float':>7}{'sim':>7}{'agree':>9}{'dB':>9}  options")
    handle = None if path is None else path.open("w", newline="")
    writer = None if handle is None else csv.DictWriter(handle, FIELDS)
    if writer is not None:
        writer.writeheader()
    for net in nets:
        with tempfile.TemporaryDirectory(prefix="bitsmith-") as scratch:
            folder = Path(scratch)
            write_folders(net, folder)
            write_arrays(net, folder)
            for options in RUNS[net]:
                for form in ("folders", "arrays"):
                    row = evaluate(net, folder, form, options)
                    print(f"{net:18}{form:10}{row['float_top1']:7.2f}{row['simulated_top1']:7.2f}"
                          f"{row['agreement']:9.3f}{row['output_sqnr_db']:9.4f}  {row['options']}",
                          flush=True)  # fmt: skip
                    if writer is not None and handle is not None:
                        writer.writerow(row)
                        handle.flush()


def main() -> None:
    """Write folders, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    folders = actions.add_parser("folders")
    folders.add_argument("net", choices=list(NETS))
    folders.add_argument("folder", type=Path)
    both = actions.add_parser("compare")
    both.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    both.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if options.action == "compare":
        compare(options.nets, options.csv)
        return
    if data.ROOT in [options.folder.resolve(), *options.folder.resolve().parents]:
        parser.error(f"{options.folder} is inside the repository, where images have no business")
    write_folders(options.net, options.folder)
    print("bitsmith", *command(options.net, options.folder, "folders", ()))


if __name__ == "__main__":
    main()
