"""Sampling: which tokens are drawn, their log-probabilities, and what must not change them."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, random_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core import rollout
from core.decoder import prefill
from core.options import UserError
from core.rollout import VISION_TOKENS, draw, sample, uniforms

MANY_ENDS = list(range(100, 130))  # of about 640 tokens: completions of very different lengths


def prompt(inputs: dict, row: int, images_of) -> dict:
    """One row of a batch alone, without its padding."""
    keep = inputs["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    one = {name: inputs[name][row, keep][None] for name in names}
    if images_of[row]:
        images = slice(sum(images_of[:row]), sum(images_of[: row + 1]))
        grids = inputs["image_grid_thw"]
        pixels = inputs["pixel_values"].split(grids.prod(-1).tolist())
        one |= {"image_grid_thw": grids[images], "pixel_values": torch.cat(pixels[images])}
    return one


def forward_logits(model, one: dict, completion: torch.Tensor) -> torch.Tensor:
    """The logits (C, V) before each token of `completion` (C,), from the unmodified model."""
    ids = torch.cat([one["input_ids"], completion[None]], 1)
    inputs = one | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = F.pad(one["mm_token_type_ids"], (0, len(completion)))
    with torch.no_grad():
        logits = model(**inputs).logits[0, one["input_ids"].shape[1] - 1 : -1]
    model.model.rope_deltas = None  # left behind by the forward pass
    return logits.double()


def excluded(model) -> list[int]:
    return [getattr(model.config, name) for name in VISION_TOKENS]


def assert_same(one: tuple, other: tuple) -> None:
    """Equal completions, and log-probabilities up to rounding, whatever the longest length."""
    C = max(one[0].shape[1], other[0].shape[1])
    one, other = ([F.pad(x, (0, C - x.shape[1])) for x in result] for result in (one, other))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    torch.testing.assert_close(one[2], other[2], atol=1e-4, rtol=0)


# --- CUDA graphs, recorded on the CPU ------------------------------------------------------------


class RecordedGraph:
    """Replays recorded operations on the memory they were recorded with, as a CUDA graph does."""

    def __init__(self):
        self.operations = []

    def replay(self) -> None:
        RecordedGraph.replayed += 1
        for function, args, kwargs, results in self.operations:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(tree_leaves(results), again, strict=True):
                if old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """Records operations without changing any tensor. Waiting for the device is an error."""

    def __init__(self, graph: RecordedGraph, pool=None):
        super().__init__()
        self.operations, self.overwritten = graph.operations, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        indices = tree_leaves(args[1]) if name.startswith("index") else []
        boolean = any(getattr(index, "dtype", None) == torch.bool for index in indices)
        if boolean or "local_scalar" in name or "nonzero" in name:
            raise RuntimeError(f"{name} waits for the device")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten.append((value, value.clone()))
        results = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.overwritten):
            tensor.copy_(value)


@pytest.fixture
def recorded_graphs(monkeypatch):
    """Makes captured decoding possible on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "replayed", 0, raising=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_decoding_equals_eager_decoding(family, recorded_graphs):
    model, processor = tiny_model(family)
    inputs = random_batch(processor, (1, 2, 0))
    model.generation_config.eos_token_id = None
    ids = sample(model, inputs, 4, 270)[0]
    # the first rows end somewhere, the last one does not
    ends = set(ids[:6, 20:200:30].flatten().tolist()) - set(ids[-1].tolist())
    model.generation_config.eos_token_id = sorted(ends)
    eager = sample(model, inputs, 4, 270)
    assert eager[1].sum(-1).unique().numel() > 3 and eager[1].shape == (12, 270)
    assert_same(eager, sample(model, inputs, 4, 270, decoding="captured"))
    # of 269 steps, one is recorded for each shape: 12 or 8 or 4 … rows, 256 or 270 tokens
    assert 262 <= RecordedGraph.replayed <= 267


def test_captured_decoding_needs_a_gpu_and_other_names_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, processor = tiny_model("qwen2_vl")
    for decoding in ("captured", "fast"):
        with pytest.raises(UserError, match=f"eager.*captured on a CUDA GPU.*'{decoding}'"):
            sample(model, random_batch(processor), 2, 2, decoding=decoding)


# --- which tokens, with which log-probabilities --------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images_of, ends", [((1, 2, 0, 1), MANY_ENDS), ((0, 0), None)])
def test_greedy_equals_generate_with_and_without_images_and_end_tokens(family, images_of, ends):
    model, processor = tiny_model(family)
    inputs = random_batch(processor, images_of)
    assert len(set(inputs["attention_mask"].sum(-1).tolist())) > 1, "prompts of unequal length"
    model.generation_config.eos_token_id = ends
    ids, mask, _ = sample(model, inputs, 2, 24, temperature=0.0)
    generated = model.generate(
        **inputs, do_sample=False, max_new_tokens=24, suppress_tokens=excluded(model)
    )[:, inputs["input_ids"].shape[1] :].repeat_interleave(2, 0)
    assert ids.shape == generated.shape
    assert torch.equal(ids[mask.bool()], generated[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_those_of_the_model_row_by_row(family):
    """Each token is where its uniform number falls in the distribution of a forward pass.

    Log-probabilities are those of the forward pass. The mask ends with the first end token.
    """
    images_of, G, C, temperature = (1, 0, 2), 3, 20, 0.8
    model, processor = tiny_model(family)
    model.generation_config.eos_token_id = MANY_ENDS
    inputs = random_batch(processor, images_of)
    ids, mask, logps = sample(model, inputs, G, C, temperature, seed=5, step=7)
    lengths = mask.sum(-1).tolist()
    assert logps.dtype == torch.float32 and ids.shape[1] == max(lengths) and len(set(lengths)) > 1
    for row, numbers in enumerate(uniforms(5, 7, [0, 1, 2], G, C)):
        length = lengths[row]
        assert mask[row, :length].all() and not ids[row, length:].any()
        assert not logps[row, length:].any()
        tokens, is_end = ids[row, :length, None], torch.isin(ids[row], torch.tensor(MANY_ENDS))
        assert not is_end[: length - 1].any() and (is_end[length - 1] or length == C)
        one = prompt(inputs, row // G, images_of)
        logits = forward_logits(model, one, tokens[:, 0]) / temperature
        expected = torch.log_softmax(logits, -1).gather(-1, tokens)[:, 0]
        torch.testing.assert_close(logps[row, :length].double(), expected, atol=1e-4, rtol=0)
        logits[:, excluded(model)] = -torch.inf
        probs = torch.softmax(logits, -1)
        above = probs.cumsum(-1).gather(-1, tokens)[:, 0]
        below = above - probs.gather(-1, tokens)[:, 0]
        assert ((numbers[:length] > below - 1e-5) & (numbers[:length] < above + 1e-5)).all()


def test_draws_follow_a_softmax_computed_by_hand():
    """Weights 1 2 3 4 and an excluded 10: shares .1 .2 .3 .4, log-probabilities log(w / 20)."""
    weights = torch.tensor([[1.0, 2.0, 10.0, 3.0, 4.0]])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = (2 * weights.log()).expand(1000, -1)  # temperature 2 halves them
    tokens, logps = draw(logits, 2.0, uniform, torch.tensor([2]))
    assert torch.bincount(tokens).tolist() == [100, 200, 0, 300, 400]
    torch.testing.assert_close(logps, (weights[0] / 20).log()[tokens])
    greedy, logps = draw(logits[:1], 0.0, uniform[:1], torch.tensor([2]))
    assert greedy.tolist() == [4]
    torch.testing.assert_close(logps, torch.tensor([16 / 130]).log())  # 4² / (1 + 4 + 100 + 9 + 16)


def test_draws_from_a_vocabulary_of_152k_tokens_are_those_of_numpy():
    """With tokens of probability zero, and the smallest and largest uniform number."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, 151_936, generator=generator)
    logits[:, ::3] = -torch.inf
    logits[:, 151_000:] = -torch.inf
    uniform = torch.rand(64, dtype=torch.float64, generator=generator)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    tokens, _ = draw(logits, 1.0, uniform, torch.tensor([0]))
    probs = torch.softmax(logits, -1).double().numpy()
    for row in range(64):
        cdf = probs[row].cumsum()
        assert tokens[row] == np.searchsorted(cdf, float(uniform[row]) * cdf[-1], side="right")
    assert tokens[0] == 1 and tokens[1] == 150_998  # the first and the last that are possible


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vision_tokens_are_never_sampled_even_when_they_are_the_likeliest(temperature):
    model, processor = tiny_model("qwen2_vl", tie_word_embeddings=False)
    inputs = random_batch(processor, (1, 1))
    with torch.no_grad():
        hidden, _, _ = prefill(model, inputs)
        model.lm_head.weight[excluded(model)] = 50 * hidden.mean(0)
        top = model(**inputs).logits[:, -1].topk(4).indices
    assert set(top.flatten().tolist()) == set(excluded(model))
    ids, _, _ = sample(model, inputs, 8, 20, temperature)
    assert not torch.isin(ids, torch.tensor(excluded(model))).any()


def test_a_completion_is_fixed_by_seed_step_prompt_and_number_not_by_the_batch():
    model, processor = tiny_model("qwen2_vl")
    model.generation_config.eos_token_id = MANY_ENDS
    batch = random_batch(processor, (1, 2, 0))
    one = prompt(batch, 1, (1, 2, 0))
    fixed = {"max_completion_length": 20, "seed": 1, "step": 2, "prompts": [5]}
    base = sample(model, one, 3, **fixed)
    torch.manual_seed(123)  # the global generator plays no part
    assert_same(base, sample(model, one, 3, **fixed))
    whole = sample(model, batch, 3, **fixed | {"prompts": [9, 5, 2]})
    assert_same(base, tuple(x[3:6] for x in whole))
    more = sample(model, one, 5, **fixed)
    assert_same(base, tuple(x[:3] for x in more))
    assert len({tuple(ids.tolist()) for ids in more[0]}) == 5, "completions differ"
    for other in ({"seed": 2}, {"step": 3}, {"prompts": [6]}):
        changed = sample(model, one, 3, **fixed | other)
        assert not torch.equal(changed[0][:, :3], base[0][:, :3])


def test_ended_rows_are_dropped_and_change_nothing(monkeypatch):
    model, processor = tiny_model("qwen3_vl")
    model.generation_config.eos_token_id = MANY_ENDS
    inputs, decoded, keep = random_batch(processor), [], rollout.Decoder.keep

    def counted(self, going, S):
        decoded.append(keep(self, going, S))
        return decoded[-1]

    monkeypatch.setattr(rollout.Decoder, "keep", counted)
    dropped = sample(model, inputs, 6, 30)
    lengths = dropped[1].sum(-1)
    assert decoded == [int((lengths > S).sum()) for S in range(1, len(decoded) + 1)]
    assert len(set(decoded)) > 5
    monkeypatch.setattr(rollout.Decoder, "keep", lambda self, going, S: int(going.sum()))
    assert_same(dropped, sample(model, inputs, 6, 30))


@torch.no_grad()
def test_attention_is_accurate_in_bfloat16_where_keys_share_a_large_offset():
    """Within 0.5 % of float64; scores rounded to bfloat16 would be wrong by up to a half."""
    model, processor = tiny_model("qwen2_vl")
    inputs, G, K, R, D, S = prompt(random_batch(processor), 0, (1,)), 3, 2, 2, 12, 8
    _, cache, start = prefill(model.bfloat16(), inputs)
    decoder = rollout.Decoder(model, cache, inputs["attention_mask"], start, G, S)
    w, to_slot = decoder.layers[0], decoder.places.flatten()
    generator = torch.Generator().manual_seed(0)
    for memory in (w.prompt_values, w.own_values, w.prompt_keys, w.own_keys):
        offset = 225 * D**-0.5 if memory.dtype == torch.float32 else 0.0  # of keys, norm 225
        memory.copy_((torch.randn(memory.shape, generator=generator) + offset).bfloat16())
    q = torch.randn(G * K, R, D, generator=generator).bfloat16().double()
    out = decoder.attend(q.float(), w, torch.zeros(1, 1, S), to_slot, to_slot.argsort())

    keys = torch.cat([w.prompt_keys.repeat(G, 1, 1), w.own_keys.flatten(0, 1)], 1).double()
    values = torch.cat([w.prompt_values.repeat(G, 1, 1), w.own_values.flatten(0, 1)], 1).double()
    exact = (torch.softmax(q @ keys.mT * D**-0.5, -1) @ values).view(G, -1)
    assert (out - exact).norm() < 0.005 * exact.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_float64_as_the_forward_pass_of_the_library(autocast):
    model, processor = tiny_model("qwen2_vl")
    model.generation_config.eos_token_id = None
    inputs, model = prompt(random_batch(processor), 1, (1, 2)), model.bfloat16()
    exact_model, ours, library = copy.deepcopy(model).double(), 0.0, 0.0
    model = model.float() if autocast else model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ids, _, logps = sample(model, inputs, 16, 10)
        for tokens, sampled in zip(ids, logps, strict=True):
            drawn = range(10), tokens
            forward = forward_logits(model, inputs, tokens).log_softmax(-1)[drawn]
            with torch.autocast("cpu", enabled=False):
                exact = forward_logits(exact_model, inputs, tokens).log_softmax(-1)[drawn]
            ours += (sampled - exact).abs().sum()
            library += (forward - exact).abs().sum()
    assert ours < 1.2 * library


@pytest.mark.parametrize("decoding", ["eager", "captured"])
def test_decoder_and_cache_are_freed_by_reference_counts(decoding, recorded_graphs, monkeypatch):
    model, processor = tiny_model("qwen2_vl")
    inputs, alive = random_batch(processor), []

    def observed(self, model, cache, *args):
        initialize(self, model, cache, *args)
        alive.extend(weakref.ref(x) for x in (self, self.own_keys, cache, cache.layers[0].keys))

    initialize = rollout.Decoder.__init__
    monkeypatch.setattr(rollout.Decoder, "__init__", observed)
    gc.disable()
    try:
        sample(model, inputs, 2, 6, decoding=decoding)
        assert len(alive) == 4 and not any(reference() is not None for reference in alive)
    finally:
        gc.enable()


def test_the_model_is_left_as_it_was_found():
    model, processor = tiny_model("qwen2_vl")
    inputs = random_batch(processor)
    expected = sample(model, inputs, 2, 8)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.model.visual.eval()  # as in a run that freezes the vision tower
    modes = [module.training for module in model.modules()]
    model.model.rope_deltas = torch.tensor([[99]])  # left behind by an earlier call
    assert_same(expected, sample(model, inputs, 2, 8))
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing and model.model.rope_deltas.tolist() == [[99]]
