"""What the benchmarks share: models of three sizes, prompts, turns, tables, records."""

import argparse
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
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from accelerate.utils import send_to_device as to_device  # noqa: E402, F401

from core.qwen import Processor  # noqa: E402
from toy.base_model import build_model as build_toy  # noqa: E402
from toy.base_model import build_tokenizer  # noqa: E402
from toy.world import ToyRows  # noqa: E402

RESULTS = Path(__file__).parent / "results.jsonl"
SIZES = """toy: the toy world's architecture, float32
100m: a Qwen2-VL with 100 M parameters, float32
2b: the architecture of Qwen2-VL-2B, bfloat16, needs a GPU
All have random weights."""
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


def build_processor() -> Processor:
    """The toy world's tokenizer, which serves all sizes, and Qwen2-VL's image processor."""
    size = {"shortest_edge": 3136, "longest_edge": 401_408}
    return Processor(build_tokenizer(rows=300), Qwen2VLImageProcessorPil(size=size))


def build_model(size: str, processor: Processor) -> nn.Module:
    """A model of this size with random weights, in float32, on the CPU."""
    if size == "toy":
        return build_toy(processor.tokenizer)
    token = processor.tokenizer.convert_tokens_to_ids
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
    return Qwen2VLForConditionalGeneration(config)


def build(size: str) -> tuple[nn.Module, Processor]:
    """A random model that never ends a completion, and its processor."""
    processor = build_processor()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = build_model(size, processor)
    set_ends(model, [])
    return model.to(torch.bfloat16 if size == "2b" else torch.float32).eval(), processor


def set_ends(model: nn.Module, ends: list[int]) -> None:
    """Set the tokens that end a completion. A random model draws all about equally often."""
    beyond = model.config.text_config.vocab_size  # a token that no model draws
    model.generation_config.eos_token_id = ends or [beyond]
    model.generation_config.pad_token_id = 0


def prompts(processor, count: int, visual: int, text: int, seed: int = 0) -> list[dict]:
    """Inputs of prompts with one noise image of `visual` tokens and with `text` other tokens."""
    rng = random.Random(seed)
    height = max(h for h in range(1, int(visual**0.5) + 1) if visual % h == 0)
    rows = ToyRows(seed=seed)
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


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(contestants: dict[str, Callable], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call. The contestants take turns. The first call of each is a warm-up."""
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
    """Use one thread and measure its CPU time, for a machine that others use too."""
    global CLOCK
    CLOCK = time.process_time
    torch.set_num_threads(1)


def spread(values: list[float]) -> str:
    """median (lowest-highest)"""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    """How many times faster, turn by turn."""
    return [s / f for s, f in zip(slow, fast, strict=True)]


def matmul_rate(dtype=torch.float32, device="cpu") -> float:
    """Floating-point operations per second of a large matrix product, the best of several."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    times = interleaved({"product": lambda: [a @ b for _ in range(3)]}, 5)["product"]
    return 3 * 2 * n**3 / min(times)


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


def report(
    benchmark: str, rows: list[dict], raw: list[dict] | None = None, write: bool = False
) -> None:
    """Print one table and append it, with what was measured and on what, to results.jsonl.

    `write` also puts it into README.md, at the place named like the benchmark.
    """
    about = machine()
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns)] + [[str(row[c]) for c in columns] for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    text = "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in about.items())])
    print(text)
    record = {"benchmark": benchmark, **about, "arguments": sys.argv[1:], "rows": rows}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(record | ({"raw": raw} if raw else {})) + "\n")
    if write:
        insert(Path(__file__).parent / "README.md", benchmark, text)


def insert(page: Path, place: str, text: str) -> None:
    """Replace what a page holds between `<!-- place -->` and the next `<!-- end -->`."""
    before, start, rest = page.read_text().partition(f"<!-- {place} -->\n")
    if not start:
        raise SystemExit(f"{page} has no place named {place}")
    page.write_text(f"{before}{start}{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


def parser_of(description: str) -> argparse.ArgumentParser:
    raw = argparse.RawTextHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw)


def arguments(parser: argparse.ArgumentParser, sizes=("toy", "100m", "2b")) -> argparse.Namespace:
    """Add the options that all scripts have, and parse. Refuses 2b on a machine without a GPU."""
    parser.add_argument("--size", choices=sizes, default="toy", help=SIZES)
    parser.add_argument("--repetitions", type=int, default=5, help="Timed calls of each contestant")
    parser.add_argument("--write", action="store_true", help="Write the table into README.md")
    parser.add_argument("--shared", action="store_true", help=use_one_busy_core.__doc__)
    chosen = parser.parse_args()
    if chosen.size == "2b" and not torch.cuda.is_available():
        parser.error("--size 2b needs a GPU")
    if chosen.shared:
        use_one_busy_core()
    return chosen
