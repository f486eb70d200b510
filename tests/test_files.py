"""core/files.py: images, the files of each split, what is read of them, and the hub."""

import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import samples
from PIL import Image
from samples import encode, plain, png, sat, write

from core import files
from core.files import to_image
from core.options import UserError
from data import BadRow, load_rows

home = samples.home  # a fixture
pytestmark = pytest.mark.usefixtures("home")
ROOT = Path(__file__).parent.parent


def near(pixel, color, slack=12):
    return all(abs(a - b) <= slack for a, b in zip(pixel, color, strict=True))


# --- images --------------------------------------------------------------------------------------


def test_an_exif_rotation_is_applied():
    picture, exif = Image.new("RGB", (64, 32), "red"), Image.Exif()
    picture.paste("blue", (32, 0, 64, 32))
    exif[0x0112] = 6  # to be turned clockwise
    image = to_image(encode(picture, "JPEG", exif=exif))
    assert image.size == (32, 64)
    assert near(image.getpixel((16, 4)), RED) and near(image.getpixel((16, 60)), BLUE)


def palette_with_hole():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 4, 8))
    return encode(image, transparency=0)


def ramp(kind, last, dtype):
    """From black at the left to white, `last`, at the right."""
    return encode(Image.fromarray(np.tile(np.linspace(0, last, 8).astype(dtype), (8, 1))), kind)


def animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
PIXELS = {
    "cmyk": (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), RED, RED),
    "palette": (palette_with_hole(), WHITE, BLUE),
    "transparent": (encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), WHITE, WHITE),
    "grey": (encode(Image.new("LA", (8, 8), (77, 255))), (77, 77, 77), (77, 77, 77)),
    "one-bit": (encode(Image.new("1", (8, 8), 1)), WHITE, WHITE),
    "png-16-bit": (ramp("PNG", 65535, np.uint16), BLACK, WHITE),
    "tiff-32-bit": (ramp("TIFF", 65535, np.int32), BLACK, WHITE),
    "tiff-float-to-1": (ramp("TIFF", 1, np.float32), BLACK, WHITE),
    "tiff-float-to-255": (ramp("TIFF", 255, np.float32), BLACK, WHITE),
    "tiff-float-over-1": (ramp("TIFF", 1.2, np.float32), BLACK, WHITE),
    "png-12-bit": (ramp("PNG", 4095, np.uint16), BLACK, WHITE),
    "png-8-of-16-bit": (ramp("PNG", 255, np.uint16), BLACK, WHITE),
    "bmp": (encode(Image.new("RGB", (8, 8), "red"), "BMP"), RED, RED),
    **{f"animated-{kind}": (animation(kind), RED, RED) for kind in ("GIF", "WEBP", "PNG")},
}
if "AVIF" in files.FORMATS:
    PIXELS["avif"] = (encode(Image.new("RGB", (8, 8), "red"), "AVIF"), RED, RED)


@pytest.mark.parametrize("encoded, left, right", PIXELS.values(), ids=PIXELS)
def test_every_kind_of_pixel_becomes_rgb(encoded, left, right):
    image = to_image(encoded)
    assert image.mode == "RGB" and image.size == (8, 8)
    assert near(image.getpixel((0, 4)), left) and near(image.getpixel((7, 4)), right)


@pytest.mark.parametrize("kind, last, dtype", [("PNG", 65535, np.uint16), ("TIFF", 1, np.float32)])
def test_deep_pixels_are_scaled_not_clipped(kind, last, dtype):
    assert near(to_image(ramp(kind, last, dtype)).getpixel((4, 4)), (145, 145, 145), slack=2)


HOSTILE = {
    "thin": (Image.new("RGB", (2001, 10)), "too thin, 2001x10"),
    "empty": (Image.new("RGB", (0, 5)), "empty"),
    "truncated": (encode(Image.effect_noise((64, 64), 50))[:-1000], "truncated"),
    "no-bytes": (b"", "damaged"),
    "html": (b"<html><body>404</body></html>", "damaged or none of JPEG, PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "damaged"),
    "nothing-inside": ({"bytes": None, "path": None}, "type NoneType"),
    "number": (7, "type int instead"),
}


@pytest.mark.parametrize("value, why", HOSTILE.values(), ids=HOSTILE)
def test_an_image_that_cannot_be_used_is_refused_with_its_reason(value, why):
    with pytest.raises(ValueError, match=why):
        to_image(value)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 25_000_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)  # the image has 600 pixels
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="exceeds limit of 598 pixels"):
        to_image(png())


def test_a_ratio_of_exactly_200_is_read_as_qwen_does():
    assert to_image(png(size=(2000, 10))).size == (2000, 10)


@pytest.fixture
def folders(tmp_path):
    """data/rows.jsonl may read data/ and, as --image_folder, pictures/, but not secret.png."""
    for name in ("data/sub", "pictures", "blobs"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("secret.png", "data/sub/a.png", "pictures/b.png", "blobs/0123"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "data/link.png").symlink_to("../blobs/0123")  # as in a hub snapshot
    (tmp_path / "linked").symlink_to("pictures")
    return tmp_path


@pytest.mark.parametrize(
    "path, image_folder",
    [
        ("sub/a.png", None),
        ("sub/a.png", "pictures"),  # not there, but beside the data
        ("b.png", "pictures"),
        ("b.png", "linked"),
        ("{here}/pictures/b.png", "pictures"),
        ("{here}/pictures/b.png", "linked"),
        ("{here}/linked/b.png", "pictures"),
        ("{here}/data/sub/a.png", None),
        ("sub/../link.png", None),
    ],
)
def test_paths_into_the_folders_that_the_user_named_are_read(folders, path, image_folder):
    rows = [plain(0, image=path.format(here=folders)), plain(1, image={"path": "sub/a.png"})]
    image_folder = image_folder and folders / image_folder
    rows = load_rows(
        str(write(folders / "data/rows.jsonl", rows)), "eval", image_folder=image_folder
    )
    assert [row["images"][0].size for row in rows] == [(30, 20)] * 2


@pytest.mark.parametrize(
    "path, why",
    [
        ("../secret.png", "leads out of"),
        ("sub/../../secret.png", "leads out of"),
        ("{here}/secret.png", "leads out of"),
        ("{here}/pictures/b.png", "leads out of"),  # not named by the user here
        ("gone.png", "No such file"),
        ("sub", "Is a directory"),
        ("a\0b.png", "null"),
        ("x" * 5000, "too long"),
    ],
)
def test_a_path_in_the_data_cannot_leave_the_folders_that_the_user_named(folders, path, why):
    rows = write(folders / "data/rows.jsonl", [plain(0, image=path.format(here=folders))])
    with pytest.raises(BadRow, match=f"^rows-train-0: an image cannot be read: .*{why}"):
        load_rows(str(rows))[0]


# --- files and splits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, train, held_out",
    [
        ("train-0 train-1 validation-0 test-0", "train-0 train-1", "validation-0"),
        ("train testA testB", "train", "testA"),
        ("train testmini test responses notes", "train", "testmini"),
        ("train/a dev/a old", "train/a", "dev/a"),
        ("train val old/train .cache/hub/train responses", "train", "val"),
        ("rows test .cache/train old/rows", "rows", "test"),
        ("SAT_train SAT_val", "SAT_train", "SAT_val"),
        ("2D/train 3D/train val2017", "2D/train 3D/train", "val2017"),
        ("training minival testdev answers", "training", "minival"),
        ("rows testdev", "rows", "testdev"),
        ("a b holdout", "a b", "holdout"),
        ("trainset testset validset contest", "trainset", "validset"),
        ("traindata valdata", "traindata", "valdata"),
        ("questions validate testcases", "questions", "validate"),
        ("train testset", "train", "testset"),
        ("train dev validation test", "train", "validation"),
        ("data development", "data", "development"),
        ("values devices", "devices values", "devices values"),
        ("train responses", "train", "train"),  # the last rows of the train file are held out
    ],
)
def test_beside_a_train_file_nothing_else_is_trained_on(tmp_path, names, train, held_out):
    for name in names.split():
        write(tmp_path / f".home/data/{name}.jsonl", [plain(name, image=None)])
    for split, expected in (("train", train), ("eval", held_out)):
        rows = load_rows(str(tmp_path / ".home/data"), split)
        assert [row["question"] for row in rows] == [f"Question {n}?" for n in expected.split()]


def test_a_folder_with_only_test_files_is_not_trained_on(tmp_path):
    write(tmp_path / "test.jsonl", [plain(0, image=None)])
    with pytest.raises(UserError, match="for train in .*, only .*test.jsonl"):
        load_rows(str(tmp_path))
    assert (
        len(load_rows(str(tmp_path), "eval")) == len(load_rows(str(tmp_path / "test.jsonl"))) == 1
    )


@pytest.mark.parametrize("size, held_out", [(19, 19), (20, 1), (60, 3), (4100, 200)])
def test_a_single_file_holds_out_its_last_rows_unless_it_is_small(tmp_path, size, held_out):
    path = write(tmp_path / "f.jsonl", [plain(n, image=None) for n in range(size)])
    train, held = load_rows(str(path)), load_rows(str(path), "eval")
    assert len(held) == held_out and len(train) == (size if size < 20 else size - held_out)
    assert (train[0]["place"], held[0]["place"]) == (0, size - held_out)
    assert held[held_out - 1]["place"] == size - 1


def test_only_the_rows_of_the_subset_are_read_from_a_file(tmp_path, monkeypatch):
    path = write(tmp_path / "f.jsonl", [plain(n, image=None) for n in range(3)])
    path.write_text(path.read_text() + "{broken")
    assert len(load_rows(str(path), subset=3)) == 3
    with pytest.raises(UserError, match="cannot read .*f.jsonl, row 3: "):
        load_rows(str(path))
    table = pa.Table.from_pylist([plain(n) for n in range(200)])
    pq.write_table(table, tmp_path / "g.parquet", row_group_size=32)
    read, batches = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda *args: (read.append(batch) or batch for batch in batches(*args)),
    )
    assert len(load_rows(str(tmp_path / "g.parquet"), "eval", subset=40)) == 2
    assert sum(map(len, read)) == 3 * 32  # the first 32 twice: to see that there are any


def test_a_table_without_rows_is_named(tmp_path):
    empty = pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="no rows in .*empty.parquet"):
        load_rows(str(tmp_path / "empty.parquet"))


def test_a_file_that_changed_is_read_again_and_one_that_did_not_is_not(tmp_path, monkeypatch):
    for text in ("old", "new one"):
        path = write(tmp_path / "f.parquet", [plain(0, question=text)])
        assert load_rows(str(path))[0]["question"] == text
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write", lambda *_: pytest.fail("again"))
    assert load_rows(str(path))[0]["question"] == "new one"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read there")
def test_a_large_single_row_group_is_read_in_bounded_memory(tmp_path, home):
    """200 MB, uncompressed; SAT's own is 5 GB in this shape."""
    noise = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8).tobytes()
    columns = {"image_bytes": [[noise[n % 20_000 :][:20_000]] for n in range(10_000)]}
    columns |= {name: ["a"] * 10_000 for name in ("question", "question_type", "correct_answer")}
    columns |= {"answers": [["a", "b"]] * 10_000}
    path = tmp_path / "SAT_train.parquet"
    options = {"use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table(columns), path, row_group_size=10**9, **options)
    assert path.stat().st_size > 196e6 and pq.ParquetFile(path).num_row_groups == 1
    script = f"""
        import datasets, datasets.config, data
        datasets.config.HF_DATASETS_CACHE = {str(home)!r}
        # not ru_maxrss, which starts at the size of the process that started this one
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
        before = peak()
        rows = data.load_rows("sat", data_path={str(path)!r})
        assert len(rows.records[9_799]["record"]["image_bytes"][0]) == 20_000
        print(len(rows), peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, grown = map(int, done.stdout.split())
    assert rows == 9_800 and grown < 170  # MB; the column alone has 200


# --- the hub -------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_one_line_that_tells_how_to_continue():
    for name in ("sat", "cvbench", "owner/name"):
        with pytest.raises(UserError, match="cannot get dataset .*/.* from the hub.*--dataset"):
            load_rows(name)


def test_a_hub_snapshot_is_read_through_its_links_and_names_its_commit(home):
    repo, commit = home / "hub/datasets--owner--name", "0" * 40
    snapshot = repo / "snapshots" / commit
    for folder in ("refs", "blobs", f"snapshots/{commit}/images"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "blobs/11").write_bytes(png())
    write(repo / "blobs/22.jsonl", [plain(0, image="images/a.png")]).rename(repo / "blobs/22")
    (snapshot / "images/a.png").symlink_to("../../../blobs/11")
    (snapshot / "train.jsonl").symlink_to("../../blobs/22")
    rows = load_rows("owner/name")
    assert rows[0]["images"][0].size == (30, 20) and rows.commit == commit
    assert load_rows(str(snapshot))[0]["images"][0].size == (30, 20)


@pytest.mark.parametrize(
    "name, there, fetched",
    [
        ("sat", "SAT_static SAT_test SAT_train SAT_val", "SAT_train SAT_val"),
        ("sat-val", "SAT_train SAT_val", "SAT_val"),
        ("cvbench", "img/2D/x test_2d test_3d", "test_2d test_3d"),
        (
            "blink-depth",
            "Art_Style/val-0 Relative_Depth/test-0 Relative_Depth/val-0",
            "Relative_Depth/val-0",
        ),
        ("owner/name", "data/train-0 data/test-0", "data/train-0 data/test-0"),
    ],
)
def test_only_the_files_that_are_read_are_fetched_at_the_revision(
    tmp_path, monkeypatch, name, there, fetched
):
    def download(repo_id, *, repo_type, revision, allow_patterns):
        assert (repo_type, revision) == ("dataset", "v2")
        listing = [f"{file}.parquet" for file in there.split()]
        chosen = [
            *huggingface_hub.utils.filter_repo_objects(listing, allow_patterns=allow_patterns)
        ]
        assert chosen == [f"{file}.parquet" for file in fetched.split()]
        for file in chosen:
            write(tmp_path / file, [sat(0)])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    rows = load_rows(name, "eval", revision="v2")
    assert len(rows) == (2 if name == "cvbench" else 1) and rows.commit == tmp_path.name


# --- what the user gets wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, why",
    [
        ("geoqua", None, "geoqua is no dataset, folder or file; did you mean geoqa"),
        ("{here}/gone.parquet", None, "gone.parquet does not exist"),
        ("{here}", None, "no .*parquet or .*jsonl for train in"),
        ("{here}/x.csv", "a,b", "no .*parquet or .*jsonl for train in .*x.csv"),
        ("{here}/x.parquet", "not parquet", "cannot read .*x.parquet"),
        ("{here}/x.parquet", "", "cannot read .*x.parquet"),
        ("{here}/x.jsonl", "", "no rows in .*x.jsonl"),
        ("{here}/x.jsonl", '{"question": 1}\n{', "cannot read .*x.jsonl, row 1"),
        ("{here}/x.jsonl", "[1]\n", "cannot read .*x.jsonl, row 0"),
        ("{here}/x.jsonl", '[{"question": 1, "answer": 2}]', "cannot read .*x.jsonl, row 0"),
        ("", None, "is no dataset, folder or file"),
        ("{here}/x.jsonl", "[" * 100_000, "cannot read .*x.jsonl, row 0"),
        ("{here}/x.jsonl", '{"q": 1, "a": 2}\n', "x.jsonl has no column `question`, only a, q"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_clear_line(tmp_path, name, text, why):
    path = name.format(here=tmp_path)
    if text is not None:
        Path(path).write_text(text)
    with pytest.raises(UserError, match=why) as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)
