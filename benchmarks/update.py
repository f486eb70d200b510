"""One whole GRPO update against TRL's GRPOTrainer: rollout, reference, log-probabilities, step.

    pip install trl
    python benchmarks/update.py                # toy, 8 x 8 completions, any CPU
    python benchmarks/update.py --size 100m    # 1 x 8 of 64 tokens, prompt of 512 visual tokens

The same weights, prompts, sampling and hyper-parameters (beta 0.04, AdamW); the updates take turns
in one process: TRL's trainer runs, and at the end of each of its steps one of ours does. The toy
case uses the embedded base model, so that completions have the lengths of a run.
"""

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

import common
import torch
from common import arguments, build, ratio, report, spread, synchronize, to
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    ProcessorMixin,
    Qwen2VLProcessor,
    TrainerCallback,
)

import toy
from grpo import compute_advantages, grpo_loss
from model import TOY_CHECKPOINT, group_logps, load_policy, save_policy
from rollout import sample

CASES = {"toy": (8, 8, 96), "100m": (1, 8, 64), "2b": (8, 8, 300)}  # prompts, G, C
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


class ImageProcessorOnly(Qwen2VLProcessor):
    """transformers' processor without its video part, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def questions(size: str, count: int) -> list[tuple[str, Image.Image]]:
    rows = toy.ToyRows()
    if size == "toy":
        return [(rows[i]["question"] + "\n<think>", rows[i]["images"][0]) for i in range(count)]
    image = Image.effect_noise((896, 448), 50).convert("RGB")
    return [(" ".join(rows[i * 30 + j]["question"] for j in range(7)), image) for i in range(count)]


def lengths_reward(completions, **_) -> list[float]:
    """Any rule will do: the share of vowels."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options = arguments(parser)
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise SystemExit(f"skipped: trl cannot be imported ({error}); pip install trl") from None
    warnings.filterwarnings("ignore")
    B, G, C = CASES[options.size]
    trained = options.size == "toy" and TOY_CHECKPOINT.exists()
    model, processor = load_policy("toy") if trained else build(options.size)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    pairs = questions(options.size, B)

    reference = load_policy("toy")[0] if trained else build(options.size)[0]
    reference.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    inputs = to(
        processor.encode(
            [f"<|vision_start|><|image_pad|><|vision_end|>{text}" for text, _ in pairs],
            [[image] for _, image in pairs],
        ),
        model.device,
    )
    seconds: dict[str, list[float]] = {"TRL": [], "ours": []}
    parts: dict[str, list[float]] = {"sampling": [], "reference": [], "training": []}
    lengths: dict[str, list[float]] = {"TRL": [], "ours": []}

    def clock() -> float:
        synchronize()
        return common.CLOCK()

    def update(number: int) -> None:
        times = [clock()]
        ids, mask = sample(model, inputs, G, C, step=number)
        rewards = torch.tensor(lengths_reward(processor.decode(ids, mask))).view(B, G)
        advantages = compute_advantages(rewards).to(model.device)
        times.append(clock())
        with torch.no_grad():
            ref = group_logps(reference, inputs, ids, mask)
        times.append(clock())
        model.train()
        logps = group_logps(model, inputs, ids, mask).flatten(0, 1)
        loss, _ = grpo_loss(
            logps,
            logps.detach(),
            ref.flatten(0, 1),
            advantages.flatten(),
            mask,
            beta=0.04,
            epsilon=0.2,
            loss_type="grpo",
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock())
        for name, start, end in zip(parts, times, times[1:], strict=False):
            parts[name].append(end - start)
        seconds["ours"].append(times[-1] - times[0])
        lengths["ours"].append(mask.sum(-1).float().mean().item())

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.began = clock()

        def on_step_end(self, args, state, control, **kwargs):
            seconds["TRL"].append(clock() - self.began)
            update(state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "completions/mean_length" in logs:
                lengths["TRL"].append(logs["completions/mean_length"])

    with tempfile.TemporaryDirectory() as folder:
        save_policy(model, processor, Path(folder) / "model")
        theirs = AutoModelForImageTextToText.from_pretrained(
            Path(folder) / "model", dtype=model.dtype
        )
        processor.tokenizer.padding_side = "left"
        trainer = GRPOTrainer(
            model=theirs,
            processing_class=ImageProcessorOnly(
                processor.image_processor, processor.tokenizer, chat_template=TEMPLATE
            ),
            reward_funcs=[lengths_reward],
            train_dataset=dataset(pairs, B * G * (options.repetitions + 1)),
            callbacks=[TakeTurns()],
            args=GRPOConfig(
                output_dir=str(Path(folder) / "run"),
                per_device_train_batch_size=B * G,
                num_generations=G,
                max_completion_length=C,
                max_steps=options.repetitions + 1,
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
            ),
        )
        trainer.train()
    first = {name: values[1:] for name, values in seconds.items()}  # the first warms up
    table = [
        {
            "contestant": name,
            "mean length": f"{statistics.mean(lengths[name]):.0f}" if lengths[name] else "",
            "seconds per update": spread(first[name]),
            "times faster": spread(ratio(first["TRL"], first[name])) if name == "ours" else "1",
            "of which": ", ".join(f"{k} {statistics.median(v[1:]):.3g}" for k, v in parts.items())
            if name == "ours"
            else "",
        }
        for name in ("TRL", "ours")
    ]
    report(f"update, {options.size}, {B} x {G} of {C}", table, [{"seconds": seconds}])


def dataset(pairs: list, count: int):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    chosen = [pairs[i % len(pairs)] for i in range(count)]
    content = [[{"role": "user", "content": text}] for text, _ in chosen]
    made = Dataset.from_dict({"prompt": content, "image": [image for _, image in chosen]})
    return made.cast_column("image", ImageFeature())


if __name__ == "__main__":
    main()
