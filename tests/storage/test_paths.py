"""Names of outputs: readable, safe, and never outside of the folder."""

from __future__ import annotations

import os
import pwd
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wancli.errors import JobError
from wancli.storage import paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A gray tabby cat, walking!", "a-gray-tabby-cat-walking"),
        ("  --../../etc/passwd", "etc-passwd"),
        ("猫在花园里散步", "猫在花园里散步"),
        ("Cafe\u0301", "caf\u00e9"),
        ("हिन्दी", "हिन्दी"),
        ("🐈 ❤\ufe0f", "shot"),
        ("", "shot"),
        ("CON", "con-shot"),
        ("x" * 100, "x" * 48),
        ("猫" * 100, "猫" * 16),
    ],
)
def test_a_slug_is_readable_and_short(text, expected):
    assert paths.slugify(text) == expected


@given(st.text(), st.integers(8, 80))
def test_a_slug_of_any_text_is_one_safe_name(text, limit):
    name = paths.slugify(text, limit)
    assert 0 < len(name.encode()) <= max(limit, 9)
    assert name == unicodedata.normalize("NFC", name).lower() or not text.isascii()
    assert paths.resolve_inside(Path("/root"), name + ".mp4") == Path("/root", name + ".mp4")


FIELDS: dict[str, str | int] = {"job": "cats", "item": 7, "slug": "a-cat", "id": "x"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{job}/{item:04d}-{slug}.mp4", "cats/0007-a-cat.mp4"),
        ("{item}{item:d}{item:3d}", "77  7"),
        ("plain", "plain"),
    ],
)
def test_a_template_takes_fields_and_zero_padded_numbers(template, expected):
    assert paths.expand_template(template, FIELDS) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{slag}", "no field {slag}"),
        ("{job.__class__}", "no field"),
        ("{job[0]}", "no field"),
        ("{}", "no field {}"),
        ("{job", "a lone {"),
        ("job}", "a lone }"),
        ("{{job}}", "a lone {"),
        ("{slug:04d}", "cannot write {slug}"),
        ("{item:>9999999999}", "cannot write {item}"),
        ("{item:{job}}", "a lone {"),
        ("{job!r}", "no field"),
    ],
)
def test_anything_else_in_a_template_is_an_error(template, message):
    with pytest.raises(JobError, match=message.replace("{", r"\{")):
        paths.expand_template(template, FIELDS)


def test_a_mistyped_field_is_corrected():
    with pytest.raises(JobError) as caught:
        paths.expand_template("{slag}", FIELDS)
    assert caught.value.hint == "did you mean {slug}?"


@pytest.mark.parametrize("value", ["a/b", "..\\b", "\0", "a\nb", "a\u202eb", "\ud800"])
def test_a_field_cannot_add_folders_or_invisible_characters(value):
    with pytest.raises(JobError, match="id"):
        paths.expand_template("{id}.mp4", {"id": value})


@pytest.mark.parametrize(
    "relative",
    ["", ".", "..", "../a", "a/../../b", "/a", "-y.mp4", ".hidden", "a\0b", "NUL", "com1.mp4", "x" * 250],
)
def test_an_unsafe_name_inside_the_output_folder_is_refused(tmp_path, relative):
    with pytest.raises(JobError):
        paths.resolve_inside(tmp_path, relative)


def test_the_sidecars_of_the_longest_allowed_name_can_be_written(tmp_path):
    name = "x" * paths._NAME_BYTES
    path = paths.resolve_inside(tmp_path, name)
    path.with_suffix(".latents.safetensors").touch()
    with pytest.raises(JobError, match="bytes"):
        paths.resolve_inside(tmp_path, name + "x")


def test_a_link_that_leads_out_of_the_output_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "away").symlink_to(tmp_path)
    (tmp_path / "out" / "near").symlink_to(tmp_path / "out")
    with pytest.raises(JobError, match="symbolic link"):
        paths.resolve_inside(tmp_path / "out", "away/a.mp4")
    assert paths.resolve_inside(tmp_path / "out", "near/a.mp4")


def test_folders_that_the_user_wrote_may_be_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    root = Path("/jobs")
    assert paths.output_path(root, "out/{job}/{item:02d}.mp4", FIELDS) == Path("/jobs/out/cats/07.mp4")
    assert paths.output_path(root, "../o/{slug}.mp4", FIELDS) == Path("/jobs/../o/a-cat.mp4")
    assert paths.output_path(root, "/data/.x/{slug}.mp4", FIELDS) == Path("/data/.x/a-cat.mp4")
    assert paths.output_path(root, "~/v/a.mp4", FIELDS) == Path("/home/me/v/a.mp4")
    assert paths.output_path(root, "a.mp4", FIELDS) == Path("/jobs/a.mp4")


@pytest.mark.parametrize("value", ["..", "-", ".git", "con", ""])
def test_the_value_of_a_field_stays_inside_the_folder(value):
    with pytest.raises(JobError):
        paths.output_path(Path("/jobs"), "out/{id}", {"id": value})


@pytest.mark.parametrize("template", ["out/a\nb{item}.mp4", "a\nb/{item}.mp4", "a\u202eb.mp4", "a\udcff.mp4"])
def test_a_template_whose_path_is_not_one_line_of_text_is_refused(template):
    odd = next(char for char in template if not char.isprintable())
    with pytest.raises(JobError, match=rf"U\+{ord(odd):04X}"):
        paths.output_path(Path("/jobs"), template, FIELDS)


def test_a_tilde_from_a_field_is_a_plain_name():
    assert paths.output_path(Path("/jobs"), "{id}/a", {"id": "~"}) == Path("/jobs/~/a")


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_label_leads_out_of_the_output_folder(a, b):
    try:
        path = paths.output_path(Path("/jobs"), "out/{a}/{b}-{a}.mp4", {"a": a, "b": b})
    except JobError:
        return
    assert Path(os.path.normpath(path)).is_relative_to("/jobs/out")
    assert len(path.parts) == 5


@pytest.mark.parametrize("text", ["s3://bucket/a", "https://host/a", "gs://bucket/{id}.mp4", "HF://x/y"])
def test_a_url_is_no_path(text):
    with pytest.raises(JobError, match="is a URL"):
        paths.expand_home(text, "job.yaml:1: output")
    with pytest.raises(JobError, match="is a URL"):
        paths.output_path(Path("/"), text, {"id": "a"})


def test_a_folder_whose_name_ends_with_a_colon_is_used_if_it_exists(tmp_path):
    (tmp_path / "night:").mkdir()
    for text in ("night:/{id}.mp4", "night://{id}.mp4"):
        assert paths.output_path(tmp_path, text, {"id": "a"}) == tmp_path / "night:" / "a.mp4"
    with pytest.raises(JobError, match="is a URL"):
        paths.output_path(tmp_path, "day://{id}.mp4", {"id": "a"})


@pytest.mark.parametrize("text", ["$SCRATCH/a.mp4", "${SCRATCH}/{id}.mp4", "out/$USER/{id}.mp4"])
def test_a_variable_in_a_path_is_refused_and_not_expanded(text):
    with pytest.raises(JobError, match="paths expand no variables") as caught:
        paths.output_path(Path("/"), text, {"id": "a"})
    assert "--set" in caught.value.hint


def test_a_folder_whose_name_begins_with_a_dollar_is_used_if_it_exists(tmp_path):
    for name in ("$SCRATCH", "$USER-old"):
        (tmp_path / name).mkdir()
        output = paths.output_path(tmp_path, f"{name}/{{id}}.mp4", {"id": "a"})
        assert output == tmp_path / name / "a.mp4"
        for path in (Path(name, "model"), tmp_path / name):
            assert paths.expand_home(path, base=tmp_path) == path
            with pytest.raises(JobError, match="paths expand no variables"):
                paths.expand_home(path / "$OTHER", base=tmp_path)
    with pytest.raises(JobError, match="paths expand no variables"):
        paths.expand_home("$SCRATCH/model", base=tmp_path / "elsewhere")


@pytest.mark.parametrize("text", ["a$b/c.mp4", "out/$5.mp4", "cost$/a.mp4"])
def test_other_dollars_are_part_of_a_name(text):
    assert paths.output_path(Path("/"), text, {}) == Path("/") / text


def test_a_path_beyond_the_limits_of_the_system_is_refused():
    paths.require_possible(Path("/", *["x" * 255] * 14), "a")
    for path in (Path("/", "ä" * 128, "a.mp4"), Path("/", *["x" * 255] * 16, "a.mp4")):
        with pytest.raises(JobError, match=r"bytes; at most [\d,]+ fit, for shot a"):
            paths.require_possible(path, "a")


def test_a_user_without_a_home_has_no_folders(monkeypatch):
    def nobody(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert paths.user_folder("cache") is None
    assert paths.user_folder("config") is None
    with pytest.raises(JobError, match="home folder of '~/a' is not known"):
        paths.expand_home("~/a")
