"""Packed log-probabilities, encoding, freezing and saving, against the unmodified library."""

import json

import pytest
import torch
from tiny import FAMILIES, IMAGE, random_batch, random_images, tiny_model
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

import model as model_module
from data import BadRow
from model import count_parameters, freeze_part, group_logps, load_policy, save_policy


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
        return logps.detach(), entropy, model.lm_head.weight.grad.clone()

    whole = run()
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 3 * len(processor.tokenizer))
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


# --- encoding ---


def test_encoding_pads_on_the_left_and_expands_each_image_to_its_merged_patches():
    _, processor = tiny_model("qwen2_vl")
    images = random_images(3)
    inputs = processor.encode(
        [f"{IMAGE} look", f"{IMAGE} one {IMAGE} two", "no image at all"],
        [images[:1], images[1:], []],
    )
    tokens = inputs["image_grid_thw"].prod(-1) // 4
    per_row = [int(tokens[0]), int(tokens[1] + tokens[2]), 0]
    assert (inputs["input_ids"] == processor.image_id).sum(-1).tolist() == per_row
    assert torch.equal(
        inputs["mm_token_type_ids"], (inputs["input_ids"] == processor.image_id).long()
    )
    assert inputs["pixel_values"].shape[0] == int(inputs["image_grid_thw"].prod(-1).sum())
    mask = inputs["attention_mask"]
    assert torch.equal(mask, mask.sort(dim=1).values) and mask[:, -1].all()


def test_a_prompt_that_names_another_number_of_images_is_refused():
    _, processor = tiny_model("qwen2_vl")
    with pytest.raises(ValueError, match="2 image places for 1 images"):
        processor.encode([IMAGE + IMAGE], [random_images(1)])


def test_a_prompt_over_the_limit_is_a_bad_row_with_its_id_and_never_cut():
    _, processor = tiny_model("qwen2_vl")
    row = {
        "id": "row-7",
        "images": random_images(1),
        "question": "How?",
        "options": [],
        "answer": "",
    }
    assert processor.prepare(row, "base")["encoded"]["input_ids"].numel() > 5
    with pytest.raises(BadRow, match="row-7: the prompt has .* more than 5"):
        processor.prepare(row, "base", 5)


# --- load, freeze, save ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        save_policy(*tiny_model(family), folders[family])
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_reloads_in_plain_transformers_with_equal_logits(saved, family):
    model, processor = tiny_model(family)
    inputs = random_batch(processor)
    plain = AutoModelForImageTextToText.from_pretrained(saved[family], dtype=torch.float32).eval()
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
    tokenizer = AutoTokenizer.from_pretrained(saved[family])
    assert (
        tokenizer("look: red square 1 2").input_ids
        == processor.tokenizer("look: red square 1 2").input_ids
    )
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(saved[family])
    assert image_processor.size == processor.image_processor.size
    again, its_processor = load_policy(str(saved[family]))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert its_processor.end_ids == processor.end_ids


def test_max_pixels_bounds_the_visual_tokens(saved):
    _, processor = load_policy(str(saved["qwen2_vl"]), max_pixels=2 * 784)
    inputs = processor.encode([IMAGE], [random_images(1)])
    assert (inputs["input_ids"] == processor.image_id).sum() <= 2


def test_instruct_checkpoints_are_told_by_their_end_token(saved, tmp_path):
    model, processor = tiny_model("qwen2_vl")
    assert processor.default_style == "base"
    ends = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.eos_token_id = ends
    save_policy(model, processor, tmp_path)
    _, instruct = load_policy(str(tmp_path))
    assert instruct.default_style == "instruct" and instruct.end_ids == ends


def test_a_template_without_roles_is_a_base_model_whatever_its_config_says(saved, tmp_path):
    model, processor = tiny_model("qwen2_vl")
    chat_end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [chat_end]
    save_policy(model, processor, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    _, base = load_policy(str(tmp_path))
    assert base.default_style == "base"
    assert base.end_ids == [processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")]


def test_a_published_generation_config_that_is_invalid_does_not_stop_a_save(saved, tmp_path):
    for file in saved["qwen2_vl"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings |= {"do_sample": False, "temperature": 0.1, "top_k": 1, "top_p": 0.001}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model, processor = load_policy(str(tmp_path))
    save_policy(model, processor, tmp_path / "again")
    _, again = load_policy(str(tmp_path / "again"))
    assert again.end_ids == processor.end_ids


def test_weights_are_never_read_from_a_pickle(saved, tmp_path):
    for file in saved["qwen2_vl"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    torch.save({"evil": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no model"):
        load_policy(str(tmp_path))


def test_a_model_that_is_no_qwen_vl_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="gpt2 model; these can be trained: qwen2_vl") as error:
        load_policy(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part, other", [("vision", "language"), ("language", "vision")])
def test_frozen_parameters_stay_bit_identical_and_the_others_move(part, other):
    model, processor = tiny_model("qwen2_vl")
    freeze_part(model, part)
    counts = count_parameters(model)
    assert counts[part][0] == 0 and counts[part][1] > 0
    assert counts[other][0] > 0 and counts[other][1] == 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = random_batch(processor)
    ids, mask = random_completions(len(processor.tokenizer), 4, 2, 5)
    for _ in range(2):
        group_logps(model, inputs, ids, mask).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        is_vision = name.startswith("model.visual")
        assert torch.equal(p, before[name]) == (is_vision == (part == "vision")), name
