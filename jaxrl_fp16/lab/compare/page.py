"""The report of a comparison: report.html, report.json, figure.png, and what the console shows."""

import dataclasses

from jaxrl_fp16.lab.compare.answer import answer
from jaxrl_fp16.lab.compare.figures import (
    GRADIENT, MAIN, OTHER_MISMATCH, RANGES, TERMS, TRAINING, draw_main, draw_panels, evaluation_panels,
)
from jaxrl_fp16.lab.compare.runs import logged_keys, series, window_of
from jaxrl_fp16.lab.compare.tables import (
    ONCE, RUN_COLUMNS, VALUE_COLUMNS, VERDICT_COLUMNS, collapse_sentences, run_rows, value_rows, verdict_rows, verdicts,
)
from jaxrl_fp16.lab.compare.verdicts import ONE_SEED
from jaxrl_fp16.lab.figures import save_png, svg_of
from jaxrl_fp16.lab.page import Figure, Section, Table, said_once, write_page
from jaxrl_fp16.logs import write_json

REPORT, DATA, PICTURE = "report.html", "report.json", "figure.png"
READING = """A line is the mean over seeds at the steps that every run of its side reached, a band spans the smallest to
the largest seed, and thin lines are single seeds. {window} An X ends a run that did not end in order. On a logarithmic
axis exact zeros have a row of their own, marked 0."""
METHOD = """Two runs of one seed began from the same weights and went through the same data in the same order, so
they are compared as pairs, over the steps that both reached. The value of a run is the mean over its steps, or over
their last tenth, as the row says; of skipped steps the sum; of an evaluation the last one; of tokens/s the median.
The mean difference over seeds is tested against its own spread, by Student's t (two-sided, level 5 %); what may differ
by powers of ten is compared as a factor, on logarithms. Tables give the mean over seeds ± their standard deviation. A
difference that passes Holm's correction over all comparisons of its table holds; of one that passes alone the table
says so. The t test assumes that differences over seeds are normal, which a few seeds cannot show.

Runs beside each other share memory bandwidth and caches, so tokens/s and seconds are those of this machine under this
load."""
COLLAPSE = """Collapsed: from some step to the end, the moving average of the training reward (over a twentieth of the
steps, at least 5) lies below its highest value before by more than {share:.0%} of that value, or of its height above
the first average if that is larger, and by more than six standard errors of such an average, for at least one window.
A reward that came back has not collapsed."""


def write_comparison(comparison):
    """Writes all three files into the comparison's folder."""
    found = verdicts(comparison)
    title = f"{comparison.config.run.name}: {', '.join(comparison.sides)}"
    main = draw_main(comparison, title)
    save_png(main, comparison.folder / PICTURE)
    sections = _sections(comparison, found, draw_main(comparison, None))
    write_page(comparison.folder / REPORT, title, _lead(comparison, found), sections)
    write_json(comparison.folder / DATA, _data(comparison, found))


def _lead(comparison, found):
    """The answer, and what forbids to take it as it is."""
    failed = [f"{run.name} ({run.ending})" for run in comparison.runs if run.code != 0]
    return [*answer(comparison, found), *([f"Not to the end: {', '.join(failed)}."] if failed else [])]


def verdict_table(pair, rows, places=range(8)):
    """Every quantity of two sides, in the columns `places`; what all verdicts say is said once, in the caption."""
    found = [[line[place] for place in places] for line in verdict_rows(rows)]
    columns = [("quantity", *pair, *VERDICT_COLUMNS)[place] for place in places]
    caption = f"{pair[0]} against {pair[1]}"
    if len(found) > 1 and all(line[-1].endswith(ONE_SEED) for line in found):
        caption = f"{caption}. {ONE_SEED.capitalize()}"
        found = [[*line, text.removesuffix(ONE_SEED).rstrip("; ") or "-"] for *line, text in found]
    return said_once(Table(columns, found, caption), ONCE)


def _sections(comparison, found, main):
    width = window_of(comparison)
    window = "" if width == 1 else f"A point is the mean of {width} steps (of extremes the extreme, of counts the sum)."
    share = comparison.config.compare.collapse
    yield Section("Reward and mismatch", figures=[Figure(svg_of(main), READING.format(window=window))])
    tables = [verdict_table(pair, rows) for pair, rows in found.items()]
    yield Section("Verdicts", " ".join(collapse_sentences(comparison)), tables=tables)
    for heading, text, panels, columns, height in _plots(comparison):
        figure = draw_panels(comparison, panels, columns, height)
        if figure is not None:
            yield Section(heading, text, figures=[Figure(svg_of(figure))])
    yield Section("The runs", _about(comparison), tables=[Table(RUN_COLUMNS, list(run_rows(comparison)))])
    yield Section("How it was tested", f"{METHOD}\n\n{COLLAPSE.format(share=share)}", folded=True)
    drawn = [key for *_, panels, _, _ in _plots(comparison) for key, _, _ in panels]
    rows = list(value_rows(comparison, dict.fromkeys([*drawn, *logged_keys(comparison)])))
    text = "Mean over seeds ± standard deviation, of everything that was logged."
    yield Section("First and last values", text, tables=[Table(VALUE_COLUMNS, rows)], folded=True)


def _plots(comparison):
    """(heading, text, panels, columns, inches a row)"""
    same = "The same weights, the same tokens, two programs."
    first = "At an iteration's first minibatch, before any step."
    yield "Sampler against scorer", same, MAIN, 2, 3.0
    yield "Sampler against scorer, the rest", "", OTHER_MISMATCH, 3, 2.3
    yield "Scorer against gradient program", first, GRADIENT, 3, 2.3
    yield "Other terms", "What makes sampler and trainer differ beside the numerics, in nats a token.", TERMS, 3, 2.3
    yield "Training", "", TRAINING, 3, 2.3
    yield "Ranges", "As telemetry saw them every few steps.", RANGES, 3, 2.3
    yield "Evaluation", "", evaluation_panels(comparison), 3, 2.3


def _about(comparison):
    warm = (
        "Every run of a seed began from the same weights: a warm start made once, in float32." if comparison.warm else
        "Every run of a seed began from the same weights; there was no warm start (sft.steps is 0)."
    )
    cores = sorted({run.outcome["cores"] for run in comparison.runs if run.outcome.get("cores")})
    pinned = f" Cores that each run had to itself: {' or '.join(map(str, cores))}." if cores else ""
    mixed = any(run.rollout for run in comparison.runs)
    label = " A side named A<-B trains in A and samples in B: the ablation." if mixed else ""
    if comparison.config.compare.engines:
        label += " A side's name begins with the engine that sampled."
    seeds = ", ".join(map(str, dict.fromkeys(run.seed for run in comparison.runs)))
    return (
        f"{len(comparison.runs)} runs of {comparison.config.run.steps} steps; seeds: {seeds}. {warm}{pinned}"
        f"{label} Peak memory is the largest resident memory of any one of a run's processes, as the "
        "system counts it; CPU seconds are user and system time of all of them. Over several starts times add up."
    )


# -- report.json ---------------------------------------------------------------------------------------


def _data(comparison, found):
    keys, width = logged_keys(comparison), window_of(comparison)
    return {
        "name": comparison.config.run.name,
        "steps": comparison.config.run.steps,
        "sides": list(comparison.sides),
        "collapsed": {label: comparison.collapses(label) for label in comparison.sides},
        "collapse": COLLAPSE.format(share=comparison.config.compare.collapse),
        "method": METHOD,
        "answer": _lead(comparison, found),
        "runs": [_run_data(run) for run in (*comparison.warm, *comparison.runs)],
        "verdicts": [_verdict_data(row) for rows in found.values() for row in rows],
        "steps_a_point": width,
        "series": {run.name: {key: _line(run, key, width) for key in keys} for run in comparison.runs},
    }


def _run_data(run):
    names = ("name", "label", "precision", "rollout", "engine", "seed", "code", "ending", "error")
    last = run.records[-1]["step"] if run.records else None
    return {name: getattr(run, name) for name in names} | {"last_step": last} | dict(run.outcome)


def _verdict_data(row):
    named = {"quantity": row.quantity.name, "key": row.quantity.key, "over": row.quantity.over, "first": row.first,
             "second": row.second, "standing": row.standing, "verdict": row.text}
    if row.pairing is None:
        return named
    values = dataclasses.asdict(row.pairing)
    return named | {"first_values": values.pop("first"), "second_values": values.pop("second")} | values


def _line(run, key, width):
    steps, values = series(run, key, width)
    return {"steps": steps.tolist(), "values": values.tolist()}


# -- the console -----------------------------------------------------------------------------------------

SHOWN = ("reward", "mismatch/kl_k3", "mismatch/prob_abs_diff_mean", "mismatch_grad/kl_k3", "tokens_per_second",
         "skipped")


def show_comparison(comparison, console):
    """The verdicts, what happened, the answer, and where the picture and the report lie."""
    found = verdicts(comparison)
    for (first, second), rows in found.items():
        shown = [row for row in rows if row.quantity.key in SHOWN or row.quantity.key.startswith("eval/")]
        table = verdict_table((first, second), shown, (0, 1, 2, 7))
        console.table(f"verdicts, {table.caption.rstrip('.')}", table.columns, table.rows)
    rows = [[*row[:6], row[8]] for row in run_rows(comparison)]
    console.table("what happened", [*RUN_COLUMNS[:6], RUN_COLUMNS[8]], rows)
    for line in (*_lead(comparison, found), *collapse_sentences(comparison)):
        console.say(line)
    console.say(f"picture: {comparison.folder / PICTURE}")
    console.say(f"report: {comparison.folder / REPORT}")
