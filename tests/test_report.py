"""Properties of report.py and of its page, on run folders written here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report

CONFIG = {"stage": "grpo", "dataset": "toy", "seed": 0, "beta": 0.0, "versions": {"torch": "2"}}
TASKS = ("Count", "Relation", "Depth", "Distance")
GUESS = "so right.</think> <answer>right</answer>"
LOOK = "red circle 1 2 large. wait, let me look again. so left.</think> <answer>left</answer>"


def metrics(step: int, progress: float) -> dict:
    """A line of metrics.jsonl of a run that learns to look again."""
    tasks = {f"eval/{task}": 0.4 + 0.1 * i * progress for i, task in enumerate(TASKS)}
    greedy = {"eval/accuracy": 0.42 + 0.45 * progress, "eval/reflection": progress**3}
    sampled = {"rewards/accuracy": 0.4 + 0.45 * progress, "completions/reflection": progress**3}
    lengths = {"eval/completion_length": 10 + 40 * progress, "completions/mean_length": 26.0}
    others = {"loss": 1e-9 * step, "kl": 0.0, "learning_rate": 5e-5, "my_metric": 2.0}
    return {"step": step} | tasks | greedy | sampled | lengths | others


def group(step: int, split: str, i: int, looks: list[bool]) -> dict:
    """A line of rollouts.jsonl. Exactly the completions that look again are right."""
    right = np.array(looks, dtype=float)
    line = {"step": step, "split": split, "id": f"{split}-{i}", "task": TASKS[i % 4]}
    line |= {"question": f"Where is the red circle, question {i}?", "options": ["left", "right"]}
    line |= {"answer": "left", "images": ["images/0.png"], "prompt": "User: … <think>"}
    line |= {"completions": [LOOK if look else GUESS for look in looks]}
    line |= {"rewards": {"accuracy": right.tolist()}}
    if split == "train":
        line["advantages"] = ((right - right.mean()) / (right.std(ddof=1) + 1e-4)).tolist()
    return line


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, steps: int = 6, **settings) -> Path:
    """Write the folder of a run that evaluates four questions and logs two groups at each step."""
    (folder / "images").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | settings))
    Image.new("RGB", (84, 84), "red").save(folder / "images/0.png")
    write_lines(folder / "metrics.jsonl", [metrics(s, s / steps) for s in range(steps + 1)])
    rollouts = []
    for step in range(steps + 1):
        looks = [g < 4 * step / steps for g in range(4)]
        rollouts += [group(step, "eval", i, [look]) for i, look in enumerate(looks)]
        rollouts += [group(step, "train", 2 * step + i, looks) for i in range(2 if step else 0)]
    write_lines(folder / "rollouts.jsonl", rollouts)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def groups_of(*folders: Path) -> list[list[report.Run]]:
    return report.seed_groups([report.read_run(folder) for folder in folders])


def page_data(*folders: Path) -> dict:
    page = report.page(groups_of(*folders))
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def run_with(loss: dict[int, float], **config: str) -> report.Run:
    return report.Run(Path("folder"), "folder", config, {"loss": loss})


def test_a_line_that_is_cut_is_skipped_and_the_rest_is_read(tmp_path):
    folder = write_run(tmp_path / "run")
    whole = report.read_run(folder)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 21, "loss": 0.5, "completions": ["a')
    cut = report.read_run(folder)
    assert cut.metrics == whole.metrics and cut.groups == whole.groups
    assert len(cut.metrics["loss"]) == 7 and len(cut.groups) == 7 * 4 + 6 * 2


def test_metrics_that_are_not_numbers_are_left_out(tmp_path):
    lines = ['{"step": 0, "eval/accuracy": 0.25}', '{"step": 1, "loss": NaN, "reward": null}']
    lines += ["[]", '{"loss": 1}', '{"step": 2, "loss": 0.5, "text": "x"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = report.read_run(tmp_path)  # without config.json and rollouts.jsonl
    assert run.metrics == {"eval/accuracy": {0: 0.25}, "loss": {2: 0.5}}
    assert page_data(tmp_path)["curves"]["loss"] == [[[2.0, 0.5, 0.0, 0.5, 0.0]]]


@pytest.mark.parametrize("split, first", [("eval", 0), ("train", 1)])
def test_the_selected_steps_are_evenly_spaced_with_first_and_last(tmp_path, split, first):
    line = {"split": split, "completions": ["a"]}
    lines = [line | {"step": step} for step in range(first, 1501) for _ in range(20)]
    write_lines(tmp_path / "rollouts.jsonl", lines)
    groups = report.read_rollouts(tmp_path / "rollouts.jsonl", last_step=1500)
    steps = [group["step"] for group in groups][:: report.SHOWN_GROUPS[split]]
    assert steps[0] == first and steps[-1] == 1500 and len(steps) == report.SHOWN_STEPS + 1
    assert len(groups) == len(steps) * report.SHOWN_GROUPS[split]
    assert set(np.diff(steps)) <= {37, 38}  # 1500 / 40


def test_a_completion_is_cut_around_its_first_reflection_phrase():
    assert report.split_text("so. Wait, wait.") == ["so. ", "Wait", ", wait."]
    assert report.split_text("people wait for a bus") == ["people wait for a bus"]


def test_images_come_only_from_the_run_folder(tmp_path):
    folder = write_run(tmp_path / "run")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "secret.png")
    (folder / "images/broken.png").write_bytes(b"\x89PNG no more")
    names = ["../secret.png", str(tmp_path / "secret.png"), "broken.png", "\0.png", "images/0.png"]
    uris = report.thumbnails(report.Run(folder, "run", groups=[{"images": names}]))
    assert {name: uri[:16] for name, uri in uris.items()} == {"images/0.png": "data:image/webp;"}


def test_seeds_become_their_mean_and_sample_standard_deviation():
    runs = [run_with({0: 1.0, 1: 2.0, 2: 3.0}), run_with({0: 3.0, 1: 6.0})]  # one still runs
    steps, mean, std, smooth_mean, smooth_std = report.curve(runs, "loss")
    assert steps.tolist() == [0, 1, 2] and mean.tolist() == [2.0, 4.0, 3.0]
    assert np.allclose(std, [2**0.5, 8**0.5, 0.0])
    assert np.array_equal(smooth_mean, mean) and np.array_equal(smooth_std, std)  # too short
    assert report.curve(runs, "no such metric").shape == (5, 0)


def test_smoothing_averages_over_a_thirtieth_and_over_less_at_the_ends():
    expected = [0.5, *range(1, 59), 58.5]  # windows of 3, and of 2 at the ends
    assert np.allclose(report.smooth(np.arange(60.0)), expected)


def test_a_long_curve_keeps_its_first_and_its_last_point():
    rows = report.curve([run_with({step: step * 2.0 for step in range(20_000)})], "loss")
    assert rows.shape == (5, report.MAX_POINTS)
    assert rows[:2, [0, -1]].tolist() == [[0, 19_999], [0, 39_998]]


def test_runs_that_differ_only_in_the_seed_are_grouped_and_others_are_not(tmp_path):
    for beta in (0.0, 0.04):
        for seed in range(2):
            write_run(tmp_path / f"{beta}-{seed}", seed=seed, beta=beta, source="a1")
    groups = groups_of(*sorted(tmp_path.iterdir()))
    names = [[Path(run.name).name for run in group] for group in groups]
    assert names == [["0.0-0", "0.0-1"], ["0.04-0", "0.04-1"]]
    assert report.labels(groups) == ["beta=0.0 (2 seeds)", "beta=0.04 (2 seeds)"]
    changed = write_run(tmp_path / "changed", seed=0, beta=0.04, source="b2")  # edited code
    assert report.labels(groups_of(changed, tmp_path / "0.04-0")) == ["source=b2", "source=a1"]


def test_labels_say_which_run_is_sft_and_which_is_grpo():
    sft = run_with({}, learning_rate="0.1", stage="sft", target="answers")
    grpo = run_with({}, learning_rate="0.2", stage="grpo", beta="0.0")
    labels = report.labels([[sft], [grpo]])
    assert labels == ["stage=sft, learning_rate=0.1", "stage=grpo, learning_rate=0.2"]


def test_runs_without_settings_are_never_averaged():
    runs = [report.Run(Path(name), name) for name in "ab"]
    assert report.seed_groups(runs) == [[run] for run in runs]


def test_the_picture_has_three_panels_with_greedy_and_sampled_lines(folder):
    picture = report.figure(groups_of(folder))
    assert [ax.get_title() for ax in picture.axes] == [title for title, *_ in report.PANELS]
    legend = [text.get_text() for text in picture.legends[0].get_texts()]
    assert legend == ["greedy, on held-out questions", "sampled, in training"]
    ends = [[line.get_ydata()[-1] for line in ax.lines] for ax in picture.axes]
    assert np.allclose(ends, [[87, 85], [50, 26], [100, 100]])


def test_several_runs_have_a_colour_each_and_are_named_in_the_picture(tmp_path):
    folders = [write_run(tmp_path / str(i), beta=0.02 * i) for i in range(3)]
    picture = report.figure(groups_of(*folders), names=["one", "t$wo$", "three"])
    texts = [text.get_text() for text in picture.legends[0].get_texts()]
    assert texts[2:] == ["one", "t$wo$", "three"]
    colours = [line.get_color() for line in picture.axes[0].lines]
    assert colours == [colour for colour in report.COLOURS[:3] for _ in range(2)]


HOSTILE = [
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">",
    "</script><script>document.title = 'owned'</script></style></title></textarea>",
    "<!--<script> {{data}} {{script_hash}} ${document.title = 'owned'}",
    "\x00 \u2028 \u202edesrever",
]


def write_hostile(folder: Path) -> Path:
    write_run(folder, model=HOSTILE[1])
    line = group(6, "train", 0, [True] * 4)
    line |= {"question": HOSTILE[0], "task": HOSTILE[1], "options": HOSTILE, "prompt": HOSTILE[2]}
    write_lines(folder / "rollouts.jsonl", [line | {"completions": HOSTILE}])
    return folder


def test_what_a_run_contains_is_data_and_never_markup(folder, tmp_path):
    hostile = write_hostile(tmp_path / "hostile")
    assert report.page(groups_of(hostile)).count("<") == report.page(groups_of(folder)).count("<")
    (line,) = page_data(hostile)["groups"][0]
    assert ["".join(parts) for parts in line["completions"]] == HOSTILE


def test_the_page_refers_to_nothing_outside_itself(folder):
    page = report.page(groups_of(folder))
    assert set(re.findall(r"https?://[^/]*/", page)) <= {"http://www.w3.org/"}  # namespaces
    assert not re.search(r"<(link|iframe|script[^>]* src|img)|@import|url\(|fetch\(", page)
    assert "default-src 'none'" in page and "{{" not in page


def command(*arguments) -> subprocess.CompletedProcess:
    argv = [sys.executable, report.__file__, *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_the_command_writes_the_page_and_the_picture(folder, tmp_path):
    done = command(folder, "--out", tmp_path / "new/page.html", "--png", tmp_path / "picture.png")
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "new/page.html").read_text("utf-8") == report.page(groups_of(folder))
    assert Image.open(tmp_path / "picture.png").size == (1800, 600)


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ([], 2, ["RUN"]),
        (["run", "--pgn", "x"], 2, ["--pgn", "valid:", "--png", "--out"]),
        (["nowhere"], 1, ["nowhere", "metrics.jsonl"]),
        (["started"], 1, ["started", "no metrics yet"]),
    ],
)
def test_a_mistake_is_answered_in_one_line(tmp_path, monkeypatch, arguments, code, words):
    (tmp_path / "started").mkdir()
    (tmp_path / "started/metrics.jsonl").write_text('{"step": 1, "lo')
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert done.returncode == code and len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in ["report.py: error: ", *words])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
in_browser = pytest.mark.skipif(
    not (CHROMIUM and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield chromium
    chromium.quit()


def open_page(browser, path: Path, *folders: Path, width: int = 1280, theme: str = "light"):
    path.write_text(report.page(groups_of(*folders)), encoding="utf-8")
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get_log("performance")  # forget what earlier pages requested
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []


def texts(browser, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def choose(browser, **values) -> list:
    """Set controls as a user would. Returns the cards that are shown then."""
    for name, value in values.items():
        script = """const c = document.getElementById(arguments[0]); c.value = arguments[1];
                    c.dispatchEvent(new Event(c.type === "range" ? "input" : "change"));"""
        browser.execute_script(script, name, value)
    return browser.find_elements("css selector", "#cards .card")


@in_browser
def test_the_summary_and_the_charts_show_the_run(browser, folder, tmp_path):
    open_page(browser, tmp_path / "page.html", folder)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if "requestWillBeSent" in m["method"]]
    assert {url for url in urls if not url.startswith("data:")} == {browser.current_url}
    cells = texts(browser, "#summary td")
    assert browser.title == cells[0] and cells[0].endswith("/one")
    assert cells[1:] == ["6", "42.0% → 87.0%", "10.0 → 50.0", "0.0% → 100.0%"]
    assert texts(browser, "#zero") == ["Always zero (below 1e-7): loss, kl"]
    titles = ["Accuracy", "Response length", "Looking again", "Held-out accuracy by task"]
    titles += ["Learning rate", "my metric"]  # and neither loss nor kl
    assert [title.split("\n")[0] for title in texts(browser, ".chart h3")] == titles
    labels = browser.find_elements("css selector", ".plot text")
    assert {label.value_of_css_property("font-size") for label in labels} == {"12px"}
    assert {"% of answers", "tokens", "update"} <= {label.text for label in labels}
    script = """const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
                const clientX = box.left + 44 + (box.width - 52) / 3;  // between the margins
                plot.dispatchEvent(new PointerEvent("pointermove", { clientX }));"""
    assert "update 6\n" in (last := texts(browser, ".chart")[0]) and "87%" in last
    browser.execute_script(script)  # a third of the updates, and of the way from 42 to 87 %
    assert "update 2\n" in (there := texts(browser, ".chart")[0]) and "57%" in there


@in_browser
def test_the_slider_and_the_filters_choose_the_answers(browser, folder, tmp_path):
    open_page(browser, tmp_path / "page.html", folder)
    assert "column 2, row 1" in texts(browser, "#toy")[0]
    assert len(choose(browser, step=0)) == 4 and texts(browser, "#at")[0].startswith("0 ")
    assert choose(browser, kind="right") == [] and len(choose(browser, kind="wrong")) == 4
    assert len(choose(browser, step=3)) == 2  # at update 3 of 6, two of four are right
    assert len(choose(browser, kind="reflects")) == 2 and texts(browser, "#cards mark")[0] == "wait"
    assert choose(browser, task="=Depth") == []
    (card,) = choose(browser, step=6)
    assert "update 0" in card.text and "update 6" in card.text  # before and after
    choose(browser, split="train", step=2, kind="both", task="")
    assert texts(browser, "#at") == ["3 · 2 of 2 shown"]
    replies = browser.find_elements("css selector", "#cards .card:first-child .reply")
    advantages = [reply.text.split("advantage ")[1][:5] for reply in replies]
    assert advantages == ["+0.87", "+0.87", "−0.87", "−0.87"]  # 1/2 / (sqrt(1/3) + 1e-4)
    colours = [reply.value_of_css_property("border-left-color") for reply in replies]
    assert colours[0] == colours[1] != colours[2] == colours[3]


@in_browser
def test_hostile_text_stays_text_on_a_dark_phone(browser, tmp_path):
    folder, other = write_hostile(tmp_path / "hostile"), write_run(tmp_path / "other", stage="sft")
    open_page(browser, tmp_path / "page.html", folder, other, width=390, theme="dark")
    assert "hostile" in browser.title and len(browser.find_elements("css selector", "script")) == 2
    (card,) = choose(browser, split="train")
    assert all(text in card.text for text in HOSTILE[:3])
    assert all(f"stage={stage}" in texts(browser, "#legend")[0] for stage in ("grpo", "sft"))
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    body, label = (browser.find_element("css selector", s) for s in ("body", ".plot text"))
    assert body.value_of_css_property("background-color") == "rgba(20, 22, 26, 1)"
    assert label.value_of_css_property("fill") == "rgb(223, 227, 232)"
