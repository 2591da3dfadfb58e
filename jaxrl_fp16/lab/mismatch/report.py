"""What `mismatch` found: every metric of every pair of programs as tables, and the page with the figures."""

import jax
import numpy as np

from jaxrl_fp16.lab.figures import svg_of
from jaxrl_fp16.lab.mismatch import figures as draw
from jaxrl_fp16.lab.mismatch.answer import answer
from jaxrl_fp16.lab.mismatch.attribution_page import attribution_section
from jaxrl_fp16.lab.mismatch.engines_page import engine_section, engine_table, engines_of
from jaxrl_fp16.lab.mismatch.stats import (
    DRAWN, PAIRS, binned_kl, by_length, distances, k3, log_ratio, mean_over_tokens, not_finite, pair_logprobs, verdict,
)
from jaxrl_fp16.lab.page import Figure, Section, Table, said_once, write_page
from jaxrl_fp16.objectives import mismatch_metrics

METRICS = (  # as they are read, the KL first
    "kl_k3", "kl_k1", "logprob_abs_diff_mean", "logprob_abs_diff_max", "prob_abs_diff_mean", "prob_diff_max",
    "prob_diff_min", "seq_log_ratio_mean", "seq_log_ratio_std", "seq_log_ratio_min", "seq_log_ratio_max", "seq_kl",
    "chi2_token", "chi2_seq", "ess_seq", "exact_fraction",
)
compare = jax.jit(mismatch_metrics, static_argnames="prefix")


def measure(rollouts, reference, bins):
    """Every number of the report, from stored rollouts `{label: ScoredRollout}` alone: a dict of plain values.

    | key | value |
    |---|---|
    | `sides` | `{label: {engine, version, precision}}` |
    | `metrics` | `{label: {pair: {metric: value}}}`: `mismatch_metrics`, with the left program as `mu` |
    | `kl_error` | `{label: standard error of the token KL of sampler and scorer, over responses}` |
    | `cross` | `{label: {scored in: {metric: value}}}` |
    | `distances` | `{label: ...}`: sampler, scorer, reference, and a `verdict` |
    | `by_length` | `{label: {pair: ...}}`: slope of the responses' log-ratio |
    | `binned` | `{along: {label: {pair: ...}}}`: token KL by position, entropy, length |
    | `not_finite` | `{label: {program: tokens}}` |
    """
    found = {"sides": {}, "metrics": {}, "kl_error": {}, "cross": {}, "distances": {}, "by_length": {},
             "not_finite": {}}
    for label, rollout in rollouts.items():
        mask = rollout.response_mask
        found["sides"][label] = {name: getattr(rollout, name) for name in ("engine", "version", "precision")}
        found["metrics"][label] = {
            pair: _metrics(*pair_logprobs(rollout, pair, reference), mask) for pair in PAIRS
        }
        kl = k3(log_ratio(rollout, "sampler|scorer", reference))
        found["kl_error"][label] = mean_over_tokens(kl, mask)[1]
        found["cross"][label] = {
            scored_in: _metrics(rollout.logprobs, logprobs, mask) for scored_in, logprobs in rollout.scorer.items()
        }
        gaps = distances(rollout, reference)
        found["distances"][label] = {**gaps, "verdict": verdict(gaps)}
        found["by_length"][label] = {pair: _slope(rollout, pair, reference) for pair in PAIRS}
        found["not_finite"][label] = not_finite(rollout, reference)
    return {**found, "binned": binned_kl(rollouts, reference, bins)}


def _metrics(log_mu, log_pi, mask):
    found = jax.device_get(compare(log_mu, log_pi, mask))
    return {name.partition("/")[2]: float(value) for name, value in found.items()}


def _slope(rollout, pair, reference):
    found = by_length(rollout, pair, reference)
    return {name: found[name] for name in ("slope", "slope_error", "intercept")}


# -- tables --------------------------------------------------------------------------------------


def _number(value):
    return f"{value + 0.0:.3g}"  # the sum takes the sign off a zero


def _pair_title(pair, reference):
    return pair.replace("reference", reference).replace("|", " | ")


def metric_rows(found, columns):
    """Rows (metric, value of each of `columns`, pairs of precision and pair) of every metric."""
    return [(name, *(_number(found["metrics"][a][b][name]) for a, b in columns)) for name in METRICS]


def distance_table(found, reference, caption=""):
    """A Table: a side a row, which of its sampler and scorer is wrong."""
    columns = ("", *(_pair_title(pair, reference) for pair in DRAWN), "second / third", "errors shared",
               "which is farther off")
    rows = []
    for name, gaps in found["distances"].items():
        far = gaps["scorer|reference"]
        ratio = f"{gaps['sampler|reference'] / far:.3f} ± {gaps['error'] / far:.3f}" if far else "-"
        rows.append((name, *(_number(gaps[pair]) for pair in DRAWN), ratio, f"{gaps['shared']:.3f}", gaps["verdict"]))
    return said_once(Table(columns, rows, caption), [columns[-1]])


def console_tables(found, facts, reference):
    """`(title, columns, rows)` of what the console shows: each precision's metrics, or the table of engines where there
    are several, and the distances."""
    several = len(engines_of(found["sides"])) > 1
    if several:
        table, shown = engine_table(found, facts["tokens"]), (0, 1, 3, 4, 5, 6)     # what a console has room for
        columns, *rows = ([line[place] for place in shown] for line in (table.columns, *table.rows))
        yield "engines side by side", columns, rows
    for name in () if several else found["metrics"]:
        columns = [(name, pair) for pair in PAIRS]
        yield (f"sampled and scored in {name}", ("", *(_pair_title(pair, reference) for pair in PAIRS)),
               metric_rows(found, columns))
    table = distance_table(found, reference, "which of the two is wrong? token KL (k3)")
    yield table.caption.rstrip("."), table.columns, table.rows


def _metrics_table(found, reference):
    columns = [(name, pair) for name in found["metrics"] for pair in PAIRS]
    heads = ("metric", *(f"{name}: {_pair_title(pair, reference)}" for name, pair in columns))
    return Table(heads, metric_rows(found, columns), "Rows as in the log's mismatch/ metrics; of a pair a|b, a stands "
                 "for the sampler in their definitions.")


def _cross_table(found):
    scored = list(next(iter(found["cross"].values())))
    rows = [(f"sampled in {name}", *(_number(row[column]["kl_k3"]) for column in scored))
            for name, row in found["cross"].items()]
    return Table(("token KL (k3)", *(f"scored in {name}" for name in scored)), rows)


def _slope_table(found, reference):
    def cell(line):
        return f"{line['slope']:+.3g} ± {line['slope_error']:.2g}" if np.isfinite(line["slope"]) else "one length"

    rows = [(name, *(cell(lines[pair]) for pair in PAIRS)) for name, lines in found["by_length"].items()]
    return Table(("per 1K tokens", *(_pair_title(pair, reference) for pair in PAIRS)), rows,
                 "Slope of the least-squares line, with its standard error.")


# -- the page ------------------------------------------------------------------------------------

HOW = """Every token was drawn by the sampler, which kept its log-prob; then the scorer and the gradient program, which
train with the same weights, gave theirs of the same tokens, and so did the scorer in {reference}, which stands in for
the exact answer. Of a pair a|b, x is log b - log a of a token. Its token KL is k3, exp(x) - 1 - x, averaged over
tokens: an estimate of KL(a || b) where a drew the token. The log-ratio of a response is the sum of x over its tokens,
the logarithm of its importance weight; a slope of it over lengths means a drift that grows.

Second / third: the token KL to {reference}, sampler's over scorer's; the error is that of their difference, over
responses. Errors shared: the correlation of the sampler's and the scorer's distance to {reference}, token by token.
What they share cancels between them and does no harm to training. Which is farther off is said where the difference of
the two token KLs to {reference} lies beyond two standard errors. Standard errors are over responses, whose tokens hang
together; bars in figures are over tokens, as if they did not. 100 responses weigh as much as so many of equal weight:
(sum of weights)² / sum of squared weights, in percent."""


def write_report(folder, facts, rollouts, reference, found):
    """Writes `report.html` into `folder` and gives its path."""
    sides = found["sides"]
    figures = {
        "scatter": draw.draw_scatter(rollouts, sides), "lines": draw.draw_length(rollouts, sides, reference),
        **{along: draw.draw_binned(found["binned"], along, sides, reference) for along in draw.ALONG},
    }
    drawn = {name: svg_of(figure) for name, figure in figures.items()}
    sections = [
        *_warnings(found, facts), *engine_section(found, facts["tokens"], reference),
        *_distance_sections(found, reference, drawn), *_length_sections(found, reference, drawn),
        *([attribution_section(found["attribution"])] if "attribution" in found else []),
        *_number_sections(facts, found, reference),
    ]
    engines, precisions = engines_of(sides), dict.fromkeys(side["precision"] for side in sides.values())
    names = list(sides) if len(engines) == 1 else [f"{', '.join(engines)} in {', '.join(precisions)}"]
    title = f"Sampler against scorer: {', '.join(names)}"
    return write_page(folder / "report.html", title, answer(found, facts), sections)


def _counts(by_label):
    """`8,192`, or where they differ `8,192 (fp16), 8,001 (bf16)`."""
    if len(set(by_label.values())) == 1:
        return f"{next(iter(by_label.values())):,}" + (" each" if len(by_label) > 1 else "")
    return ", ".join(f"{count:,} ({name})" for name, count in by_label.items())


def _warnings(found, facts):
    odd = [f"{name}: {count:,} tokens by the {program}" for name, programs in found["not_finite"].items()
           for program, count in programs.items() if count]
    if odd:
        yield Section("Log-probs that are not finite", "Figures leave such tokens out; metrics do not. "
                      + "; ".join(odd) + ".")
    doubts = doubts_of(found, facts["config"]["rollout"]["stop_above"])
    if doubts:
        yield Section("Beyond any rounding", "\n\n".join(doubts))


def doubts_of(found, limit):
    """A sentence on each side whose token KL no rounding explains: it is above `limit`, `rollout.stop_above`."""
    return [
        f"{label}: a token KL of {pairs['sampler|scorer']['kl_k3']:.2g} is above rollout.stop_above, {limit:g}. It may "
        "be other weights or another tokenizer, another temperature, top-k or top-p, or log-probs of the raw logits."
        for label, pairs in found["metrics"].items() if pairs["sampler|scorer"]["kl_k3"] > limit
    ]


def _distance_sections(found, reference, drawn):
    yield Section(
        "Every token", "Each token that the sampler drew, with its probability under both programs. On the line they "
        "agree.", figures=[Figure(drawn["scatter"], f"Above: probabilities. Below: the same tokens' log-ratio. At most "
                                  f"{draw.POINTS:,} tokens a panel, at even distances.")],
    )
    yield Section("Which of the two is wrong?", f"Token KL (k3) of each two of sampler, scorer and {reference}.",
                  tables=[distance_table(found, reference)])


def _length_sections(found, reference, drawn):
    yield Section(
        "Log-ratio of whole responses, by length", "Whether the probabilities of a response drift apart as it grows.",
        tables=[_slope_table(found, reference)], figures=[Figure(drawn["lines"])],
    )
    texts = {
        "position": "Whether the two drift apart along a response, as a cache of rounded keys and values might make "
                    "them.",
        "entropy": "Whether they differ where the model is sure or where it hesitates.",
        "length": "Whether tokens of long responses are worse off than those of short ones.",
    }
    for along, text in texts.items():
        caption = "Bars: one standard error, over tokens. Bins hold " + (
            "equal ranges." if along == "position" else "about equally many tokens.")
        yield Section(f"Token KL by {along}", text, figures=[Figure(drawn[along], caption)])


def _number_sections(facts, found, reference):
    yield Section("Sampled in one precision, scored in another", "What a sampler and a trainer of two precisions would "
                  "make of the mismatch.", tables=[_cross_table(found)])
    yield Section("How it was measured", HOW.format(reference=reference), folded=True)
    yield Section("Every measure", tables=[_metrics_table(found, reference)], folded=True)
    environment = facts["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    engines = {side["engine"]: side["version"] for side in found["sides"].values() if side["version"]}
    yield Section("What this depends on", tables=[Table(("", ""), [
        ("rollouts", facts["rollouts"]), ("responses", _counts(facts["responses"])),
        ("tokens", _counts(facts["tokens"])), ("temperature", facts["temperature"]),
        *((name, value) for name, value in (facts["model"] or {}).items()),
        ("device", f"{environment['devices']} x {environment['device_kind']}"),
        ("XLA flags", environment["xla_flags"] or "none"), ("versions", versions),
        *((f"engine {name}", version) for name, version in engines.items()),
    ])], folded=True)
