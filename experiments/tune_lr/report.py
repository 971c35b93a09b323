"""Table, verdict and report.html of the experiment, from what the run folders say."""

import ast
import base64
import html
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plots

from src import jobs
from src.results import collect, load_config, mean_interval, to_json, welch

METRIC = "acc"  # in %; val_acc chooses, the test's acc is told for the chosen setting alone
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; }
tr.best { background: #e8f1fa; font-weight: 600; }
img { width: 100%; }
.verdict { border-left: 4px solid #0072b2; padding-left: 1rem; }
.warning { border-left: 4px solid #d55e00; padding-left: 1rem; }
"""


def report(folder: Path, axis: str, label: str, *, as_json: bool) -> None:
    """Writes table.csv, table.md, the plots and report.html into folder/report, and prints the findings."""
    grid = json.loads((folder / "grid.json").read_text())[axis]
    runs, left_out = comparable(folder, axis)
    rows = []
    for value in grid:
        mean, deviation, half, n = mean_interval(runs.loc[runs["value"] == value, "valid"].tolist())
        rows.append((value, n, mean, deviation, half))
    table = pd.DataFrame(rows, columns=["value", "n", "mean", "std", "interval"])
    ranked = table[table["n"] > 0].sort_values("mean", ascending=False)["value"].tolist()
    said = verdict(runs, ranked, label, grid)
    shown = as_read(table, label)
    header = [shown.columns.tolist(), ["---"] * len(shown.columns)]
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in header + shown.to_numpy().tolist())

    out = folder / "report"
    out.mkdir(exist_ok=True)
    named = table.rename(columns={"value": axis})
    named.to_csv(out / "table.csv", index=False, float_format="%.6g")
    (out / "table.md").write_text(markdown, encoding="utf-8")
    plots.metric_by_setting(runs, table, label, out / "accuracy")
    plots.learning_curves(runs, label, f"val_{METRIC}", out / "curves")
    (out / "report.html").write_text(page(label, shown, ranked[:1], runs, left_out, said, out), encoding="utf-8")
    if as_json:
        rows = named.astype(object).to_dict("records")
        print(to_json({"best": ranked[0] if ranked else None, "verdict": said, "table": rows, "left_out": left_out}))
    else:
        print(markdown, *said, *(f"{run}: {why}" for run, why in left_out.items()), out / "report.html", sep="\n")


def comparable(folder: Path, axis: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """The runs of the batch that have finished, a row each; and why the others do not count: unfinished, diverged."""
    found = collect(folder).set_index("run").to_dict("index")
    left_out, counted = {}, []
    for job in jobs.read_batch(folder / "batch.sh"):
        run = str(job.run or job.line)
        row = found.get(run, {"status": "missing", "problem": "not started yet"})
        valid, test = (row.get(column, math.nan) for column in (f"best_val_{METRIC}", f"test_{METRIC}"))
        if row["status"] != "finished" or row["problem"]:
            left_out[run] = ": ".join(filter(None, (row["status"], row["problem"])))
        elif not (math.isfinite(valid) and math.isfinite(test)):
            left_out[run] = f"finished: val_{METRIC} or the test's {METRIC} is missing or not finite"
        else:
            config = load_config(run)  # collect leaves out what is the same in all runs
            value, seed = (ast.literal_eval(config[name]) for name in (axis, "training_loop.seed"))
            counted.append((run, value, seed, int(row["best_epoch"]), valid, test))
    runs = pd.DataFrame(counted, columns=["run", "value", "seed", "best_epoch", "valid", "test"])
    return runs.sort_values(["value", "seed"], ignore_index=True), left_out


def verdict(runs: pd.DataFrame, ranked: Sequence[Any], label: str, grid: Sequence[Any]) -> list[str]:
    """Sentences: the best, its test metric, whether it differs from the second, and whether it is at the edge."""
    if not ranked:
        return ["No run is finished: nothing can be told yet."]
    best, *others = ranked
    of = dict(iter(runs.groupby("value")))
    mean, _, half, n = mean_interval(of[best]["test"].tolist())
    spread = "" if math.isnan(half) else f" ± {half:.2f} (95 % interval)"
    said = [f"Best {label}: {best:g}, by the mean of val_{METRIC}. Test: {mean:.2f}{spread} %, n = {n}."]
    if others:
        second = others[0]
        p = welch(of[best]["valid"].tolist(), of[second]["valid"].tolist())
        if p is None:
            said.append(f"Whether it differs from {second:g}: cannot tell, there are fewer than 3 seeds, or no spread.")
        else:
            word = "differs" if p < 0.05 else "does not differ"
            said.append(f"It {word} from the second, {second:g} (Welch's t test on val_{METRIC}: p = {p:.3g}).")
    if len(grid) > 1 and best in (min(grid), max(grid)):
        said.append(f"Warning: {best:g} is at the edge of the grid; the best may lie outside.")
    return said


def as_read(table: pd.DataFrame, label: str) -> pd.DataFrame:
    """The table as people read it: texts, in columns of speaking names."""
    names = [label, "n", f"val_{METRIC} (%)", "standard deviation", "95 % interval"]
    formats = ["{:g}", "{}", "{:.2f}", "{:.2f}", "± {:.2f}"]
    columns = zip(names, table.columns, formats, strict=True)
    return pd.DataFrame({name: table[c].map(f.format, na_action="ignore") for name, c, f in columns}).fillna("-")


def page(
    label: str, shown: pd.DataFrame, best: list[Any], runs: pd.DataFrame, left_out: dict[str, str], said: list[str],
    out: Path,
) -> str:  # fmt: skip
    """report.html: all in one file; each run's number is linked to its folder."""

    def link(run: str, text: str) -> str:
        return f'<a href="{html.escape(Path(os.path.relpath(run, out)).as_posix())}/">{html.escape(text)}</a>'

    def image(name: str, text: str) -> str:
        data = base64.b64encode((out / name).read_bytes()).decode()
        return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'

    title = html.escape(f"Which {label} is best?")
    summary = shown.to_html(index=False, border=0, table_id="summary")
    for value in best:  # its row
        cell = f"\n      <td>{value:g}</td>"
        summary = summary.replace(f"<tr>{cell}", f"<tr class=best>{cell}")
    each = pd.DataFrame({
        "run": [link(run, Path(run).name) for run in runs["run"]],
        html.escape(label): runs["value"].map("{:g}".format),
        "seed": runs["seed"],
        "best epoch": runs["best_epoch"],
        f"val_{METRIC} (%)": [link(run, f"{valid:.2f}") for run, valid in zip(runs["run"], runs["valid"], strict=True)],
    })  # fmt: skip
    with pd.option_context("display.max_colwidth", None):  # else long links are cut
        each_run = each.to_html(index=False, border=0, table_id="runs", escape=False)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
        f"<h1>{title}</h1>",
        *(f"<p class={'warning' if s.startswith('Warning') else 'verdict'}>{html.escape(s)}</p>" for s in said),
        summary,
        image("accuracy.png", f"validation accuracy by {label}"),
        image("curves.png", "learning curves"),
        f"<h2>Runs</h2>{each_run}",
    ]
    if left_out:
        items = [f"<li>{link(run, Path(run).name)}: {html.escape(why)}</li>" for run, why in left_out.items()]
        parts.append(f"<h2>Left out</h2><ul id=left_out>{''.join(items)}</ul>")
    return "\n".join([*parts, "</html>\n"])
