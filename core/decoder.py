"""One decode step of a Qwen-VL language model, in plain tensor operations.

It computes what the library's model computes, faster:

1. The keys and values of a prompt are stored once, and all completions of its group attend to them.
2. A layer is about 30 tensor operations on memory that is allocated once. There are no masks to
   build, no cache objects and no module calls.
3. Rows that have ended are dropped from the batch.

Letters: B prompts, G completions per prompt, N = B * G, n rows that are still decoded, P prompt
length, C maximal completion length, S <= C own tokens that a row attends to, K key/value heads,
R query heads per key/value head, D head width, H model width, V vocabulary.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from core.packing import get_positions


def prefill(model: nn.Module, prompt_inputs: dict) -> tuple[Tensor, DynamicCache, Tensor]:
    """Run the prompts and their images through the unmodified model.

    Returns the last hidden state (B, H), the cache, and the position of the first new token (B,).
    """
    positions, start = get_positions(model, prompt_inputs)
    cache = DynamicCache(config=model.config.get_text_config())
    training = [module for module in model.modules() if module.training]
    model.eval()  # with gradient checkpointing, a model in training mode drops its cache
    try:
        output = model.model(
            **prompt_inputs, position_ids=positions, past_key_values=cache, use_cache=True
        )
    finally:
        for module in training:
            module.training = True
    return output.last_hidden_state[:, -1], cache, start


def prepare_layer(layer: nn.Module, cache, own_keys: Tensor, own_values: Tensor):
    """The weights, keys and values of one decoder layer."""
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    qk_norm = None
    if hasattr(attention, "q_norm"):  # Qwen3-VL, which has no biases
        K, R = own_keys.shape[1], attention.num_key_value_groups
        norms = attention.q_norm.weight.expand(K * R, -1), attention.k_norm.weight.expand(K, -1)
        qk_norm = torch.cat(norms)
    return SimpleNamespace(
        attention_norm=layer.input_layernorm.weight,  # (H,)
        qkv=torch.cat([projection.weight for projection in projections]),
        qkv_bias=torch.cat([p.bias for p in projections]) if qk_norm is None else None,
        qk_norm=qk_norm,  # (K*R + K, D)
        out=attention.o_proj.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=layer.mlp.gate_proj.weight,
        up=layer.mlp.up_proj.weight,
        down=layer.mlp.down_proj.weight,
        # Keys stay in float32: bfloat16 scores would be wrong by up to 1/256 of their size.
        prompt_keys=cache.keys.float().flatten(0, 1),  # (B*K, P, D)
        prompt_values=cache.values.flatten(0, 1),
        own_keys=own_keys,  # (N, K, C, D)
        own_values=own_values,
    )


class Decoder:
    """The language model with the keys and values of all prompts and completions.

    The rows that are still decoded occupy the first n slots of the memory for own keys and values:
    slot s decodes row `rows[s]` = b * G + g. A step reads no value on the host, and its shapes
    depend on n and S alone, so it can be captured.
    """

    def __init__(self, model, cache: DynamicCache, prompt_mask, start, G: int, C: int):
        language, N, device = model.model.language_model, len(start) * G, start.device
        attention, self.eps = language.layers[0].self_attn, language.config.rms_norm_eps
        self.K, self.R = language.config.num_key_value_heads, attention.num_key_value_groups
        self.B, self.G, self.D = len(start), G, attention.head_dim
        self.embedding, self.norm = language.embed_tokens.weight, language.norm.weight
        self.lm_head = model.lm_head

        # zeros, because masked positions are read too and 0 * NaN is NaN
        shape = (len(language.layers), N, self.K, C, self.D)
        self.own_keys = torch.zeros(shape, device=device)
        self.own_values = torch.zeros(shape, dtype=self.embedding.dtype, device=device)
        parts = zip(language.layers, cache.layers, self.own_keys, self.own_values, strict=True)
        self.layers = [prepare_layer(*part) for part in parts]
        prompt_mask = torch.where(prompt_mask.bool(), 0.0, -torch.inf)
        self.prompt_mask = prompt_mask.repeat_interleave(self.K, 0)[:, None]  # (B*K, 1, P)

        self.own_tokens = torch.arange(C, device=device)
        # a text token has the same position on all three axes
        positions = (start[:, None] + self.own_tokens).expand(3, -1, -1)  # (3, B, C)
        tables = language.rotary_emb(self.embedding[:1], positions)
        # some versions of transformers return one table per axis
        cos, sin = (table.reshape(-1, self.B, C, self.D)[0].transpose(0, 1) for table in tables)
        self.cos = cos[:, :, None]  # (C, B, 1, D)
        self.sin = torch.cat([-sin[..., : self.D // 2], sin[..., self.D // 2 :]], -1)[:, :, None]

        self.n, self.rows = N, torch.arange(N, device=device)
        # where the queries of each row and head are in the order (B, K, G)
        places = torch.arange(N * self.K, device=device).view(self.B, self.K, G)
        self.places = places.transpose(1, 2).reshape(N, self.K)

    def rms_norm(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)  # one kernel, in float32

    def step(self, tokens: Tensor, position: Tensor, S: int) -> Tensor:
        """Read `tokens` (n,) at `position` (1,) < S of the first n slots; return logits (n, V)."""
        rows = self.rows[: len(tokens)]
        to_slot, group = self.places[rows].flatten(), rows // self.G
        # dropped rows repeat the queries of slot 0, and nothing reads the result
        to_group = torch.zeros_like(self.places).flatten()
        to_group[to_slot] = torch.arange(len(to_slot), device=rows.device)
        rotation = self.cos[position, group], self.sin[position, group]  # (n, 1, D)
        own_mask = torch.where(self.own_tokens[:S] <= position, 0.0, -torch.inf).expand(1, 1, S)
        x = self.embedding[tokens]  # (n, H)
        for w in self.layers:
            q = self.project(self.rms_norm(x, w.attention_norm), w, rotation, position)
            x = x + F.linear(self.attend(q, w, own_mask, to_slot, to_group), w.out)
            h = self.rms_norm(x, w.mlp_norm)
            x = x + F.linear(F.silu(F.linear(h, w.gate)) * F.linear(h, w.up), w.down)
        return self.lm_head(self.rms_norm(x, self.norm))

    def project(self, h: Tensor, w: SimpleNamespace, rotation, position: Tensor) -> Tensor:
        """Store a token's key and value in each slot; return its queries: (n, H) -> (n*K, R, D)."""
        n, heads, (cos, sin) = len(h), self.K * self.R, rotation
        qkv = F.linear(h, w.qkv, w.qkv_bias).view(n, -1, self.D)
        qk, v = qkv[:, : heads + self.K], qkv[:, heads + self.K :]
        if w.qk_norm is not None:
            qk = self.rms_norm(qk) * w.qk_norm
        qk = torch.addcmul(qk * cos, qk.roll(self.D // 2, -1), sin).float()
        w.own_keys[:n].index_copy_(2, position, qk[:, heads:, None])
        w.own_values[:n].index_copy_(2, position, v[:, :, None])
        return qk[:, :heads].reshape(n * self.K, self.R, self.D)

    def attend(self, q: Tensor, w: SimpleNamespace, own_mask, to_slot, to_group) -> Tensor:
        """softmax(q [prompt_keys, own_keys]) [prompt_values, own_values]: (n*K, R, D) -> (n, H).

        The queries of a group are one matrix against its prompt, (G*R, D) by (D, P), so that the
        prompt's keys are read once for all completions.
        """
        n, S, P, scale = len(q) // self.K, own_mask.shape[-1], w.prompt_keys.shape[1], self.D**-0.5

        def by_group(x: Tensor) -> Tensor:  # (n*K, R, …) -> (B*K, G*R, …)
            return x.index_select(0, to_group).view(self.B * self.K, self.G * self.R, -1)

        def by_slot(x: Tensor) -> Tensor:  # (B*K, G*R, …) -> (n*K, R, …)
            return x.view(-1, self.R, x.shape[-1]).index_select(0, to_slot)

        own_keys = w.own_keys[:n, :, :S].flatten(0, 1)  # (n*K, S, D), a view
        own_values = w.own_values[:n, :, :S].flatten(0, 1)
        scores = torch.baddbmm(self.prompt_mask, by_group(q), w.prompt_keys.mT, alpha=scale)
        own_scores = torch.baddbmm(own_mask, q, own_keys.mT, alpha=scale)
        probs = torch.softmax(torch.cat([by_slot(scores), own_scores], -1), -1).to(own_values.dtype)
        from_prompt = by_slot(torch.bmm(by_group(probs)[..., :P], w.prompt_values))
        return torch.baddbmm(from_prompt, probs[..., P:], own_values).view(n, -1)

    def keep(self, going: Tensor, S: int) -> int:
        """Drop the rows that are not `going` (N,), with S own tokens each; return how many stay.

        The last slots move to where others have ended.
        """
        going = going[self.rows[: self.n]]
        n = int(going.sum())
        if n < self.n:
            ended = (~going[:n]).nonzero().squeeze(-1)
            moved = going[n:].nonzero().squeeze(-1) + n
            for own in (self.own_keys, self.own_values):
                own[:, ended, :, :S] = own[:, moved, :, :S]
            self.rows[ended], self.rows[moved] = self.rows[moved], self.rows[ended]
            self.n = n
        return n


class CapturedStep:
    """`step(n, S)`, recorded as a CUDA graph for every shape and replayed from then on.

    Its speed on a GPU has not been measured yet. Rounding up keeps the graphs few: n to a power of
    2, where the additional slots hold rows that have ended, and S to a multiple of 256, where the
    additional tokens are masked.
    """

    def __init__(self, step, max_n: int, max_S: int):
        self.step, self.max_n, self.max_S = step, max_n, max_S
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, n: int, S: int) -> None:
        shape = min(self.max_n, 1 << (n - 1).bit_length()), min(self.max_S, -(-S // 256) * 256)
        if shape in self.graphs:
            return self.graphs[shape].replay()
        self.step(*shape)  # the first step of a shape runs directly, because recording runs nothing
        self.graphs[shape] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[shape], pool=self.pool):
            self.step(*shape)
