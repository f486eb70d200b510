"""Tokens per second of rollout.sample against `generate` of transformers and the hardware's limit.

    python benchmarks/rollout.py                # toy, 8 x 8 completions, any CPU
    python benchmarks/rollout.py --size 100m
    python benchmarks/rollout.py --size 2b      # one GPU

Both sample with the same settings: temperature 1, the whole vocabulary. `fixed`: every completion
has the same length. `drawn`: any of several tokens ends a completion, so that lengths are spread
geometrically about a mean. `run` (toy): the embedded base model on its own questions, as `grpo.py`
samples it. Only tokens up to the end count.

The limit of a GPU is the time to read, once a step, the weights, each prompt's keys and values once
and those of the completions, at the bandwidth of a large copy; that of a CPU the time of the matrix
products with the weights alone, at the rate of a large product.
"""

import argparse
import statistics

import torch
from common import (
    arguments,
    bandwidth,
    build,
    interleaved,
    matmul_rate,
    prompts,
    ratio,
    report,
    set_ends,
    spread,
    to,
)

from data import load_rows
from model import load_policy
from rollout import sample

CASES = {  # size: prompts, completions of each, visual tokens, text tokens, lengths
    "toy": (8, 8, 9, 24, (60,)),
    "100m": (1, 8, 512, 100, (64,)),
    "2b": (8, 8, 512, 100, (300, 700)),
}


def decoding_limit(model, inputs: dict, lengths: torch.Tensor) -> float:
    """Seconds that decoding completions of these lengths takes at least; prefill not counted."""
    language, config = model.model.language_model, model.config.text_config
    weights = sum(p.numel() for p in language.layers.parameters()) + model.lm_head.weight.numel()
    if not torch.cuda.is_available():
        return 2 * weights * int(lengths.sum()) / matmul_rate()
    bytes_each = model.dtype.itemsize
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * bytes_each
    steps = int(lengths.max())
    own = sum(int((lengths.clamp(max=t)[lengths > t]).sum()) for t in range(steps))
    prompt = steps * int(inputs["attention_mask"].sum())
    return (steps * weights * bytes_each + (own + prompt) * per_token) / bandwidth("cuda")


def race(model, inputs: dict, G: int, C: int, ends: list[int], options):
    """Tokens per second of each contestant, turn by turn; seconds and last lengths likewise."""
    P, lengths = inputs["input_ids"].shape[1], {}

    def ours(name: str, decoding: str | None) -> None:
        turn = len(lengths.setdefault(name, []))
        _, mask = sample(model, inputs, G, C, step=turn, decoding=decoding)
        lengths[name].append(mask.sum(-1))

    def generate() -> None:
        ids = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            num_return_sequences=G,
            max_new_tokens=C,
        )[:, P:]
        is_end = torch.isin(ids, torch.tensor(ends or [-1], device=ids.device)).long()
        lengths.setdefault("generate", []).append((is_end.cumsum(-1) == is_end).sum(-1))
        model.model.rope_deltas = None

    contestants = {"generate": generate, "sample": lambda: ours("sample", None)}
    for decoding in options.decoding:
        contestants[decoding] = lambda decoding=decoding: ours(decoding, decoding)
    torch.manual_seed(0)
    seconds = interleaved(contestants, options.repetitions)
    rates = {
        name: [int(n.sum()) / s for n, s in zip(lengths[name][1:], times, strict=True)]
        for name, times in seconds.items()
    }
    return rates, seconds, lengths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--decoding", nargs="*", default=[], help="also these ways of rollout.sample"
    )
    options = arguments(parser)
    B, G, visual, text, lengths = CASES[options.size]
    model, processor = build(options.size)
    inputs = to(processor.collate(prompts(processor, B, visual, text)), model.device)
    # ended by any of k of V tokens: about V / k tokens long, cut at C
    V = model.config.text_config.vocab_size
    cases = []
    for C in lengths:
        cases += [("fixed", C, []), ("drawn", C, list(range(100, 100 + V * 3 // C)))]
    if options.size == "toy":
        cases.append(("run", 96, None))

    rows, raw = [], []
    for kind, C, ends in cases:
        if kind == "run":
            model, processor = load_policy("toy")
            ends = processor.end_ids
            asked = [processor.prepare(row, "base") for row in load_rows("toy", limit=B)]
            inputs = processor.collate([row["encoded"] for row in asked])
        else:
            set_ends(model, ends)
        rates, seconds, counts = race(model, inputs, G, C, ends, options)
        limit = decoding_limit(model, inputs, counts["sample"][-1])
        for name, times in seconds.items():
            ours, mean = name != "generate", torch.cat(counts[name][1:]).float().mean()
            rows.append(
                {
                    "lengths": f"{kind}, {'' if kind == 'fixed' else 'at most '}{C}",
                    "contestant": name,
                    "mean length": f"{mean:.0f}",
                    "tokens/s": spread(rates[name]),
                    "times faster": spread(ratio(rates[name], rates["generate"])) if ours else "1",
                    "of the limit": f"{limit / statistics.median(times):.0%}" if ours else "",
                }
            )
            raw.append({"name": name, "kind": kind, "C": C, "seconds": times})
    report(f"rollout, {options.size}, {B} x {G}", rows, raw)


if __name__ == "__main__":
    main()
