"""Write the measured rows to benchmarks/RESULTS.md, README.md and docs/algorithms.md: python -m benchmarks.tables"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet32": "ResNet-32, CIFAR-10",
    "shufflenetv2_x0_5": "ShuffleNetV2 x0.5, CIFAR-10",
    "dscnn_kws": "DS-CNN, keywords",
    "mcunet_in4": "MCUNet-in4, ImageNet sample",
    "mobilenet_v1_025": "MobileNetV1 0.25, ImageNet sample",
}
MARK = "<!-- RESULTS: written by python -m benchmarks.tables -->"


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a result file."""
    with (RESULTS / name).open(newline="") as handle:
        return list(csv.DictReader(handle))


def accuracy(*, main: bool = False) -> list[str]:
    """One line a network, recipe and placement; ``main`` keeps what a first look needs."""
    heads = ("network (judged)", "recipe, placement", "float", "simulated", "same class as float", "file",
             "file: same class as simulation", "differing outputs")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows("accuracy.csv"):
        if main and (r["recipe"], r["placement"]) != ("int8", "runtime") and r["net"] != "resnet20":
            continue
        total = int(r["judged_samples"])
        lines.append(
            f"| {NAMES[r['net']]} ({total:,}) | `{r['recipe']}`, `{r['placement']}` | {float(r['float_top1']):.2f} | "
            f"{float(r['simulated_top1']):.2f} | {float(r['agreement']):.2f} % | {float(r['deployed_top1']):.2f} | "
            f"{float(r['file_class_agreement']):.2f} % | {int(r['differing_outputs']):,} |"
        )
    return lines


def algorithms() -> list[str]:
    """What each post-training algorithm gives back; of a row that was measured twice, the later."""
    heads = ("network (judged)", "row, placement", "float", "top-1", "same class as float", "draws", "step, s",
             "Brevitas: top-1", "same class", "step, s")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in {(r["net"], r["row"]): r for r in rows("algorithms.csv")}.values():
        spread = f" +- {float(r['top1_std']):.2f}" if int(r["draws"]) > 1 else ""
        cells = (
            f"{NAMES[r['net']]} ({int(r['judged_samples']):,})", f"{r['row']}, `{r['placement']}`",
            f"{float(r['float_top1']):.2f}", f"{float(r['top1']):.2f}{spread}", f"{float(r['agreement']):.2f} %",
            r["draws"], r["step_s"], r["brevitas_top1"], r["brevitas_agreement"], r["brevitas_step_s"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def equalization() -> list[str]:
    """Top-1 with each step in front of rounding, or that the gate has undone it; of a row measured twice, the later."""
    found = {(r["net"], r["setting"], r["step"]): r for r in rows("equalization.csv")}
    steps = [step for step in dict.fromkeys(step for *_, step in found) if step != "none"]
    lines = [f"| network (judged) | setting | without | {' | '.join(steps)} |", "|---" * (len(steps) + 3) + "|"]
    for net, setting in dict.fromkeys((net, setting) for net, setting, _ in found):
        plain = found[net, setting, "none"]
        cells = [f"{NAMES[net]} ({int(plain['judged_samples']):,})", setting, f"{float(plain['top1']):.2f}"]
        for step in steps:
            r = found.get((net, setting, step))
            top1 = "" if r is None else "undone" if r["kept"] == "undone" else f"{float(r['top1']):.2f}"
            cells.append(f"**{top1}** ({float(r['change']):+.2f})" if r is not None and r["kept"] == "yes" else top1)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def latency() -> list[str]:
    """Our files beside the rivals'."""
    lines = ["| file | engine | batch | ms | times as fast as the baseline | baseline |", "|---|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("latency-*.csv")):
        net = path.stem.split("-")[1]
        for r in rows(path.name):
            ratio = f"{float(r['ratio']):.2f}" if r["ratio"] else ""
            cells = (
                f"{net} {r['label']}",
                r["engine"],
                r["batch"],
                f"{float(r['median_ms']):.2f}",
                ratio,
                r["baseline"],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def speed() -> list[str]:
    """Quantizing beside Brevitas."""
    r = rows("speed.csv")[0]
    text = (
        f"Quantizing ResNet-20 with {r['samples']} images takes {r['quantize_s']} s (median, two threads), "
        f"{r['times_faster_than_brevitas']} times less than Brevitas' default flow beside it ({r['brevitas_s']} s); "
        f"calibration costs {r['calibrate_per_forward']} float forward passes."
    )
    return [text]


def dynamic() -> list[str]:
    """Dynamic quantization: accuracy, then times beside the rivals' of the same model."""
    lines = ["| network | variant | measure | value | to float | MB |", "|---" * 6 + "|"]
    for r in rows("dynamic-accuracy.csv"):
        value, difference = float(r["value"]), float(r["difference"])
        lines.append(
            f"| {r['net']} | {r['variant']} | {r['measure']} | {value:.5g} | {difference:+.4f} | {r['megabytes']} |"
        )
    lines += [
        "",
        "| network, input | variant | ms, two threads | times as fast as the fastest rival |",
        "|---" * 4 + "|",
    ]
    for r in rows("dynamic-latency.csv"):
        ratio = f"{float(r['ratio']):.2f}"
        lines.append(f"| {r['net']} {r['input_shape']} | {r['variant']} | {float(r['median_ms']):.3f} | {ratio} |")
    return lines


def torch_engine() -> list[str]:
    """PyTorch's int8 kernels: agreement with the simulation, then times."""
    lines = ["| quantized for target | same class as its simulation | equal to the bit |", "|---" * 3 + "|"]
    for r in rows("torch_engine_accuracy.csv"):
        note = "" if r["target"] == "torch" else ", whose simulation rounds otherwise: `bs.deploy` warns"
        share = f"{float(r['same_class']):.2f} % of {int(r['images']):,} | {float(r['equal_to_the_bit']):.1f} %"
        lines.append(f"| `{r['target']}`{note} | {share} |")
    heads = "| network, batch | variant | ms, two threads | times as fast as float eager | as torch.ao's own |"
    lines += ["", heads, "|---" * 5 + "|"]
    for r in rows("torch_engine_speed.csv"):
        against = f"{float(r['against']):.2f} ({r['baseline']})" if r["against"] else ""
        cells = (
            f"{r['net']}, {r['batch']}",
            r["label"],
            f"{float(r['median_ms']):.2f}",
            f"{float(r['faster']):.2f}",
            against,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Write the tables between the markers."""
    _write_between_marks(ROOT / "README.md", [*accuracy(main=True), "", *speed()])
    _write_between_marks(ROOT / "docs" / "algorithms.md", equalization())
    page = ["# Results", "", "Written by `python -m benchmarks.tables` from `benchmarks/results/`.", ""]
    parts = (accuracy(), algorithms(), equalization(), speed(), latency(), dynamic(), torch_engine())
    lines = [line for part in parts for line in (*part, "")]
    (ROOT / "benchmarks" / "RESULTS.md").write_text("\n".join([*page, *lines]))


def _write_between_marks(page: Path, lines: list[str]) -> None:
    """Replace what stands between the markers of a page."""
    before, _, after = page.read_text(encoding="utf-8").split(MARK)
    page.write_text("\n".join([f"{before}{MARK}", "", *lines, "", f"{MARK}{after}"]), encoding="utf-8")


if __name__ == "__main__":
    main()
