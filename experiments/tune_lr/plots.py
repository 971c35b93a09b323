"""The experiment's two plots, as png and pdf, for a column of a paper."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from src.results import load_history

# Okabe and Ito 2008, "Color universal design": told apart by the colour-blind.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"axes.prop_cycle": matplotlib.cycler(color=COLOURS, marker=list("osD^vPX"))}
STYLE |= {"legend.frameon": False, "figure.constrained_layout.use": True}


@contextmanager
def figure(path: Path, x: str, y: str) -> Iterator[Axes]:
    """Axes with these labels, to be drawn in; then path.png and path.pdf are written."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5, 3))
        axes = figure.subplots()
        axes.set(xlabel=x, ylabel=y)
        yield axes
        # Without the time of their making: the same runs give the same bytes.
        figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None, "Producer": None, "Creator": None})


def metric_by_setting(runs: pd.DataFrame, table: pd.DataFrame, label: str, path: Path) -> None:
    """A point a run, and mean and 95 % interval of each setting, on a log axis if they are far apart."""
    with figure(path, label, "best validation accuracy (%)") as axes:
        table = table.sort_values("value")
        axes.errorbar(table["value"], table["mean"], table["interval"], capsize=4, label="mean, 95 % interval")
        beside = offset_copy(axes.transData, axes.figure, x=7, units="points")
        axes.scatter(runs["value"], runs["valid"], color=COLOURS[1], s=10, alpha=0.7, transform=beside, label="a run")
        axes.update_datalim(runs[["value", "valid"]].to_numpy(float))  # so moved, they do not count for its limits
        if table["value"].min() > 0 and table["value"].max() / table["value"].min() > 5:
            axes.set_xscale("log")
        axes.set_xticks(table["value"], table["value"].map("{:g}".format))
        axes.minorticks_off()
        axes.legend()


def learning_curves(runs: pd.DataFrame, label: str, column: str, path: Path) -> None:
    """The column by epoch: a line a setting, the mean over its runs, with all of them in between shaded."""
    with figure(path, "epoch", "validation accuracy (%)") as axes:
        for value, group in runs.groupby("value"):
            curves = pd.DataFrame([[row[column] for row in load_history(run)] for run in group["run"]])
            epochs, every = curves.columns + 1, max(1, len(curves.columns) // 5)
            (line,) = axes.plot(epochs, curves.mean(), markevery=every, ms=4, label=f"{value:g}")
            axes.fill_between(epochs, curves.min(), curves.max(), color=line.get_color(), alpha=0.15, lw=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(runs):
            axes.legend(title=label)
