"""`images_from`: pictures become items, each with the text beside it as its prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from wancli.errors import JobError
from wancli.job.loader import Item, JobFile, load
from wancli.job.schema import ImageOptions


def job(folder: Path, text: str) -> JobFile:
    (folder / "job.yaml").write_text(text)
    return load(folder / "job.yaml")


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("A prompt of its own\nin two lines\n" if name.endswith(".txt") else "")


def first_of(item: Item) -> object:
    return item.job.image.first if isinstance(item.job.image, ImageOptions) else item.job.image


def pairs(jobs: JobFile) -> list[tuple[object, object]]:
    return [(first_of(item), item.job.prompt) for item in jobs.items]


def problem(folder: Path, text: str) -> JobError:
    with pytest.raises(JobError) as caught:
        job(folder, text)
    return caught.value


def test_a_pattern_makes_an_item_of_each_picture_with_the_prompt_beside_it(tmp_path: Path) -> None:
    put(tmp_path, "photos/b.jpg", "photos/a.jpg", "photos/a.txt", "photos/c.png", "photos/.hidden.jpg")
    own = "A prompt of its own\nin two lines"
    jobs = job(tmp_path, "prompt: p\nimages_from: photos/*.jpg\n")
    assert pairs(jobs) == [("photos/a.jpg", own), ("photos/b.jpg", "p")]
    assert jobs.items[0].base_dir("image") == tmp_path
    assert pairs(job(tmp_path, "prompt: p\nimages_from: photos\n")) == [
        ("photos/a.jpg", own),
        ("photos/b.jpg", "p"),
        ("photos/c.png", "p"),
    ]
    assert pairs(job(tmp_path, f"prompt: p\nimages_from: '{tmp_path}/**/c.*'\n")) == [("photos/c.png", "p")]


def test_a_list_names_pictures_from_its_own_folder_with_keys_of_a_job(tmp_path: Path) -> None:
    put(tmp_path, "lists/cat.png", "lists/cat.txt")
    (tmp_path / "lists/all.txt").write_text("# mine\ncat.png\n\nsub/dog.png\n")
    jobs = job(tmp_path, "prompt: p\nimages_from: lists/all.txt\n")
    assert [image for image, _ in pairs(jobs)] == ["cat.png", "sub/dog.png"]
    assert jobs.items[0].base_dir("image") == tmp_path / "lists"
    assert jobs.items[0].job.prompt != "p"
    assert jobs.items[1].location("image").endswith("lists/all.txt:4: image")
    (tmp_path / "lists/all.jsonl").write_text(
        '{"image": {"first": "cat.png", "fit": "pad"}, "seed": 3, "prompt": "own"}\n{"image": "cat.png"}\n'
    )
    jobs = job(tmp_path, "prompt: p\nimages_from: lists/all.jsonl\n")
    assert (jobs.items[0].job.seed, jobs.items[0].job.prompt) == (3, "own")
    assert str(jobs.items[1].job.prompt).startswith("A prompt of its own")


def test_every_picture_is_rendered_for_every_combination(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    jobs = job(tmp_path, "prompt: p\nimages_from: '*.png'\nmatrix: {seed: [1, 2]}\n")
    assert [(first_of(item), item.job.seed) for item in jobs.items] == [
        ("a.png", 1), ("a.png", 2), ("b.png", 1), ("b.png", 2),
    ]  # fmt: skip
    swept = job(tmp_path, "prompt: p\nmatrix: {image: [a.png, b.png]}\n")
    assert [(item.job.id, item.job.labels) for item in swept.items] == [
        ("a-png", {"image": "a.png"}), ("b-png", {"image": "b.png"}),
    ]  # fmt: skip


def test_the_label_of_a_picture_is_its_name_unless_two_have_the_same(tmp_path: Path) -> None:
    for values, names in (
        ("photos/a.png, {first: b.png}", ["a.png", "b.png"]),
        ("one/a.png, two/a.png", ["one/a.png", "two/a.png"]),
        (
            "{first: a.png}, {first: a.png, fit: pad}",
            ['{"first": "a.png"}', '{"first": "a.png", "fit": "pad"}'],
        ),
    ):
        swept = job(tmp_path, f"prompt: p\nmatrix: {{image: [{values}]}}\n")
        assert [item.job.labels for item in swept.items] == [{"image": name} for name in names]
    swept = job(tmp_path, "prompt: p\nimage: {fit: pad}\nmatrix: {image.first: [photos/a.png, b.png]}\n")
    assert [item.job.labels for item in swept.items] == [{"first": "a.png"}, {"first": "b.png"}]


def test_the_other_keys_of_image_apply_to_every_picture_of_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "photos/a.png", "photos/b.png")
    jobs = job(tmp_path, "prompt: p\nimage: {preprocess: comfy, last: end.png}\nimages_from: photos\n")
    assert [item.job.image for item in jobs.items] == [
        ImageOptions(first=f"photos/{name}.png", last="end.png", preprocess="comfy") for name in "ab"
    ]


def test_a_place_without_pictures_is_named_with_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, "empty/notes.md")
    error = problem(tmp_path, "prompt: p\nimages_from: empty\n")
    assert str(error).endswith(
        "job.yaml:2: images_from: 'empty' names no picture, only other files such as notes.md"
    )
    assert "photos/*.jpg" in error.hint
    assert "names no picture" in str(problem(tmp_path, "prompt: p\nimages_from: none/*.png\n"))
    assert "must be the name of a file" in str(problem(tmp_path, "prompt: p\nimages_from: [a]\n"))
    (tmp_path / "none.txt").write_text("# nothing\n")
    assert "contains no images" in str(problem(tmp_path, "prompt: p\nimages_from: none.txt\n"))


def test_lists_of_shots_exclude_each_other_and_a_missing_prompt_is_reported(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for other in ("items: [{seed: 1}]", "prompts_from: p.txt"):
        error = problem(tmp_path, f"prompt: p\n{other}\nimages_from: '*.png'\n")
        assert f"job.yaml:3: images_from: {other.partition(':')[0]} and images_from both list shots" in str(
            error
        )
    assert "job.yaml: prompt: is missing" in str(problem(tmp_path, "images_from: '*.png'\n"))
    put(tmp_path, "b.png", "b.txt")
    error = problem(tmp_path, "images_from: '*.png'\n")
    assert str(error).endswith("job.yaml:1: images_from.a.png.prompt: is missing")


def test_a_text_beside_a_picture_that_is_not_a_prompt_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert f"{tmp_path}/a.txt: byte 0 is not UTF-8" in str(problem(tmp_path, "images_from: a.png\n"))
    (tmp_path / "a.txt").write_bytes(b"x" * 70_000)
    assert "too long for a prompt" in str(problem(tmp_path, "images_from: a.png\n"))
    (tmp_path / "a.txt").write_text("  \n")
    assert pairs(job(tmp_path, "prompt: p\nimages_from: a.png\n")) == [("a.png", "p")]
