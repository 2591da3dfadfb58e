"""`mismatch` through the command line on a tiny model; every number again by plain NumPy in float64."""

import dataclasses
import json
import math
from pathlib import Path
import re
import signal

import numpy as np
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.commands import mismatch
from jaxrl_fp16.console import Console
from jaxrl_fp16.engines import pipe, weights
from jaxrl_fp16.lab.mismatch import scoring
from jaxrl_fp16.lab.mismatch.answer import answer
from jaxrl_fp16.lab.mismatch.rollout_files import load_rollout, load_rollouts, save_rollout
from jaxrl_fp16.lab.mismatch.stats import by_length, distances, probabilities, verdict
from jaxrl_fp16.models import Decoder, DecoderConfig
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.tasks import ALPHABET
from jaxrl_fp16.tokenizer import character_tokenizer

PAIRS = ("sampler|scorer", "scorer|gradient", "sampler|reference", "scorer|reference")
FLAGS = ("--sampling.max_new_tokens", "24", "--mismatch.prompts", "10", "--mismatch.bins", "5")


@pytest.fixture(scope="module")
def start(tiny, compile_cache, tmp_path_factory):
    """start(flag, ...) -> (exit code, run folder or None)."""

    def start(*flags):
        runs = tmp_path_factory.mktemp("runs")
        code = cli.main(["mismatch", str(tiny), "--run.compile_cache", compile_cache, "--run.dir", str(runs), *FLAGS,
                         *flags])
        return code, next(runs.glob("*"), None)

    return start


@pytest.fixture(scope="module")
def whole(start):
    code, folder = start()
    assert code == 0
    return folder


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def stored(folder, precision):
    """The arrays of a file, log-probs in float64, read without the package."""
    with np.load(folder / "rollouts" / f"{precision}.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return {name: array.astype(float) if array.dtype == np.float32 else array for name, array in arrays.items()}


def two_of(arrays, precision, pair):
    names = {"sampler": "logprobs", "scorer": f"scorer/{precision}", "gradient": f"gradient/{precision}",
             "reference": "scorer/fp32"}
    return (arrays[names[name]] for name in pair.split("|"))


def metrics_in_float64(log_mu, log_pi, mask):
    """spec/mismatch.md, written again."""
    d, rows = (log_mu - log_pi)[mask], np.where(mask, log_pi - log_mu, 0.0).sum(axis=1)[mask.any(axis=1)]
    mu, change = np.exp(log_mu[mask]), np.exp(log_mu[mask]) * np.expm1(-d)
    weights = np.exp(rows)
    return {
        "kl_k1": d.mean(), "kl_k3": (np.expm1(-d) + d).mean(),
        "logprob_abs_diff_mean": np.abs(d).mean(), "logprob_abs_diff_max": np.abs(d).max(),
        "prob_abs_diff_mean": (mu * np.abs(np.expm1(-d))).mean(), "prob_diff_max": change.max(),
        "prob_diff_min": change.min(), "seq_log_ratio_mean": rows.mean(), "seq_log_ratio_std": rows.std(),
        "seq_log_ratio_min": rows.min(), "seq_log_ratio_max": rows.max(), "seq_kl": -rows.mean(),
        "chi2_token": np.expm1(-2 * d).mean(), "chi2_seq": np.expm1(2 * rows).mean(),
        "ess_seq": weights.sum() ** 2 / (len(rows) * (weights**2).sum()), "exact_fraction": (d == 0).mean(),
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_metric_again_in_float64(whole, precision):
    arrays, report = stored(whole, precision), report_of(whole)
    mask = arrays["response_mask"]
    assert mask.shape == (40, 30) and mask.any(axis=1).all()
    for pair in PAIRS:
        expected = metrics_in_float64(*two_of(arrays, precision, pair), mask)
        found = report["metrics"][precision][pair]
        assert set(found) == set(expected)
        for name, value in expected.items():
            # atol: a sum of float32 differences that cancel, each as fine as float32 holds it
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-12, err_msg=f"{pair} {name}")
    for scored_in in ("fp16", "bf16", "fp32"):
        expected = metrics_in_float64(arrays["logprobs"], arrays[f"scorer/{scored_in}"], mask)
        np.testing.assert_allclose(report["cross"][precision][scored_in]["kl_k3"], expected["kl_k3"], rtol=1e-3)
    assert 0 < report["metrics"][precision]["sampler|reference"]["kl_k3"] < 1e-3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_lines_through_the_responses_again(whole, precision):
    arrays, report = stored(whole, precision), report_of(whole)
    mask = arrays["response_mask"]
    lengths = mask.sum(axis=1)
    assert len(set(lengths)) > 5
    for pair in PAIRS:
        a, b = two_of(arrays, precision, pair)
        ratios = np.where(mask, b - a, 0.0).sum(axis=1)
        (slope, intercept), covariance = np.polyfit(lengths, ratios, 1, cov=True)
        found = report["by_length"][precision][pair]
        scale = np.abs(ratios).max()
        np.testing.assert_allclose(found["slope"], 1000 * slope, rtol=1e-3, atol=1e-9 * scale)
        np.testing.assert_allclose(found["slope_error"], 1000 * np.sqrt(covariance[0, 0]), rtol=1e-3)
        np.testing.assert_allclose(found["intercept"], intercept, rtol=1e-3, atol=1e-9 * scale)


@pytest.mark.parametrize("along", ["position", "entropy", "length"])
def test_the_bins_again(whole, along):
    both = {precision: stored(whole, precision) for precision in ("fp16", "bf16")}
    values = {
        precision: {
            "position": np.concatenate([np.arange(n) for n in arrays["response_mask"].sum(axis=1)]),
            "length": np.repeat(arrays["response_mask"].sum(axis=1), arrays["response_mask"].sum(axis=1)),
            "entropy": arrays["entropy/fp32"][arrays["response_mask"]],
        }[along]
        for precision, arrays in both.items()
    }
    pooled = np.concatenate(list(values.values())).astype(float)
    edges = (np.unique(np.round(np.linspace(pooled.min(), pooled.max() + 1, 6))) if along == "position"
             else np.unique(np.percentile(pooled, np.linspace(0, 100, 6))))
    for precision, arrays in both.items():
        x, mask = values[precision], arrays["response_mask"]
        bins = [(x >= low) & ((x < high) | (high == edges[-1])) for low, high in zip(edges, edges[1:])]
        for pair in PAIRS:
            a, b = two_of(arrays, precision, pair)
            kl = np.expm1((b - a)[mask]) - (b - a)[mask]
            found = report_of(whole)["binned"][along][precision][pair]
            assert found["count"] == [int(inside.sum()) for inside in bins if inside.any()]
            np.testing.assert_allclose(found["x"], [x[inside].mean() for inside in bins if inside.any()], rtol=1e-3)
            np.testing.assert_allclose(found["mean"], [kl[inside].mean() for inside in bins if inside.any()], rtol=1e-3)
            errors = [kl[inside].std() / np.sqrt(inside.sum() - 1) for inside in bins if inside.any()]
            np.testing.assert_allclose(found["error"], errors, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_which_is_wrong_again(whole, precision):
    arrays, found = stored(whole, precision), report_of(whole)["distances"][precision]
    mask, kl, d = arrays["response_mask"], {}, {}
    for pair in ("sampler|scorer", "sampler|reference", "scorer|reference"):
        a, b = two_of(arrays, precision, pair)
        d[pair] = (b - a)[mask]
        kl[pair] = np.where(mask, np.expm1(b - a) - (b - a), 0.0).sum(axis=1)
        np.testing.assert_allclose(found[pair], kl[pair].sum() / mask.sum(), rtol=1e-3)
    gap = kl["sampler|reference"] - kl["scorer|reference"]
    np.testing.assert_allclose(found["difference"], gap.sum() / mask.sum(), rtol=1e-3, atol=1e-18)
    np.testing.assert_allclose(found["error"], gap.std(ddof=1) * np.sqrt(len(gap)) / mask.sum(), rtol=1e-3)
    correlation = np.corrcoef(d["sampler|reference"], d["scorer|reference"])[0, 1]
    np.testing.assert_allclose(found["shared"], correlation, rtol=1e-3)


def test_the_scatter_is_of_every_token(whole):
    arrays = stored(whole, "fp16")
    mask = arrays["response_mask"]
    mu, pi = probabilities(load_rollout(whole / "rollouts" / "fp16.npz"))
    np.testing.assert_allclose(mu, np.exp(arrays["logprobs"][mask]), rtol=1e-12)
    np.testing.assert_allclose(pi, np.exp(arrays["scorer/fp16"][mask]), rtol=1e-12)


def test_the_page_and_the_folder(whole, capsys):
    page = (whole / "report.html").read_text()
    assert page.count("<svg") == 5 and "Which of the two is wrong?" in page and "1e" in page
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "the page asks for nothing"
    assert (whole / "config.yaml").is_file() and (whole / "environment.json").is_file()
    report = report_of(whole)
    assert report["reference"] == "fp32" and report["responses"] == {"fp16": 40, "bf16": 40}
    assert report["tokens"]["fp16"] == int(stored(whole, "fp16")["response_mask"].sum())
    assert not any(count for programs in report["not_finite"].values() for count in programs.values())


def test_the_page_opens_with_the_answer(whole, read_page):
    """Which differs least, by how many times, what it means for a response; how it was measured is folded away."""
    seen, report = read_page(whole / "report.html"), report_of(whole)
    title, least, times, meaning, heading = [text for text in seen.text if text][2:7]
    kl = {name: report["metrics"][name]["sampler|scorer"]["kl_k3"] for name in ("fp16", "bf16")}
    low, high = sorted(kl, key=kl.get)
    assert title == "Sampler against scorer: fp16, bf16" and heading == "Every token"
    assert least == f"Sampler and trainer differ least in {low}: by a token KL of {kl[low]:.1e}."
    assert times.startswith(f"{high} differs {kl[high] / kl[low]:.3g} times as much as {low}")
    assert meaning.startswith("Over a response of 16 tokens, the average, its probability differs by a factor of 1")
    assert "100 responses weigh as much as 100 in fp16 and 100 in bf16" in meaning
    assert report["answer"] == [least, times, meaning]
    page = (whole / "report.html").read_text()
    open_text, folded = page.split("<details>", 1)
    assert "expm1" not in page and "exp(x) - 1 - x" in folded and "exp(x) - 1 - x" not in open_text
    assert folded.count("<details>") == 2 and "In every row which is farther off: neither" in page


def sides_of(*names):
    return {" ".join(name): dict(zip(("engine", "precision"), name), version="") for name in names}


def answered(kls, spreads, error=1e-9, sides=None):
    sides = sides or {name: {"engine": "jit", "precision": name, "version": ""} for name in kls}
    found = {"sides": sides, "kl_error": dict.fromkeys(kls, error), "metrics": {
        name: {"sampler|scorer": {"kl_k3": kl, "seq_log_ratio_std": spread, "ess_seq": 1 / (1 + spread**2)}}
        for (name, kl), spread in zip(kls.items(), spreads)}}
    return answer(found, {"responses": dict.fromkeys(kls, 4), "tokens": dict.fromkeys(kls, 512)})


def test_the_answer_in_words():
    assert answered({"bf16": 1.45e-3, "fp16": 2.5e-5, "fp32": 0.0}, [0.58, 0.044, 0.0]) == [
        "Sampler and trainer differ least in fp32: by not a single bit.",
        "fp16 differs by 2.5e-05 and fp32 by nothing, bf16 differs 58 times as much as fp16.",
        "Over a response of 128 tokens, the average, its probability differs by a factor of 1.786 in bf16, 1.045 in "
        "fp16 and 1 in fp32 (one standard deviation); 100 responses weigh as much as 74.8 in bf16, 99.8 in fp16 and "
        "100 in fp32."]
    assert answered({"fp16": 2e-5, "bf16": 3e-5}, [0.1, 0.1], error=1e-5)[1] == (
        "bf16 differs 1.5 times as much as fp16, within two standard errors.")
    assert answered({"fp16": 2e-5, "bf16": 2e-5}, [0.1, 0.1])[1] == "bf16 differs as much as fp16."
    one = answered({"fp16": 2e-5}, [0.1])
    assert one[0] == "In fp16 sampler and trainer differ by a token KL of 2.0e-05."
    assert one[1] == "There is no other to compare it with."
    assert len(answered({"fp16": math.nan}, [math.nan])) == 1
    assert answered({"fp16": math.nan, "bf16": 1e-3}, [math.nan, 900.0])[2].count("bf16") == 2


def test_the_answer_of_several_engines():
    names = (("jit", "fp16"), ("jit", "bf16"), ("vllm", "fp16"), ("vllm", "bf16"))
    said = answered(dict(zip(sides_of(*names), (9e-6, 5.4e-4, 2.5e-5, 1.45e-3))), [0.03, 0.4, 0.044, 0.58],
                    sides=sides_of(*names))
    assert said[0] == "Sampler and trainer differ least in jit fp16: by a token KL of 9.0e-06."
    assert said[1] == (
        "With jit, bf16 differs 60 times as much as fp16; with vllm, bf16 differs 58 times as much as fp16; in fp16, "
        "vllm differs 2.78 times as much as jit; in bf16, vllm differs 2.69 times as much as jit.")
    assert "a factor of 1.03 to 1.045 in fp16 and 1.492 to 1.786 in bf16" in said[2]


def test_stored_rollouts_give_the_same_numbers_without_a_model(start, whole, monkeypatch, capsys):
    monkeypatch.setattr(mismatch, "open_model", None)
    code, folder = start("--mismatch.rollouts", str(whole), "--task.path", "nowhere")
    said = capsys.readouterr().out
    assert code == 0 and "no model is loaded" in said and "sampled and scored in bf16" in said
    again, before = report_of(folder), report_of(whole)
    for key in ("metrics", "cross", "distances", "by_length", "binned", "tokens"):
        assert again[key] == before[key], key
    assert not (folder / "rollouts").exists() and again["rollouts"] == str(whole)


def test_rollouts_without_scores_are_scored(start, whole, tmp_path, capsys):
    """As another engine may have written them, with the sampler's log-probs alone."""
    for precision in ("fp16", "bf16"):
        rollout = load_rollout(whole / "rollouts" / f"{precision}.npz")
        save_rollout(tmp_path, dataclasses.replace(rollout, scorer={}, gradient={}, entropy={}))
    code, folder = start("--mismatch.rollouts", str(tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert code == 0
    # Scorer and gradient program of two precisions and the reference's scorer, on two rollouts: each is told when it
    # begins and when it ends, with what is left and with its first figures.
    ended = [re.match(r"(\d+) of 10: (.*): [0-9.]+ s(, about \d:\d\d:\d\d left)?$", line) for line in said]
    assert [int(each[1]) for each in ended if each] == list(range(1, 11))
    assert ended[said.index(next(line for line in said if line.startswith("10 of 10") and line[-1] == "s"))][3] is None
    assert "1 of 10: the scorer in fp16, on what fp16 sampled ..." in said
    kl = report_of(folder)["metrics"]["bf16"]["sampler|scorer"]["kl_k3"]
    (line,) = (line for line in said if "sampler in bf16 | scorer in bf16: token KL (k3) " in line)
    assert float(line.split("(k3) ")[1].split(",")[0]) == pytest.approx(kl, rel=1e-2)
    for precision in ("fp16", "bf16"):
        first, again = stored(whole, precision), stored(folder, precision)
        assert set(first) == set(again)
        for name, array in first.items():
            np.testing.assert_array_equal(again[name], array, err_msg=name)


# -- what another engine drew --------------------------------------------------------------------


def as_file(path, rollout, engine="sglang", vocab_size=None, **changes):
    """The file that another engine would have written of `rollout`."""
    head = {"format": "jaxrl_fp16 engine rollouts 1", "engine": engine, "version": "0.5", "temperature": 1.0,
            "dtype": {"fp16": "float16", "bf16": "bfloat16"}[rollout.precision], "vocab_size": vocab_size or VOCAB}
    lines = [head | changes]
    for tokens, mask, response, logprobs in zip(rollout.tokens, rollout.mask, rollout.response_mask, rollout.logprobs):
        lines.append({"prompt": tokens[mask & ~response].tolist(), "response": tokens[response].tolist(),
                      "logprobs": logprobs[response].tolist()})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


VOCAB = character_tokenizer(ALPHABET).vocab_size


@pytest.fixture(scope="module")
def drawn(whole):
    return {name: load_rollout(whole / "rollouts" / f"{name}.npz") for name in ("fp16", "bf16")}


def test_a_file_of_another_engine_is_scored(start, whole, drawn, tmp_path, capsys, read_page):
    """Our own tokens as another engine's, beside ours: the scores are the same, and the page names the engine."""
    code, folder = start("--mismatch.rollouts", str(whole), "--rollouts", as_file(tmp_path / "a", drawn["bf16"]),
                         "--precisions", "bf16")
    said = capsys.readouterr().out
    assert code == 0 and "the scorer in bf16, on what sglang bf16 sampled ..." in said and "1 of 6: " in said
    report, before = report_of(folder), report_of(whole)
    assert list(report["metrics"]) == ["jit bf16", "sglang bf16"]
    assert report["sides"]["sglang bf16"] == {"engine": "sglang", "version": "0.5", "precision": "bf16"}
    assert report["metrics"]["jit bf16"] == before["metrics"]["bf16"]
    for pair in PAIRS:
        found = report["metrics"]["sglang bf16"][pair]["kl_k3"]
        assert found == pytest.approx(before["metrics"]["bf16"][pair]["kl_k3"], rel=1e-3, abs=1e-13), pair
    kept = folder / "rollouts" / "sglang-bf16.npz"
    assert sorted(path.name for path in kept.parent.iterdir()) == ["bf16.npz", kept.name]
    seen = read_page(folder / "report.html").text
    assert "Sampler against scorer: jit, sglang in bf16" in seen and "engine sglang" in seen

    code, alone = start("--rollouts", str(kept), "--precisions", "bf16")
    assert code == 0 and "no model is loaded" in capsys.readouterr().out
    assert report_of(alone)["metrics"] == {"sglang bf16": report["metrics"]["sglang bf16"]}


@pytest.fixture
def fake_engine(monkeypatch, tmp_path):
    """The engine of the tests in the place of Transformers: it draws evenly, and says so. Its log."""
    pytest.importorskip("torch")    # that its interpreter has what Transformers takes is looked at
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(weights, "MEMORY", str(tmp_path / "memory"))
    monkeypatch.setattr(pipe, "CHILD", Path(__file__).parents[1] / "engines" / "fake_child.py")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "fake.log"))
    return tmp_path / "fake.log"


def test_engines_side_by_side(start, fake_engine, capsys, read_page):
    """Each engine samples in each precision. One whose samples are no model's is said to be."""
    code, folder = start("--engines", "jit", "transformers")
    said = capsys.readouterr().out
    assert code == 0, said
    report, labels = report_of(folder), ["jit fp16", "jit bf16", "transformers fp16", "transformers bf16"]
    assert list(report["metrics"]) == list(report["sides"]) == labels
    assert "sampling by transformers in bf16" in said
    assert "1 of 22: " in said and "22 of 22: " in said, "another engine's by the gradient program of its own precision"
    log = fake_engine.read_text().splitlines()
    assert sum(line.startswith("process") for line in log) == 2, "one for each precision"
    arrays = stored(folder, "transformers-bf16")
    assert str(arrays["engine"]) == "transformers"
    size = float(np.exp(-arrays["logprobs"][arrays["response_mask"]].mean()))
    assert size == pytest.approx(VOCAB, rel=2e-3)
    for precision in ("fp16", "bf16"):
        expected = metrics_in_float64(*two_of(stored(folder, f"transformers-{precision}"), precision, "sampler|scorer"),
                                      stored(folder, f"transformers-{precision}")["response_mask"])
        found = report["metrics"][f"transformers {precision}"]["sampler|scorer"]
        assert found["kl_k3"] == pytest.approx(expected["kl_k3"], rel=1e-3) and found["kl_k3"] > 0.05
    doubt = "transformers bf16: a token KL of "
    assert doubt in said and "above rollout.stop_above, 0.05. It may be other weights" in said
    assert "jit bf16: a token" not in said
    page = read_page(folder / "report.html")
    assert {"Beyond any rounding", "Engines side by side", "slope per 1K tokens", "KL where unsure"} <= set(page.text)
    assert page.tags.count("svg") == 6 and any(text.startswith(doubt) for text in page.text)
    least, times, _ = report["answer"]
    assert least.startswith("Sampler and trainer differ least in jit ") and "; in fp16, transformers differs" in times

    (again,) = load_rollouts(folder, ["bf16"], ["transformers"])
    assert (again.engine, again.precision, set(again.scorer)) == ("transformers", "bf16", {"fp16", "bf16", "fp32"})


@pytest.mark.parametrize("flags, message", [
    (("--engines", "jit", "jit"), "mismatch: engines are jit, jit; allowed: each once"),
    (("--engines", "sglang"), 'mismatch.engines[0]: "sglang" is not allowed'),
    (("--engines", "jit", "vllm", "--sampling.top_k", "3"), "mismatch.engines: top_k is 3 and top_p 1.0 with"),
    (("--engines", "transformers", "--rollout.python", "nowhere"), "python is nowhere, which is no program here"),
    (("--engines", "transformers", "--mismatch.attribution"), "mismatch.attribution is true and all rollouts are"),
    (("--engines", "transformers", "--mismatch.rollouts", "nowhere"), "nowhere has no transformers-fp16.npz"),
])
def test_engines_that_cannot_be_drawn_are_refused(start, capsys, flags, message):
    code, folder = start(*flags)
    error = capsys.readouterr().err
    assert (code, folder) == (2, None) and message in error and error.count("\n") == 1


def test_an_engine_and_a_file_of_it_are_refused(start, drawn, tmp_path, capsys):
    """Before anything is sampled."""
    code, folder = start("--engines", "transformers", "--rollouts",
                         as_file(tmp_path / "a.jsonl", drawn["fp16"], engine="transformers"))
    error = capsys.readouterr().err
    assert (code, folder) == (2, None) and "there are two rollouts of transformers fp16; allowed: " in error


@pytest.mark.parametrize("changes, flags, message", [
    ({"vocab_size": 500}, (), "mismatch.rollout_files: sglang fp16 is of a model with vocab_size 500; allowed: that"),
    ({"temperature": 0.7}, (), "sglang fp16 was sampled at temperature 0.7; allowed: sampling.temperature, 1"),
    ({}, ("--model.max_positions", "8"), "sglang fp16's longest row has 28 tokens, and the model's weights"),
    ({}, ("--precisions", "bf16"), "dtype is 'float16'; allowed: the compute dtypes of mismatch.precisions, bfloat16"),
    ({"engine": "a b"}, (), "line 1: engine is 'a b'; allowed: up to 40 letters"),
    ({}, ("--mismatch.attribution",), "mismatch.attribution is true and all rollouts are another engine's"),
])
def test_files_that_do_not_belong_here_are_refused(start, drawn, tmp_path, capsys, changes, flags, message):
    code, folder = start("--rollouts", as_file(tmp_path / "a.jsonl", drawn["fp16"], **changes), *flags)
    error = capsys.readouterr().err
    assert (code, folder) == (2, None) and message in error and error.count("\n") == 1


def test_one_engine_twice_is_refused(start, drawn, tmp_path, capsys):
    files = [as_file(tmp_path / name, drawn["fp16"]) for name in ("a", "b")]
    code, folder = start("--rollouts", *files)
    assert (code, folder) == (2, None) and "there are two rollouts of sglang fp16; allowed: " in capsys.readouterr().err


def test_a_signal_ends_it_with_what_was_sampled_kept(start, monkeypatch, capsys):
    score = scoring.score_rollouts

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return score(*arguments, **options)

    monkeypatch.setattr(mismatch, "score_rollouts", interrupted)
    code, folder = start()
    said = capsys.readouterr().out
    assert code == 130 and "stopped by SIGINT" in said and not (folder / "report.json").exists()
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == ["bf16.npz", "fp16.npz"]


def test_a_verdict_says_only_what_the_numbers_carry():
    base = {"sampler|reference": 3e-5, "scorer|reference": 1e-5, "difference": 2e-5, "error": 1e-6}
    assert verdict(base) == "the sampler, 3.00 times as far"
    assert verdict({**base, "scorer|reference": 6e-5, "difference": -3e-5}) == "the scorer, 2.00 times as far"
    assert verdict({**base, "error": 1.1e-5}).startswith("neither")
    assert verdict({**base, "error": np.nan}).startswith("neither")
    assert verdict({**base, "scorer|reference": 0.0}) == "the sampler alone"
    equal = {**base, "sampler|reference": 0.0, "scorer|reference": 0.0}
    assert verdict(equal) == "both equal the reference to the last bit"


def test_odd_rollouts_are_drawn(start, whole, tmp_path, capsys):
    """One length, tokens that are not finite, a row without a token."""
    for precision in ("fp16", "bf16"):
        rollout = load_rollout(whole / "rollouts" / f"{precision}.npz")
        rows = np.flatnonzero(rollout.response_mask.sum(axis=1) == 24)[:3]
        assert len(rows) == 3
        groups = {name: {key: x[rows] for key, x in getattr(rollout, name).items()}
                  for name in ("scorer", "gradient", "entropy")}
        arrays = {name: getattr(rollout, name)[rows]
                  for name in ("tokens", "mask", "response_mask", "logprobs", "finished")}
        if precision == "fp16":
            arrays["logprobs"][1, -1] = -np.inf
            groups["gradient"]["fp16"][0, -2] = np.nan
        else:
            arrays["response_mask"][2] = False
            groups["scorer"]["bf16"] = groups["scorer"]["fp32"] = arrays["logprobs"]
        odd = dataclasses.replace(rollout, **arrays, **groups)
        assert np.isnan(by_length(odd, "sampler|scorer", "fp32")["slope"])
        save_rollout(tmp_path, odd)
    assert distances(odd, "fp32")["sampler|scorer"] == 0
    code, folder = start("--mismatch.rollouts", str(tmp_path))
    capsys.readouterr()
    report, page = report_of(folder), (folder / "report.html").read_text()
    assert code == 0 and report["not_finite"]["fp16"] == {"sampler": 1, "scorer": 0, "gradient": 1, "reference": 0}
    assert "fp16: 1 tokens by the sampler" in page and "both equal the reference" in page
    assert report["metrics"]["fp16"]["scorer|gradient"]["kl_k3"] == "NaN"


def test_the_reference_does_without_a_kernel_for_half_precision():
    model = Decoder(DecoderConfig(family="qwen2", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1,
                                  num_heads=1, num_kv_heads=1, head_dim=8), attention="cudnn")
    chosen = {name: scoring.model_for(model, get_precision(name)).attention for name in ("fp16", "bf16", "fp32")}
    assert chosen == {"fp16": "cudnn", "bf16": "cudnn", "fp32": "blockwise"}
    plain = model.clone(attention="plain")
    assert scoring.model_for(plain, get_precision("fp32")) == plain


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (("--mismatch.precisions", "[]"), "mismatch.precisions"),
    (("--mismatch.precisions", "[fp16, fp8]"), "mismatch.precisions: precision 'fp8' is unknown; allowed: fp16"),
    (("--mismatch.precisions", "[fp16, auto]"), "mismatch.precisions are fp16, fp16; allowed: different ones"),
    (("--mismatch.reference", "exact"), "mismatch.reference: precision 'exact' is unknown"),
    (("--mismatch.prompts", "0"), "mismatch.prompts: 0 is not allowed"),
    (("--rollout_precision", "bf16"), "rollout_precision is bf16; allowed with mismatch: null"),
    (("--resume", "somewhere"), "allowed: --mismatch.rollouts FOLDER"),
    (("--mismatch.rollouts", "nowhere"), "mismatch.rollouts: nowhere has no fp16.npz; it holds no .npz file"),
    (("--training.max_prompt_tokens", "1"), "none of the 64 prompts fits"),
])
def test_what_is_refused(start, capsys, flags, message):
    code, folder = start(*flags)
    error = capsys.readouterr().err
    assert (code, folder) == (2, None) and message in error and error.count("\n") == 1


def broken(path, change):
    """The file with its arrays changed, or with its bytes."""
    if change == "one array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
        return
    if change in ("cut", "flipped", "empty", "text"):
        data = path.read_bytes()
        middle = len(data) // 2
        path.write_bytes({"cut": data[:middle], "empty": b"", "text": b"tokens\n1 2 3\n",
                          "flipped": data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1:]}[change])
        return
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(path, **arrays)


@pytest.mark.parametrize("change, message", [
    ("cut", "cannot be read as stored rollouts"),
    ("flipped", "cannot be read as stored rollouts"),
    ("empty", "cannot be read as stored rollouts"),
    ("text", "cannot be read as stored rollouts"),
    ("one array", "cannot be read as stored rollouts"),
    (lambda x: x.pop("format"), "holds no stored rollouts; allowed: files with format"),
    (lambda x: x.update(format=np.array("other")), "holds no stored rollouts"),
    (lambda x: x.update(tokens=np.array([{}], object)), "cannot be read as stored rollouts"),
    (lambda x: x.pop("logprobs"), "logprobs missing or unknown"),
    (lambda x: x.update(extra=np.zeros(3)), "extra missing or unknown"),
    (lambda x: x.pop("temperature"), "temperature is missing; allowed: one float"),
    (lambda x: x.update(precision=np.array(["fp16"])), "precision is <U4 (1,); allowed: one text"),
    (lambda x: x.update(precision=np.array("bf16")), "was sampled in 'bf16'; allowed: 'fp16'"),
    (lambda x: x.update(tokens=x["tokens"][:, 1:]), "mask is bool [40, 30]; allowed: bool [40,29]"),
    (lambda x: x.update(logprobs=x["logprobs"].astype(float)), "logprobs is float64 [40, 30]; allowed: float32"),
    (lambda x: x.update({"scorer/fp16": x["scorer/fp16"][1:]}), "scorer/fp16 is float32 [39, 30]"),
    (lambda x: x.update({"judge/fp16": x["logprobs"]}), "judge/fp16 is unknown"),
    (lambda x: x["response_mask"].fill(False), "no row has a response token"),
    (lambda x: x["response_mask"].fill(True), "response_mask covers columns where mask is 0"),
    (lambda x: x["tokens"].__setitem__((0, 0), -1), "tokens are as low as -1"),
])
def test_a_file_at_fault_is_refused(start, whole, tmp_path, capsys, change, message):
    for path in (whole / "rollouts").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken(tmp_path / "fp16.npz", change)
    code, folder = start("--mismatch.rollouts", str(tmp_path))
    error = capsys.readouterr().err
    assert (code, folder) == (2, None), error
    assert message in error and str(tmp_path) in error and error.count("\n") == 1


@pytest.mark.parametrize("change, message", [
    (lambda x: {"tokens": x.tokens + 1000}, "tokens are as high as"),
    (lambda x: {"temperature": 0.5}, "was sampled at temperature 0.5; allowed: sampling.temperature, 1"),
])
def test_rollouts_of_another_model_are_not_scored(start, whole, tmp_path, capsys, change, message):
    for precision in ("fp16", "bf16"):
        rollout = load_rollout(whole / "rollouts" / f"{precision}.npz")
        save_rollout(tmp_path, dataclasses.replace(rollout, scorer={}, gradient={}, entropy={}, **change(rollout)))
    code, folder = start("--mismatch.rollouts", str(tmp_path))
    error = capsys.readouterr().err
    assert (code, folder) == (2, None) and message in error and error.count("\n") == 1


def test_attribution_is_a_section_of_the_page(whole, start, monkeypatch, capsys):
    """From stored rollouts, whose model is then loaded all the same. What is done and left is said on the way."""
    monkeypatch.setattr(Console, "status", Console.say)
    code, folder = start("--mismatch.rollouts", str(whole / "rollouts"), "--mismatch.attribution", "true",
                         "--mismatch.precisions", "[bf16]")
    assert code == 0
    said = capsys.readouterr().out.splitlines()
    told = [re.fullmatch(r"    (\d+) of 10 modules(, about \d:\d\d:\d\d left)?", line) for line in said]
    told = [match for match in told if match]
    assert [int(match[1]) for match in told] == [0, 0, 0, 1, 5, 9, 10]
    assert not told[0][2] and told[3][2]
    found = report_of(folder)["attribution"]
    assert list(found) == ["bf16"] and found["bf16"]["modules"][0]["name"] == "embedding"
    page = (folder / "report.html").read_text()
    assert "Where the difference arises" in page and "layers.1.mlp" in page
    assert "Where the difference arises" not in (whole / "report.html").read_text()


def test_a_signal_ends_attribution(whole, start, monkeypatch, capsys):
    find = mismatch.attribute

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return find(*arguments, **options)

    monkeypatch.setattr(mismatch, "attribute", interrupted)
    code, folder = start("--mismatch.rollouts", str(whole / "rollouts"), "--mismatch.attribution", "true")
    assert code == 130 and "stopped by SIGINT" in capsys.readouterr().out and not (folder / "report.json").exists()


def test_attribution_of_a_truncated_distribution_is_refused(start, capsys):
    code, folder = start("--mismatch.attribution", "true", "--sampling.top_p", "0.9")
    assert code == 2 and folder is None
    assert "mismatch.attribution is true with sampling.top_k 0 and top_p 0.9; allowed: " in capsys.readouterr().err
