"""Pages in a browser: clicked, typed into, read back, and compared with what Python says."""

from __future__ import annotations

import itertools
import json
import shutil
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
from jobs import run_wancli
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.select import Select

from wancli import cli
from wancli.injection import block_map
from wancli.injection.block_map import BlockMap, MapModel, NoiseLevel, PromptPair
from wancli.job.loader import load
from wancli.models import variants
from wancli.models.config import ComputeOptions
from wancli.plan import memory_estimate
from wancli.plan.model_spec import ModelSpec
from wancli.plan.planner import build_plan
from wancli.plan.shot import Shot
from wancli.report.html import model_facts, page, page_data
from wancli.report.html.collect import ReportInputs
from wancli.weights.lora.match import Coverage
from wancli.weights.lora.use import LoraUse

TINY = Path(__file__).parent.parent / "fixtures" / "wan21-tiny"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, quick: Path) -> Path:
    """A rendered job with its page, a block map and a comparison: three shots of two axes."""
    folder = tmp_path_factory.mktemp("browser")
    items = [
        {"id": "plain", "labels": {"row": "a", "column": 1}},
        {"id": "fish", "labels": {"row": "a", "column": 2}, "inject": [pages.injection()]},
        {
            "id": "late",
            "labels": {"row": "b", "column": 2},
            "inject": [pages.injection() | {"blocks": "2-3"}],
        },
    ]
    found = pages.render(folder, quick, items=items, frames=5)
    model = pages.entries(found)["model"]
    by_block = BlockMap(
        job="job", shot="fish", model=MapModel(root="x", sha256=model["sha256"]["transformer"], blocks=4),
        loras=[], method="inject", prompts=[PromptPair(main="A cat.", injected="A reef.", ids=["a", "b"])],
        size="64x64", frames=5, seed=0, levels=[NoiseLevel(step=0, sigma=1.0), NoiseLevel(step=1, sigma=0.8)],
        unit="of the velocity", values=[[0.1, 0.4, 0.2, 0.3], [0.2, 0.5, 0.3, 0.1]], ranges=None,
        total=[0.15, 0.45, 0.25, 0.2], suggestion="1", seconds=1.5, forwards=5.5, versions={}, created="2026",
    )  # fmt: skip
    rendered = {"levels": [], "values": [], "ranges": [[0, 1], [2, 3]], "total": [3.0, 7.0]}
    by_range = by_block.model_copy(update={"method": "render", "suggestion": "2-3", **rendered})
    strange = by_block.model_copy(update={"model": MapModel(root="y", sha256="f" * 64, blocks=4)})
    for name, one_map in (("inject", by_block), ("render", by_range), ("strange", strange)):
        block_map.write(found / f"job.map.{name}.json", one_map)
    heat = {"width": 2, "height": 2, "values": [0, 0.5, 1, 0.25]}
    scores = [
        {
            "id": "fish",
            "output": "fish.mp4",
            "baseline": "plain",
            "psnr": 21.5,
            "ssim": 0.5,
            "latent_distance": 0.75,
            "heatmap": heat,
        }
    ]
    compare = {"schema": "wancli/compare/1", "job": "job", "baseline": "plain", "shots": scores}
    (found / "job.compare.json").write_text(json.dumps(compare))
    assert cli.run(["report", str(folder / "job.yaml")]) == 0
    return found


@pytest.fixture
def opened(browser: Any, out: Path) -> WebDriver:
    driver: WebDriver = browser.open(out / "job.report.html")
    driver.execute_script("for (const folded of document.querySelectorAll('.fold')) folded.open = true")
    return driver


@pytest.fixture(autouse=True)
def _silence(browser: Any) -> Any:
    """Whatever a test does, the console stays empty and nothing but local files is asked for."""
    yield
    assert browser.console_messages() == []
    outside = [url for url in browser.requests() if not url.startswith(("file:", "data:", "about:"))]
    assert outside == []


def one(driver: WebDriver, selector: str) -> Any:
    return driver.find_element(By.CSS_SELECTOR, selector)


def every(driver: WebDriver, selector: str) -> list[Any]:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def pick(driver: WebDriver, shot: str) -> None:
    Select(one(driver, "#shot")).select_by_visible_text(shot)


def put(driver: WebDriver, selector: str, value: object) -> None:
    box = one(driver, selector)
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(str(value))


# ---- what is shown ----


def test_the_pipeline_shows_the_shapes_of_the_job(opened: WebDriver, out: Path) -> None:
    text_dim = pages.entries(out)["model"]["sizes"]["text_dim"]
    text = one(opened, "#pipeline").text
    assert one(opened, "#tokens").text == "32"
    for shape in (f"[256, {text_dim}]", "[16, 2, 8, 8]", "[32, 64]", "[3, 5, 64, 64]"):
        assert shape in text
    assert "(5 − 1) / 4 + 1 = 2" in text
    assert "64 values → width" in text


def test_a_block_is_picked_by_mouse_and_by_keys_and_shows_the_facts_of_python(
    opened: WebDriver, out: Path
) -> None:
    pick(opened, "fish")
    assert one(opened, "#block h3").text == "Block 1"  # the first that is injected
    cells = every(opened, "#blocks .cell")
    assert len(cells) == 4
    cells[2].click()
    assert one(opened, "#block h3").text == "Block 2"
    assert [cell.get_attribute("tabindex") for cell in cells] == ["-1", "-1", "0", "-1"]
    cells[2].send_keys(Keys.ARROW_RIGHT)
    assert one(opened, "#block h3").text == "Block 3"
    assert opened.switch_to.active_element == cells[3]
    cells[3].send_keys(Keys.ARROW_RIGHT)  # there is no other
    cells[3].send_keys(Keys.HOME)
    cells[0].send_keys(Keys.END, Keys.ARROW_LEFT)
    assert one(opened, "#block h3").text == "Block 2"

    body = pages.entries(out)
    wan = model_facts.WanConfig(**body["model"]["sizes"])
    rows = [
        [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")]
        for row in every(opened, "#parts tbody tr")
    ]
    parts = model_facts.block_parts(wan)
    assert [row[0] for row in rows] == [part["name"] for part in parts] + ["the block"]
    assert [int(row[1].replace(",", "")) for row in rows[:-1]] == [part["weights"] for part in parts]
    effects = [effect["blocks"]["2"] for effect in body["effects"]]
    told = one(opened, "#block .facts").text
    assert f"{100 * sum(effects) / len(effects):.1f} % of its cross-attention" in told
    assert "rank 2 of 4" in told  # in the map of blocks
    assert "7 of the velocity, rank 1 of 2, as one of blocks 2-3" in told  # in that of ranges
    assert told.count("rank") == 2  # in none of another network
    assert body["injection"][0]["hits_by_block"]["2"] == 2
    assert "hits\n2" in told
    assert [cell.text for cell in every(opened, "#over-steps tr:nth-child(3) td")] == ["0.75", "·"]
    assert "ComfyUI-WanActivationEditor" in one(opened, "#claims").text


def test_the_prompt_difference_is_that_of_the_manifest(opened: WebDriver, out: Path) -> None:
    pick(opened, "fish")
    found = pages.entries(out)["injection"][0]["difference"]
    text = one(opened, "#text").text
    assert f"{found['verdict']['percent']:.0f} %, {found['verdict']['band']}" in text
    for figures in (found["raw"], found["projected"]):
        assert f"{100 * figures['token_set_distance']:.1f} %" in text
    assert f"{found['legacy_trimmed_percent']:.1f} %" in text
    tokens = [token.text for token in every(opened, "#text .token")]
    assert tokens.count("</s>") == 2
    assert len(tokens) == found["a"]["tokens"] + found["b"]["tokens"]
    assert len(every(opened, "#text svg rect")) == 4


def test_heat_maps_of_steps_and_of_a_block_map_are_shown(opened: WebDriver) -> None:
    pick(opened, "fish")
    choice = Select(one(opened, "#map select"))
    assert [option.text for option in choice.options] == ["job, fish: inject", "job, fish: render"]
    choice.select_by_index(1)
    titles = [title.get_attribute("textContent") for title in every(opened, "#map svg title")]
    assert titles == ["video, blocks 0-1: 3", "video, blocks 2-3: 7"]
    choice = Select(one(opened, "#map select"))
    choice.select_by_index(0)
    assert len(every(opened, "#map svg rect")) == 3 * 4  # two levels and their total
    assert "blocks: 1" in one(opened, "#map").text
    titles = [title.get_attribute("textContent") for title in every(opened, "#map svg title")]
    assert "σ 0.80, block 1: 0.5" in titles


# ---- memory ----


def test_the_memory_of_the_page_is_that_of_the_plan(
    opened: WebDriver, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pick(opened, "plain")
    settings = {"dtype": "bf16", "residency": "streamed", "encoder": "streamed"}
    for key, value in settings.items():
        Select(one(opened, f"#set-{key}")).select_by_value(value)
    put(opened, "#set-width", 128)
    put(opened, "#set-height", 96)
    put(opened, "#set-frames", 17)
    rows = every(opened, "#computed [data-phase]")
    names = ("model", "activation", "buffer")
    shown = {row.text: [int(row.get_attribute(f"data-{name}")) for name in names] for row in rows}
    changes = ["size=128x96", "frames=17", "memory.dtype=bf16", "memory.residency=streamed", "batch=1"]
    sets = [word for change in changes for word in ("--set", change)]
    result = run_wancli(capsys, "plan", out.parent / "job.yaml", "--json", "--items", "0", *sets)
    assert result.code == 0
    memory = json.loads(result.out)["memory"]
    assert shown == {row["name"]: [row[name] for name in names] for row in memory}
    assert int(one(opened, "#peak").get_attribute("data-bytes")) == max(row["peak"] for row in memory)


def test_the_limit_shows_what_fits_and_a_click_chooses_an_alternative(opened: WebDriver) -> None:
    put(opened, "#set-limit", 0.001)
    assert "does not fit" in one(opened, "#calculator").text
    put(opened, "#set-limit", 64)
    assert "does not fit" not in one(opened, "#calculator").text
    one(opened, "#calculator summary").click()
    ways = every(opened, "#calculator .alternatives button")
    assert len(ways) == 3 * 6 + 2
    next(way for way in ways if way.get_attribute("title").startswith("bf16, streamed, 1,024")).click()
    chosen = [
        Select(one(opened, f"#set-{key}")).first_selected_option.get_attribute("value")
        for key in ("dtype", "residency", "chunk")
    ]
    assert chosen == ["bf16", "streamed", "1024"]
    Select(one(opened, "#set-dtype")).select_by_value("fp8")
    assert not one(opened, "#set-residency").is_enabled()


def settings_of(shot: Shot) -> dict[str, Any]:
    model = shot.model
    return {
        "device": model.device,
        "dtype": model.dtype,
        "residency": model.residency,
        "encoder": model.encoder.residency,
        "chunk": model.kernels.chunk,
        "width": shot.width,
        "height": shot.height,
        "frames": shot.frames,
        "tokens": [len(text.tokens.ids) for text in shot.prompts],
        "forwards": shot.forwards_per_step,
        "decodeChunk": shot.decode_chunk,
        "loras": sum(path.stat().st_size for path in {use.path for use in shot.loras}),
    }


def models(tiny: ModelSpec) -> list[ModelSpec]:
    """The model of a shot, and those that Wan released, on a CPU and on a GPU."""
    found = [replace(tiny, device=device) for device in ("cpu", "cuda")]
    for name, device in itertools.product(model_facts.RELEASED, ("cpu", "cuda")):
        checkpoint, text, vae = model_facts.released_checkpoint(name)
        found.append(replace(tiny, checkpoint=checkpoint, text_encoder=text, vae_sizes=vae, device=device))  # type: ignore[arg-type]
    return found


def grid(shot: Shot) -> list[Shot]:
    """That shot by every model and in every way: hundreds of settings."""
    ways = [
        (dtype, residency)
        for dtype in ("fp32", "bf16", "fp16")
        for residency in ("resident", "packed", "streamed")
    ]
    found = []
    for model in models(shot.model):
        stride = model.checkpoint.variant.stride
        sizes = [(stride, stride, 1), (26 * stride, 15 * stride, 81), (40 * stride, 22 * stride, 121)]
        for (dtype, residency), chunk, (width, height, frames) in itertools.product(
            [*ways, ("fp8", "packed")], (None, 1024), sizes
        ):
            text = {"fp8": "fp32" if model.device == "cpu" else "bf16"}.get(dtype, dtype)
            housed = replace(model, dtype=dtype, residency=residency, kernels=ComputeOptions(chunk=chunk))
            housed = replace(housed, encoder=replace(model.encoder, dtype=text, residency=residency))
            found.append(replace(shot, model=housed, width=width, height=height, frames=frames))
    return found


def test_the_memory_of_the_page_is_that_of_python_for_hundreds_of_settings(
    opened: WebDriver, out: Path, tmp_path: Path
) -> None:
    style = tmp_path / "style.safetensors"
    style.write_bytes(bytes(1_234_567))
    lora = LoraUse(style, "", 1.0, None, None, None, Coverage("kohya", 1, {}, (0,), 0, (4,), True, 0, 0, ()))
    plain, fish, _ = build_plan(load(out.parent / "job.yaml"), tmp_path / "memo.json").shots
    shots = [plain, replace(fish, loras=(lora, lora))]
    every_way = [way for shot in shots for way in grid(shot)]
    assert len(every_way) == 2 * 10 * 10 * 2 * 3
    asked = [
        [
            model_facts.calculator_coefficients(
                vars(way.model.checkpoint.transformer_config),
                json.loads(json.dumps(memory_estimate.network_sizes(way.model))),
                way.model.device,
            ),
            settings_of(way),
        ]
        for way in every_way
    ]
    source = (page.ASSETS / "memory_formulas.js").read_text()
    run = "JSON.parse(arguments[0]).map(([c, s]) => [processOf(c, s), tokensOf(c, s), phasesOf(c, s)])"
    found = opened.execute_script(f"{source}\nreturn {run}", json.dumps(asked))
    for way, (process, tokens, phases) in zip(every_way, found, strict=True):
        assert (process, tokens) == (memory_estimate.process_bytes(way.model), way.tokens)
        for ours, theirs in zip(memory_estimate.predict_phases(way), phases, strict=True):
            told = {key: theirs[key] for key in ("name", "model", "activation", "buffer", "total")}
            assert told == {**vars(ours), "total": ours.total}, settings_of(way)


# ---- tables, videos, and how it looks ----


def test_the_table_is_sorted_filtered_and_picks_a_shot(opened: WebDriver) -> None:
    def ids() -> list[str]:
        return [row.text for row in every(opened, "#experiments tbody .pick") if row.is_displayed()]

    assert ids() == ["plain", "fish", "late"]
    header = one(opened, "#experiments th[data-key=effect] button")
    header.click()
    assert ids()[-1] == "plain"  # which has none
    header.click()
    assert ids()[0] == "plain"
    assert one(opened, "#experiments th[data-key=effect]").get_attribute("aria-sort") == "descending"
    put(opened, "#filter", "tropical 1-2")
    assert ids() == ["fish"]
    assert one(opened, "#counted").text == "1 of 3 shots"
    one(opened, "#experiments tbody tr:not([hidden]) .pick").click()
    assert one(opened, "#shot").get_attribute("value") == "1"
    assert one(opened, "#pipeline strong").text == "fish"


def test_videos_are_arranged_by_their_axes_and_play_together(opened: WebDriver, browser: Any) -> None:
    heads = [head.text for head in every(opened, "#videos th")]
    assert heads == ["row: a", "row: b", "column: 1", "column: 2"]
    videos = "[...document.querySelectorAll('#videos video')]"
    browser.wait_until(lambda: len(every(opened, "#videos video")) == 3)
    times = f"return {videos}.map((v) => v.readyState > 0 ? v.currentTime : -1)"
    opened.execute_script(
        "const at = document.getElementById('scrub'); at.value = 500; at.dispatchEvent(new Event('input'))"
    )
    found = browser.wait_until(lambda: [t for t in [opened.execute_script(times)] if all(x > 0 for x in t)])[
        0
    ]
    assert len(found) == 3
    assert found == pytest.approx([found[0]] * 3)
    assert found[0] == pytest.approx(5 / 16 / 2, abs=0.01)
    one(opened, "#play").click()
    browser.wait_until(lambda: opened.execute_script(times)[0] != found[0])
    assert one(opened, "#play").text == "Pause all"
    one(opened, "#play").click()
    Select(one(opened, "#rows")).select_by_value("")
    assert len(every(opened, "#videos tbody tr")) == 1


def test_a_comparison_is_written_under_a_video_and_drawn_over_it(opened: WebDriver, browser: Any) -> None:
    card = one(opened, "#videos .card[data-shot='1']")
    assert "PSNR 21.5" in card.text
    browser.wait_until(lambda: every(opened, "#videos canvas"))
    canvas = card.find_element(By.CSS_SELECTOR, "canvas")
    assert not canvas.is_displayed()
    one(opened, "#heat").click()
    assert canvas.is_displayed()
    pixels = "return [...arguments[0].getContext('2d').getImageData(0, 0, 2, 2).data]"
    alpha = opened.execute_script(pixels, canvas)[3::4]
    assert alpha[0] == 0
    assert alpha[1] == pytest.approx(128, abs=2)
    assert alpha[2] > alpha[1] > alpha[3]


def test_stars_and_notes_stay_in_the_browser_and_give_ids_to_pick(
    opened: WebDriver, browser: Any, out: Path
) -> None:
    opened.execute_script("localStorage.clear()")
    driver = browser.open(out / "job.report.html")
    assert not one(driver, "#picked").is_displayed()
    one(driver, "#experiments tr[data-shot='1'] .star").click()
    one(driver, "#videos .card[data-shot='2'] .star").click()
    put(driver, "#experiments tr[data-shot='2'] .note-field", "the best\n")
    driver = browser.open(out / "job.report.html")
    assert one(driver, "#pick-command").text == "wancli render job.yaml --pick fish,late -o finals/"
    assert one(driver, "#experiments tr[data-shot='2'] .note-field").get_attribute("value") == "the best"
    one(driver, "#experiments th[data-key=star] button").click()
    ids = [row.text for row in every(driver, "#experiments tbody .pick")]
    assert ids == ["fish", "late", "plain"]
    driver.execute_script("localStorage.clear()")


def test_a_link_leads_to_a_shot_or_to_a_folded_section(browser: Any, out: Path) -> None:
    driver = browser.open(out / "job.report.html")
    assert not one(driver, "#memory .body").is_displayed()
    driver.execute_script("location.hash = '#shot=late'")
    browser.wait_until(lambda: one(driver, "#shot").get_attribute("value") == "2")
    one(driver, "nav a[href='#memory']").click()
    browser.wait_until(lambda: one(driver, "#memory .body").is_displayed())
    pick(driver, "fish")
    assert driver.current_url.endswith("#shot=fish")


def test_a_further_axis_chooses_the_shots_of_one_value_and_the_frame_numbers_move_all(
    browser: Any, out: Path, tmp_path: Path
) -> None:
    entry, inputs = pages.entries(out), ReportInputs("job")
    for index in range(27):
        labels = {"seed": index // 9, "blocks": "abc"[index // 3 % 3], "strength": index % 3}
        inputs.entries.append(("job", pages.typed(entry | {"id": f"s{index}", "labels": labels})))
    inputs.entries.append(("job", pages.typed(entry | {"id": "plain", "labels": {"seed": 1}})))
    path = tmp_path / "many.html"
    path.write_bytes(page.render_html(page_data.page_document(inputs, path, {})))
    driver = browser.open(path)
    assert (len(every(driver, "#videos tbody tr")), len(every(driver, "#videos .card"))) == (4, 28)
    Select(one(driver, "#only-seed")).select_by_value("1")
    assert len(every(driver, "#videos .card")) == 10
    numbers = every(driver, "#frames span")
    assert [number.text for number in numbers] == ["0", "1", "2", "3", "4"]
    ActionChains(driver).click_and_hold(numbers[1]).move_to_element(numbers[3]).release().perform()
    assert int(one(driver, "#scrub").get_attribute("value")) == pytest.approx(750, abs=60)
    assert one(driver, "#frames .now").text == "3"


def test_of_many_shots_only_those_in_view_have_a_player_and_the_table_grows_on_demand(
    browser: Any, out: Path, tmp_path: Path
) -> None:
    entry, inputs = pages.entries(out), ReportInputs("job")
    inputs.entries = [("job", pages.typed(entry | {"id": f"s{i}", "labels": {}})) for i in range(500)]
    path = tmp_path / "many.html"
    path.write_bytes(page.render_html(page_data.page_document(inputs, path, {})))
    driver = browser.open(path)
    assert len(every(driver, "#videos .card")) == 500
    browser.wait_until(lambda: 0 < len(every(driver, "#videos video")) < 200)
    shown = "return [...document.querySelectorAll('#experiments tbody tr')].filter((r) => !r.hidden).length"
    assert driver.execute_script(shown) == 200
    one(driver, "#more").click()
    assert driver.execute_script(shown) == 400
    put(driver, "#filter", "s499")
    assert driver.execute_script(shown) == 1
    assert one(driver, "#counted").text == "1 of 500 shots"


def test_the_table_has_scores_and_links_and_says_what_all_shots_share_once(opened: WebDriver) -> None:
    heads = [head.get_attribute("data-key") for head in every(opened, "#experiments th[data-key]")]
    assert {"psnr", "ssim", "latent_distance"} <= {*heads}
    assert not {"size", "frames", "seed", "prompt"} & {*heads}
    assert "size 64x64" in one(opened, ".constants").text
    link = one(opened, "#experiments tr[data-shot='1'] .thumb")
    assert link.get_attribute("href").endswith("/fish.mp4")
    assert link.find_element(By.TAG_NAME, "img").get_attribute("alt") == "Video of fish"
    one(opened, "#experiments th[data-key=psnr] button").click()
    assert one(opened, "#experiments tbody .pick").text == "fish"  # the only one with a score


@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
def test_nothing_is_wider_than_the_window(browser: Any, out: Path, width: int) -> None:
    driver = browser.open(out / "job.report.html", width=width)
    pick(driver, "fish")
    wide, room = driver.execute_script(
        "const e = document.documentElement;"
        "return [Math.max(e.scrollWidth, document.body.scrollWidth), e.clientWidth]"
    )
    assert wide <= room == width


@pytest.mark.parametrize("dark", [False, True])
def test_the_theme_follows_the_system_until_the_button_is_pressed(
    browser: Any, out: Path, dark: bool
) -> None:
    driver = browser.open(out / "job.report.html", dark=dark)
    paper = "return getComputedStyle(document.body).backgroundColor"
    before = driver.execute_script(paper)
    assert before == ("rgb(18, 21, 24)" if dark else "rgb(247, 247, 245)")
    one(driver, "#theme").click()
    assert driver.execute_script(paper) == ("rgb(247, 247, 245)" if dark else "rgb(18, 21, 24)")


CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgb = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] === 255) return c;
  }
};
const apart = 'svg, script, option, .hidden, .skip, :disabled';
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest(apart)) continue;
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${e.className || e.tagName}: ${walk.currentNode.data}`);
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read_against_what_is_behind_it(browser: Any, out: Path, dark: bool) -> None:
    driver = browser.open(out / "job.report.html", dark=dark)
    pick(driver, "fish")
    assert driver.execute_script(CONTRAST) == []


def test_every_control_has_a_name_and_headings_do_not_skip(opened: WebDriver) -> None:
    for control in every(opened, "button, select, input, video, [role=img], [role=grid], [role=region]"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")[:200]
    levels = [int(h.tag_name[1]) for h in every(opened, "h1, h2, h3, h4") if h.is_displayed()]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert levels.count(1) == 1


def test_texts_of_a_job_stay_texts(browser: Any, out: Path, tmp_path: Path) -> None:
    trees = []
    for entry in (pages.entries(out), pages.hostile(pages.entries(out))):
        path = tmp_path / "page.html"
        path.write_bytes(
            page.render_html(
                page_data.page_document(ReportInputs("job", [("job", pages.typed(entry))]), path, {})
            )
        )
        driver = browser.open(path)
        assert driver.title == "job · wancli"
        trees.append(
            driver.execute_script("return [...document.querySelectorAll('*')].map((e) => e.tagName)")
        )
    assert [tag for tag in trees[1] if tag in ("IMG", "IFRAME", "OBJECT")] == []
    assert trees[1].count("SCRIPT") == trees[0].count("SCRIPT") == 2
    assert trees[1] == trees[0]
    assert pages.HOSTILE in one(driver, "#text").get_attribute("textContent")


def test_a_video_plays_from_a_folder_of_any_name(browser: Any, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a # b ? 100 % é"
    shutil.copytree(out, folder)
    assert cli.run(["report", str(folder)]) == 0
    driver = browser.open(folder / "report.html")
    driver.execute_script("for (const v of document.querySelectorAll('video')) v.preload = 'auto'")
    ready = "return [...document.querySelectorAll('video')].map((v) => v.readyState)"
    browser.wait_until(lambda: all(state > 1 for state in driver.execute_script(ready)))
    asked = {urllib.parse.unquote(url) for url in browser.requests() if url.endswith("mp4")}
    assert asked == {f"file://{folder}/{name}.mp4" for name in ("plain", "fish", "late")}


def test_an_explored_model_follows_its_controls(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "explore.html"
    assert cli.run(["explore", "-o", str(path)]) == 0
    driver = browser.open(path)
    assert [o.text for o in Select(one(driver, "#shot")).options] == [*model_facts.RELEASED, "wan-mini"]
    pick(driver, "Wan2.1-T2V-14B")
    assert one(driver, "#tokens").text == "75,600"
    assert len(every(driver, "#blocks .cell")) == 40
    put(driver, "#set-width", 832)
    put(driver, "#set-height", 480)
    assert one(driver, "#tokens").text == "32,760"
    assert variants.T2V_14B.stride == 16
    Select(one(driver, "#set-dtype")).select_by_value("bf16")
    assert "in bf16" in one(driver, "#parts thead").text


def test_the_steps_of_a_cache_are_drawn(browser: Any, quick: Path, tmp_path: Path) -> None:
    cached = {"sampler": {"steps": 12}, "cache": {"table": "Wan2.1-T2V-1.3B"}, "measure": False}
    found = pages.render(tmp_path, quick, items=[{"id": "fast"}], **cached)
    assert cli.run(["report", str(found)]) == 0
    driver = browser.open(found / "report.html")
    reused = pages.entries(found, "fast")["shot"]["cache"]["reused"]
    assert reused["cond"]
    lines = [
        f"{branch:<7}" + "".join("·" if step in steps else "█" for step in range(12))
        for branch, steps in reused.items()
    ]
    assert one(driver, "#cache-strip").get_attribute("textContent") == "\n".join(lines)


def test_rules_are_listed_and_a_mask_is_drawn_by_its_tokens(
    browser: Any, quick: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "left.png"
    Image.fromarray(np.array([[255, 0], [255, 0]], np.uint8)).save(mask)
    items = [{"id": "masked", "inject": [pages.injection() | {"mask": str(mask)}]}]
    found = pages.render(tmp_path, quick, items=items, emphasis={"cat": 1.5}, measure=False)
    assert cli.run(["report", str(found)]) == 0
    driver = browser.open(found / "report.html")
    rows = [row.text for row in every(driver, "#rules tbody tr")]
    assert len(rows) == 2
    assert rows[1].startswith("emphasis.0")
    tokens = every(driver, "#areas svg rect[fill-opacity='0.5']")
    assert len(tokens) == 8  # half of 4 x 4 tokens, all white
    assert {float(token.get_attribute("x")) for token in tokens} == {0, 48}
