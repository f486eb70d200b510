"""How the time of an update grows with G, with the image and with the length of the completions.

    python benchmarks/scaling.py

An update samples, computes log-probabilities, and makes the backward pass and the AdamW step. Each
sweep is fitted by least squares, seconds = fixed + slope * x. If the prompt were computed once per
completion, a longer prompt would raise the slope against G. It is computed once per group, so a
longer prompt raises the fixed part.
"""

import statistics

import torch
from common import arguments, build, interleaved, parser_of, prompts, report, spread, to_device

from core.packing import group_logps, pack_groups
from core.rollout import sample

SWEEPS = {  # name: (G, visual tokens, completion length)
    "G, 9 visual tokens": [(G, 9, 48) for G in (4, 8, 16, 32, 64)],
    "G, 256 visual tokens": [(G, 256, 48) for G in (4, 8, 16, 32, 64)],
    "visual tokens": [(8, visual, 48) for visual in (9, 64, 144, 256, 400)],
    "completion length": [(8, 9, C) for C in (16, 32, 64, 128, 192)],
}
VARIED = {"G": 0, "visual": 1, "completion": 2}
PROMPTS, TEXT = 2, 24


def fit(x: list[float], y: list[float]) -> tuple[float, float]:
    """Fixed part and slope."""
    slope, fixed = statistics.linear_regression(x, y)
    return fixed, slope


def main() -> None:
    options = arguments(parser_of(__doc__), ("toy", "100m"))
    model, processor = build(options.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def update(inputs: dict, G: int, C: int) -> None:
        ids, mask, _ = sample(model, inputs, G, C)
        model.train()
        logps = group_logps(model, pack_groups(model, inputs, ids, mask))
        advantages = torch.randn(len(logps), G, 1, device=logps.device)
        (-(logps - logps.detach()).exp() * advantages * mask.view_as(logps)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    table, fits = [], []
    for name, points in SWEEPS.items():
        runs = {}
        for G, visual, C in points:
            encoded = prompts(processor, PROMPTS, visual, TEXT)
            inputs = to_device(processor.collate(encoded), model.device)
            runs[G, visual, C] = lambda i=inputs, G=G, C=C: update(i, G, C)
        seconds = interleaved(runs, options.repetitions)
        x = [point[VARIED[name.split()[0].strip(",")]] for point in points]
        medians = [statistics.median(seconds[point]) for point in points]
        fixed, slope = fit(x, medians)
        ends = [spread(seconds[point]) for point in (points[0], points[-1])]
        fits.append({"sweep": name, "x": x, "seconds": [seconds[p] for p in points]})
        table.append(
            {
                "against": name,
                "from - to": f"{x[0]} - {x[-1]}",
                "seconds at the ends": " - ".join(ends),
                "fixed, ms": f"{1e3 * fixed:.0f}",
                "slope, ms": f"{1e3 * slope:.3g}",
            }
        )
    report(f"scaling, {options.size}, {PROMPTS} prompts", table, fits, options.write)


if __name__ == "__main__":
    main()
