"""Tokens per second of `core.rollout.sample` against transformers' `generate` and the hardware.

    python benchmarks/rollout.py                # toy, 8 x 8 completions, any CPU
    python benchmarks/rollout.py --size 100m
    python benchmarks/rollout.py --size 2b --decoding eager captured      # one GPU

Both sample from the whole vocabulary at temperature 1. There are three kinds of lengths:

    fixed   every completion has the same length
    drawn   any of several tokens ends a completion, so the lengths are distributed geometrically
    run     the toy world's base model answers its own questions, as in grpo.py (toy only)

Only tokens up to the end count. The hardware's limit is an estimate. On a GPU it is the time to
read, in every step, the weights, the prompts' keys and values, and those of the completions, at the
bandwidth of a large copy. On a CPU it is the time of the matrix products with the weights, at the
rate of a large product.
"""

import statistics

import torch
from common import (
    arguments,
    bandwidth,
    build,
    interleaved,
    matmul_rate,
    parser_of,
    prompts,
    ratio,
    report,
    set_ends,
    spread,
    to_device,
)

from core.qwen import load_policy
from core.rollout import sample
from toy.world import ToyRows

CASES = {  # size: prompts, completions of each, visual tokens, text tokens, lengths
    "toy": (8, 8, 9, 24, (60,)),
    "100m": (1, 8, 512, 100, (64,)),
    "2b": (8, 8, 512, 100, (300, 700)),
}


def decoding_limit(model, inputs: dict, lengths: torch.Tensor) -> float:
    """The least seconds that decoding completions of these lengths takes, without prefill."""
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
    """Tokens per second, seconds and completion lengths of each contestant in each turn."""
    P, lengths = inputs["input_ids"].shape[1], {}

    def ours(decoding: str) -> None:
        turn = len(lengths.setdefault(decoding, []))
        _, mask, _ = sample(model, inputs, G, C, step=turn, decoding=decoding)
        lengths[decoding].append(mask.sum(-1))

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

    contestants = {"generate": generate}
    for decoding in options.decoding:
        contestants[decoding] = lambda decoding=decoding: ours(decoding)
    torch.manual_seed(0)
    seconds = interleaved(contestants, options.repetitions)
    rates = {
        name: [int(n.sum()) / s for n, s in zip(lengths[name][1:], times, strict=True)]
        for name, times in seconds.items()
    }
    return rates, seconds, lengths


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--decoding",
        nargs="+",
        choices=["eager", "captured"],
        default=["eager"],
        help="Ways to decode",
    )
    options = arguments(parser)
    B, G, visual, text, lengths = CASES[options.size]
    model, processor = build(options.size)
    inputs = to_device(processor.collate(prompts(processor, B, visual, text)), model.device)
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
            model = model.eval().to(inputs["input_ids"].device)
            rows_of_toy = ToyRows()
            asked = [processor.prompt(rows_of_toy[i], "base").inputs for i in range(B)]
            inputs = to_device(processor.collate(asked), model.device)
        else:
            set_ends(model, ends)
        rates, seconds, counts = race(model, inputs, G, C, ends, options)
        limit = decoding_limit(model, inputs, counts[options.decoding[0]][-1])
        for name, times in seconds.items():
            ours, mean = name != "generate", torch.cat(counts[name][1:]).float().mean()
            rows.append(
                {
                    "lengths": f"{kind}, {'' if kind == 'fixed' else 'at most '}{C}",
                    "contestant": name if name == "generate" else f"sample, {name}",
                    "mean length": f"{mean:.0f}",
                    "tokens/s": spread(rates[name]),
                    "times faster": spread(ratio(rates[name], rates["generate"])) if ours else "1",
                    "of the limit": f"{limit / statistics.median(times):.0%}" if ours else "",
                }
            )
            raw.append({"name": name, "kind": kind, "C": C, "seconds": times})
    report(f"rollout, {options.size}, {B} x {G}", rows, raw, options.write)


if __name__ == "__main__":
    main()
