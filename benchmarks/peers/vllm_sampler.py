"""vLLM generates once a turn; the work is the tokens that it made. No row ends early.

Settings: folder, dtype, prompts (lists of ids), group, new_tokens, memory (bytes of keys and values).
"""

from turns import Turns


def main():
    turns = Turns()
    from vllm import LLM, SamplingParams

    s = turns.settings
    engine = LLM(
        s["folder"], dtype=s["dtype"], skip_tokenizer_init=True, enforce_eager=True, generation_config="vllm",
        kv_cache_memory_bytes=s["memory"], max_model_len=max(map(len, s["prompts"])) + s["new_tokens"],
        max_num_seqs=len(s["prompts"]) * s["group"],
    )
    # Ours returns log-probs too. At temperature 1 without limits vLLM's raw ones are those of what it draws from.
    sampling = SamplingParams(n=s["group"], max_tokens=s["new_tokens"], ignore_eos=True, temperature=1.0, logprobs=0,
                              flat_logprobs=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in s["prompts"]]
    while True:
        turns.start()
        answers = engine.generate(prompts, sampling, use_tqdm=False)
        turns.end(sum(len(one.token_ids) for answer in answers for one in answer.outputs))
        if not engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not emptied: the next turn would not prefill")


if __name__ == "__main__":
    main()
