"""The experiment's two plots, as png and pdf, for a column of a paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito 2008, "Color universal design": told apart by the colour-blind.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MARKERS = "osD^vPX"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}


def metric_by_setting(runs: pd.DataFrame, table: pd.DataFrame, axis: str, label: str, column: str, path: Path) -> None:
    """A point a run, and mean and 95 % interval of each setting, on a log axis."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
        known = table[table["n"] > 0].sort_values(axis)
        axes.errorbar(
            known[axis],
            known["mean"],
            yerr=known["interval"],
            color=COLOURS[0],
            marker="o",
            capsize=4,
            label="mean, 95 % interval",
        )
        axes.scatter(runs[axis], runs[column], color=COLOURS[1], s=14, alpha=0.7, zorder=3, label="a run")
        values = table[axis]
        if values.min() > 0 and values.max() / values.min() > 5:
            axes.set_xscale("log")
        axes.set_xticks(table[axis], [f"{value:g}" for value in table[axis]])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("best validation accuracy (%)")
        if len(runs):
            axes.legend(frameon=False)
        _save(figure, path)


def learning_curves(
    histories: Mapping[Any, Sequence[Sequence[Mapping[str, float]]]], label: str, column: str, path: Path
) -> None:
    """The column by epoch: a line a setting, the mean over its runs, with all of them in between shaded."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
        for k, (value, runs) in enumerate(histories.items()):
            n = min(map(len, runs))
            values = np.array([[row[column] for row in run[:n]] for run in runs])
            epochs, colour = np.arange(1, n + 1), COLOURS[k % len(COLOURS)]
            axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, lw=0)
            marker = MARKERS[k % len(MARKERS)]
            axes.plot(
                epochs,
                values.mean(axis=0),
                color=colour,
                marker=marker,
                markevery=max(1, n // 5),
                ms=4,
                label=f"{value:g}",
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if histories:
            axes.legend(title=label, frameon=False)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # Without the time of their making: the same runs give the same bytes.
    figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None, "Producer": None, "Creator": None})
    plt.close(figure)
