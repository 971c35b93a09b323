"""Table, verdict and report.html of the experiment, from what the run folders say."""

import base64
import html
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plots

from src.results import collect, mean_interval, to_json, welch

METRIC = "acc"  # in %; val_acc chooses, the test's acc is told for the chosen setting alone
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { width: 100%; }
p { border-left: 4px solid #0072b2; padding-left: 1rem; }
p.warning { border-color: #d55e00; }
#summary tbody tr:nth-child(BEST) { background: #e8f1fa; font-weight: 600; }
"""


def report(folder: Path, axis: str, label: str, *, as_json: bool) -> None:
    """Writes table.csv, table.md, the plots and report.html into folder/report, and prints the findings."""
    runs = read_runs(folder, axis)
    counted = runs[runs["why"] == ""]
    left_out = runs[runs["why"] != ""].set_index("run")["why"].to_dict()
    rows = [(v, *mean_interval(counted.loc[counted["value"] == v, "valid"])) for v in runs["value"].unique()]
    table = pd.DataFrame(rows, columns=["value", "mean", "std", "interval", "n"])
    best, said = verdict(counted, table, label)
    shown = pd.DataFrame({
        label: table["value"].map("{:g}".format),
        f"val_{METRIC} (%)": table["mean"].map("{:.2f}".format),
        "standard deviation": table["std"].map("{:.2f}".format),
        "95 % interval": table["interval"].map("± {:.2f}".format),
        "n": table["n"].map(str),
    }).replace(r"(± )?nan", "-", regex=True)  # fmt: skip
    lines = [shown.columns, ["---"] * len(shown.columns), *shown.to_numpy()]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)

    row = 1 + table.index[table["value"] == best].max() if best is not None else 0
    out = folder / "report"
    out.mkdir(exist_ok=True)
    named = table.rename(columns={"value": axis})
    named.to_csv(out / "table.csv", index=False, float_format="%.6g")
    (out / "table.md").write_text(markdown, encoding="utf-8")
    plots.metric_by_setting(counted, table, label, out / "accuracy")
    plots.learning_curves(counted, label, f"val_{METRIC}", out / "curves")
    (out / "report.html").write_text(page(f"Which {label} is best?", said, shown, row, runs, out), encoding="utf-8")
    if as_json:
        print(to_json({"best": best, "verdict": said, "table": named.to_dict("records"), "left_out": left_out}))
    else:
        print(markdown, *said, *(f"{run}: {why}" for run, why in left_out.items()), out / "report.html", sep="\n")


def read_runs(folder: Path, axis: str) -> pd.DataFrame:
    """A row for each run of the grid, in its order: run (its path), value (of the axis), valid and test (in %), and
    why it does not count, or "".
    """
    runs = pd.read_csv(folder / "grid.csv").rename(columns={axis: "value"})
    runs["run"] = [str(folder / "runs" / name) for name in runs["run"]]
    metrics = {f"best_val_{METRIC}": "valid", f"test_{METRIC}": "test"}
    found = collect(folder).reindex(columns=["run", "status", "problem", *metrics]).rename(columns=metrics)
    runs = runs.merge(found, how="left", on="run").fillna({"status": "missing", "problem": "not started yet"})
    finished = (runs["status"] == "finished") & (runs["problem"] == "")
    measured = np.isfinite(runs[["valid", "test"]].astype(float)).all(axis="columns")
    runs["why"] = (runs["status"] + ": " + runs["problem"]).str.removesuffix(": ")
    runs.loc[finished, "why"] = f"finished: val_{METRIC} or the test's {METRIC} is missing or not finite"
    runs.loc[finished & measured, "why"] = ""
    return runs


def verdict(runs: pd.DataFrame, table: pd.DataFrame, label: str) -> tuple[Any, list[str]]:
    """The best value, or None, and sentences: its test metric, whether it differs from the second, is at the edge."""
    ranked = table[table["n"] > 0].sort_values("mean", ascending=False)["value"].tolist()
    if not ranked:
        return None, ["No run is finished: nothing can be told yet."]
    best = ranked[0]
    of = dict(iter(runs.groupby("value")))
    mean, _, half, n = mean_interval(of[best]["test"])
    spread = f"{mean:.2f} %" if math.isnan(half) else f"{mean:.2f} ± {half:.2f} %, 95 % interval"
    said = [f"Best {label}: {best:g}, by the mean of val_{METRIC}. Test {METRIC}: {spread}, n = {n}."]
    for second in ranked[1:2]:
        p = welch(of[best]["valid"], of[second]["valid"])
        if p is None:
            said.append(f"Whether it differs from {second:g}: cannot tell, there are fewer than 3 seeds, or no spread.")
        else:
            word = "differs" if p < 0.05 else "does not differ"
            said.append(f"It {word} from the second, {second:g} (Welch's t test on val_{METRIC}: p = {p:.3g}).")
    if len(table) > 1 and best in (table["value"].min(), table["value"].max()):
        said.append(f"Warning: {best:g} is at the edge of the grid; the best may lie outside.")
    return best, said


def page(title: str, said: list[str], shown: pd.DataFrame, best: int, runs: pd.DataFrame, out: Path) -> str:
    """report.html: all in one file; each run's number is linked to its folder, and row `best` of the table, from 1,
    stands out.
    """
    style = STYLE.replace("BEST", str(best))
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{style}</style>"]
    kinds = ["warning" if sentence.startswith("Warning") else "verdict" for sentence in said]
    told = (f"<p class={kind}>{html.escape(sentence)}</p>" for kind, sentence in zip(kinds, said, strict=True))
    parts += [f"<h1>{title}</h1>", *told]
    parts.append(shown.to_html(index=False, border=0, table_id="summary"))
    for name in ("accuracy", "curves"):
        image = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{image}">')
    parts.append(f"<table id=runs><tr><th>run</th><th>val_{METRIC} (%)</th></tr>")
    for run, valid, why in runs[["run", "valid", "why"]].itertuples(index=False):
        link = f'<a href="{html.escape(Path(os.path.relpath(run, out)).as_posix())}/">'
        told = html.escape(why or f"{valid:.2f}")
        parts.append(f"<tr><td>{link}{html.escape(Path(run).name)}</a></td><td>{link}{told}</a></td></tr>")
    return "\n".join([*parts, "</table></html>\n"])
