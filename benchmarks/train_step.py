"""Forward and backward of one group: packed into one sequence, against its G rows apart.

    python benchmarks/train_step.py                                     # toy, any CPU
    python benchmarks/train_step.py --size 100m --generations 4 8
    python benchmarks/train_step.py --size 2b --generations 8           # one GPU

Both ways give the same log-probabilities, which every row of the table verifies, and share
`token_logps`. Only the sequence differs. The packing's plan is part of the time.

Memory: on a GPU the peak above the weights, on a CPU the bytes that autograd keeps for the backward
pass. Utilisation: floating-point operations of the packed pass, as torch counts them, per second,
as a share of the rate of a large matrix product.
"""

import statistics

import torch
from common import (
    arguments,
    build,
    interleaved,
    matmul_rate,
    parser_of,
    prompts,
    ratio,
    report,
    spread,
    to_device,
)
from torch.utils.flop_counter import FlopCounterMode

from core.packing import group_logps, pack_groups, token_logps

SHAPES = {  # size: (visual tokens, text tokens, shortest and longest completion)
    "toy": [
        *((36, 28, 4, 8), (36, 28, 32, 64), (9, 23, 64, 128)),
        *((512, 100, 300, 300), (512, 100, 700, 700)),
    ],
    "100m": [(512, 100, 64, 64)],
    "2b": [(512, 100, 300, 300), (512, 100, 700, 700)],
}


def rows_logps(model, inputs: dict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What `group_logps` gives for one group, by the unmodified model on G rows apart."""
    G, C = ids.shape
    P = inputs["input_ids"].shape[1]
    repeated = {name: value.repeat_interleave(G, 0) for name, value in inputs.items()}
    repeated["pixel_values"] = inputs["pixel_values"].repeat(G, 1)
    repeated["image_grid_thw"] = inputs["image_grid_thw"].repeat(G, 1)
    repeated["input_ids"] = torch.cat([repeated["input_ids"], ids], 1)
    repeated["attention_mask"] = torch.cat([repeated["attention_mask"], mask], 1)
    types = repeated["mm_token_type_ids"]
    repeated["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(ids)], 1)
    hidden = model.model(**repeated, use_cache=False).last_hidden_state[:, P - 1 : -1]
    kept = mask.bool()
    logps, _ = token_logps(model.lm_head, hidden[kept], ids[kept], 1.0)
    model.model.rope_deltas = None
    return torch.zeros(G, C, dtype=logps.dtype, device=ids.device).masked_scatter(kept, logps)


def kept_bytes(model, forward) -> int:
    """The bytes that the backward pass of `forward()` needs, without the weights."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward().sum().backward()
        model.zero_grad()
        return torch.cuda.max_memory_allocated() - before
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(len(storage) for storage in storages.values())


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--generations", type=int, nargs="+", default=[4, 8, 16], help="Values of G"
    )
    options = arguments(parser)
    model, processor = build(options.size)
    model.train()
    rate = matmul_rate(model.dtype, model.device.type)
    table, raw = [], []
    for visual, text, least, C in SHAPES[options.size]:
        for G in options.generations:
            encoded = prompts(processor, 1, visual, text)
            inputs = to_device(processor.collate(encoded), model.device)
            torch.manual_seed(0)
            ids = torch.randint(10, 300, (G, C), device=model.device)
            lengths = torch.randint(least, C + 1, (G, 1), device=model.device)
            mask = (torch.arange(C, device=model.device) < lengths).long()

            def packed():
                return group_logps(model, pack_groups(model, inputs, ids, mask))[0]  # noqa: B023

            def rows():
                return rows_logps(model, inputs, ids, mask)  # noqa: B023

            def both_ways(forward):
                forward().sum().backward()
                model.zero_grad()

            with torch.no_grad():
                difference = (packed() - rows()).abs().max().item()
            seconds = interleaved(
                {"rows": lambda: both_ways(rows), "packed": lambda: both_ways(packed)},  # noqa: B023
                options.repetitions,
            )
            memory = {f.__name__: kept_bytes(model, f) for f in (rows, packed)}
            with FlopCounterMode(display=False) as counter:
                both_ways(packed)
            mib = [f"{memory[name] / 2**20:.0f}" for name in ("rows", "packed")]
            share = counter.get_total_flops() / statistics.median(seconds["packed"]) / rate
            table.append(
                {
                    "prompt": visual + text,
                    "completions": f"{G} x {C}" if least == C else f"{G} x {least}-{C}",
                    "rows, s": spread(seconds["rows"]),
                    "packed, s": spread(seconds["packed"]),
                    "times faster": spread(ratio(seconds["rows"], seconds["packed"])),
                    "memory, MiB": " -> ".join(mib),
                    "memory": f"{memory['packed'] / memory['rows']:.0%}",
                    "utilisation": f"{share:.0%}",
                    "largest difference": f"{difference:.0e}",
                }
            )
            raw.append({"prompt": visual + text, "G": G, "C": C, "seconds": seconds})
    report(f"train_step, {options.size}", table, raw, options.write)


if __name__ == "__main__":
    main()
