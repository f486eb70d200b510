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
from rewards import reflects

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


def runs_of(*folders: Path) -> list[dict]:
    return [report.read_run(folder) for folder in folders]


def page_data(*folders: Path) -> dict:
    page = report.page(runs_of(*folders))
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_line_that_is_cut_is_skipped_and_the_rest_is_read(tmp_path):
    folder = write_run(tmp_path / "run")
    whole = report.read_run(folder)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 21, "loss": 0.5, "completions": ["a')
    cut = report.read_run(folder)
    assert cut["metrics"] == whole["metrics"] and cut["rollouts"] == whole["rollouts"]
    assert len(cut["metrics"]["loss"]) == 7 and len(cut["rollouts"]) == 7 * 4 + 6 * 2


def test_metrics_that_are_not_numbers_are_left_out(tmp_path):
    lines = ['{"step": 0, "eval/accuracy": 0.25}', '{"step": 1, "loss": NaN, "reward": null}']
    lines += ["[]", '{"loss": 1}', '{"step": 2, "loss": 0.5, "text": "x"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = report.read_run(tmp_path)  # without config.json and rollouts.jsonl
    assert run["metrics"] == {"eval/accuracy": {0: 0.25}, "loss": {2: 0.5}}
    assert page_data(tmp_path)["runs"][0]["metrics"]["loss"] == {"2": 0.5}


def test_the_rollouts_of_a_long_run_are_evenly_spaced_with_first_and_last(tmp_path):
    folder, lines = write_run(tmp_path / "run"), []
    for step in range(1501):
        lines += [group(step, "train", i, [True, False]) for i in range(2 if step else 0)]
        lines += [group(step, "eval", i, [True]) for i in range(3 if step % 100 == 0 else 0)]
    write_lines(folder / "rollouts.jsonl", lines)
    shown = {"train": [], "eval": []}
    for line in report.read_run(folder)["rollouts"]:
        shown[line["split"]].append(line["step"])
    assert shown["eval"] == [step for step in range(0, 1501, 100) for _ in range(3)]
    steps = shown["train"][::2]  # each has both of its groups
    assert steps == shown["train"][1::2] and steps[0] == 1 and steps[-1] == 1500
    assert 20 <= len(steps) <= 41 and len(set(np.diff(steps[:-1]))) == 1


def test_a_long_curve_keeps_its_first_its_last_and_every_held_out_point(tmp_path):
    lines = [{"step": step, "loss": step * 2.0} for step in range(20_000)]
    for line in lines[::500]:
        line["eval/accuracy"] = 0.5
    write_lines(tmp_path / "metrics.jsonl", lines)
    metrics = report.read_run(tmp_path)["metrics"]
    assert list(metrics["eval/accuracy"]) == list(range(0, 20_000, 500))
    steps = list(metrics["loss"])
    assert steps == sorted(steps) and {0, 19_999} <= set(steps) and 1000 < len(steps) < 2_050
    assert all(value == 2 * step for step, value in metrics["loss"].items())


def test_runs_of_different_lengths_are_thinned_to_common_steps():
    long, short = (report.thin([{"step": i} for i in range(n)], 100) for n in (1500, 700))
    assert [line for line in long if line["step"] < 699] == short[:-1:2]


def test_images_come_only_from_the_run_folder(tmp_path):
    folder = write_run(tmp_path / "run")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "secret.png")
    (folder / "images/broken.png").write_bytes(b"\x89PNG no more")
    names = ["../secret.png", str(tmp_path / "secret.png"), "broken.png", "\0.png", "images/0.png"]
    write_lines(folder / "rollouts.jsonl", [group(0, "eval", 0, [True]) | {"images": names}])
    uris = report.read_run(folder)["images"]
    assert {name: uri[:16] for name, uri in uris.items()} == {"images/0.png": "data:image/webp;"}


def test_the_picture_has_three_panels_with_greedy_and_sampled_lines(folder):
    picture = report.figure({"one": runs_of(folder)})
    assert [ax.get_title() for ax in picture.axes] == [title for title, *_ in report.PANELS]
    legend = [text.get_text() for text in picture.legends[0].get_texts()]
    assert legend == ["greedy, on held-out questions", "sampled, in training"]
    ends = [[line.get_ydata()[-1] for line in ax.lines] for ax in picture.axes]
    assert np.allclose(ends, [[87, 85], [50, 26], [100, 100]])


def test_the_lines_of_the_picture_average_over_a_thirtieth_and_over_less_at_the_ends():
    run = {"metrics": {"rewards/accuracy": {step: step / 100 for step in range(60)}}}
    (line,) = (line for line in report.figure({"": [run]}).axes[0].lines if len(line.get_xdata()))
    expected = [0.5, *range(1, 59), 58.5]  # windows of 3, and of 2 at the ends
    assert np.allclose(line.get_ydata(), expected)


def test_several_runs_have_a_colour_each_and_are_named_in_the_picture(tmp_path):
    folders = [write_run(tmp_path / str(i), beta=0.02 * i) for i in range(3)]
    names = ["one", "t$wo$", "three"]
    seeds = [[run, run] for run in runs_of(*folders)]
    picture = report.figure(dict(zip(names, seeds, strict=True)))
    assert [text.get_text() for text in picture.legends[0].get_texts()] == names
    explanation = picture.legends[0].get_title().get_text()
    assert explanation.index("dots: greedy") < explanation.index("without: sampled")
    colours = [line.get_color() for line in picture.axes[0].lines]
    assert colours == [colour for colour in report.COLOURS[:3] for _ in range(4)]
    markers = [line.get_marker() for line in picture.axes[0].lines]
    assert markers == ["o", "o", "None", "None"] * 3


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
    assert report.page(runs_of(hostile)).count("<") == report.page(runs_of(folder)).count("<")
    (line,) = page_data(hostile)["runs"][0]["rollouts"]
    assert line["completions"] == line["options"] == HOSTILE


def test_the_page_refers_to_nothing_outside_itself(folder):
    page = report.page(runs_of(folder))
    assert set(re.findall(r"https?://[^/]*/", page)) <= {"http://www.w3.org/"}  # namespaces
    assert not re.search(r"<(link|iframe|script[^>]* src|img)|@import|url\(|fetch\(", page)
    assert "default-src 'none'" in page and "{{" not in page


def command(*arguments) -> subprocess.CompletedProcess:
    argv = [sys.executable, report.__file__, *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_the_command_writes_the_page_and_the_picture(folder, tmp_path):
    done = command(folder, "--out", tmp_path / "new/page.html", "--png", tmp_path / "picture.png")
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "new/page.html").read_text("utf-8") == report.page(runs_of(folder))
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
    path.write_text(report.page(runs_of(*folders)), encoding="utf-8")
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


def run_script(browser, tmp_path: Path, script: str, *arguments):
    """What a line of JavaScript returns that calls functions of the page's script."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1}')
    open_page(browser, tmp_path / "page.html", tmp_path)
    return browser.execute_script(script, *arguments)


@in_browser
def test_seeds_become_their_mean_and_sample_standard_deviation(browser, tmp_path):
    seeds = [{0: 1.0, 1: 2.0, 2: 3.0}, {0: 3.0, 1: 6.0}]  # one still runs
    runs = [{"metrics": {"loss": seed}} for seed in seeds]
    script = "return [curve(arguments[0], 'loss'), curve(arguments[0], 'no such metric')]"
    rows, nothing = run_script(browser, tmp_path, script, runs)
    steps, mean, std, smooth_mean, smooth_std = map(list, zip(*rows, strict=True))
    assert steps == [0, 1, 2] and mean == [2, 4, 3] and nothing == []
    assert np.allclose(std, [2**0.5, 8**0.5, 0])
    assert smooth_mean == mean and smooth_std == std  # too short


@in_browser
def test_a_step_that_thinning_took_from_one_seed_is_left_out(browser, tmp_path):
    seeds = [{0: 1.0, 1: 9.0, 2: 3.0, 3: 9.0, 4: 5.0, 5: 6.0}, {0: 1.0, 2: 3.0, 4: 5.0}]
    runs = [{"metrics": {"loss": seed}} for seed in seeds]
    rows = run_script(browser, tmp_path, "return curve(arguments[0], 'loss')", runs)
    assert [row[:3] for row in rows] == [[0, 1, 0], [2, 3, 0], [4, 5, 0], [5, 6, 0]]


@in_browser
def test_smoothing_averages_over_a_thirtieth_and_over_less_at_the_ends(browser, tmp_path):
    values = run_script(browser, tmp_path, "return smooth(arguments[0])", list(range(60)))
    assert np.allclose(values, [0.5, *range(1, 59), 58.5])  # windows of 3, and of 2 at the ends


@in_browser
def test_a_completion_is_cut_around_its_first_reflection_phrase(browser, tmp_path):
    texts = ["so. Wait, wait.", "people wait for a bus", "éwait", "hmmé", "on closer look"]
    cuts = run_script(browser, tmp_path, "return arguments[0].map(cut)", texts)
    assert cuts == [["so. ", "Wait", ", wait."], *([text] for text in texts[1:4])] + [
        ["", "on closer look", ""]
    ]
    assert [reflects(text) for text in texts] == [len(parts) > 1 for parts in cuts]


@in_browser
def test_runs_that_differ_only_in_the_seed_are_grouped_and_others_are_not(browser, tmp_path):
    runs = tmp_path / "runs"
    for beta in (0.0, 0.04):
        for seed in range(2):
            write_run(runs / f"{beta}-{seed}", seed=seed, beta=beta, source="a1")
    open_page(browser, tmp_path / "page.html", *sorted(runs.iterdir()))
    assert texts(browser, "#legend span") == ["beta=0 (2 seeds)", "beta=0.04 (2 seeds)"]
    folders = texts(browser, "#summary td:first-child .soft")
    assert folders == ["runs/0.0-0, runs/0.0-1", "runs/0.04-0, runs/0.04-1"]
    assert texts(browser, "#summary td:nth-child(3)") == ["42.0% → 87.0%"] * 2
    changed = write_run(tmp_path / "changed", seed=0, beta=0.04, source="b2")  # edited code
    open_page(browser, tmp_path / "page.html", changed, runs / "0.04-0")
    assert texts(browser, "#legend span") == ["source=b2", "source=a1"]


@in_browser
def test_labels_say_which_run_is_sft_and_which_is_grpo(browser, tmp_path):
    sft = write_run(tmp_path / "a", learning_rate=0.1, stage="sft", target="answers")
    grpo = write_run(tmp_path / "b", learning_rate=2e-5)
    open_page(browser, tmp_path / "page.html", sft, grpo)
    labels = ["stage=sft, learning_rate=0.1", "stage=grpo, learning_rate=2e-5"]
    assert texts(browser, "#legend span") == labels


@in_browser
def test_runs_without_settings_are_never_averaged(browser, tmp_path):
    folders = [write_run(tmp_path / "runs" / name) for name in "ab"]
    for folder in folders:
        (folder / "config.json").unlink()
    open_page(browser, tmp_path / "page.html", *folders)
    assert texts(browser, "#summary td:first-child") == ["runs/a", "runs/b"]


@in_browser
def test_a_metric_that_is_zero_stays_in_a_chart_that_is_not(browser, tmp_path):
    lines = [{"step": i, "eval/reflection": 0.0, "completions/reflection": 0.5} for i in range(3)]
    write_lines(tmp_path / "metrics.jsonl", [line | {"kl": 0.0} for line in lines])
    open_page(browser, tmp_path / "page.html", tmp_path)
    (values,) = texts(browser, ".values")
    assert values.split("\n") == ["greedy, held-out", "0%", "sampled, training", "50%"]
    assert texts(browser, "#zero") == ["Always zero (below 1e-7): kl"]


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
