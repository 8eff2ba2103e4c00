"""Pages of renders and of models, taken apart without a browser. tests/browser clicks in them."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
from jobs import rule, run_wancli, tiny_job, write_job
from PIL import Image

from wancli.cli import run
from wancli.job.loader import load
from wancli.models import parameter_count
from wancli.models.config import WanConfig
from wancli.plan.planner import build_plan
from wancli.report import batch_report, shots_table
from wancli.report.html import injection_entries, model_facts, page, page_data, rerun_job
from wancli.report.html.collect import ReportInputs
from wancli.resources import flops
from wancli.storage import manifest
from wancli.storage.manifest import manifest_path
from wancli.storage.schema import FileRecord
from wancli.video import mp4, thumbnails

T2V_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
TI2V_5B = WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, quick: Path) -> Path:
    """The outputs of a job of two shots."""
    return pages.render(tmp_path_factory.mktemp("pages"), quick)


def made(out: Path, entry: dict[str, Any]) -> bytes:
    return page.render_html(
        page_data.page_document(ReportInputs("job", [("job", pages.typed(entry))]), out / "report.html", {})
    )


# ---- what is in it ----


def test_a_number_that_a_browser_would_round_is_a_text(out: Path) -> None:
    entry = pages.entries(out)
    for seed in (2**53 - 1, 2**53 + 1, 2**63 - 1):
        entry["shot"]["seed"] = entry["labels"]["seed"] = seed
        (shot,) = pages.Page(made(out, entry)).document["shots"]
        shown = seed if seed < 2**53 else str(seed)
        assert (shot["seed"], shot["labels"]["seed"], shot["row"]["seed"]) == (shown,) * 3


def test_the_page_of_a_model_with_sizes_that_no_model_has_lacks_the_calculator(out: Path) -> None:
    entry = pages.entries(out)
    entry["model"]["sizes"] |= {"in_dim": 7, "from_a_later_version": 1}
    (model,) = pages.Page(made(out, entry)).document["models"]
    assert model["calculator"] is None


def test_a_render_leaves_a_page_beside_its_report_that_needs_nothing_else(out: Path) -> None:
    data = (out / "job.report.html").read_bytes()
    found = pages.Page(data)
    assert found.document["name"] == "job"
    assert [shot["id"] for shot in found.document["shots"]] == ["plain", "fish"]
    assert [shot["video"] for shot in found.document["shots"]] == ["plain.mp4", "fish.mp4"]
    titles = [attrs["id"] for tag, attrs in found.elements if tag == "section"]
    assert titles == ["videos", "shots", "blocks", "maps", "text", "again", "pipeline", "memory", "time"]
    outside = [
        value
        for _, attrs in found.elements
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "action", "poster") and not (value or "").startswith("#")
    ]
    assert outside == ["plain.mp4", "fish.mp4"]
    assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", data)
    assert not [
        name for _, attrs in found.elements for name in attrs if name.startswith("on") or name == "style"
    ]


def test_only_the_scripts_and_styles_of_the_package_run(out: Path) -> None:
    found = pages.Page((out / "job.report.html").read_bytes())
    policy = next(a["content"] for t, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert policy.startswith("default-src 'none'; ")
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (source,) = [text for text in found.inside(tag) if not text.startswith("{")]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert "unsafe" not in policy


def test_no_script_makes_code_or_elements_of_text() -> None:
    for path in page.ASSETS.glob("*.js"):
        source = path.read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|fetch\(", source
        )
    assert {path.stem for path in page.ASSETS.glob("*.js")} == set(page.SCRIPTS)


def test_texts_of_a_job_are_inert_whatever_they_contain(out: Path) -> None:
    entry = pages.entries(out)
    plain, changed = (pages.Page(made(out, one)) for one in (entry, pages.hostile(entry)))
    assert changed.tree == plain.tree
    assert [sorted(attrs) for _, attrs in changed.elements] == [sorted(attrs) for _, attrs in plain.elements]
    assert pages.HOSTILE in changed.inside("button")
    assert changed.document["prompts"][0]["text"] == pages.HOSTILE
    odd = entry | {"id": "\udce9 \0 \u2028", "output": str(out / "caf\udce9.mp4")}
    assert pages.Page(made(out, odd)).tree == plain.tree


def test_a_page_of_a_hundred_measured_shots_is_under_two_megabytes(out: Path) -> None:
    found = pages.many(pages.entries(out), 100)
    picture = "data:image/jpeg;base64," + "A" * 4000
    data = page.render_html(
        page_data.page_document(found, out / "report.html", dict.fromkeys(range(100), picture))
    )
    assert len(data) < 2_000_000
    shots = pages.Page(data).document["shots"]
    assert len(shots) == 100
    assert shots[3]["effects"]["mean"][0] == pytest.approx(0.123456789 * (1 + 0.03 + 24.5), rel=0.005)
    assert "values" not in shots[3]["effects"]
    few = page_data.page_document(pages.many(pages.entries(out), 3), out / "report.html", {})
    assert few["shots"][2]["effects"]["values"][1][0] == pytest.approx(0.123456789 * 2.02, rel=0.005)


def test_the_share_of_injection_is_that_of_the_plan(out: Path) -> None:
    record = pages.typed(pages.entries(out)).record
    assert record
    found = injection_entries.injected_shares(record)
    cells = {(row["branch"], step): row["blocks"] for row in found for step in row["steps"]}
    assert cells == {
        ("cond", 0): [0, 0.25, 0.75, 0],
        ("uncond", 0): [0, 0.25, 0.75, 0],
        ("cond", 1): [0, 0, 0, 0],
        ("uncond", 1): [0, 0, 0, 0],
    }


def test_the_page_has_the_areas_of_rules(out: Path) -> None:
    entry = pages.entries(out)
    area = {
        "frames": [0, 0],
        "region": [0, 0, 0.5, 1],
        "mask": {"path": "/m/hand.png", "sha256": "1"},
        "tokens": 8,
    }
    injection = [entry["injection"][0] | {"area": area}, *entry["injection"][1:]]
    inputs = ReportInputs("job", [("job", pages.typed(entry | {"injection": injection}))])
    (shot,) = page_data.page_document(inputs, out / "report.html", {})["shots"]
    assert shot["injection"][0]["area"] == area | {"mask": "hand.png"}  # whose file is gone


def test_the_page_has_the_weights_of_a_mask_and_a_row_for_each_rule(
    known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = tmp_path / "left.png"
    Image.fromarray(np.array([[255, 0], [255, 0]], np.uint8)).save(mask)
    keys = {
        "inject": [rule(blocks="1-2", mask=str(mask), words="fish"), rule(blocks="all", blend="nag")],
        "emphasis": [{"words": "cat", "weight": 1.5}],
        "steer": [{"toward": ["warm light"], "away": ["fog"], "strength": 0.5, "blocks": "late"}],
    }
    said = run_wancli(capsys, "render", write_job(tmp_path, tiny_job(known, **keys)))
    assert said.code == 0, said.err
    document = pages.Page((tmp_path / "out/job.report.html").read_bytes()).document
    (shot,) = document["shots"]
    assert shot["injection"][0]["area"]["white"] == ["9900"] * 4
    rows = [[*row.values()] for row in document["rule_rows"][shot["rule_rows"]]]
    assert [row[0] for row in rows] == ["inject.0", "inject.1", "emphasis.0", "steer.0"]
    assert rows[0][1].endswith(", only 'fish', rows 14-15")
    assert rows[0][2:] == ["context-lerp", "1-2", "0-1", "8 tokens"]
    assert rows[1][2].startswith("nag, scale ")
    assert rows[2][1:] == ["'cat', rows 7-8", "counts 1.5 times", "0-3", "0-1", "everywhere"]
    assert rows[3][1:3] == ["toward warm light; away from fog", "strength 0.5"]


# ---- facts of models ----


@pytest.mark.parametrize(
    "wan", [T2V_14B, TI2V_5B, WanConfig(dim=88, ffn_dim=176, num_heads=4, num_layers=40)]
)
def test_the_parts_of_a_model_add_up_to_its_parameters_and_its_arithmetic(wan: WanConfig) -> None:
    parts, ends = model_facts.block_parts(wan), model_facts.input_output_parts(wan)
    assert wan.num_layers * sum(p["weights"] for p in parts) + sum(p["weights"] for p in ends) == (
        parameter_count.wan_parameters(wan)
    )
    matrices = 8 * wan.dim**2 + 2 * wan.dim * wan.ffn_dim
    assert sum(part["matrices"] for part in parts) == matrices
    tokens, rows = 7_800, 61

    def of(part: dict[str, Any]) -> int:
        cost = part["flops"]
        return int(tokens * (cost["token"] + tokens * cost["token2"] + rows * cost["token_text"]))

    clock = flops.forward_flops(wan, 0, 0)
    forward = flops.forward_flops(wan, tokens, wan.num_layers * rows) - clock
    assert wan.num_layers * sum(map(of, parts)) + sum(map(of, ends)) == forward
    text = wan.num_layers * sum(p["flops"]["text"] for p in parts) + sum(p["flops"]["text"] for p in ends)
    assert rows * text == flops.context_flops(wan, rows)


def test_claims_say_where_they_come_from_and_cover_blocks_of_a_model_of_forty() -> None:
    claims = json.loads((page.ASSETS / "claims.json").read_text())
    for claim in claims:
        assert claim["source"]
        assert claim["where"]
        for span, says in claim["ranges"]:
            first, last = map(int, span.split("-"))
            assert says
            assert 0 <= first <= last < 40


# ---- gathering ----


def test_the_command_renders_the_very_same_shot_again(out: Path, tmp_path: Path) -> None:
    body = manifest.read(manifest_path(out / "fish.mp4"))
    assert body is not None
    text = rerun_job.rerun_command(body, str(tmp_path / "again.mp4"))
    first, *job, last, end = text.split("\n")
    assert (first, last, end) == ("wancli render - <<'JOB'", "JOB", "")
    (shot,) = build_plan(load(write_job(tmp_path, "\n".join(job))), tmp_path / "memo.json").shots
    assert shot.key == body.key


def test_the_command_has_the_loras_and_the_guidance_of_both_experts(out: Path) -> None:
    body = pages.entries(out)
    lora = {
        "path": "/loras/style.safetensors",
        "sha256": "",
        "strength": 0.5,
        "expert": "low",
        "blocks": None,
        "steps": None,
    }
    stages = [
        {"expert": "high", "steps": [0, 0], "guidance": 4.0},
        {"expert": "low", "steps": [1, 1], "guidance": 3.0},
    ]
    entry = pages.typed(body | {"loras": [lora], "shot": body["shot"] | {"stages": stages}})
    assert entry.record
    found = rerun_job.build_job(entry.record, "x.mp4")
    assert found["sampler"]["guidance"] == {"high": 4.0, "low": 3.0}
    (said,) = found["loras"]
    assert (said["path"], said["strength"], said["expert"]) == ("/loras/style.safetensors", 0.5, "low")


def test_a_folder_of_jobs_is_one_page_and_says_what_it_cannot_read(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "renders"
    body = manifest.read(manifest_path(out / "fish.mp4"))
    assert body is not None
    for job in ("one", "two"):
        (folder / job).mkdir(parents=True)
        manifest.write(folder / job / "fish.manifest.json", body.as_dict())
    (folder / "one" / "fish.mp4").write_bytes((out / "fish.mp4").read_bytes())
    (folder / "two" / "bad.manifest.json").write_text('{"schema": "wancli/manifest/1"}')
    (folder / "two" / "x.map.inject.json").write_text("{}")
    (folder / "two" / "x.compare.json").write_text('{"schema": "wancli/compare/1", "shots": [{}]}')
    score = {"id": "fish", "output": "fish.mp4", "baseline": "plain", "ssim": 0.5}
    compared = {"schema": "wancli/compare/1", "baseline": "plain", "shots": [score]}
    (folder / "one" / "job.compare.json").write_text(json.dumps(compared))
    # The folder was moved since; and a job of another folder has a shot of that name.
    entry = {"id": "nan", "labels": {}, "output": "/farm/two/nan.mp4", "status": "failed", "error": None}
    other = {"id": "fish", "labels": {}, "output": "/farm/two/fish.mp4", "status": "rendered"}
    report = {"schema": batch_report.SCHEMA, "job": "sweep", "shots": [entry, other]}
    (folder / "two" / "report.json").write_text(json.dumps(report))
    said = run_wancli(capsys, "report", folder)
    assert (said.code, said.out) == (0, f"{folder}/report.html\n")
    found = pages.Page((folder / "report.html").read_bytes())
    rows = [(shot["job"], shot["id"], shot["status"]) for shot in found.document["shots"]]
    assert rows == [("one", "fish", "rendered"), ("sweep", "fish", "video gone"), ("sweep", "nan", "failed")]
    problems = [
        text
        for text in found.inside("p")
        if "not wancli/map/1" in text or "comparison is damaged" in text or "manifest is damaged" in text
    ]
    assert len(problems) == 3
    assert [shot["score"] for shot in found.document["shots"]] == [score, None, None]  # not of its namesake
    assert found.document["shots"][0]["video"] == "one/fish.mp4"
    assert found.document["shots"][0]["poster"].startswith("data:image/jpeg;base64,/9j/")


def test_the_command_of_a_page_works_in_any_folder(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    assert run(["report", out.name, "-o", str(tmp_path / "page.html")]) == 0
    (shot, *_) = pages.Page((tmp_path / "page.html").read_bytes()).document["shots"]
    assert f'"output": "{out}/' in shot["again"]
    assert (tmp_path / shot["video"]).resolve().parent == out


def test_a_job_is_shown_as_it_stands(out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "here" / "page.html"
    said = run_wancli(capsys, "report", out.parent / "job.yaml", "-o", target)
    assert (said.code, said.out) == (0, f"{target}\n")
    document = pages.Page(target.read_bytes()).document
    assert [shot["status"] for shot in document["shots"]] == ["rendered", "rendered"]
    assert document["jobs"][0]["job"] == "job"
    assert (target.parent / document["shots"][0]["video"]).resolve() == out / "plain.mp4"


def test_a_job_that_nobody_rendered_yet_has_its_table_of_shots(
    out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = write_job(tmp_path, (out.parent / "job.yaml").read_text())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fish.manifest.json").write_text("{")
    assert run_wancli(capsys, "report", job, "-o", tmp_path / "page.html").code == 0
    found = pages.Page((tmp_path / "page.html").read_bytes())
    assert [shot["status"] for shot in found.document["shots"]] == ["not started", "damaged"]
    assert "experiments" in [attrs.get("id") for tag, attrs in found.elements if tag == "table"]


def test_a_page_does_not_take_the_name_of_a_folder(
    out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for options in (["-o", tmp_path], ["-o", tmp_path / "p.html", "--csv", tmp_path]):
        said = run_wancli(capsys, "report", out, *options)
        assert (said.code, said.err) == (2, f"wancli: {tmp_path}: a folder has the name of an output\n")


def test_what_a_page_cannot_be_made_of_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run_wancli(capsys, "report", tmp_path)
    assert said.code == 2
    assert said.err.startswith(f"wancli: {tmp_path}: no manifest is in or below it")
    (tmp_path / "a.manifest.json").write_text("{")
    said = run_wancli(capsys, "report", tmp_path)
    assert said.code == 4
    assert said.err.startswith(f"wancli: {tmp_path}: no manifest is whole\n  {tmp_path}/a.manifest.json: the")
    assert not (tmp_path / "report.html").exists()
    said = run_wancli(capsys, "explore", "Wan2.1-T2V-41B", "-o", tmp_path / "x.html")
    assert said.code == 2
    assert "did you mean Wan2.1-T2V-14B?" in said.err


def test_another_file_of_that_name_moves_aside_and_an_earlier_page_does_not(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("<html>mine</html>")
    for text in (b"one", b"two"):
        page.publish_page(path, page.MARK + text)
    assert path.read_bytes().endswith(b"two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.old-1.html"]


def test_a_poster_is_made_once(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ReportInputs("job", [("job", pages.typed(pages.entries(out)))])
    first = page.render_page(found, out / "x.html", tmp_path, make=True)
    monkeypatch.setattr(mp4, "extract_thumbnail", lambda *_: pytest.fail("made again"))
    for make in (True, False):
        second = page.render_page(found, out / "x.html", tmp_path, make=make)
        posters = [pages.Page(data).document["shots"][0]["poster"] for data in (first, second)]
        assert posters[0] == posters[1]
        assert base64.b64decode(posters[0].partition(",")[2]).startswith(b"\xff\xd8\xff")
    nothing = page.render_page(found, out / "x.html", tmp_path / "empty", make=False)
    assert pages.Page(nothing).document["shots"][0]["poster"] is None


def test_a_poster_that_cannot_be_kept_or_made_costs_no_page(out: Path, tmp_path: Path) -> None:
    video = out / "fish.mp4"
    record = manifest.read(manifest_path(video))
    assert record
    (tmp_path / "kept").write_text("a file")
    picture = thumbnails.thumbnail_uri(video, record, tmp_path / "kept", create=True)
    assert picture
    assert picture.startswith("data:image/jpeg;base64,/9j/")
    odd = FileRecord(path="fish.mp4", sha256="../../etc/passwd", bytes=1)
    odd_record = record.model_copy(update={"files": [odd]})
    assert thumbnails.thumbnail_uri(video, odd_record, tmp_path, create=True) is None
    assert thumbnails.thumbnail_uri(tmp_path / "gone.mp4", record, tmp_path, create=True) is None


def test_a_video_that_is_gone_has_no_link_and_a_name_of_any_letters_has_one(out: Path) -> None:
    entry = pages.entries(out)
    gone = entry | {"status": "video gone"}
    assert "video" not in pages.Page(made(out, gone)).document["shots"][0]
    odd = entry | {"output": str(out / "100% #1?.mp4")}
    assert pages.Page(made(out, odd)).document["shots"][0]["video"] == "100%25%20%231%3F.mp4"


# ---- experiments ----


def test_a_line_of_the_lab_book_says_what_went_in_and_what_came_out(out: Path) -> None:
    row = shots_table.shot_row(pages.typed(pages.entries(out)), "job")
    body = pages.entries(out)
    assert (row["shot"], row["status"], row["seed"], row["size"]) == ("fish", "rendered", 0, "64x64")
    assert (row["blocks"], row["strength"], row["steps"], row["branch"]) == (
        "1-2",
        "0.25 to 0.75",
        "0",
        "cond+uncond",
    )
    assert row["injected"] == pages.injection()["prompt"]
    velocities = [effect["velocity"] for effect in body["effects"]]
    assert row["effect"] == pytest.approx(100 * sum(velocities) / len(velocities), abs=0.01)
    assert row["difference"] == pytest.approx(
        body["injection"][0]["difference"]["verdict"]["percent"], abs=0.06
    )
    assert row["seconds"] == pytest.approx(sum(phase["seconds"] for phase in body["phases"]), abs=0.006)


def test_of_several_rules_the_difference_is_that_of_the_prompt_that_differs_least(out: Path) -> None:
    entry = pages.entries(out)
    (rule,) = entry["injection"]
    near = rule | {"difference": rule["difference"] | {"verdict": {"percent": 1.25, "band": "near"}}}
    row = shots_table.shot_row(pages.typed(entry | {"injection": [rule, near]}), "job")
    assert (row["difference"], row["blocks"]) == (1.2, "1-2 | 1-2")


def test_csv_is_read_back_whole_and_holds_no_formulas(out: Path, tmp_path: Path) -> None:
    entry = pages.entries(out)
    texts = [
        '=HYPERLINK("x")',
        "+1",
        "-cmd|' /C calc'!A0",
        "@sum",
        "\tx",
        'a "quoted", one\nand more',
        "plain",
    ]
    rows, labels = [], []
    for text in texts:
        one = entry | {"prompts": [entry["prompts"][0] | {"text": text}, *entry["prompts"][1:]]}
        rows.append(shots_table.shot_row(pages.typed(one), "job"))
        labels.append({"take": -2.5, "=x": text})
    data = shots_table.to_csv(rows, labels)
    assert data.count(b"\r\n") == len(texts) + 1
    read = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    found = [line["prompt"] for line in read]
    assert found == [f"'{text}" if text[0] in "=+-@\t" else text for text in texts]
    assert not [cell for line in read for cell in line.values() if cell and cell[0] in "=+@\t\r"]
    assert {line["label.take"] for line in read} == {"-2.5"}  # a number is no formula


def test_the_columns_of_the_csv_are_those_that_the_docs_name() -> None:
    text = (Path(__file__).parents[3] / "docs" / "report.md").read_text()
    told = text.partition("with the columns ")[2].partition("and the labels")[0]
    assert re.findall(r"`(\w+)`", told) == [*shots_table.COLUMNS, *shots_table.CSV_ONLY_COLUMNS]


def test_csv_is_written_beside_the_page(out: Path, tmp_path: Path) -> None:
    assert run(["report", str(out), "-o", str(tmp_path / "p.html"), "--csv", str(tmp_path / "t.csv")]) == 0
    lines = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_bytes().decode(), newline="")))
    assert [(line["shot"], line["label.take"]) for line in lines] == [("fish", "1"), ("plain", "")]


# ---- models without a render ----


def test_models_are_explored_without_weights(tmp_path: Path, quick: Path) -> None:
    path = tmp_path / "explore.html"
    assert run(["explore", "wan2.1-t2v-14b", "-o", str(path)]) == 0
    found = pages.Page(path.read_bytes())
    shown = found.document
    names = [model["variant"] for model in shown["models"]]
    assert names == ["Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-TI2V-5B", "Wan2.2-T2V-A14B", "wan-mini"]
    assert shown["shots"][shown["chosen"]]["id"] == "Wan2.1-T2V-14B"
    assert [shot["tokens"] for shot in shown["shots"][:3]] == [32_760, 75_600, 27_280]
    coefficients = shown["models"][1]["calculator"]["devices"]["cuda"]
    assert coefficients["sample"]["fp32"]["resident"]["model"] == 4 * 14_288_491_584
    assert coefficients["encode"]["fp32"]["resident"]["model"] == 4 * 5_680_910_336
    assert coefficients["decode"]["model"] == 4 * 126_892_531
    sections = [attrs["id"] for tag, attrs in found.elements if tag == "section"]
    assert sections == ["blocks", "pipeline", "memory"]
    assert run(["explore", str(quick), "-o", str(path)]) == 0
    (model,) = pages.Page(path.read_bytes()).document["models"]
    assert model["sizes"]["num_layers"] == 4


def test_csv_moves_a_file_that_is_no_table_of_ours_aside(out: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("prompt: precious\n")
    for _ in range(2):
        assert run(["report", str(out), "-o", str(tmp_path / "p.html"), "--csv", str(mine)]) == 0
    assert (tmp_path / "mine.old-1.yaml").read_text() == "prompt: precious\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.old-1.yaml", "mine.yaml", "p.html"]
