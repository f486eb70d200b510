"""Loading, encoding, freezing and saving, against the unmodified library."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, IMAGE, random_batch, random_images, tiny_model
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

from core.options import TrainingOptions, UserError
from core.prompts import Prompts
from core.qwen import Prompt, count_parameters, freeze_part, load_policy, save_policy

# --- encoding ------------------------------------------------------------------------------------


def test_encoding_pads_on_the_left_and_expands_each_image_to_its_merged_patches():
    _, processor = tiny_model("qwen2_vl")
    images = random_images(3)
    inputs = processor.encode(
        [f"{IMAGE} look", f"{IMAGE} one {IMAGE} two", "no image at all"],
        [images[:1], images[1:], []],
    )
    tokens = inputs["image_grid_thw"].prod(-1) // 4
    per_row = [int(tokens[0]), int(tokens[1] + tokens[2]), 0]
    is_image = inputs["input_ids"] == processor.image_id
    assert is_image.sum(-1).tolist() == per_row
    assert torch.equal(inputs["mm_token_type_ids"], is_image.long())
    assert inputs["pixel_values"].shape[0] == int(inputs["image_grid_thw"].prod(-1).sum())
    mask = inputs["attention_mask"]
    assert torch.equal(mask, mask.sort(dim=1).values) and mask[:, -1].all()


def test_a_prompt_that_names_another_number_of_images_is_refused():
    _, processor = tiny_model("qwen2_vl")
    with pytest.raises(ValueError, match="2 image places for 1 images"):
        processor.encode([IMAGE + IMAGE], [random_images(1)])


def test_the_length_of_a_prompt_is_known_before_its_pixels_are_read():
    _, processor = tiny_model("qwen2_vl")
    row = {"id": "row-7", "images": random_images(2), "question": "How?", "options": []}
    length = len(processor.prompt(row, "base").inputs["input_ids"])
    assert processor.prompt_length(row, "base") == length


def test_rows_whose_prompt_is_over_the_limit_are_left_out_and_named(tmp_path):
    _, processor = tiny_model("qwen2_vl")
    images, questions = random_images(4), ["How?", "How? " * 200, "Why?", "When?"]
    rows = [
        {"id": f"row-{i}", "images": [images[i]], "question": q, "options": [], "answer": "so"}
        for i, q in enumerate(questions)
    ]
    prompts = Prompts((rows, []), TrainingOptions(max_prompt_length=200), processor, size=1)
    assert prompts.usable == [0, 2, 3]
    assert "1 unusable rows skipped: row-1: its prompt has" in prompts.skipped


def test_held_out_rows_that_cannot_be_used_are_counted_and_named_and_none_left_is_an_error():
    _, processor = tiny_model("qwen2_vl")
    rows = [
        {"id": f"row-{i}", "images": [], "question": q, "options": [], "answer": "so", "task": "t"}
        for i, q in enumerate(["How?", "How? " * 200, "Why?"])
    ]
    more = TrainingOptions(max_prompt_length=200), processor, 1
    prompts = Prompts((rows[:1], rows), *more)
    assert [prompt.row["id"] for prompt in prompts.held_out] == ["row-0", "row-2"]
    assert prompts.skipped.startswith("1 unusable rows skipped: row-1: its prompt has")
    with pytest.raises(UserError, match="no held-out row can be used: 1 unusable .* row-1: "):
        Prompts((rows[:1], rows[1:2]), *more)


def test_targets_end_with_the_end_token_and_decode_to_their_text():
    _, processor = tiny_model("qwen2_vl")
    ids, mask = processor.encode_targets(["left", "so the red square"])
    lengths = mask.sum(-1)
    assert (ids[[0, 1], lengths - 1] == processor.end_ids[0]).all() and lengths[0] < lengths[1]
    assert processor.decode(ids, mask) == ["left", "so the red square"]


def test_the_opening_is_what_the_prompt_already_holds_of_the_answers_format():
    _, processor = tiny_model("qwen2_vl")
    row = {"id": "1", "images": [], "question": "How?", "options": [], "answer": "so"}
    openings = [
        processor.prompt(row, style).opening for style in ("base", "base-direct", "instruct")
    ]
    assert openings == ["<think>", "", ""]
    assert Prompt({}, "Assistant: <answer>", {}).opening == "<answer>"  # of a style of one's own


# --- load and save -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        save_policy(*tiny_model(family), folder)
    return folders


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of a Qwen2-VL checkpoint, to be changed."""
    return shutil.copytree(saved["qwen2_vl"], tmp_path / "model")


def rewrite(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_reloads_in_plain_transformers_with_equal_logits(saved, family):
    model, processor = tiny_model(family)
    inputs = random_batch(processor)
    plain = AutoModelForImageTextToText.from_pretrained(saved[family], dtype=torch.float32).eval()
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
    text, tokenizer = "look: red square 1 2", AutoTokenizer.from_pretrained(saved[family])
    assert tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(saved[family])
    assert image_processor.size == processor.image_processor.size
    again, its_processor = load_policy(str(saved[family]))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert its_processor.end_ids == processor.end_ids


def test_max_pixels_bounds_the_visual_tokens_and_wins_over_a_saved_limit(folder):
    def visual_tokens(**limit) -> int:
        _, processor = load_policy(str(folder), **limit)
        image = random_images(1)[0].resize((280, 280))
        return int((processor.encode([IMAGE], [[image]])["input_ids"] == processor.image_id).sum())

    assert visual_tokens(max_pixels=2 * 784) <= 2
    rewrite(folder / "preprocessor_config.json", size={"shortest_edge": 784, "longest_edge": 3136})
    assert visual_tokens() <= 4 and visual_tokens(max_pixels=100 * 784) == 100


def test_instruct_checkpoints_are_told_by_their_end_token(folder):
    _, base = load_policy(str(folder))
    ends = base.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    rewrite(folder / "generation_config.json", eos_token_id=ends)
    _, instruct = load_policy(str(folder))
    assert base.default_style == "base"
    assert instruct.default_style == "instruct" and instruct.end_ids == ends


def test_a_template_without_roles_is_a_base_model_whatever_its_config_says(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    _, processor = load_policy(str(folder))
    chat_end, end = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    rewrite(folder / "generation_config.json", eos_token_id=[chat_end])
    _, processor = load_policy(str(folder))
    assert processor.default_style == "base" and processor.end_ids == [end]


def test_a_chat_template_in_a_file_of_its_own_is_kept(folder, tmp_path):
    template = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    save_policy(*load_policy(str(folder)), tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == template


def test_a_published_generation_config_that_is_invalid_does_not_stop_a_save(folder, tmp_path):
    settings = {"do_sample": False, "temperature": 0.1, "top_k": 1, "top_p": 0.001}
    rewrite(folder / "generation_config.json", **settings)
    model, processor = load_policy(str(folder))
    save_policy(model, processor, tmp_path / "again")
    assert load_policy(str(tmp_path / "again"))[1].end_ids == processor.end_ids


# --- checkpoints that are refused ----------------------------------------------------------------


def refused(folder) -> str:
    with pytest.raises(UserError) as error:
        load_policy(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_that_are_missing_or_have_other_names_are_an_error_that_names_them(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    key = next(name for name in weights if "layers.1.mlp" in name and "visual" not in name)
    save_file({k: w for k, w in weights.items() if k != key}, file, {"format": "pt"})
    assert "lacks 1 weights" in (line := refused(folder)) and key.split("layers.")[1] in line
    save_file({f"base_model.model.{k}": w for k, w in weights.items()}, file, {"format": "pt"})
    assert "weights, " in refused(folder)


@pytest.mark.parametrize("kept", [50, 0])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json"]
)
def test_a_damaged_file_is_named_as_such(name, kept, folder):
    file = folder / name
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{folder}': {file.resolve()} is damaged (" in refused(folder)


def test_a_pointer_of_git_lfs_instead_of_the_weights_is_named_as_damaged(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model.safetensors is damaged" in refused(folder)


def test_weights_of_another_shape_are_named(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    key = next(name for name in weights if name.endswith("embed_tokens.weight"))
    save_file(weights | {key: weights[key][:-5].clone()}, file, {"format": "pt"})
    assert "lacks 1 weights, " in (line := refused(folder)) and "embed_tokens.weight" in line


def test_adapters_beside_the_weights_are_refused_not_ignored(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds adapters: merge them" in refused(folder)


def test_weights_are_never_read_from_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"evil": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert "cannot load the model" in refused(folder)


def test_a_model_that_is_no_qwen_vl_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "is a gpt2 model. Valid: qwen2_vl" in refused(folder)


# --- freeze --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part, other", [("vision", "language"), ("language", "vision")])
def test_the_frozen_part_has_no_trainable_parameter_and_the_other_has_no_frozen_one(part, other):
    model, _ = tiny_model("qwen2_vl")
    sizes = {"vision": sum(p.numel() for p in model.model.visual.parameters())}
    sizes["language"] = sum(p.numel() for p in model.parameters()) - sizes["vision"]
    freeze_part(model, part)
    assert count_parameters(model) == {part: (0, sizes[part]), other: (sizes[other], 0)}
