"""Sample completions of each prompt from the policy, without a filter.

Tokens are drawn from softmax(logits / temperature) over the whole vocabulary, except the vision
tokens: a sampled one breaks the next forward pass. A draw is a function of (seed, rollout,
prompt, completion, position), so neither the batching nor the number of processes changes it.
`core/decoder.py` defines the letters.
"""

import numpy as np
import torch
from torch import Tensor, nn

from core.decoder import CapturedStep, Decoder, prefill
from core.options import UserError

VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def uniforms(seed: int, step: int, prompts: list[int], G: int, C: int) -> Tensor:
    """One number in [0, 1) for every token that may be drawn: (B*G, C), float64."""
    keys = [[seed, step, prompt, g] for prompt in prompts for g in range(G)]
    return torch.from_numpy(np.stack([np.random.default_rng(key).random(C) for key in keys]))


def draw(logits: Tensor, temperature: float, uniform: Tensor, excluded: Tensor):
    """Draw a token per row: logits (n, V), uniform (n,) -> tokens and log-probabilities, (n,).

    A row's token is the first whose cumulative probability exceeds its uniform number. The
    log-probabilities are those of the full softmax, `excluded` tokens included, as in training.
    Temperature 0 takes the likeliest token and returns its log-probability at temperature 1.
    """
    logits = logits.float() / (temperature or 1.0)
    logps = torch.log_softmax(logits, -1)
    logits.index_fill_(-1, excluded, -torch.inf)
    if temperature:  # float64, because float32 sums would swallow the unlikely tokens
        cdf = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # NaN would lead beyond the vocabulary
    else:
        tokens = logits.argmax(-1)
    return tokens, logps.gather(-1, tokens[:, None]).squeeze(-1)


class SamplingState:
    """The completions during sampling. A step updates tensors in place, so it can be captured."""

    def __init__(self, model: nn.Module, decoder: Decoder, uniform: Tensor, temperature: float):
        device, ends = uniform.device, model.generation_config.eos_token_id  # one, several or None
        self.end_ids = torch.tensor([] if ends is None else ends, device=device).view(-1)
        excluded = [getattr(model.config, name) for name in VISION_TOKENS]
        self.excluded = torch.tensor(excluded, device=device)
        self.decoder, self.uniform, self.temperature = decoder, uniform, temperature
        self.ids = torch.zeros_like(uniform, dtype=torch.long)
        self.logps = torch.zeros_like(uniform, dtype=torch.float32)
        self.going = torch.ones_like(uniform[:, 0], dtype=torch.bool)
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the next token

    def draw(self, rows: Tensor, logits: Tensor) -> None:
        """Draw the next token of `rows` (n,) from `logits` (n, V)."""
        at = rows, self.position
        tokens, self.logps[at] = draw(logits, self.temperature, self.uniform[at], self.excluded)
        self.ids[at] = tokens
        self.going[rows] &= (tokens[:, None] != self.end_ids).all(-1)
        self.position += 1

    def step(self, n: int, S: int) -> None:
        """Read the last token of the first n slots, attending to S own tokens; draw the next."""
        rows, last = self.decoder.rows[:n], self.position - 1
        self.draw(rows, self.decoder.step(self.ids[rows, last], last, S))


def sample(
    model: nn.Module,
    prompt_inputs: dict[str, Tensor],
    num_generations: int,
    max_completion_length: int,
    temperature: float = 1.0,
    *,
    seed: int = 0,
    step: int = 0,
    prompts: list[int] | None = None,
    decoding: str = "eager",
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `num_generations` completions of each of B prompts.

    `step` is the number of the rollout and `prompts` are the indices of its prompts, by default
    0 … B - 1. "captured" decoding replays CUDA graphs and raises UserError without a CUDA GPU.

    Returns `completion_ids`, `completion_mask` and `logps` (see `draw`), all (B*G, C), where C is
    the length of the longest completion. The mask includes the end token and nothing after it.
    """
    captured = decoding == "captured" and torch.cuda.is_available()
    if decoding != "eager" and not captured:
        raise UserError(f"decoding must be eager, or captured on a CUDA GPU, not {decoding!r}")
    G, C, device = num_generations, max_completion_length, model.device
    prompt_inputs = {name: value.to(device) for name, value in prompt_inputs.items()}
    # the model's own precision, and no bookkeeping for gradients
    with torch.autocast(device.type, enabled=False), torch.inference_mode():
        hidden, cache, start = prefill(model, prompt_inputs)
        uniform = uniforms(seed, step, prompts or range(len(start)), G, C).to(device)
        decoder = Decoder(model, cache, prompt_inputs["attention_mask"], start, G, C)
        state = SamplingState(model, decoder, uniform, temperature)
        run_step = CapturedStep(state.step, *uniform.shape) if captured else state.step
        check_every = 8 if captured else 1  # a check waits for the device
        state.draw(decoder.rows, model.lm_head(hidden).repeat_interleave(G, 0))
        for S in range(1, C):
            if S % check_every == 0 and decoder.keep(state.going, S) == 0:
                break
            run_step(decoder.n, S)

    is_end = (state.ids[..., None] == state.end_ids).any(-1).long()
    mask = (is_end.cumsum(-1) == is_end).long()  # no end token before
    C = int(mask.sum(-1).max())
    return (state.ids * mask)[:, :C], mask[:, :C], (state.logps * mask)[:, :C]
