"""The figures of docs/gpu.md, from the result files: all that the page has between its marks.

    python benchmarks/gpu/figures.py

A passage is between `<!-- NAME: start -->` and `<!-- NAME: end -->`; the function NAME below writes it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import re
import statistics
import textwrap

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"

# Why a test of the suite failed, by its name; a failure that is not here is told as it is.
CHILD = "a process that the test starts did not find the packages of the test's own"
BITS = "bits that are equal on a CPU, or a tolerance that holds there, and not on this GPU"
HLO = "the compiled text of the update in place reads otherwise for a GPU; whether a cache is copied, it does not say"
ENGINE = "a fault: a sampler in float32 was given NVIDIA's attention, which takes half precision alone; mended since"
REASONS = {
    "test_a_disk_that_takes_no_more_leaves_the_older_one": CHILD, "test_a_save_that_is_killed_costs_only_itself": CHILD,
    "test_restored_on_another_mesh_the_values_are_equal": CHILD, "test_on_four_devices": CHILD,
    "test_blocks_of_padding_change_no_bit": BITS, "test_without_a_change_it_is_the_decoder": BITS,
    "test_a_nan_off_the_responses_changes_nothing": BITS, "test_tokens_off_the_mask_teach_nothing": BITS,
    "test_a_segment_does_not_see_its_neighbour": BITS, "test_the_cache_is_updated_in_place": HLO,
    "test_a_command_may_ask_for_other_sampling_and_precision": ENGINE,
}


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows(name, **wanted):
    """The rows of a result that were measured and have these values."""
    return [row for row in load(name)["rows"] if not {"left_out", "error"} & set(row)
            and all(row.get(key) == value for key, value in wanted.items())]


def one(name, **wanted):
    (row,) = rows(name, **wanted)
    return row


def table(heads, lines):
    cells = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)


def small(value, digits=1):
    """1.5e-5, or 0."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def share(value, digits=0):
    return f"{100 * value:.{digits}f} %"


def span(values, form):
    """The least and the largest; form: of `format`, or a function."""
    low, high = (form(value) if callable(form) else format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def upper(row):
    return row["precision"].upper()


# -- the passages --------------------------------------------------------------------------------


def setting():
    """The machine and the versions, and the commits, of every result."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"))
             if not path.stem.startswith("gpu_call_")]    # those say how steps ended
    versions = found[0]["versions"]
    # What counts tests asks no GPU: it said that it was on a CPU, and says nothing now.
    device = {each["device"] for each in found if each.get("device", "cpu: cpu") != "cpu: cpu"}
    packages = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax", "torch", "transformers"))
    return "\n".join([
        f"- device: {', '.join(sorted(device)).removeprefix('gpu: ')}; {found[0]['cores']} cores of "
        f"{found[0]['processor']}",
        f"- {packages}; Python {found[0]['python']}; PyTorch's CUDA: {load('gpu_torch_speed')['torch'].split('+')[1]}",
        f"- day: {', '.join(sorted({each['date'][:10] for each in found}))}; commits "
        f"{', '.join(f'`{name}`' for name in sorted({each['commit'] for each in found}))}",
    ])


def main_job():
    """The quickstart's run in each precision, with the attention of the time and, where that was run, with `auto`."""
    lines = []
    for name, attention in (("gpu_main_job", "blockwise"), ("gpu_main_job_auto", "cudnn")):
        for row in rows(name) if (RESULTS / f"{name}.json").exists() else []:
            accuracy = [f"{value:.3f}" for value in row["accuracy"].values()]
            lines.append([upper(row), f"`{attention}`", f"{row['steps_done']}, exit code {row['exit']}",
                          " to ".join(accuracy), small(row["mismatch/kl_k3"]), share(row["mismatch/exact_fraction"]),
                          f"{1e3 * row['seconds/sample']:.0f} + {1e3 * row['seconds/learn']:.0f} ms",
                          f"{row['wall_seconds']:.0f} s"])
    kl = {row["precision"]: row["mismatch/kl_k3"] for row in rows("gpu_main_job")}
    heads = ["precision", "attention", "steps", "sampled accuracy", "token KL", "equal tokens",
             "a step: sample + learn", "in all"]
    return f"{table(heads, lines)}\n\nThe token KL in BF16 is {kl['bf16'] / kl['fp16']:.0f} times that in FP16."


def mismatch():
    """Sampler, scorer and gradient program at equal weights, and what was left out."""
    result, found = load("gpu_mismatch"), rows("gpu_mismatch")
    lines = [[row["model"], f"`{row['attention']}`", upper(row), small(row["sampler_scorer_kl"]),
              small(row["sampler_scorer_prob"]), share(row["sampler_scorer_exact"], 2),
              small(row["scorer_gradient_kl"], 0), share(row["scorer_gradient_exact"], 2)] for row in found]
    by = {(row["model"], row["attention"], row["precision"]): row for row in found}
    ratios = [row["sampler_scorer_kl"] / by[model, kind, "fp16"]["sampler_scorer_kl"]
              for (model, kind, precision), row in by.items() if precision == "bf16"]
    left = [f"{model} `{kind}` {precision.upper()}" for model in result["models"] for kind in result["attention"]
            for precision in result["precisions"] if (model, kind, precision) not in by]
    fp16, bf16 = ([row["sampler_scorer_kl"] for row in found if row["precision"] == name] for name in ("fp16", "bf16"))
    equal = max(row["sampler_scorer_exact"] for row in found)
    heads = ["shape", "attention", "precision", "KL, sampler and scorer", "mean difference in probability",
             "equal tokens", "KL, scorer and gradient", "equal tokens"]
    return (f"{table(heads, lines)}\n\n"
            f"- Sampler and scorer: {span(fp16, small)} in FP16, {span(bf16, small)} in BF16, {span(ratios, '.0f')} "
            "times as much.\n"
            f"- Equal tokens of sampler and scorer: at most {share(equal, 2)}. The first of {result['tokens']} tokens, "
            f"which the prefill gives, would be {share(1 / result['tokens'], 2)}.\n"
            f"- Not measured, since the time ran out: {', '.join(left) or 'nothing'}.")


def products():
    """How much of a product of few rows is that of many rows, and what tiles cost."""
    lines, many = [], (16, 64, 128, 256)
    halves = [[row for row in rows("gpu_invariance", precision=name) if row["what"] != "attention"]
              for name in ("fp16", "bf16")]
    for pair in zip(*halves):
        lines.append([f"`{pair[0]['what']}`", f"{pair[0]['inner']:,} x {pair[0]['outer']:,}",
                      *(share(min(row[f"exact_{count}"] for count in many), 2) for row in pair),
                      *(share(row["exact_1"], 2) for row in pair)])
    times = {count: [sum(row[f"tiled_ms_{count}"] for row in half) / sum(row["whole_ms"] for row in half)
                     for half in halves] for count in many}
    costs = ", ".join(f"{span(ratios, '.1f')} in tiles of {count} rows" for count, ratios in times.items())
    itself = min(row[f"tile_is_itself_{count}"] for half in halves for row in half for count in many)
    alike = [row["whole_ms"] for half in halves for row in half if row["what"] in ("q", "o")]
    heads = ["product", "inner x outer", "equal, 16 to 256 rows: FP16", "BF16", "equal, one row: FP16", "BF16"]
    return (f"{table(heads, lines)}\n\n"
            f"Cut into tiles of one size, the first tile had the bits of a product of that size alone, in "
            f"{share(itself)} of the numbers. All six products in tiles, one tile after another, took this multiple of "
            f"the time of whole ones: {costs}. Times this short scatter: `q` and `o` are one shape, and their whole "
            f"products took {span(alike, '.2f')} ms.")


def attention_bits():
    """Decode's attention against that of the whole sequence."""
    lines = [[f"`{row['kind']}`", upper(row), f"{row['columns']:,}", share(row["exact_decode"], 3),
              share(row["exact_one_row"], 3), small(row["largest"], 0)]
             for row in rows("gpu_invariance", what="attention")]
    heads = ["attention", "precision", "columns", "decode equals the whole sequence", "one row equals 64",
             "largest difference in decode"]
    return table(heads, lines)


def limits():
    """What the card did in a copy and a matmul, in each call."""
    names = ["gpu_speed", "gpu_speed_bf16", "gpu_speed_plain", "gpu_speed_without_remat", "gpu_speed_deterministic"]
    copies = [one(name, what="copy")["bytes_per_second"] / 1e12 for name in names]
    products = [row["flop_per_second"] / 1e12 for name in names for row in rows(name, what="matmul")]
    return (f"A copy moved {span(copies, '.2f')} TB/s, and an 8,192-cubed product did {span(products, '.0f')} TFLOP/s, "
            "from call to call. Shares below are of the figures of the same call.")


def decoding():
    """Decode steps, ours and Transformers'."""
    lines, ratios = [], []
    for slots in load("gpu_speed")["slots"]:
        fp16 = one("gpu_speed", what="decode", attention="cudnn", slots=slots)
        bf16 = one("gpu_speed_bf16", what="decode", slots=slots)
        blocks = one("gpu_speed", what="decode", attention="blockwise", slots=slots)
        ours = [f"{row['ms_per_step']:.2f} ms, {share(row['of_copy'])}" for row in (fp16, bf16, blocks)]
        cells = [f"{slots:,}", *ours]
        for compiled in (False, True):
            for torch in rows("gpu_torch_speed", what="decode", slots=slots, compiled=compiled):
                ratios.append(torch["ms_per_step"] / bf16["ms_per_step"])
                cells.append(f"{torch['ms_per_step']:.1f} ms, {ratios[-1]:.1f} x")
        lines.append(cells + ["-"] * (6 - len(cells)))
    plain = one("gpu_speed_plain", what="decode")
    heads = ["slots", "`cudnn`, FP16", "`cudnn`, BF16", "`blockwise`, FP16", "Transformers, BF16", "compiled"]
    return (f"{table(heads, lines)}\n\n"
            f"Transformers' `generate` took {span(ratios, '.1f')} times as long as ours in BF16. `plain` attention at "
            f"{plain['slots']:,} slots took {plain['ms_per_step']:.2f} ms.")


def updating():
    """Updates, ours and PyTorch's."""
    lines, against, without, peaks = [], {True: [], False: []}, [], []
    for columns in load("gpu_speed")["columns"]:
        ours, blocks = (one("gpu_speed", what="update", attention=kind, columns=columns)
                        for kind in ("cudnn", "blockwise"))
        kept = one("gpu_speed_without_remat", what="update", columns=columns)
        without.append(kept["step_seconds"] / ours["step_seconds"])
        peaks.append((kept["peak_gib_so_far"], ours["peak_gib_so_far"]))
        cells = [f"{columns:,}", *(
            f"{row['step_seconds']:.2f} s, {row['tflop_per_second']:.0f}, {share(row['of_matmul'])}"
            for row in (ours, blocks))]
        for checkpointing, ratios in against.items():
            torch = one("gpu_torch_speed", what="update", precision="fp16", columns=columns,
                        checkpointing=checkpointing)
            ratios.append(torch["step_seconds"] / ours["step_seconds"])
            cells.append(f"{torch['step_seconds']:.2f} s, {torch['tflop_per_second']:.0f}, {ratios[-1]:.2f} x")
        lines.append(cells)
    heads = ["columns", "`cudnn`", "`blockwise`", "PyTorch, checkpointing", "PyTorch, without"]
    plain, fixed = (one(f"gpu_speed_{name}", what="update") for name in ("plain", "deterministic"))
    usual = one("gpu_speed", what="update", attention="cudnn", columns=fixed["columns"])
    step, usual_step = (one("gpu_speed_deterministic", what="decode"),
                        one("gpu_speed", what="decode", attention="cudnn", slots=2048))
    return (f"{table(heads, lines)}\n\n"
            f"- PyTorch with checkpointing, which recomputes as ours does, took {span(against[True], '.2f')} times our "
            f"time. Without checkpointing it took {span(against[False], '.2f')} of it: there ours is slower.\n"
            f"- Without `model.remat` ours took {span(without, '.2f')} times as long as with it, and "
            f"{max(each[0] for each in peaks):.0f} GiB at most in place of {max(each[1] for each in peaks):.0f}.\n"
            f"- At {columns:,} columns `blockwise` took {blocks['step_seconds']:.0f} s in place of "
            f"{ours['step_seconds']:.1f} s.\n"
            f"- `plain` took {plain['step_seconds']:.2f} s at {plain['columns']:,} columns.\n"
            f"- Deterministic kernels (`--xla_gpu_deterministic_ops=true`) took "
            f"{share(fixed['step_seconds'] / usual['step_seconds'] - 1)} more time for an update and "
            f"{share(step['ms_per_step'] / usual_step['ms_per_step'] - 1)} more for a decode step, at 2,048.")


def kernels():
    """The three longest kernels of each program."""
    lines, steps = [], 32
    for row in rows("gpu_profile"):
        for kernel in row["kernels"][:3]:
            lines.append([f"{row['what']}, `{row['attention']}`", f"`{kernel['name'][:44]}`",
                          f"{kernel['ms']:.1f}", share(kernel["ms"] / row["busy_ms"]), f"{kernel['launches']:,}"])
    decode, update = (one("gpu_profile", what=what, attention="cudnn") for what in (f"decode, {steps} steps", "update"))
    blocks, attention = one("gpu_profile", what="update", attention="blockwise"), decode["kernels"][0]
    needed = {slots: one("gpu_speed", what="decode", attention="cudnn", slots=slots)["bytes"] for slots in (512, 2048)}
    cache = (needed[2048] - needed[512]) * 2048 / (2048 - 512)
    once = [kernel for kernel in decode["kernels"] if kernel["launches"] % steps]     # not in the loop
    rest = decode["busy_ms"] - attention["ms"] - sum(kernel["ms"] for kernel in once)
    launches = decode["launches"] - attention["launches"] - sum(kernel["launches"] for kernel in once)
    rate = lambda count, ms: share(count / (ms / steps / 1e3) / one("gpu_speed", what="copy")["bytes_per_second"])
    heads = ["program", "kernel", "ms", "share", "launches"]
    return (f"{table(heads, lines)}\n\n"
            f"- A decode step with `cudnn`: attention reads the cache at {rate(cache, attention['ms'])} of the copy's "
            f"rate. All else reads the weights at {rate(needed[2048] - cache, rest)} of it, in {launches / steps:.0f} "
            f"launches. Once a program the caches change their layout, in {sum(each['ms'] for each in once):.1f} ms. "
            "Next: fewer and larger kernels around the products.\n"
            f"- An update with `cudnn`: {update['launches']:,} launches, the longest are products. Next: why it is "
            "slower to keep results than to compute them again.\n"
            f"- An update with `blockwise`: {blocks['launches']:,} launches, "
            f"{1e3 * blocks['busy_ms'] / blocks['launches']:.0f} microseconds each on average. Next: one kernel for "
            "its loop over blocks.")


def paper_test():
    """The sanity test, shortened: the warm start and the runs that there are."""
    result, (warm, *runs) = load("gpu_paper_test"), rows("gpu_paper_test")
    reached = {int(step): found["eval/sampled/accuracy"] for step, found in warm["evaluated"].items()}
    lines = []
    for row in runs:
        late = [step for step in row["curve"] if "reward" in step][1:]      # the first one compiles
        middle = {key: statistics.median(step[key] for step in late) for key in late[0]}
        accuracy = [f"{step}: {found['eval/sampled/accuracy']:.2f}" for step, found in row["evaluated"].items()]
        lines.append([upper(row), row["last_step"], ", ".join(accuracy),
                      small(middle["mismatch/prob_abs_diff_mean"], 0), small(middle["mismatch/kl_k3"], 0),
                      share(middle["mismatch/exact_fraction"]), f"{middle['response_length']:.0f}",
                      f"{middle['seconds/sample']:.1f} + {middle['seconds/learn']:.1f} s"])
    absent = [name.upper() for name in result["precisions"] if name not in {row["precision"] for row in runs}]
    heads = ["precision", "steps", "sampled accuracy after step", "mean difference in probability", "token KL",
             "equal tokens", "tokens a response", "a step: sample + learn"]
    missing = f"\n\nThe run in {' and '.join(absent)} did not fit into the time: nothing is compared here."
    return (f"Sums of {result['terms']} terms in place of 160, {result['tokens']} tokens in place of 1,664. The warm "
            f"start, in {upper(warm)}, took {warm['last_step']} steps in {warm['wall_seconds']:.0f} s; its accuracy "
            f"was {reached[max(reached)]:.2f} after {max(reached)} of them. Then RL:\n\n"
            f"{table(heads, lines)}{missing if absent else ''}")


def suite():
    """How many tests passed, and why the others did not."""
    (counts, *failures), marked = load("gpu_tests")["rows"], load("gpu_tests_marked")["rows"][0]
    total, bad, needing = int(counts["tests"]), int(counts["failures"]) + int(counts["errors"]), int(marked["tests"])
    groups = {}
    for row in failures:
        name = row["test"].partition("::")[2]
        reason = REASONS.get(name.partition("[")[0], "not explained: " + row.get("failure", row.get("error", ""))[:80])
        groups.setdefault(reason, []).append(f"`{name}`")
    folders = ", ".join(f"`{word}`" for word in counts["what"].split() if word.startswith("tests/"))
    lines = [[len(names), reason, ", ".join(names)] for reason, names in groups.items()]
    return (f"{total - bad} of {total} tests in {folders} passed, {bad} failed, in {float(counts['time']):.0f} s. Of "
            f"the {needing} tests that need a GPU {needing - int(marked['failures'])} passed.\n\n"
            + table(["tests", "why", "which"], lines))


PASSAGES = {function.__name__: function for function in (
    setting, main_job, mismatch, products, attention_bits, limits, decoding, updating, kernels, paper_test, suite,
)}


def filled(text):
    """The page's text with its passages written anew."""
    def fill(match):
        lines = PASSAGES[match[2]]().splitlines()
        return "\n".join([match[1], *(line if line.startswith("|") else wrapped(line) for line in lines), match[3]])

    return re.sub(r"(<!-- (\w+): start -->)\n(?:.*?\n)??(<!-- \2: end -->)", fill, text, flags=re.DOTALL)


def wrapped(line):
    return textwrap.fill(line, 120, subsequent_indent="  " if line.startswith("- ") else "", break_on_hyphens=False)


def main():
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
