"""A whole GRPO update against TRL's GRPOTrainer: rollout, reference, log-probabilities, step.

    pip install trl                            # for this benchmark only
    python benchmarks/update.py                # toy, 8 x 8 completions, any CPU
    python benchmarks/update.py --size 100m    # 1 x 8 of 64 tokens, prompt of 512 visual tokens

Weights, prompts, sampling and hyper-parameters are the same (beta 0.04, AdamW). The updates take
turns in one process: after each step of TRL's trainer, grpo.py's functions make one of ours. The
toy case uses the toy world's base model, so completions are as long as in a run.
"""

import copy
import importlib.util
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path

import common
import torch
from accelerate import Accelerator
from common import arguments, build, parser_of, ratio, report, spread, synchronize
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    ProcessorMixin,
    Qwen2VLProcessor,
    TrainerCallback,
)

from core.groups import make_micro_batches, sample_rollout, trained_tokens
from core.optimizer import GuardedStep, prepare
from core.options import parse_options
from core.packing import Policy
from core.qwen import Prompt, load_policy, save_policy
from grpo import GRPOOptions, compute_advantages, compute_gradients, token_weights
from toy.world import ToyRows

CASES = {"toy": (8, 8, 96), "100m": (1, 8, 64), "2b": (8, 8, 300)}  # prompts, G, C
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


class ImageProcessorOnly(Qwen2VLProcessor):
    """The library's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def questions(size: str, count: int) -> list[tuple[str, Image.Image]]:
    rows = ToyRows()
    if size == "toy":
        return [(rows[i]["question"] + "\n<think>", rows[i]["images"][0]) for i in range(count)]
    image = Image.effect_noise((896, 448), 50).convert("RGB")
    return [(" ".join(rows[i * 30 + j]["question"] for j in range(7)), image) for i in range(count)]


def vowels(completions, **_) -> list[float]:
    """The share of vowels. Any rule would do."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in texts]


class Ours:
    """Our side: `update` makes one update and notes its seconds and mean completion length."""

    def __init__(self, size: str, model, processor, pairs: list):
        B, G, C = CASES[size]
        words = f"--beta 0.04 --learning_rate 1e-6 --prompts_per_update {B} --num_generations {G} "
        words += f"--max_completion_length {C} --prompts_per_forward {B}"
        self.options = parse_options(GRPOOptions, argv=words.split())
        self.accelerator = Accelerator()
        self.model, self.processor = model, processor
        reference = copy.deepcopy(model).requires_grad_(False).eval()
        self.pack = partial(
            make_micro_batches, model, reference, processor, self.options, self.accelerator
        )
        self.policy, optimizer = prepare(Policy(model), self.options, self.accelerator, None)
        self.step = GuardedStep(self.policy, optimizer, self.options, self.accelerator)
        texts = [f"<|vision_start|><|image_pad|><|vision_end|>{text}" for text, _ in pairs]
        self.prompts = [
            Prompt({}, text, processor.encode_one(text, [image]))
            for text, (_, image) in zip(texts, pairs, strict=True)
        ]
        self.seconds: list[float] = []
        self.lengths: list[float] = []
        self.parts: dict[str, list[float]] = {"sampling": [], "reference": [], "training": []}

    def update(self, number: int) -> None:
        options, B = self.options, len(self.prompts)
        times = [clock()]
        rollout = sample_rollout(
            self.model, self.processor, self.prompts, range(B), number, options
        )
        advantages = compute_advantages(torch.tensor(vowels(rollout.completions)).view(B, -1))
        trained, counts = trained_tokens(rollout, options, self.accelerator)
        weights = token_weights(trained, options.loss_type, **counts)
        times.append(clock())
        batches = self.pack(rollout, advantages, weights)
        times.append(clock())
        loss = compute_gradients(self.policy, batches, options, self.accelerator)["loss"]
        self.step(loss, number)
        times.append(clock())
        for name, start, end in zip(self.parts, times, times[1:], strict=False):
            self.parts[name].append(end - start)
        self.seconds.append(times[-1] - times[0])
        self.lengths.append(rollout.completion_mask.sum(-1).float().mean().item())


def clock() -> float:
    synchronize()
    return common.CLOCK()


class TakeTurns(TrainerCallback):
    """Times every step of TRL's trainer, and makes one update of ours after it."""

    def __init__(self):
        self.ours: Ours | None = None
        self.seconds: list[float] = []
        self.lengths: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(clock() - self.began)
        self.ours.update(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "completions/mean_length" in logs:
            self.lengths.append(logs["completions/mean_length"])


def trl_trainer(size: str, model, processor, pairs: list, turns: TakeTurns, folder: Path, steps):
    """TRL's trainer of the same model, with the same settings."""
    from trl import GRPOConfig, GRPOTrainer

    B, G, C = CASES[size]
    save_policy(model, processor, folder / "model")
    theirs = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=model.dtype)
    processor.tokenizer.padding_side = "left"
    settings = GRPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=B * G,
        num_generations=G,
        max_completion_length=C,
        max_steps=steps,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.04,
        learning_rate=1e-6,
        loss_type="grpo",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=model.dtype == torch.bfloat16,
        dataloader_pin_memory=False,
    )
    return GRPOTrainer(
        model=theirs,
        processing_class=ImageProcessorOnly(
            processor.image_processor, processor.tokenizer, chat_template=TEMPLATE
        ),
        reward_funcs=[vowels],
        train_dataset=dataset(pairs, B * G * steps),
        callbacks=[turns],
        args=settings,
    )


def main() -> None:
    options = arguments(parser_of(__doc__))
    if not importlib.util.find_spec("trl"):
        raise SystemExit("TRL is not installed: pip install trl")
    warnings.filterwarnings("ignore")
    B, G, C = CASES[options.size]
    model, processor = load_policy("toy") if options.size == "toy" else build(options.size)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    pairs, turns = questions(options.size, B), TakeTurns()
    with tempfile.TemporaryDirectory() as folder:
        steps = options.repetitions + 1  # the first is a warm-up
        trainer = trl_trainer(options.size, model, processor, pairs, turns, Path(folder), steps)
        turns.ours = ours = Ours(options.size, model, processor, pairs)
        trainer.train()
    theirs, mine = turns.seconds[1:], ours.seconds[1:]
    parts = [f"{name} {statistics.median(s[1:]):.3g}" for name, s in ours.parts.items()]
    rows = [
        {
            "contestant": name,
            "mean length": f"{statistics.mean(lengths):.0f}",
            "seconds per update": spread(seconds),
            "times faster": faster,
            "of which": of_which,
        }
        for name, lengths, seconds, faster, of_which in (
            ("TRL", turns.lengths, theirs, "1", ""),
            ("ours", ours.lengths, mine, spread(ratio(theirs, mine)), ", ".join(parts)),
        )
    ]
    raw = [{"seconds": {"TRL": turns.seconds, "ours": ours.seconds}}]
    report(f"update, {options.size}, {B} x {G} of {C}", rows, raw, options.write)


def dataset(pairs: list, count: int):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    chosen = [pairs[i % len(pairs)] for i in range(count)]
    content = [[{"role": "user", "content": text}] for text, _ in chosen]
    made = Dataset.from_dict({"prompt": content, "image": [image for _, image in chosen]})
    return made.cast_column("image", ImageFeature())


if __name__ == "__main__":
    main()
