"""The learning curves of a training run, as a table and as a picture."""

import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLUMNS = (
    *("step", "epoch", "loss", "reconstruction", "kl", "kl_weight", "learning_rate", "grad_norm", "tokens_per_second"),
    *("eval_loss", "eval_reconstruction", "eval_kl"),
)
TABLE, PICTURE = "curves.csv", "curves.png"
SMOOTH = 10  # points in the moving average of the training curves


def write_curves(history: list[dict[str, float]], folder: Path) -> None:
    """Write curves.csv, a row per entry of the Trainer's log, and curves.png, the loss and the KL, if any, over the steps."""
    rows = [{name: entry[name] for name in COLUMNS if name in entry} for entry in history]
    rows = [row for row in rows if "loss" in row or "eval_loss" in row]
    with open(folder / TABLE, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    shown = [("loss", "nats per token")] + [("kl", "KL, nats per token")] * any("kl" in row for row in rows)
    figure, axes = pyplot.subplots(1, len(shown), figsize=(6 * len(shown), 4), squeeze=False, layout="constrained")
    for axis, (name, label) in zip(axes[0], shown):
        _curve(axis, rows, name, "training", color="#9db8d9")
        _curve(axis, rows, f"eval_{name}", "validation", color="#d1495b", marker="o")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(folder / PICTURE, dpi=120)
    pyplot.close(figure)


def _curve(axis, rows: list[dict[str, float]], name: str, label: str, **style) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if not points:
        return
    steps, values = map(np.array, zip(*points))
    if name.startswith("eval"):
        axis.plot(steps, values, label=label, **style)
        return
    axis.plot(steps, values, alpha=0.5, lw=0.8, **style)
    width = min(SMOOTH, len(values))
    smooth = np.convolve(values, np.ones(width) / width, "valid")
    axis.plot(steps[width - 1 :], smooth, label=label, color="#1f4e8c")
