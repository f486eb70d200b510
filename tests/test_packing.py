"""Packed log-probabilities against the unmodified library, one completion at a time."""

import pytest
import torch
from tiny import FAMILIES, random_batch, tiny_model

from core import packing
from core.packing import group_logps as packed_logps
from core.packing import pack_groups


def group_logps(model, inputs, ids, mask, **more):
    return packed_logps(model, pack_groups(model, inputs, ids, mask), **more)


def random_completions(vocab: int, B: int, G: int, C: int, seed: int = 0):
    """Completions of unequal length (1 … C), one of them empty; ids that are no vision tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(300, vocab, (B * G, C), generator=generator)
    lengths = torch.randint(1, C + 1, (B * G,), generator=generator)
    lengths[0], lengths[-1] = C, 0
    mask = (torch.arange(C) < lengths[:, None]).long()
    return ids, mask


def row_by_row(model, inputs, ids, mask):
    """The oracle: each completion after its own copy of the prompt, one plain forward at a time."""
    B = len(inputs["input_ids"])
    G, C = len(ids) // B, ids.shape[1]
    grid = inputs.get("image_grid_thw")
    merge = model.config.vision_config.spatial_merge_size**2
    out = torch.zeros(B, G, C)
    image = patch = 0
    for b in range(B):
        prompt = inputs["input_ids"][b][inputs["attention_mask"][b].bool()]
        images = {}
        places = int((prompt == model.config.image_token_id).sum())
        if places:
            first, first_patch = image, patch
            while places:
                places -= int(grid[image].prod()) // merge
                patch += int(grid[image].prod())
                image += 1
            images["pixel_values"] = inputs["pixel_values"][first_patch:patch]
            images["image_grid_thw"] = grid[first:image]
        for g in range(G):
            kept = ids[b * G + g][mask[b * G + g].bool()]
            if not len(kept):
                continue
            full = torch.cat([prompt, kept])[None]
            logits = model(
                input_ids=full,
                attention_mask=torch.ones_like(full),
                mm_token_type_ids=(full == model.config.image_token_id).long(),
                **images,
            ).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1).gather(-1, kept[:, None]).squeeze(-1)
            out[b, g, : len(kept)] = logps
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_groups_equal_rows_apart_in_values_and_gradients(family):
    model, processor = tiny_model(family)
    inputs = random_batch(processor, images_of=(1, 2, 0, 1))
    ids, mask = random_completions(len(processor.tokenizer), B=4, G=3, C=7)
    weight = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(1))

    expected = row_by_row(model, inputs, ids, mask)
    (expected * weight).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    packed = group_logps(model, inputs, ids, mask)
    (packed * weight).sum().backward()

    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-5)
    assert set(wanted) == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if p.grad is not None:
            scale = wanted[name].abs().max().clamp(min=1.0)
            assert (p.grad - wanted[name]).abs().max() / scale < 1e-4, name


def test_stale_rope_deltas_of_an_earlier_forward_change_nothing():
    model, processor = tiny_model("qwen2_vl")
    inputs = random_batch(processor)
    ids, mask = random_completions(len(processor.tokenizer), 4, 2, 5)
    fresh = group_logps(model, inputs, ids, mask)
    other = random_batch(processor, (2, 1), seed=5)
    model(**other)
    torch.testing.assert_close(group_logps(model, inputs, ids, mask), fresh, atol=0, rtol=0)


def test_logits_in_chunks_change_neither_values_nor_gradients(monkeypatch):
    model, processor = tiny_model("qwen2_vl")
    inputs = random_batch(processor)
    ids, mask = random_completions(len(processor.tokenizer), 4, 2, 6)

    def run():
        model.zero_grad()
        logps, entropy = group_logps(model, inputs, ids, mask, with_entropy=True, temperature=0.7)
        logps.sum().backward()
        gradient = model.lm_head.weight.grad.clone()
        return logps.detach(), entropy, gradient / gradient.abs().max()

    whole = run()
    monkeypatch.setattr(packing, "LOGITS_AT_ONCE", 3 * len(processor.tokenizer))
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_entropy_and_temperature_are_those_of_the_scaled_softmax():
    model, processor = tiny_model("qwen2_vl")
    inputs = random_batch(processor, (1,))
    ids, mask = torch.tensor([[310]]), torch.tensor([[1]])
    logits = model(**inputs).logits[0, -1].double() / 0.5
    p = logits.softmax(-1)
    logps, entropy = group_logps(model, inputs, ids, mask, temperature=0.5, with_entropy=True)
    assert logps.item() == pytest.approx(p[310].log().item(), abs=1e-4)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_value_and_no_gradient(family):
    model, processor = tiny_model(family)
    inputs = random_batch(processor)
    ids, mask = random_completions(len(processor.tokenizer), 4, 2, 5)

    def run():
        model.zero_grad()
        logps = group_logps(model.train(), inputs, ids, mask)
        logps.sum().backward()
        return [logps.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, other in zip(plain, run(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
