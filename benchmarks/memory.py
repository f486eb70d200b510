"""The peak memory of a GRPO update of Qwen2-VL-2B, simulated without a GPU and without weights.

    python benchmarks/memory.py                # the table of docs/memory.md, on stdout
    python benchmarks/memory.py --write        # and into docs/memory.md
    python benchmarks/memory.py --validate     # the simulation against the CPU allocator, 100 M
    python benchmarks/memory.py --flags "--beta 0 --num_generations 4"    # any flags of grpo.py

The functions of grpo.py run on fake tensors: they have shapes and no values. The bytes of every
storage are counted from its creation to its end. Fake tensors take the operations of a CPU, so the
attention kernels are not those of a GPU. Workspace inside a kernel, the CUDA context (about 0.5 GB)
and the fragmentation of the allocator are not counted. Nothing here was measured on a GPU.

The table takes about six minutes on one core.
"""

import multiprocessing
import os
import sys
from collections import Counter
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from common import ROOT, build_model, build_processor, insert, parser_of, prompts
from simulation import Allocator, Simulation
from torch import Tensor

import core.rollout
from core.decoder import Decoder, prefill
from core.groups import Rollout, make_micro_batches
from core.lora import add_adapters
from core.optimizer import GuardedStep, prepare
from core.options import parse_options
from core.packing import Policy, use_packed_attention
from core.processes import Replica
from core.qwen import Prompt, freeze_part
from grpo import GRPOOptions, compute_gradients

GB = 1e9
TEXT = 100  # tokens of a question
VISUAL = {"2b": 512, "100m": 256}  # tokens of an image: the paper's largest; fewer to validate
KINDS = (
    "weights", "gradients", "optimizer", "reference", "replica", "inputs", "bf16 copies",
    "activations", "temporaries",
)  # fmt: skip
PHASES = ("rollout", "reference", "forward", "backward", "clip", "step", "refresh")
RECIPES = [  # what differs from the paper's recipe
    "",
    "--prompts_per_forward 2",
    "--gradient_checkpointing false",
    "--max_completion_length 350",
    "--freeze vision",
    "--beta 0",
    "--beta 0 --freeze vision",
    "--lora_rank 16",
    "--lora_rank 16 --beta 0",
]


def sampled(size: str, processor, options: GRPOOptions) -> tuple[Rollout, Tensor, Tensor]:
    """A rollout whose completions all have the greatest length, its advantages and weights."""
    B, G, C = options.prompts_per_update, options.num_generations, options.max_completion_length
    inputs = prompts(processor, B, VISUAL[size], TEXT)
    ids, logps = torch.full((B * G, C), 300), torch.zeros(B * G, C)
    truncated = torch.ones(B * G, dtype=torch.bool)
    asked = [Prompt({}, "", one) for one in inputs]
    rollout = Rollout(asked, ids, torch.ones_like(ids), logps, truncated, [""] * (B * G))
    return rollout, torch.randn(B, G), torch.full((B * G, C), 1 / (B * G * C))


@torch.no_grad()
def sample_once(model, prompt_inputs: dict, options: GRPOOptions, world) -> None:
    """The memory of `core.rollout.sample`: prefill, and one step at the greatest length."""
    G, C = options.num_generations, options.max_completion_length
    B = len(prompt_inputs["input_ids"])
    uniform = core.rollout.uniforms(0, 0, range(B), G, C)
    pixels = world.move(prompt_inputs["pixel_values"])
    hidden, cache, start = prefill(model, prompt_inputs | {"pixel_values": pixels})
    with world.make("temporaries"):
        decoder = Decoder(model, cache, prompt_inputs["attention_mask"], start, G, C)
        drawing = core.rollout.SamplingState(model, decoder, uniform, 1.0)
        drawing.draw(decoder.rows, model.lm_head(hidden).repeat_interleave(G, 0))
        drawing.step(B * G, C)


def in_phase(world, name: str, function):
    def wrapped(*args, **kwargs):
        with world.phase(name), world.make("optimizer") if name == "step" else nullcontext():
            return function(*args, **kwargs)

    return wrapped


def set_up(size: str, options: GRPOOptions, world: Simulation | Allocator):
    """The models, optimizer and accelerator of a run in bf16, as `main()` of grpo.py makes them."""
    accelerator, processor = Accelerator(cpu=True, mixed_precision="bf16"), build_processor()
    with world.make("weights"):
        model = build_model(size, processor)
    use_packed_attention(model)
    freeze_part(model, options.freeze)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with world.make("replica"):
        sampler = Replica(model, accelerator)
    reference = None
    if options.beta:
        with world.make("reference"):  # a copy in bf16, like the replica
            reference = Replica(model, accelerator).model
    with world.make("weights"):
        add_adapters(model, options.lora_rank, options.seed, torch.bfloat16)
    policy, optimizer = prepare(Policy(model), options, accelerator, None)
    for group in optimizer.param_groups:
        group["fused"] = True  # as on a GPU
    world.watch(policy, accelerator)
    policy.forward = in_phase(world, "forward", policy.forward)
    accelerator.backward = in_phase(world, "backward", accelerator.backward)
    accelerator.clip_grad_norm_ = in_phase(world, "clip", accelerator.clip_grad_norm_)
    optimizer.step = in_phase(world, "step", optimizer.step)
    return accelerator, processor, sampler, reference, policy, optimizer


def run_update(size: str, options: GRPOOptions, world: Simulation | Allocator) -> tuple:
    """An update that is not the run's first. Returns what is alive then."""
    with world.running():
        parts = set_up(size, options, world)
        accelerator, processor, sampler, reference, policy, optimizer = parts
        guarded_step = GuardedStep(policy, optimizer, options, accelerator)
        for group in optimizer.param_groups:  # the first update makes the optimizer's state
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        guarded_step(0.0, 1)
        rollout, advantages, weights = sampled(size, processor, options)
        with world.phase("rollout"):
            encoded = [prompt.inputs for prompt in rollout.prompts]
            sample_once(sampler.model, processor.collate(encoded), options, world)
        with world.phase("reference"):
            models = sampler.model, reference
            batches = make_micro_batches(
                *models, processor, options, accelerator, rollout, advantages, weights
            )
        # All groups have the same size, so two micro-batches need what any number would.
        loss = compute_gradients(policy, batches[:2], options, accelerator)["loss"]
        guarded_step(loss, 2)
        with world.phase("refresh"):
            sampler.refresh(policy)
    return parts, batches


def peaks_of(size: str, flags: str, world: Simulation | Allocator) -> dict[str, Counter]:
    """The peak of each phase, of the paper's recipe with these flags.

    It runs in a process of its own that frees nothing at its end, because torch 2.13 sometimes
    crashes when it frees a model of fake tensors.
    """
    options = parse_options(GRPOOptions, argv=["--recipe", "paper", *flags.split()])
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        _alive = run_update(size, options, world)
        sender.send({phase: world.peaks[phase] for phase in PHASES})
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    sender.close()  # so that `recv` raises EOFError if the child fails
    peaks = receiver.recv()
    process.join()
    return peaks


# --- tables --------------------------------------------------------------------------------------


def table(first: list[str], rows: list[tuple[list[str], Counter]]) -> str:
    """GB at a peak: in all, and of each kind."""
    lines = [[*first, "peak, GB", *KINDS], ["---"] * (len(first) + 1 + len(KINDS))]
    for names, peak in rows:
        parts = [f"{peak[kind] / GB:.1f}" for kind in KINDS]
        lines.append([*names, f"**{peak.total() / GB:.1f}**", *parts])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def simulated_tables(recipes: list[str]) -> str:
    rows, of_phases = [], None
    for flags in recipes:
        peaks = peaks_of("2b", flags, Simulation())
        phase = max(peaks, key=lambda name: peaks[name].total())
        name = f"`{flags}`" if flags else "the paper's recipe"
        rows.append(([name, phase], peaks[phase]))
        of_phases = of_phases or table(["phase"], [([p], peaks[p]) for p in PHASES])
        print(f"{name}: {peaks[phase].total() / GB:.1f} GB, in {phase}", file=sys.stderr)
    about = f"Simulated with torch {torch.__version__}, not measured on a GPU."
    largest = table(["settings", "in phase"], rows)
    name = rows[0][0][0]
    return f"{about}\n\n{largest}\n\nThe phases of {name}, simulated:\n\n{of_phases}"


def validate() -> bool:
    """Compare with the allocator on the 100 M model, with and without gradient checkpointing."""
    errors = []
    print("| settings | phase | simulated, MB | allocator, MB | error |")
    print("|---|---|---|---|---|")
    for flags in ("", "--gradient_checkpointing false"):
        given = f"--prompts_per_update 2 --max_completion_length 64 {flags}"
        simulated, measured = (peaks_of("100m", given, w) for w in (Simulation(), Allocator()))
        for phase in PHASES:
            ours, theirs = simulated[phase].total(), measured[phase].total()
            errors.append(abs(ours / theirs - 1))
            cells = [f"`{flags}`" if flags else "checkpointing", phase]
            cells += [f"{ours / 1e6:.1f}", f"{theirs / 1e6:.1f}", f"{ours / theirs - 1:+.2%}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"largest error {max(errors):.2%}; allowed 2 %")
    return max(errors) <= 0.02


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--validate", action="store_true", help=validate.__doc__)
    parser.add_argument("--write", action="store_true", help="Write the tables into docs/memory.md")
    parser.add_argument("--flags", help="Simulate grpo.py with these flags only, in quotes")
    options = parser.parse_args()
    if options.validate:
        sys.exit(not validate())
    text = simulated_tables(RECIPES if options.flags is None else [options.flags])
    print(text)
    if options.write:
        insert(ROOT / "docs" / "memory.md", "memory", text)


if __name__ == "__main__":
    main()
