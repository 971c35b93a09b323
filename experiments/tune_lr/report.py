"""Table, verdict and report.html of the experiment, from what the run folders say."""

import ast
import base64
import html
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plots

from src import jobs
from src.config import Refused
from src.results import collect, load_config, load_history, mean_interval, to_json, welch

METRIC = "acc"  # in %; val_acc chooses, test_acc is told for the chosen setting alone
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


@dataclass
class Findings:
    """What the report says. table: a row a value of the grid; left_out: run -> why it does not count."""

    table: pd.DataFrame
    runs: pd.DataFrame
    left_out: dict[str, str]
    best: Any
    verdict: list[str]


def report(folder: Path, axis: str, label: str, *, as_json: bool) -> None:
    """Writes table.csv, table.md, the plots and report.html into folder/report, and prints the findings."""
    values = json.loads((folder / "grid.json").read_text())
    batch = jobs.read_batch(folder / "batch.sh")
    if strange := [job.line for job in batch if not job.run]:
        raise Refused(f"{folder / 'batch.sh'}: which run this line is cannot be told: {strange[0]}")
    found = find(folder, [job.run for job in batch if job.run], axis, label, values[axis])
    out = folder / "report"
    out.mkdir(exist_ok=True)
    found.table.to_csv(out / "table.csv", index=False, float_format="%.6g")
    table = as_text(found.table, label)
    (out / "table.md").write_text(markdown(table), encoding="utf-8")
    histories = {value: [load_history(run) for run in group["run"]] for value, group in found.runs.groupby(axis)}
    plots.metric_by_setting(found.runs, found.table, axis, label, f"best_val_{METRIC}", out / "accuracy")
    plots.learning_curves(histories, label, f"val_{METRIC}", out / "curves")
    (out / "report.html").write_text(page(found, table, axis, label, out), encoding="utf-8")
    if as_json:
        rows = found.table.astype(object).to_dict("records")
        print(to_json({"best": found.best, "verdict": found.verdict, "table": rows, "left_out": found.left_out}))
    else:
        print(markdown(table), *found.verdict, *(f"{run}: {why}" for run, why in found.left_out.items()), sep="\n")
        print(f"{out / 'report.html'}")


def find(folder: Path, planned: list[Path], axis: str, label: str, grid: list[Any]) -> Findings:
    """Compares the finished runs; those that are not, or have diverged, are left out and named."""
    frame = collect(folder / "runs") if (folder / "runs").is_dir() else pd.DataFrame({"run": []})
    rows = {row["run"]: row for row in frame.to_dict("records")}
    left_out, counted = {}, []
    for run in map(str, planned):
        row = rows.get(run)
        if row is None:
            left_out[run] = "missing: not started yet"
        elif row["status"] != "finished" or row["problem"]:
            left_out[run] = f"{row['status']}" + (f": {row['problem']}" if row["problem"] else "")
        elif not all(math.isfinite(row.get(column, math.nan)) for column in (f"best_val_{METRIC}", f"test_{METRIC}")):
            left_out[run] = f"{row['status']}: val_{METRIC} or the test's {METRIC} is missing or not finite"
        else:
            config = load_config(run)  # collect leaves out what is the same in all runs
            own = {name: ast.literal_eval(config[name]) for name in (axis, "training_loop.seed")}
            counted.append(row | own | {"best_epoch": int(row["best_epoch"])})
    columns = ["run", axis, "training_loop.seed", "best_epoch", f"best_val_{METRIC}", f"test_{METRIC}"]
    runs = pd.DataFrame(counted, columns=columns).sort_values([axis, "training_loop.seed"], ignore_index=True)
    records = []
    for value in grid:
        own = runs[runs[axis] == value]
        mean, deviation, half, n = mean_interval(own[f"best_val_{METRIC}"].tolist())
        records.append({axis: value, "n": n, "mean": mean, "std": deviation, "interval": half})
    table = pd.DataFrame(records, columns=[axis, "n", "mean", "std", "interval"])
    ranked = table[table["n"] > 0].sort_values("mean", ascending=False)[axis].tolist()
    best = ranked[0] if ranked else None
    return Findings(table, runs, left_out, best, verdict(runs, ranked, axis, label, grid))


def verdict(runs: pd.DataFrame, ranked: list[Any], axis: str, label: str, grid: list[Any]) -> list[str]:
    """Sentences: the best, its test metric, whether it differs from the second, and whether it is at the edge."""
    if not ranked:
        return ["No run is finished: nothing can be told yet."]
    of = {value: runs[runs[axis] == value] for value in ranked}
    valid = {value: own[f"best_val_{METRIC}"].tolist() for value, own in of.items()}
    mean, _, half, n = mean_interval(of[ranked[0]][f"test_{METRIC}"].tolist())
    spread = "" if math.isnan(half) else f" ± {half:.2f} (95 % interval)"
    said = [f"Best {label}: {ranked[0]:g}, by the mean of val_{METRIC}. Test: {mean:.2f}{spread} %, n = {n}."]
    if len(ranked) > 1:
        p = welch(valid[ranked[0]], valid[ranked[1]])
        if p is None:
            said.append(
                f"Whether it differs from {ranked[1]:g}: cannot tell, there are fewer than 3 seeds, or no spread."
            )
        else:
            word = "differs" if p < 0.05 else "does not differ"
            said.append(f"It {word} from the second, {ranked[1]:g} (Welch's t test on val_{METRIC}: p = {p:.3g}).")
    if len(grid) > 1 and ranked[0] in (min(grid), max(grid)):
        said.append(f"Warning: {ranked[0]:g} is at the edge of the grid; the best may lie outside.")
    return said


def as_text(table: pd.DataFrame, label: str) -> list[list[str]]:
    """The table as people read it: header and rows."""
    rows = [[label, "n", f"val_{METRIC} (%)", "standard deviation", "95 % interval"]]
    for value, n, *numbers in table.itertuples(index=False):
        rows.append([f"{value:g}", str(n), *("-" if math.isnan(x) else f"{x:.2f}" for x in numbers)])
        rows[-1][-1] = rows[-1][-1] if rows[-1][-1] == "-" else f"± {rows[-1][-1]}"
    return rows


def markdown(rows: list[list[str]]) -> str:
    """The rows as a table of markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def page(found: Findings, table: list[list[str]], axis: str, label: str, out: Path) -> str:
    """report.html: all in one file; each run's number is linked to its folder."""

    def cells(row: list[str], tag: str = "td") -> str:
        return "".join(f"<{tag}>{cell}</{tag}>" for cell in row)

    def link(run: str, text: str) -> str:
        return f'<a href="{html.escape(Path(os.path.relpath(run, out)).as_posix())}/">{html.escape(text)}</a>'

    def image(name: str, text: str) -> str:
        data = base64.b64encode((out / name).read_bytes()).decode()
        return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'

    escaped = [[html.escape(cell) for cell in row] for row in table]
    summary = [f"<tr>{cells(escaped[0], 'th')}</tr>"]
    for value, row in zip(found.table[axis], escaped[1:], strict=True):
        summary.append(f"<tr{' class=best' if value == found.best else ''}>{cells(row)}</tr>")
    each = [f"<tr>{cells(['run', html.escape(label), 'seed', 'best epoch', f'val_{METRIC} (%)'], 'th')}</tr>"]
    for run, value, seed, epoch, valid, _ in found.runs.itertuples(index=False):
        each.append(
            f"<tr>{cells([link(run, Path(run).name), f'{value:g}', seed, epoch, link(run, f'{valid:.2f}')])}</tr>"
        )
    out_of_it = [f"<li>{link(run, Path(run).name)}: {html.escape(why)}</li>" for run, why in found.left_out.items()]
    title = f"Which {label} is best?"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        *(
            f"<p class={'warning' if s.startswith('Warning') else 'verdict'}>{html.escape(s)}</p>"
            for s in found.verdict
        ),
        f"<table id=summary>{''.join(summary)}</table>",
        image("accuracy.png", f"validation accuracy by {label}"),
        image("curves.png", "learning curves"),
        f"<h2>Runs</h2><table id=runs>{''.join(each)}</table>",
        f"<h2>Left out</h2><ul id=left_out>{''.join(out_of_it)}</ul>" if out_of_it else "",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"
