"""Sampling G completions of each prompt from the policy itself, unfiltered.

logits / temperature, softmax over the whole vocabulary with the vision tokens masked (a sampled
image token would break the next forward pass), no top-k, no top-p. Every draw is a function of
(seed, step, prompt, completion, position) alone, so neither the batching nor the number of
processes changes what is sampled.

What makes it faster than `generate`:

1. Image and prompt go through the library's model once per group. Their keys and values are kept
   once, and all completions of the group attend to that one copy: `Decoder.attend`.
2. A step is the language model's own weights in a few dozen plain operations on memory allocated
   beforehand, without the library's masks, cache objects and module calls: `Decoder.layer`.
3. Rows that have ended leave the batch: `Decoder.drop_ended`.
4. On a GPU a step can be captured as a CUDA graph, so that launching it costs next to nothing.

Letters: B prompts, G completions of each, N = B * G, n rows decoded now, P prompt length, S own
tokens attended to, C their number at most, K key/value heads, R query heads per key/value head,
D width of a head, H width of the model, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
BLOCK = 128  # tokens of the vocabulary that are summed before one of them is drawn
DECODING = {
    "eager": "shapes follow the rows and tokens that there are; the default on a CPU",
    "static": "few different shapes, what is too much is masked; the default on a GPU",
    "captured": "static, and each shape replayed from a CUDA graph; not yet run on a GPU",
    "compiled": "captured, with the layers through torch.compile; on a CPU static",
}
LENGTHS, CHECK = 256, 8  # static: S in multiples of this; steps between looks at who has ended


def uniforms(seed: int, step: int, prompts: list[int], G: int, C: int) -> Tensor:
    """One number in [0, 1) for every token that may be drawn: (B*G, C), float64."""
    keys = [[seed, step, prompt, g] for prompt in prompts for g in range(G)]
    return torch.from_numpy(np.stack([np.random.default_rng(key).random(C) for key in keys]))


def invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Indices drawn in proportion to `weights` (N, M), and where inside its interval each fell.

    Both (N,). In float64: the first index whose cumulative weight exceeds uniform * total, which is
    never one of weight 0.
    """
    cdf = weights.double().cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]
    index = torch.searchsorted(cdf, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, index)
    inside = 1 - (cdf.gather(-1, index) - target) / weight
    return index.squeeze(-1), inside.clamp(0, 1 - 2**-53).squeeze(-1)


def choose(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """One token a row by inverting the distribution function: (N, V), (N,) -> (N,).

    Of a long vocabulary first a block, then a token of it, so that what needs float64 is short.
    Temperature 0 takes the most likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, -1)
    if probs.shape[-1] <= BLOCK**2:
        cdf = probs.cumsum(-1, dtype=torch.float64)
        index = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
        return index.squeeze(-1).clamp(max=probs.shape[-1] - 1)  # NaN would lead beyond the end
    blocks = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block, inside = invert(blocks.sum(-1), uniform)
    tokens = blocks.gather(1, block[:, None, None].expand(-1, 1, BLOCK)).squeeze(1)
    # NaN would lead beyond the vocabulary, where the padding of the last block is
    return (block * BLOCK + invert(tokens, inside)[0]).clamp(max=logits.shape[-1] - 1)


def prefill(model: nn.Module, prompt_inputs: dict) -> tuple[Tensor, DynamicCache, Tensor]:
    """The prompts and their images through the unmodified model.

    Returns the last hidden state (B, H), the cache, and the position of the first new token (B,).
    """
    positions, _ = model.model.get_rope_index(
        input_ids=prompt_inputs["input_ids"],
        mm_token_type_ids=prompt_inputs["mm_token_type_ids"],
        image_grid_thw=prompt_inputs.get("image_grid_thw"),
        attention_mask=prompt_inputs["attention_mask"],
    )  # (3, B, P)
    cache = DynamicCache(config=model.config.get_text_config())
    hidden = model.model(
        **{k: v for k, v in prompt_inputs.items() if k != "mm_token_type_ids"},
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]  # the padding is on the left
    return hidden, cache, positions.amax((0, 2)) + 1


class Layer(NamedTuple):
    """What a decoder layer computes with: its weights and its cache."""

    norm: Tensor
    qkv: Tensor  # the three projections as one matrix
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # (K*R + K, D), of Qwen3-VL
    out: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    prompt_keys: Tensor  # (B*K, P, D)
    prompt_values: Tensor
    own_keys: Tensor  # (N, K, C, D)
    own_values: Tensor


class Decoder:
    """One more token for every row at a time.

    Rows live in slots 0 … n-1 of memory allocated once; `row` says which completion a slot decodes.
    A step reads its position from the tensor `t` and its shapes depend on n and S alone, so that it
    is the same operations whether it is run, compiled or captured.
    """

    def __init__(self, model, cache, prompt_inputs, start, uniform, temperature, decoding):
        config, language = model.config.get_text_config(), model.model.language_model
        device, self.D = start.device, language.layers[0].self_attn.head_dim
        self.K, self.R = (
            config.num_key_value_heads,
            language.layers[0].self_attn.num_key_value_groups,
        )
        self.B, (N, C) = len(start), uniform.shape
        self.G = N // self.B
        self.eps, self.temperature, self.uniform = config.rms_norm_eps, temperature, uniform
        autocast = torch.is_autocast_enabled(device.type)
        self.dtype = model.lm_head.weight.dtype
        if autocast:
            self.dtype = torch.get_autocast_dtype(device.type)

        self.static = decoding != "eager"
        self.run_layer = self.layer
        if decoding == "compiled":
            self.run_layer = torch.compile(self.layer, dynamic=True)
        self.pool, self.graphs = None, {}
        if decoding in ("captured", "compiled") and device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()

        self.embed, self.norm = language.embed_tokens.weight, language.norm.weight
        self.head = model.lm_head.weight.to(self.dtype)
        self.head_bias = torch.zeros(len(self.head), dtype=self.dtype, device=device)
        self.head_bias[[getattr(model.config, name) for name in VISION_TOKENS]] = -torch.inf
        # zeros where masked positions are read too: 0 * NaN is not 0
        allocate = torch.zeros if self.static else torch.empty
        shape = (len(language.layers), 2, N, self.K, C, self.D)
        own = allocate(shape, dtype=self.dtype, device=device)
        parts = zip(language.layers, cache.layers, own, strict=True)
        self.own, self.layers = own, [self.prepare(*part) for part in parts]
        mask = torch.where(prompt_inputs["attention_mask"].bool(), 0.0, -torch.inf).to(self.dtype)
        self.prompt_mask = mask.repeat_interleave(self.K, 0)[:, None]  # (B*K, 1, P)

        self.steps = torch.arange(C, device=device)
        positions = start[:, None] + self.steps  # (B, C), the same on all three axes: it is text
        cos, sin = language.rotary_emb(self.embed[:1], positions.expand(3, -1, -1))
        if cos.dim() == 4:  # some versions of transformers pick the axis later, in the attention
            cos, sin = cos[0], sin[0]
        half = self.D // 2
        self.cos = cos.transpose(0, 1)[:, :, None]  # (C, B, 1, D)
        self.sin = torch.cat([-sin[..., :half], sin[..., half:]], -1).transpose(0, 1)[:, :, None]

        ends = model.generation_config.eos_token_id  # one, several or None
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)
        self.ids = torch.zeros(N, C, dtype=torch.long, device=device)
        self.ended = torch.zeros(N, dtype=torch.bool, device=device)
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.n, self.row = N, torch.arange(N, device=device)
        self.to_group = torch.empty(N * self.K, dtype=torch.long, device=device)
        self.to_slot = torch.empty_like(self.to_group)
        self.map_slots()

    def prepare(self, layer: nn.Module, cache, own: Tensor) -> Layer:
        a, mlp, qkv_bias, qk_norm = layer.self_attn, layer.mlp, None, None
        projections = (a.q_proj, a.k_proj, a.v_proj)
        if a.q_proj.bias is not None:
            qkv_bias = torch.cat([p.bias for p in projections]).to(self.dtype)
        if hasattr(a, "q_norm"):
            norms = [a.q_norm.weight] * (self.K * self.R) + [a.k_norm.weight] * self.K
            qk_norm = torch.stack(norms)
        return Layer(
            layer.input_layernorm.weight,
            torch.cat([p.weight for p in projections]).to(self.dtype),
            qkv_bias,
            qk_norm,
            a.o_proj.weight.to(self.dtype),
            layer.post_attention_layernorm.weight,
            mlp.gate_proj.weight.to(self.dtype),
            mlp.up_proj.weight.to(self.dtype),
            mlp.down_proj.weight.to(self.dtype),
            cache.keys.to(self.dtype).flatten(0, 1),
            cache.values.to(self.dtype).flatten(0, 1),
            *own,
        )

    # --- one step ---

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.eps).to(self.dtype)

    def attend(self, q: Tensor, w: Layer, own_mask: Tensor, to_slot: Tensor) -> Tensor:
        """softmax(q [prompt_keys, own_keys]) [prompt_values, own_values]: (n*K, R, D) in and out.

        A group's queries are one matrix against its prompt, (G*R, D) by (D, P); a slot's another
        against its own tokens. `to_group` and `to_slot` carry (R, …) from one order to the other.
        """
        n, S, P = len(to_slot) // self.K, own_mask.shape[-1], w.prompt_keys.shape[1]
        own_keys = w.own_keys[:n, :, :S].flatten(0, 1)  # (n*K, S, D), a view
        own_values = w.own_values[:n, :, :S].flatten(0, 1)
        scale = self.D**-0.5

        grouped = q.index_select(0, self.to_group).view(self.B * self.K, -1, self.D)
        scores = torch.baddbmm(self.prompt_mask, grouped, w.prompt_keys.mT, alpha=scale)
        own_scores = torch.baddbmm(own_mask, q, own_keys.mT, alpha=scale)
        scores = torch.cat([scores.view(-1, self.R, P).index_select(0, to_slot), own_scores], -1)
        probs = torch.softmax(scores, -1, dtype=torch.float32).to(self.dtype)
        prompt_probs, own_probs = probs.split((P, S), -1)
        grouped = prompt_probs.index_select(0, self.to_group).view(self.B * self.K, -1, P)
        from_prompt = torch.bmm(grouped, w.prompt_values).view(-1, self.R, self.D)
        from_prompt = from_prompt.index_select(0, to_slot)
        return torch.baddbmm(from_prompt, own_probs, own_values)

    def layer(self, x: Tensor, w: Layer, cos, sin, own_mask: Tensor, to_slot: Tensor) -> Tensor:
        """One decoder layer for one token a slot, (n, H) -> (n, H); keeps its keys and values."""
        n, heads = len(x), self.K * self.R
        qkv = F.linear(self.rms_norm(x, w.norm), w.qkv, w.qkv_bias).view(n, -1, self.D)
        qk, v = qkv[:, : heads + self.K], qkv[:, heads + self.K :]
        if w.qk_norm is not None:
            qk = F.rms_norm(qk, (self.D,), eps=self.eps) * w.qk_norm
        qk = torch.addcmul(qk * cos, qk.roll(self.D // 2, -1), sin).to(self.dtype)
        w.own_keys[:n].index_copy_(2, self.t, qk[:, heads:, None])
        w.own_values[:n].index_copy_(2, self.t, v[:, :, None])
        q = qk[:, :heads].reshape(n * self.K, self.R, self.D)
        x = x + F.linear(self.attend(q, w, own_mask, to_slot).view(n, -1), w.out)
        h = self.rms_norm(x, w.mlp_norm)
        return x + F.linear(F.silu(F.linear(h, w.gate)) * F.linear(h, w.up), w.down)

    def step(self, n: int, S: int) -> None:
        """Read token t of the first n slots, attending to S > t own tokens, and draw the next."""
        row, group = self.row[:n], self.row[:n] // self.G
        x = self.embed[self.ids[row, self.t]]  # (n, H)
        cos, sin = self.cos[self.t, group], self.sin[self.t, group]  # (n, 1, D)
        own_mask = torch.where(self.steps[:S] <= self.t, 0.0, -torch.inf).to(self.dtype)
        for w in self.layers:
            x = self.run_layer(x, w, cos, sin, own_mask.expand(1, 1, S), self.to_slot[: n * self.K])
        self.t += 1
        self.draw(self.logits(self.rms_norm(x, self.norm)), row)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.dtype), self.head, self.head_bias)

    def draw(self, logits: Tensor, row: Tensor) -> None:
        """Token t of the completions `row`."""
        token = choose(logits, self.temperature, self.uniform[row, self.t])
        self.ids[row, self.t] = token
        self.ended[row] |= torch.isin(token, self.ends)

    def captured_step(self, n: int, S: int) -> None:
        """`step` replayed from a CUDA graph; the first step of a shape is run as it is."""
        if (n, S) in self.graphs:
            return self.graphs[n, S].replay()
        self.step(n, S)
        self.graphs[n, S] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[n, S], pool=self.pool):
            self.step(n, S)

    # --- all steps ---

    def drop_ended(self, t: int) -> bool:
        """Move rows still going from the last slots to where others ended; False: none is left."""
        going = ~self.ended[self.row[: self.n]]
        count = int(going.sum())
        n = count
        if self.static:
            n = min(self.n, 1 << (count - 1).bit_length())  # a power of 2; some have ended
        if count == 0 or n == self.n:
            return count > 0
        holes = (~going[:count]).nonzero().squeeze(-1)
        movers = going[count:].nonzero().squeeze(-1) + count
        self.own[:, :, holes, :, : t + 1] = self.own[:, :, movers, :, : t + 1]
        self.row[holes], self.row[movers] = self.row[movers], self.row[holes]
        self.n = n
        self.map_slots()
        return True

    def map_slots(self) -> None:
        """Where a slot's queries are among its group's, and a group's among the slots: `attend`."""
        group, member = self.row[:, None] // self.G, self.row[:, None] % self.G
        heads = torch.arange(self.K, device=self.row.device)
        self.to_slot[:] = ((group * self.K + heads) * self.G + member).flatten()
        self.to_group.zero_()  # a completion no longer decoded borrows slot 0
        decoded = self.to_slot[: self.n * self.K]
        self.to_group[decoded] = torch.arange(len(decoded), device=decoded.device)

    def decode(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What follows the prompts, whose last logits (N, V) are given: ids and mask."""
        self.draw(logits, self.row)
        C, run = len(self.steps), self.captured_step if self.pool else self.step
        for t in range(C - 1):
            if t % (CHECK if self.static else 1) == 0 and not self.drop_ended(t):
                break
            run(self.n, min(C, -(-(t + 1) // LENGTHS) * LENGTHS) if self.static else t + 1)
        is_end = torch.isin(self.ids, self.ends).long()
        mask = (is_end.cumsum(-1) == is_end).long()  # no end before
        mask = mask[:, : int(mask.sum(-1).max())]
        return self.ids[:, : mask.shape[1]] * mask, mask


@torch.no_grad()
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
    decoding: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample `num_generations` completions of each of B prompts.

    Args: `prompt_inputs` from `Processor.encode`; `temperature` 0 is greedy; `prompts` are the
    numbers of these prompts among all of the step (default 0 … B-1), which together with `seed` and
    `step` fix every draw; `decoding`, one of DECODING, changes nothing but the speed.
    Returns `completion_ids` (B*G, C) and `completion_mask` (B*G, C), prompt-major. C is the length
    of the longest; the mask includes the end token and nothing after it.
    """
    device = prompt_inputs["input_ids"].device
    decoding = decoding or ("static" if device.type == "cuda" else "eager")
    if decoding not in DECODING:
        raise ValueError(f"decoding must be one of {', '.join(DECODING)}, not {decoding!r}")
    numbers = list(range(len(prompt_inputs["input_ids"]))) if prompts is None else prompts
    uniform = uniforms(seed, step, numbers, num_generations, max_completion_length).to(device)
    training = [module for module in model.modules() if module.training]
    model.eval()  # gradient checkpointing drops the cache of a model in training mode
    try:
        hidden, cache, start = prefill(model, prompt_inputs)
        decoder = Decoder(model, cache, prompt_inputs, start, uniform, temperature, decoding)
        with torch.autocast(device.type, enabled=False):  # the decoder casts by itself
            return decoder.decode(decoder.logits(hidden).repeat_interleave(num_generations, 0))
    finally:
        for module in training:
            module.training = True
