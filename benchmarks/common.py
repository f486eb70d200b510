"""What the benchmarks share: models of three sizes, prompts, taking turns, tables, records."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import toy  # noqa: E402
from model import Processor, load_policy  # noqa: E402

RESULTS = Path(__file__).parent / "results.jsonl"
SIZES = {
    "toy": "the embedded world's Qwen2-VL, random weights, float32",
    "100m": "a Qwen2-VL of 100 M parameters, random weights, float32",
    "2b": "Qwen2-VL-2B's architecture, random weights, bfloat16 (GPU)",
}
SHAPES = {  # (text, vision) of a config
    "100m": (
        dict(
            vocab_size=16_384,
            hidden_size=768,
            intermediate_size=2560,
            num_hidden_layers=8,
            num_attention_heads=12,
            num_key_value_heads=2,
            mrope=[8, 12, 12],
        ),
        dict(depth=8, embed_dim=512, hidden_size=768, num_heads=8, mlp_ratio=4),
    ),
    "2b": (
        dict(
            vocab_size=151_936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            mrope=[16, 24, 24],
        ),
        dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4),
    ),
}


def build(size: str):
    """A random model of this size and a processor (the toy world's tokenizer serves them all)."""
    if size == "toy":
        model, processor = load_policy("toy-scratch")
    else:
        tokenizer = toy.build_tokenizer(rows=300)
        token = tokenizer.convert_tokens_to_ids
        text, vision = (dict(part) for part in SHAPES[size])
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope")}
        config = Qwen2VLConfig(
            text_config=text | {"rope_parameters": rope, "tie_word_embeddings": True},
            vision_config=vision,
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        dtype, device = (torch.bfloat16, "cuda") if size == "2b" else (torch.float32, "cpu")
        with torch.device(device):
            model = Qwen2VLForConditionalGeneration(config).to(dtype)
        processor = Processor(tokenizer, Qwen2VLImageProcessorPil())
    set_ends(model, [])
    if torch.cuda.is_available():
        model.cuda()
    return model.eval(), processor


def set_ends(model, ends: list[int]) -> None:
    """Tokens that end a completion. A random model draws any with about equal probability."""
    beyond = model.config.text_config.vocab_size  # a token that no model draws
    model.generation_config.eos_token_id = ends or [beyond]
    model.generation_config.pad_token_id = 0


def prompts(processor, count: int, visual: int, text: int, seed: int = 0) -> list[dict]:
    """Encoded prompts with one noise image of `visual` tokens and `text` tokens beside it."""
    rng = random.Random(seed)
    height = max(h for h in range(1, int(visual**0.5) + 1) if visual % h == 0)
    rows = toy.ToyRows(seed=seed)
    encoded = []
    for number in range(count):
        size = (28 * visual // height, 28 * height)
        image = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
        words = " ".join(rows[number * 50 + i]["question"] for i in range(1 + text // 4))
        prompt = f"<|vision_start|><|image_pad|><|vision_end|>{words}"
        one = processor.encode_one(prompt, [image])
        one["input_ids"] = one["input_ids"][: visual + text]
        assert int((one["input_ids"] == processor.image_id).sum()) == visual
        encoded.append(one)
    return encoded


def to(inputs: dict, device) -> dict:
    return {name: value.to(device) for name, value in inputs.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(contestants: dict[str, Callable], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call, the contestants taking turns, after one call of each to warm up."""
    seconds = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, run in contestants.items():
            synchronize()
            began = CLOCK()
            run()
            synchronize()
            if repetition:
                seconds[name].append(CLOCK() - began)
    return seconds


CLOCK = time.perf_counter


def use_one_busy_core() -> None:
    """One thread and its CPU time in place of wall time: for a machine that others use too."""
    global CLOCK
    CLOCK = time.process_time
    torch.set_num_threads(1)


def spread(values: list[float]) -> str:
    """median (lowest-highest)"""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    """How many times faster, turn by turn."""
    return [s / f for s, f in zip(slow, fast, strict=True)]


def matmul_rate(dtype=torch.float32, device="cpu", shape=None) -> float:
    """Floating-point operations per second of a large matrix product, the best of several."""
    m, k, n = shape or ((2048, 2048, 2048) if device == "cpu" else (8192, 8192, 8192))
    a = torch.randn(m, k, dtype=dtype, device=device)
    b = torch.randn(k, n, dtype=dtype, device=device)
    times = interleaved({"product": lambda: [a @ b for _ in range(3)]}, 5)["product"]
    return 3 * 2 * m * k * n / min(times)


def bandwidth(device: str) -> float:
    """Bytes per second read and written by a large copy, the best of several."""
    a = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * len(a) / min(interleaved({"copy": lambda: b.copy_(a)}, 5)["copy"])


def machine() -> dict:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if CLOCK is time.process_time else "wall time",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--short") else ""),
    }


def report(benchmark: str, rows: list[dict], raw: list[dict] | None = None) -> None:
    """Print one table and append it, with what was measured and on what, to results.jsonl."""
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns)] + [[str(row[c]) for c in columns] for row in rows]
    for line in cells:
        print("| " + " | ".join(line) + " |")
    record = {"benchmark": benchmark, **about, "arguments": sys.argv[1:], "rows": rows}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(record | ({"raw": raw} if raw else {})) + "\n")


def arguments(parser, sizes=("toy", "100m", "2b")):
    """The options that all scripts have; refuses what this machine cannot run."""
    parser.add_argument("--size", choices=sizes, default="toy", help=str(SIZES))
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls of each contestant")
    parser.add_argument("--shared", action="store_true", help=use_one_busy_core.__doc__)
    chosen = parser.parse_args()
    if chosen.size == "2b" and not torch.cuda.is_available():
        parser.error("--size 2b needs a GPU")
    if chosen.shared:
        use_one_busy_core()
    return chosen
