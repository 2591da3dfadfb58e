"""On a GPU: the work of `speed.py` as people do it in PyTorch with Transformers, on random weights of one shape.

    python benchmarks/gpu/torch_speed.py [--model 1.5B] [--rows 64] [--slots 512 2048 8192] [--columns 2048 8192]

Decoding: `generate` with a static cache, sampling at temperature 1; the median time between two tokens, late in the
cache. The update: one GRPO step, float32 weights under autocast, the better of with and without gradient
checkpointing, fused AdamW.
"""

import gc
import statistics
import time

import torch
import transformers

from qwen import SHAPES, Results, arguments, decoder, sizes

NEW = 32
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Clock(transformers.StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        wait()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def make(shape, dtype):
    s = SHAPES[shape]
    config = transformers.Qwen2Config(
        vocab_size=s["vocab_size"], hidden_size=s["hidden_size"], intermediate_size=s["intermediate_size"],
        num_hidden_layers=s["num_layers"], num_attention_heads=s["num_heads"], num_key_value_heads=s["num_kv_heads"],
        max_position_embeddings=32768, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device()):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def measure_decode(shape, precision, rows, slots, compiled):
    model = make(shape, DTYPES[precision]).eval()
    prompts = torch.randint(2, SHAPES[shape]["vocab_size"], (rows, slots - NEW), device=device())
    clock = Clock()
    settings = {} if compiled else {"disable_compile": True}
    with torch.inference_mode():
        for _ in range(2 if compiled else 1):
            clock.times.clear()
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, min_new_tokens=NEW,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, cache_implementation="static",
                stopping_criteria=transformers.StoppingCriteriaList([clock]), **settings,
            )
    each = statistics.median(b - a for a, b in zip(clock.times[NEW // 4:], clock.times[NEW // 4 + 1:]))
    return {"ms_per_step": 1e3 * each, "tokens_per_second": rows / each}


def measure_update(shape, precision, rows, columns, micro, checkpointing):
    model = make(shape, torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    fused = {"fused": True} if device() == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, **fused)
    scaler = torch.amp.GradScaler(device(), enabled=precision == "fp16")
    tokens = torch.randint(2, SHAPES[shape]["vocab_size"], (rows, columns), device=device())
    advantages = torch.randn(rows, 1, device=device())
    old = torch.full((rows, columns - 1), -5.0, device=device())

    def share(at):
        with torch.autocast(device(), DTYPES[precision]):
            logits = model(tokens[at], use_cache=False).logits[:, :-1]
        logprobs = -torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[at, 1:].flatten(), reduction="none").view(-1, columns - 1)
        ratio = torch.exp(logprobs - old[at])
        loss = -torch.minimum(ratio * advantages[at], ratio.clamp(0.8, 1.2) * advantages[at])
        return loss.mean(1).sum() / rows

    def step():
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, rows, micro):
            scaler.scale(share(slice(start, start + micro))).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        wait()

    step()
    spent = []
    for _ in range(2):
        began = time.perf_counter()
        step()
        spent.append(time.perf_counter() - began)
    c = decoder(shape, "plain").config
    positions, heads = rows * columns, c.num_heads * c.head_dim
    flops = 6 * sum(sizes(c)) * positions + 3 * c.num_layers * 2 * heads * columns * positions
    peak = torch.cuda.max_memory_allocated() / 2**30 if device() == "cuda" else 0.0
    took = statistics.median(spent)
    return {"rows": rows, "micro": micro, "step_seconds": took, "tflop_per_second": flops / took / 1e12,
            "positions_per_second": positions / took, "peak_gib": peak}


def in_empty_memory(measure, *args):
    """`measure(*args)`, with what an earlier one left in the card's memory gone."""
    gc.collect()
    if device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return measure(*args)


def main():
    given = arguments(__doc__, model="1.5B", rows=64, slots=[512, 2048, 8192], columns=[2048, 8192],
                      precisions=["fp16", "bf16"], positions=16384, compiled=[2048], limit=1e9,
                      name="gpu_torch_speed")
    results, began = Results(given.name, {**vars(given), "torch": torch.__version__}), time.monotonic()
    jobs = [("decode", name, size, False) for name in given.precisions[-1:] for size in given.slots]
    jobs += [("update", name, size, checkpointing) for name in given.precisions[::-1] for size in given.columns
             for checkpointing in (True, False)]
    jobs += [("decode", given.precisions[-1], size, True) for size in given.compiled]
    for what, name, size, flag in jobs:
        row = {"what": what, "model": given.model, "precision": name}
        if what == "decode":
            row |= {"slots": size, "compiled": flag}
            job = measure_decode, given.model, name, given.rows, size, flag
        else:
            row |= {"columns": size, "checkpointing": flag}
            rows = max(given.positions // size, 1)
            micro = min(max(8192 // size, 1), rows)
            job = measure_update, given.model, name, rows, size, micro, flag
        if time.monotonic() - began > given.limit:
            results.add({**row, "left_out": "no time"})
            continue
        results.add(row, in_empty_memory, *job)


if __name__ == "__main__":
    main()
