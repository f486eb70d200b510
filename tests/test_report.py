"""Properties of report.py, on run folders written here, and of its page in a real browser."""

import functools
import html.parser
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import report
from run import source_hash

CONFIG = {"model": "toy", "dataset": "toy", "seed": 0, "max_steps": 150, "beta": 0.0}
CONFIG |= {"num_generations": 8, "rewards": ["accuracy", "format"], "versions": {"torch": "2.13"}}
HELD_OUT = [("Count", 0), ("Relation", 1), ("Depth", 2), ("Distance", 3)]
LOOK = "look: red circle 1 2 large. blue square 3 1 small."


def learned(step: int, steps: int, beta: float) -> float:
    return (1 - 4 * beta) / (1 + math.exp(5 - 12 * step / steps))


def update(rng: random.Random, step: int, steps: int, beta: float) -> dict:
    """The metrics of an update of a run that learns to look."""
    skill = learned(step, steps, beta)
    noise = functools.partial(rng.gauss, 0)
    accuracy = min(1.0, max(0.0, 0.4 + 0.45 * skill + noise(0.05)))
    form = min(1.0, 0.8 + 0.2 * skill + noise(0.01))
    return {
        "step": step,
        "loss": noise(0.02),
        "reward": accuracy + form,
        "reward_std": 0.5 - 0.3 * skill + noise(0.04),
        "rewards/accuracy": accuracy,
        "rewards/format": form,
        "frac_reward_zero_std": min(1.0, max(0.0, 0.1 + 0.5 * skill + noise(0.06))),
        "completions/mean_length": 9 + 24 * skill + noise(1.5),
        "completions/clipped_ratio": max(0.0, 0.02 + noise(0.01)),
        "kl": 0.3 * skill + abs(noise(0.01)),
        "entropy": 0.9 - 0.5 * skill + noise(0.03),
        "clip_ratio": 0.0,
        "grad_norm": abs(0.8 + noise(0.3)),
        "learning_rate": 1e-6 * (1 - step / steps),
        "seconds/rollout": 0.3 + noise(0.02),
        "seconds/train": 0.4 + noise(0.02),
        "tokens_per_second": 2000 + noise(100),
    }


def evaluation(rng: random.Random, step: int, steps: int, beta: float) -> dict:
    skill, noise = learned(step, steps, beta), rng.gauss(0, 0.02)
    tasks = {f"eval/{task}": 0.4 + 0.1 * i * skill + noise for task, i in HELD_OUT}
    tasks["eval/accuracy"] = 0.4 + 0.45 * skill + noise
    return tasks | {"eval/completion_length": 9 + 24 * skill + 20 * noise}


def group(rng: random.Random, step: int, steps: int, split: str, i: int, G: int) -> dict:
    """A line of rollouts.jsonl: later completions look first, a few look again."""
    task, options = HELD_OUT[i % 4][0], ["left", "right"]
    texts, right = [], []
    for _ in range(1 if split == "eval" else G):
        looks, answer = rng.random() < step / steps, rng.choice(options)
        again = " wait, let me look again. red circle 1 2 large." if rng.random() < 0.1 else ""
        thought = f" {LOOK}{again} so left." if looks else f" so {answer}."
        answer = "left" if looks else answer
        texts.append(f"{thought}</think> <answer>{answer}</answer>")
        right.append(float(answer == "left"))
    rewards = {"accuracy": right} | ({"format": [1.0] * G} if split == "train" else {})
    line = {"step": step, "split": split, "id": f"{split}-{i}", "task": task}
    line |= {"question": f"Where is the red circle, question {i}?", "options": options}
    line |= {"answer": "left", "images": [f"images/{i % 4}.png"], "prompt": "User: …<think>"}
    line |= {"completions": texts, "rewards": rewards}
    if split == "train":
        spread = np.std(right, ddof=1)
        line["advantages"] = [float((r - np.mean(right)) / (spread + 1e-4)) for r in right]
    return line


def write_run(folder: Path, steps: int = 150, seed: int = 0, **settings) -> Path:
    """A run's folder as training writes it: 7 evaluations, and two groups logged each step."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    config = CONFIG | {"seed": seed, "max_steps": steps, "output_dir": str(folder)} | settings
    (folder / "config.json").write_text(json.dumps(config))
    for i, colour in enumerate(("#d62728", "#2ca02c", "#1f77b4", "#f2c500")):
        image = Image.new("RGB", (84, 84), "white")
        ImageDraw.Draw(image).ellipse((8 + 14 * i, 20, 38 + 14 * i, 50), fill=colour)
        image.save(folder / f"images/{i}.png")
    every = max(1, steps // 6)
    with (
        open(folder / "metrics.jsonl", "w") as metrics,
        open(folder / "rollouts.jsonl", "w") as rollouts,
    ):
        for step in range(steps + 1):
            line = update(rng, step, steps, config["beta"]) if step else {"step": 0}
            held_out = range(4) if step % every == 0 else ()
            line |= evaluation(rng, step, steps, config["beta"]) if held_out else {}
            metrics.write(json.dumps(line) + "\n")
            for i in held_out:
                rollouts.write(json.dumps(group(rng, step, steps, "eval", i, 1)) + "\n")
            for i in range(2 if step else 0):
                line = group(rng, step, steps, "train", 2 * step + i, 8)
                rollouts.write(json.dumps(line) + "\n")
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def add_completions(folder: Path, texts: list[str], step: int = 150, **fields) -> None:
    """Append held-out groups of one completion each."""
    with open(folder / "rollouts.jsonl", "a") as file:
        for i, text in enumerate(texts):
            line = group(random.Random(0), step, step, "eval", i, 1)
            line |= {"id": f"added-{i}", "completions": [text], "rewards": {"accuracy": [0.0]}}
            file.write(json.dumps(line | fields) + "\n")


class Elements(html.parser.HTMLParser):
    """The page's elements outside charts, all ids, and what its script elements hold."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.ids, self.scripts = [], [], []
        self.inside = self.chart = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.chart |= tag == "svg"
        self.tags += [tag] * (not self.chart)
        self.ids += [value for name, value in attributes if name == "id"]
        self.inside = tag == "script"
        self.scripts += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside, self.chart = False, self.chart and tag != "svg"

    def handle_data(self, text):
        if self.inside:
            self.scripts[-1] += text


@functools.cache
def page_text(*folders: Path) -> str:
    return report.page([report.read_run(folder) for folder in folders])


def page_of(*folders: Path) -> tuple[Elements, dict]:
    elements = Elements(report.page([report.read_run(folder) for folder in folders]))
    return elements, json.loads(elements.scripts[0])


def shown_texts(data: dict) -> list[str]:
    return [answer["text"] for group in data["groups"] for answer in group["answers"]]


# --- reading -------------------------------------------------------------------------------------


def test_lines_that_are_half_written_are_left_out_and_the_rest_is_read(tmp_path):
    folder = write_run(tmp_path / "run", steps=20)
    whole = report.read_run(folder)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 21, "loss": 0.5, "completions": ["a')
    cut = report.read_run(folder)
    assert cut.last_step == 20 and len(cut.groups) == len(whole.groups)
    for key, (steps, values) in whole.series.items():
        assert np.array_equal(cut.series[key], (steps, values))
    (folder / "config.json").write_text('{"model": "to')
    assert report.read_run(folder).config == {}
    assert "<svg" in report.page([report.read_run(folder)])


def test_metrics_without_some_keys_and_without_numbers_still_give_their_curves(tmp_path):
    lines = ['{"step": 0, "eval/accuracy": 0.25}', '{"step": 1, "loss": NaN, "reward": null}']
    lines += ["[]", '{"loss": 1}', '{"step": 2, "loss": 0.5, "odd one": 3, "text": "x"}']
    lines += ['{"step": 3, "loss": 1e999}', '{"step": 4, "loss": 1.5, "grad_norm": "high"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = report.read_run(tmp_path)
    curves = {key: (list(steps), list(values)) for key, (steps, values) in run.series.items()}
    assert curves == {
        "eval/accuracy": ([0], [0.25]),
        "loss": ([2, 4], [0.5, 1.5]),
        "odd one": ([2], [3.0]),
    }
    page = report.page([run])
    assert page.count("<svg") == 3 and "odd one" in page


def test_of_two_lines_for_a_step_the_later_counts(tmp_path):
    lines = [
        {"step": 1, "loss": 1.0, "kl": 0.1},
        {"step": 2, "loss": 2.0},
        {"step": 1, "loss": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = report.read_run(tmp_path)
    assert list(run.series["loss"][1]) == [3.0, 2.0] and list(run.series["kl"][1]) == [0.1]


def test_the_selection_of_completions_is_bounded_and_keeps_first_and_last(tmp_path):
    run = report.read_run(write_run(tmp_path / "run", steps=400))
    train = [g["step"] for g in run.groups if g["split"] == "train"]
    held_out = [g for g in run.groups if g["split"] == "eval"]
    assert len(set(train)) == report.STEPS and (train[0], train[-1]) == (1, 400)
    assert len(train) == report.STEPS * report.TRAIN_GROUPS
    assert sorted({g["step"] for g in held_out})[0] == 0 and len(held_out) == 4 * 7


# --- comparing -----------------------------------------------------------------------------------


def test_seeds_become_their_mean_and_sample_standard_deviation():
    a = np.array([0, 1, 2]), np.array([1.0, 2.0, 3.0])
    b = np.array([0, 1]), np.array([3.0, 6.0])  # still going
    steps, mean, std = report.mean_and_std([a, b], last_step=2)
    assert steps.tolist() == [0, 1, 2]
    assert mean.tolist() == [2.0, 4.0, 3.0]
    assert np.allclose(std, [2**0.5, 8**0.5, 0.0])


def test_a_long_curve_is_drawn_by_the_means_of_equal_spans():
    steps = np.arange(20_000)
    x, mean, std = report.mean_and_std([(steps, steps * 2.0)], last_step=19_999)
    assert len(x) == report.POINTS and std.max() == 0
    assert np.allclose(mean[:2], [39.0, 119.0]) and np.allclose(mean, 2 * x)


def test_smoothing_keeps_a_constant_and_short_curves_as_they_are():
    assert np.allclose(report.smooth(np.full(300, 7.0)), 7.0)
    few = np.array([1.0, 5.0, 2.0])
    assert np.array_equal(report.smooth(few), few)


def test_runs_that_differ_only_in_the_seed_are_grouped_and_others_are_not(tmp_path):
    for beta in (0.0, 0.04):
        for seed in range(2):
            write_run(tmp_path / f"{beta}-{seed}", steps=6, seed=seed, beta=beta)
    runs = [report.read_run(folder) for folder in sorted(tmp_path.iterdir())]
    groups = report.seed_groups(runs)
    assert [[run.name for run in group] for group in groups] == [
        ["0.0-0", "0.0-1"],
        ["0.04-0", "0.04-1"],
    ]
    assert report.labels(groups) == ["beta=0.0 (2 seeds)", "beta=0.04 (2 seeds)"]
    for run in runs:
        run.config = {}
    assert len(report.seed_groups(runs)) == 4  # nothing is known, so nothing is averaged


def test_runs_before_and_after_a_changed_line_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "grpo.py").write_text("epsilon = 0.2\n")
    monkeypatch.setattr("run.__file__", str(tmp_path / "run.py"))
    before = source_hash()
    (tmp_path / "report.py").write_text("changes nothing that is learned\n")
    assert source_hash() == before
    (tmp_path / "grpo.py").write_text("epsilon = 0.3\n")
    assert source_hash() != before

    runs = [report.RunData(tmp_path, "run", {"source": code}) for code in (before, source_hash())]
    assert len(report.seed_groups(runs)) == 2


def test_the_diff_holds_what_differs_and_nothing_else(tmp_path):
    a = report.read_run(write_run(tmp_path / "a", steps=6))
    b = report.read_run(write_run(tmp_path / "b", steps=6, rewards=["accuracy"], epsilon_high=0.3))
    diff = report.config_diff([a, b])
    del diff["output_dir"]
    assert diff == {
        "rewards": ['["accuracy", "format"]', '["accuracy"]'],
        "epsilon_high": [None, "0.3"],
    }
    _, data = page_of(a.folder, b.folder)
    settings = {key: (values, differs) for key, values, differs in data["settings"]}
    assert settings["epsilon_high"] == ([None, "0.3"], True)
    assert settings["versions.torch"] == (["2.13", "2.13"], False)


def test_reflection_is_counted_by_the_documented_phrases(tmp_path):
    folder = write_run(tmp_path / "run", steps=6)
    (folder / "rollouts.jsonl").write_text("")
    add_completions(folder, ["so left.", f"{'x ' * 900}Wait, let me check. {'y ' * 900}"], step=3)
    add_completions(folder, ["so left.", "people wait for a bus"], step=6)
    run = report.read_run(folder)
    steps, shares = run.series["reflection/held-out"]
    assert steps.tolist() == [3, 6] and shares.tolist() == [0.5, 0.0]
    (example,) = run.examples
    before, phrase, after = example["parts"]
    assert (example["step"], phrase) == (3, "Wait")
    assert len(before) == len(after) == 501 and before[0] == after[-1] == "…"


# --- what a model wrote --------------------------------------------------------------------------

HOSTILE = [
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">",
    "</script><script>document.title = 'owned'</script></style></title></textarea>",
    "<!--<script> {{data}} {{title}} ${document.title = 'owned'}",
    "a\x00b\x1b[31m\u202edesrever\u202c \ud800 \u2028 שלום",
]
LONG = "A" * 500_000 + "middle" + "Z" * 500_000


def test_hostile_completions_are_data_and_never_markup(tmp_path):
    folder = write_run(tmp_path / "run", steps=6)
    plain, _ = page_of(folder)
    add_completions(folder, HOSTILE, question=HOSTILE[0], task=HOSTILE[1], options=HOSTILE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model": HOSTILE[1]}))
    elements, data = page_of(folder)
    assert elements.tags == plain.tags and len(elements.scripts) == 2
    texts = shown_texts(data)
    assert all(text in texts for text in HOSTILE[:3])
    assert "a⟨U+0000⟩b⟨U+001B⟩[31m⟨U+202E⟩desrever⟨U+202C⟩ ⟨U+D800⟩ ⟨U+2028⟩ שלום" in texts


def test_a_long_completion_keeps_both_ends_and_says_what_is_missing():
    text = report.shown(LONG, 4000)
    assert text.startswith("A" * 3000) and text.endswith("Z" * 1000)
    assert "996,006 characters left out" in text and len(text) < 4100
    assert len(report.shown("\u202e" * 1_000_000, 4000)) < 4100


def test_a_malformed_rollout_is_shown_as_far_as_it_makes_sense(tmp_path):
    folder = write_run(tmp_path / "run", steps=6)
    add_completions(folder, ["odd"], rewards={"accuracy": ["high"]}, images="no", options=None)
    add_completions(folder, ["odder"], rewards=[1], advantages=[float("nan")], images=[7, "a\0b"])
    add_completions(folder, ["gone"], completions=None)
    add_completions(folder, ["numb"], completions=[3, None], id=["a"], task={}, question=5)
    texts = shown_texts(page_of(folder)[1])
    assert "odder" in texts and "3" in texts and "gone" not in texts


def test_images_come_from_the_run_folder_only_and_once(tmp_path):
    folder = write_run(tmp_path / "run", steps=6)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (20, 20), "red").save(secret)
    (folder / "images/link.png").symlink_to(secret)
    (folder / "images/broken.png").write_bytes(b"\x89PNG no more")
    for name in ("../secret.png", str(secret), "images/link.png", "images/gone.png", ".", ""):
        assert report.thumbnail(folder, name) is None, name
    assert report.thumbnail(folder, "images/broken.png") is None
    assert report.thumbnail(folder, "images/0.png").startswith("data:image/png;base64,")
    add_completions(folder, ["see"], images=["../secret.png", "images/0.png"])
    _, data = page_of(folder)
    assert len(data["images"]) == 4
    (added,) = [g for g in data["groups"] if g["id"] == "added-0"]
    assert added["images"][0] is None and added["images"][1] is not None


# --- the files it writes -------------------------------------------------------------------------


def test_the_page_is_the_same_each_time_and_its_ids_are_unique(run_folder):
    text = report.page([report.read_run(run_folder)])
    assert text == report.page([report.read_run(run_folder)])
    ids = Elements(text).ids
    assert len(ids) == len(set(ids)) and text.count("<svg") == 17
    assert report.INK not in text  # charts take the page's colour
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) - {"x"}
    assert references <= set(ids)


@pytest.mark.parametrize("runs", [1, 3])
def test_a_picture_is_written_for_a_readme(tmp_path, runs):
    folders = [write_run(tmp_path / f"{i}", beta=0.02 * i) for i in range(runs)]
    report.png(folders, tmp_path / "report.png")
    image = Image.open(tmp_path / "report.png")
    assert image.format == "PNG" and image.width >= 1600 and image.width > 2 * image.height
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    drawn = [tuple(bytes.fromhex(c[1:])) in colours for c in report.COLOURS]
    assert sum(drawn) == max(2, runs)  # a metric each, or a run each


def command(*arguments) -> subprocess.CompletedProcess:
    script = Path(report.__file__)
    argv = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_the_command_writes_the_page_and_the_picture(run_folder, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    done = command(run_folder, "--out", page, "--png", picture)
    assert done.returncode == 0 and done.stderr == ""
    assert page.stat().st_size > 100_000 and picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ([], 2, ["RUN"]),
        (["run", "--pgn", "x"], 2, ["--pgn", "valid:", "--png", "--out"]),
        (["nowhere"], 1, ["nowhere", "no run"]),
        ([""], 1, ["no run", "inside", "runs/good"]),
        (["started"], 1, ["started", "no metrics yet"]),
        (["runs/good", "--out", "nowhere/report.html"], 1, ["nowhere/report.html"]),
    ],
)
def test_a_mistake_is_answered_in_one_line(tmp_path, monkeypatch, arguments, code, words):
    write_run(tmp_path / "runs/good", steps=3)
    (tmp_path / "started").mkdir()
    (tmp_path / "started/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = command(*["runs" if argument == "" else argument for argument in arguments])
    assert done.returncode == code and len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_20000_updates_and_100_mb_of_rollouts_give_a_small_page_in_time(tmp_path):
    folder = write_run(tmp_path / "run", steps=6)
    rng = random.Random(0)
    noise = np.random.default_rng(0).integers(0, 255, (60, 448, 448, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"images/{i}.png", compress_level=1)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps(update(rng, step, 20_000, 0.0)) + "\n")
    words = "look red square 1 3 large so we count <b> wait a for the objects there and".split()
    texts = [" ".join(rng.choices(words, k=150)) for _ in range(64)]
    with open(folder / "rollouts.jsonl", "w") as file:
        step = 0
        while file.tell() < 100_000_000:
            step += 1
            splits = ["train"] * 2 + ["eval"] * (6 * (step % 50 == 0))
            for i, split in enumerate(splits):
                line = group(rng, step, 20_000, split, i, 8)
                place = i if split == "eval" else 2 * step + i
                line |= {"id": f"{split}-{place}", "images": [f"images/{place % 60}.png"]}
                line["completions"] = rng.sample(texts, len(line["completions"]))
                file.write(json.dumps(line) + "\n")
    began = time.perf_counter()
    done = command(folder, "--out", tmp_path / "page.html")
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    assert seconds < 30
    assert (tmp_path / "page.html").stat().st_size < 20_000_000


# --- in a real browser ---------------------------------------------------------------------------

FLAGS = """--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run
    --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A fresh headless Chromium that logs its console and its requests; nothing is downloaded."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary, driver = (
        next(filter(None, map(shutil.which, names)), None),
        shutil.which("chromedriver"),
    )
    if not (binary and driver):
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(driver)
    chromium = webdriver.Chrome(options=options, service=service)
    yield chromium
    chromium.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page of some runs on a screen of a given width, light or dark."""

    def open_page(*folders: Path, width: int = 1280, theme: str = "light"):
        page = tmp_path / "report.html"
        page.write_text(page_text(*folders), encoding="utf-8")
        screen = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": theme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # what earlier pages left
        browser.get(page.as_uri())
        return browser

    return open_page


def choose(browser, **values) -> list:
    """Set controls as a hand would, then the cards that are shown."""
    for name, value in values.items():
        browser.execute_script(
            "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
            "c.dispatchEvent(new Event(c.type === 'range' ? 'input' : 'change'));",
            name,
            value,
        )
    return browser.find_elements("css selector", "#cards .card")


def test_browser_opens_the_page_without_errors_or_requests(opened, run_folder):
    browser = opened(run_folder)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if "requestWillBeSent" in e["method"]]
    requests = [url for url in requests if not url.startswith("data:")]
    assert requests and set(requests) == {browser.current_url}
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => ["
        "s.getBoundingClientRect().width, s.getBoundingClientRect().height,"
        "[...s.querySelectorAll('path')].filter(p => p.getTotalLength() > 50).length])"
    )
    assert len(sizes) == 17
    assert all(width > 200 and height > 100 and lines > 3 for width, height, lines in sizes)
    images = browser.find_elements("css selector", "#cards img")
    assert [image.get_property("naturalWidth") for image in images] == [84] * 4


def test_browser_slider_moves_through_the_steps(opened, run_folder):
    browser = opened(run_folder)
    slider = browser.find_element("id", "step")
    at = browser.find_element("id", "at")
    seen = [at.text.split()[0]]
    for _ in range(6):
        slider.send_keys("\ue012")  # arrow left
        seen.append(at.text.split()[0])
    assert seen == ["150", "125", "100", "75", "50", "25", "0"]
    replies = browser.find_elements("css selector", "#cards .reply")
    assert len(replies) == 4 and all("look:" not in reply.text for reply in replies)
    (last, *_) = browser.find_elements("css selector", ".history button:last-child")
    last.click()
    assert at.text.startswith("150")
    first, second = browser.find_elements("css selector", "#cards .card:first-child .reply")
    assert "update 0" in first.text and "update 150" in second.text and "look:" in second.text
    browser.find_element("id", "beside").click()
    assert len(browser.find_elements("css selector", "#cards .reply")) == 4


def test_browser_filters_by_task_and_reward_and_shows_the_advantages(opened, run_folder):
    browser = opened(run_folder)
    (card,) = choose(browser, task="=Depth")
    assert "Depth" in card.text
    assert len(choose(browser, task="", step=0)) == 4
    right, wrong = (len(choose(browser, reward=reward)) for reward in ("right", "wrong"))
    assert right + wrong == 4 and 0 < right < 4
    assert choose(browser, reward="both") == []
    assert "Nothing at this update" in browser.find_element("id", "cards").text

    choose(browser, split="train", step=0, reward="any")
    group = next(g for g in report.read_run(run_folder).groups if g["split"] == "train")
    replies = browser.find_elements("css selector", "#cards .card:first-child .reply")
    assert len(replies) == 8
    for reply, answer in zip(replies, group["answers"], strict=True):
        sign = "−" if answer["advantage"] < 0 else "+"
        assert f"advantage {sign}{abs(answer['advantage']):.2f}" in reply.text
    colours = {(a["right"], r.value_of_css_property("border-left-color"))
               for a, r in zip(group["answers"], replies, strict=True)}  # fmt: skip
    assert len(colours) == 2  # right and wrong, a colour each


def test_browser_shows_hostile_completions_as_text(opened, tmp_path):
    folder = write_run(tmp_path / "run", steps=6)
    add_completions(folder, [*HOSTILE, LONG], step=6, question=HOSTILE[0], task=HOSTILE[1])
    browser = opened(folder, width=390)
    assert browser.get_log("browser") == [] and browser.title == "run"
    assert len(browser.find_elements("css selector", "script")) == 2
    texts = browser.find_elements("css selector", "#cards .reply .text")
    shown = [text.text for text in texts]
    assert all(text in shown for text in HOSTILE[:3])
    assert any("⟨U+202E⟩desrever⟨U+202C⟩" in text for text in shown)
    assert any("characters left out" in text for text in shown)
    assert all(text.size["height"] <= 250 and text.size["width"] < 390 for text in texts)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_browser_page_fits_a_phone_and_follows_the_theme(opened, tmp_path, theme):
    folders = [write_run(tmp_path / f"{i}", steps=12, beta=0.02 * i) for i in range(3)]
    browser = opened(*folders, width=390, theme=theme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    brightness = browser.execute_script(
        "const light = (e, name) => getComputedStyle(e)[name].match(/\\d+/g)"
        ".slice(0, 3).reduce((a, b) => a + +b, 0) / 3;"
        "const text = document.querySelector('svg text');"
        "return [light(document.body, 'backgroundColor'), light(text, 'fill')]"
    )
    assert (brightness[0] > 200 and brightness[1] < 80) == (theme == "light")
    assert (brightness[0] < 80 and brightness[1] > 200) == (theme == "dark")
    legend = browser.find_element("id", "legend").text
    assert all(f"beta={0.02 * i}" in legend for i in range(3))
    rows = browser.find_elements("css selector", "#config tr.same")
    assert rows and not any(row.is_displayed() for row in rows)
    browser.find_element("id", "only").click()
    assert all(row.is_displayed() for row in rows)
