"""Sampling: what is drawn, from which distribution, and that how it is run changes nothing."""

import functools

import pytest
import torch
from tiny import FAMILIES, random_batch, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList

import rollout
from rollout import VISION_TOKENS, choose, sample, uniforms

MANY_ENDS = list(range(100, 130))  # of 640 tokens: completions of very different lengths


def prompt(inputs: dict, row: int, images_of) -> dict:
    """One row of a batch alone, without its padding."""
    keep = inputs["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    one = {name: inputs[name][row, keep][None] for name in names}
    first, count = sum(images_of[:row]), images_of[row]
    if count:
        grids = inputs["image_grid_thw"]
        sizes = grids.prod(-1).tolist()
        start, length = sum(sizes[:first]), sum(sizes[first : first + count])
        one["pixel_values"] = inputs["pixel_values"][start : start + length]
        one["image_grid_thw"] = grids[first : first + count]
    return one


class NoVisionTokens(LogitsProcessor):
    def __init__(self, config):
        self.ids = [getattr(config, name) for name in VISION_TOKENS]

    def __call__(self, input_ids, scores):
        scores[:, self.ids] = -torch.inf
        return scores


# --- the right tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images_of", [(1, 2, 0, 1), (0, 0)], ids=["images", "text"])
def test_greedy_equals_generate(family, images_of):
    model, processor = tiny_model(family)
    inputs = random_batch(processor, images_of)
    assert len(set(inputs["attention_mask"].sum(-1).tolist())) > 1, "prompts of unequal length"
    model.generation_config.eos_token_id = MANY_ENDS
    for G in (1, 2):
        ids, mask = sample(model, inputs, G, 24, temperature=0.0)
        generated = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=24,
            logits_processor=LogitsProcessorList([NoVisionTokens(model.config)]),
        )[:, inputs["input_ids"].shape[1] :]
        generated = generated.repeat_interleave(G, 0)
        assert ids.shape == generated.shape
        assert torch.equal(ids[mask.bool()], generated[mask.bool()])
        model.model.rope_deltas = None  # left behind by generate


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom; tokens expected less than 5 times share a bin."""
    expected = counts.sum() * probs.double()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def assert_drawn_from(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    statistic, freedom = chi_square(torch.bincount(tokens, minlength=len(probs)), probs)
    assert freedom > 10
    # mean `freedom`, variance twice that: five standard deviations
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    assert (probs[tokens] > 0).all()


def distributions(model, one: dict, completion: torch.Tensor, temperature: float) -> torch.Tensor:
    """What the unmodified model draws each token of `completion` (C,) from: (C, V), float64."""
    more = completion[None]
    inputs = dict(one)
    inputs["input_ids"] = torch.cat([one["input_ids"], more], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([one["mm_token_type_ids"], torch.zeros_like(more)], 1)
    with torch.no_grad():
        logits = model(**inputs).logits[0, one["input_ids"].shape[1] - 1 :]
    model.model.rope_deltas = None
    logits[:, [getattr(model.config, name) for name in VISION_TOKENS]] = -torch.inf
    return torch.softmax(logits.double() / temperature, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_the_softmax_first_and_after_a_prefix(temperature):
    model, processor = tiny_model("qwen2_vl")
    inputs = prompt(random_batch(processor, (2, 1)), 1, (2, 1))
    ids, _ = sample(model, inputs, 20_000, 2, temperature, seed=3)
    first = ids[:, 0].mode().values[None]
    probs = distributions(model, inputs, first, temperature)
    assert_drawn_from(ids[:, 0], probs[0])
    assert_drawn_from(ids[ids[:, 0] == first, 1], probs[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoding", ["eager", "static"])
def test_every_token_is_where_its_draw_falls_in_the_models_own_distribution(family, decoding):
    images_of, G, C, temperature = (1, 0, 2), 3, 20, 0.8
    model, processor = tiny_model(family)
    model.generation_config.eos_token_id = MANY_ENDS
    inputs = random_batch(processor, images_of)
    ids, mask = sample(model, inputs, G, C, temperature, seed=5, step=7, decoding=decoding)
    draws = uniforms(5, 7, [0, 1, 2], G, C)
    assert mask.sum(-1).unique().numel() > 3, "completions of different lengths"
    for row in range(len(ids)):
        length = int(mask[row].sum())
        completion = ids[row, :length]
        probs = distributions(model, prompt(inputs, row // G, images_of), completion, temperature)
        above = probs.cumsum(-1).gather(-1, torch.cat([completion, completion[-1:]])[:, None])[
            :-1, 0
        ]
        below = above - probs[:-1].gather(-1, completion[:, None])[:, 0]
        draw = draws[row, :length]
        assert ((draw > below - 1e-5) & (draw < above + 1e-5)).all()


def test_drawing_is_exact_where_the_vocabulary_is_large():
    """Against one float64 cumulative sum over 152k tokens, most of them of no weight."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, 151_936, generator=generator)
    logits[:, ::3] = -torch.inf
    uniform = torch.rand(64, dtype=torch.float64, generator=generator)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    tokens = choose(logits, 1.0, uniform)
    probs = torch.softmax(logits.double(), -1)
    above = probs.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    weight = probs.gather(-1, tokens[:, None])[:, 0]
    assert (weight > 0).all()
    assert ((uniform > above - weight - 1e-6) & (uniform < above + 1e-6)).all()


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((1, 640), -torch.inf)
    logits[0, [5, 300, 639]] = torch.tensor([0.0, 1.0, -1.0])
    uniform = torch.cat(
        [torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1], torch.tensor([1 - 2**-53])]
    )
    tokens = choose(logits.expand(1001, -1), 1.0, uniform)
    assert tokens.unique().tolist() == [5, 300, 639]
    assert (tokens.diff() >= 0).all(), "larger draws give later tokens"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vision_tokens_are_never_sampled_even_when_they_are_the_likeliest(temperature):
    model, processor = tiny_model("qwen2_vl", tie_word_embeddings=False)
    forbidden = [getattr(model.config, name) for name in VISION_TOKENS]
    hidden = []
    model.model.register_forward_hook(lambda m, i, o: hidden.append(o.last_hidden_state[:, -1]))
    inputs = random_batch(processor, (1, 1))
    sample(model, inputs, 1, 1)
    with torch.no_grad():  # a head that wants them first of all
        model.lm_head.weight[forbidden] = 50 * hidden[0].mean(0)
        assert set(model(**inputs).logits[:, -1].topk(4).indices.flatten().tolist()) == set(
            forbidden
        )
    ids, _ = sample(model, inputs, 8, 20, temperature)
    assert not torch.isin(ids, torch.tensor(forbidden)).any()


# --- the right shape -----------------------------------------------------------------------------


def test_the_mask_holds_the_first_end_token_and_nothing_after_it():
    model, processor = tiny_model("qwen2_vl")
    model.generation_config.eos_token_id = MANY_ENDS
    for decoding in ("eager", "static"):
        ids, mask = sample(model, random_batch(processor), 8, 25, decoding=decoding)
        is_end = torch.isin(ids, torch.tensor(MANY_ENDS)) & mask.bool()
        lengths = mask.sum(-1)
        assert torch.equal(mask, (torch.arange(mask.shape[1]) < lengths[:, None]).long())
        assert mask.shape[1] == lengths.max()
        ended = is_end.any(-1)
        assert ended.any() and (lengths[~ended] == 25).all()
        assert (is_end.sum(-1)[ended] == 1).all()
        assert (is_end.long().argmax(-1)[ended] == lengths[ended] - 1).all()
        assert (ids[mask == 0] == 0).all()
    for C in (1, 2):
        assert sample(model, random_batch(processor), 2, C)[0].shape[1] <= C


# --- nothing changes with how it is run ----------------------------------------------------------


def assert_same(one: tuple, other: tuple) -> None:
    """Equal completions, wherever the batches' longest end."""
    C = max(one[0].shape[1], other[0].shape[1])
    for a, b in zip(one, other, strict=True):
        a, b = (torch.nn.functional.pad(x, (0, C - x.shape[1])) for x in (a, b))
        assert torch.equal(a, b)


def test_a_batch_of_8_prompts_is_8_batches_of_1():
    model, processor = tiny_model("qwen2_vl")
    model.generation_config.eos_token_id = MANY_ENDS
    images_of = (1, 2, 0, 1, 1, 0, 3, 1)
    inputs = random_batch(processor, images_of)
    numbers = [3, 1, 4, 15, 9, 2, 6, 5]
    whole = sample(model, inputs, 4, 20, seed=2, step=1, prompts=numbers)
    for row in range(8):
        one = sample(
            model,
            prompt(inputs, row, images_of),
            4,
            20,
            seed=2,
            step=1,
            prompts=numbers[row : row + 1],
        )
        assert_same(one, tuple(x[4 * row : 4 * row + 4] for x in whole))


def test_a_completion_is_fixed_by_seed_step_prompt_and_number():
    model, processor = tiny_model("qwen2_vl")
    inputs = prompt(random_batch(processor, (1,)), 0, (1,))
    run = functools.partial(sample, model, inputs, max_completion_length=12)
    base = run(num_generations=3, seed=1, step=2, prompts=[5])
    torch.manual_seed(123)  # nothing is drawn from a global generator
    assert_same(base, run(num_generations=3, seed=1, step=2, prompts=[5]))
    more = run(num_generations=5, seed=1, step=2, prompts=[5])
    assert_same(base, tuple(x[:3] for x in more))
    for other in (dict(seed=2), dict(step=3), dict(prompts=[6])):
        changed = run(num_generations=3, **({"seed": 1, "step": 2, "prompts": [5]} | other))
        assert not torch.equal(changed[0][:, :6], base[0][:, :6])
    assert len({tuple(ids.tolist()) for ids in more[0]}) == 5, "completions differ"


def test_dropping_ended_rows_changes_nothing(monkeypatch):
    model, processor = tiny_model("qwen3_vl")
    model.generation_config.eos_token_id = MANY_ENDS
    inputs = random_batch(processor)
    dropped = sample(model, inputs, 6, 30)
    monkeypatch.setattr(
        rollout.Decoder, "drop_ended", lambda self, t: not self.ended[self.row[: self.n]].all()
    )
    assert_same(dropped, sample(model, inputs, 6, 30))


@pytest.mark.parametrize("family", FAMILIES)
def test_static_shapes_decode_the_same(family, monkeypatch):
    monkeypatch.setattr(rollout, "LENGTHS", 8)
    monkeypatch.setattr(rollout, "CHECK", 3)
    model, processor = tiny_model(family)
    model.generation_config.eos_token_id = MANY_ENDS
    inputs = random_batch(processor)
    assert_same(sample(model, inputs, 6, 30), sample(model, inputs, 6, 30, decoding="static"))


def test_compiled_decodes_the_same(monkeypatch):
    """On a GPU compiled and captured; on a CPU what would be compiled is traced and run."""
    model, processor = tiny_model("qwen3_vl")
    model.generation_config.eos_token_id = MANY_ENDS
    inputs = random_batch(processor)
    eager = sample(model, inputs, 4, 16, decoding="eager")
    if torch.cuda.is_available():
        model.cuda()
        inputs = {name: value.cuda() for name, value in inputs.items()}
    else:
        backend = functools.partial(torch.compile, backend="eager")
        monkeypatch.setattr(torch, "compile", backend)
    compiled = sample(model, inputs, 4, 16, decoding="compiled")
    assert_same(eager, tuple(x.cpu() for x in compiled))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_decodes_the_same(monkeypatch):
    monkeypatch.setattr(rollout, "LENGTHS", 8)
    model, processor = tiny_model("qwen2_vl")
    model.cuda().generation_config.eos_token_id = MANY_ENDS
    inputs = {name: value.cuda() for name, value in random_batch(processor).items()}
    eager = sample(model, inputs, 8, 30, decoding="eager")
    assert_same(eager, sample(model, inputs, 8, 30, decoding="captured"))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_decodes_as_the_model_does(how):
    """Greedy tokens may differ where two are nearly tied; nearly all are the same."""
    model, processor = tiny_model("qwen2_vl")
    inputs = random_batch(processor, (1, 2))
    if how == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        ids, mask = sample(model, inputs, 1, 12, temperature=0.0)
        for row in range(2):
            completion = ids[row, : int(mask[row].sum())]
            probs = distributions(model, prompt(inputs, row, (1, 2)), completion, 1.0)[:-1]
            chosen = probs.gather(-1, completion[:, None])[:, 0]
            assert (chosen > 0.9 * probs.amax(-1)).all()


# --- nothing is left behind ----------------------------------------------------------------------


def test_the_model_is_left_as_it_was_found():
    model, processor = tiny_model("qwen2_vl")
    inputs = random_batch(processor)
    expected = sample(model, inputs, 2, 8)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.model.visual.eval()  # as somebody who freezes it may have done
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.rope_deltas = torch.tensor([[99]])  # left by an earlier call
    assert_same(expected, sample(model, inputs, 2, 8))
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing
    assert model.model.rope_deltas.tolist() == [[99]]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_way_of_decoding_is_refused_with_the_valid_ones():
    model, processor = tiny_model("qwen2_vl")
    with pytest.raises(ValueError, match="eager, static"):
        sample(model, random_batch(processor), 2, 2, decoding="fast")


def test_a_model_without_an_end_token_goes_on_to_the_limit():
    model, processor = tiny_model("qwen2_vl")
    model.generation_config.eos_token_id = None
    ids, mask = sample(model, random_batch(processor, (1, 0)), 2, 5)
    assert ids.shape == (4, 5) and mask.all()
