"""Pictures of a shot: their number, their files, the size of the video, and what changes its key."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from PIL import Image

from wancli.errors import JobError
from wancli.job.loader import Item, parse
from wancli.models.variants import FLF2V, I2V_480P, I2V_A14B, T2V_14B, TI2V_5B, Variant
from wancli.plan import picture_resolver
from wancli.plan.picture_resolver import PictureMemo, resolve_pictures
from wancli.plan.pictures import PictureFile, ShotPictures

I2V = I2V_480P


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("cat", (157, 111)), ("wide", (1664, 960)), ("needle", (1, 4000))):
        Image.new("RGB", size, (20, 90, 160)).save(tmp_path / f"{name}.png")
    return tmp_path


def item(folder: Path, **keys: Any) -> Item:
    (found,) = parse(yaml.safe_dump({"prompt": "p", **keys}).encode(), "job.yaml", "job", folder).items
    return found


def resolve(folder: Path, variant: Variant = I2V, **keys: Any) -> tuple[ShotPictures | None, tuple[int, int]]:
    memo = PictureMemo(folder / "cache" / "pictures.json")
    result = resolve_pictures(item(folder, **keys), variant, memo, None)
    memo.save()
    return result


def fits(folder: Path, variant: Variant = I2V, **keys: Any) -> tuple[str, tuple[int, int]]:
    pictures, size = resolve(folder, variant, **keys)
    assert pictures
    return pictures.first.how.fit, size


def problem(folder: Path, variant: Variant = I2V, **keys: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        resolve(folder, variant, **keys)
    return caught.value


@pytest.mark.parametrize(
    ("variant", "keys", "fit", "size"),
    [
        (I2V, {"size": {"area": 4096}}, "stretch", (64, 48)),
        (I2V, {"size": {"area": "96x32"}}, "stretch", (64, 32)),
        (I2V, {"size": "64x48"}, "stretch", (64, 48)),
        (I2V, {"size": "64x64"}, "crop", (64, 64)),
        (I2V, {}, "stretch", (736, 528)),  # the area of 832x480
        (TI2V_5B, {"size": {"area": 9216}}, "crop", (128, 64)),
        (TI2V_5B, {"size": "64x64"}, "crop", (64, 64)),
        (I2V, {"image": {"first": "cat.png", "fit": "pad"}}, "pad", (736, 528)),
        (
            I2V,
            {"image": {"first": "cat.png", "preprocess": "diffusers"}, "size": "64x64"},
            "stretch",
            (64, 64),
        ),
        (
            I2V,
            {"image": {"first": "cat.png", "preprocess": "comfy"}, "size": {"area": 4096}},
            "crop",
            (64, 48),
        ),
    ],
)
def test_size_and_fit_follow_from_the_model_the_picture_and_the_job(
    folder: Path, variant: Variant, keys: dict[str, Any], fit: str, size: tuple[int, int]
) -> None:
    assert fits(folder, variant, **{"image": "cat.png", **keys}) == (fit, size)


AREA = {"area": 4096}


@pytest.mark.parametrize(
    ("variant", "last", "keys", "fit", "crop"),
    [
        (I2V_A14B, "cat.png", {"size": AREA}, "stretch", None),
        (I2V_A14B, "wide.png", {"size": AREA}, "crop", None),
        (FLF2V, "cat.png", {"size": AREA}, "stretch", None),
        # To cover 157x111, 1664x960 is scaled by 111/960 to 192x111; width and height are exchanged.
        (FLF2V, "wide.png", {"size": AREA}, "stretch", (111, 192)),
        (FLF2V, "wide.png", {}, "stretch", (111, 192)),
        (FLF2V, "wide.png", {"size": "64x48"}, "crop", None),
        (FLF2V, "wide.png", {"size": AREA, "fit": "crop"}, "crop", None),
        (FLF2V, "wide.png", {"size": AREA, "preprocess": "diffusers"}, "stretch", None),
        (FLF2V, "wide.png", {"size": AREA, "preprocess": "comfy"}, "crop", None),
    ],
)
def test_a_last_frame_of_another_size_is_cropped_to_the_video_or_as_the_official_code_does(
    folder: Path, variant: Variant, last: str, keys: dict[str, Any], fit: str, crop: tuple[int, int] | None
) -> None:
    options = {key: keys[key] for key in ("fit", "preprocess") if key in keys}
    image = {"first": "cat.png", "last": last, **options}
    pictures, _ = resolve(folder, variant, image=image, **{key: keys[key] for key in keys.keys() - options})
    assert pictures
    assert pictures.last
    source = pictures.last.source
    assert isinstance(source, PictureFile)
    assert (pictures.last.how.fit, source.crop) == (fit, crop)
    assert any("as the official code does" in note for note in source.facts.notes) == bool(crop)


@pytest.mark.parametrize(
    ("size", "crop", "grey"), [((314, 222), (111, 157), False), ((300, 210), (111, 159), False),
                               ((160, 112), (111, 159), True), ((50, 40), (126, 157), True)]
)  # fmt: skip
def test_the_warning_of_the_official_crop_speaks_of_grey_only_if_there_is_any(
    folder: Path, size: tuple[int, int], crop: tuple[int, int], grey: bool
) -> None:
    Image.new("RGB", size).save(folder / "last.png")
    pictures, _ = resolve(folder, FLF2V, image={"first": "cat.png", "last": "last.png"})
    assert pictures
    _, last = pictures.files
    assert last.crop == crop
    (note,) = last.facts.notes
    assert f"a middle of {crop[0]}x{crop[1]} is taken" in note
    assert ("grey" in note) == grey


@pytest.mark.parametrize(
    ("variant", "image", "where", "message"),
    [
        (I2V, None, "image", "makes a video from a picture, and the job names none"),
        (T2V_14B, "cat.png", "image", "Wan2.1-T2V-14B makes videos from text alone"),
        (I2V, {"first": "cat.png", "last": "wide.png"}, "image.last", "takes no last frame"),
        (I2V, {"last": "wide.png"}, "image", "needs the first frame"),
        (FLF2V, "cat.png", "image", "needs the last frame, too"),
        (I2V, {"fit": "crop"}, "image", "names no picture"),
        (I2V, {"first": "cat.png", "shot": "a"}, "image", "has both `first` and `shot`"),
        (I2V, "dog.png", "image", "'dog.png' cannot be read: No such file"),
        (I2V, {"first": "."}, "image.first", "'.' is a folder"),
        (I2V, "job.yaml", "image", "'job.yaml' cannot be read: No such file"),
        (I2V, "needle.png", "image", "a picture of 1x4000 gives a video of 0x"),
    ],
)
def test_a_picture_too_many_too_few_or_unreadable_is_refused_by_name(
    folder: Path, variant: Variant, image: Any, where: str, message: str
) -> None:
    error = problem(folder, variant, **({} if image is None else {"image": image}))
    assert f": {where}: " in str(error)
    assert message in str(error)
    assert error.hint


def test_an_area_needs_a_picture_and_sides_are_parsed(folder: Path) -> None:
    assert "size.area" in str(problem(folder, T2V_14B, size={"area": 4096}))
    assert "'832' is not a size" in str(problem(folder, image="cat.png", size={"area": "832"}))
    assert "not made of multiples of 32" in str(problem(folder, TI2V_5B, image="cat.png", size="80x64"))
    assert resolve(folder, TI2V_5B) == (None, (1280, 704))
    assert resolve(folder, T2V_14B, size="64x64") == (None, (64, 64))


def settings(folder: Path, **image: Any) -> Any:
    pictures, _ = resolve(folder, image={"first": "cat.png", **image}, size="64x64")
    assert pictures
    return pictures.pixel_settings


def test_the_settings_of_a_key_change_with_pixels_and_not_with_the_file(folder: Path) -> None:
    plain = settings(folder)
    Image.open(folder / "cat.png").save(folder / "copy.bmp")
    assert settings(folder, first="copy.bmp") == plain
    assert settings(folder, orient="ignore", alpha="white") == plain  # of this picture they change no pixel
    others = [{"first": "wide.png"}, {"preprocess": "comfy"}, {"preprocess": "diffusers"}, {"fit": "pad"}]
    assert len({plain, *(settings(folder, **other) for other in others)}) == 1 + len(others)


def test_orientation_follows_the_method_unless_the_job_says_it(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (160, 96)).save(folder / "phone.jpg", exif=exif)
    found = {}
    for image in (
        {},
        {"orient": "exif"},
        {"preprocess": "diffusers"},
        {"preprocess": "comfy", "orient": "ignore"},
    ):
        pictures, _ = resolve(folder, image={"first": "phone.jpg", **image}, size="64x64")
        assert pictures
        (file,) = pictures.files
        found[json.dumps(image)] = (file.size, bool(file.facts.notes))
    assert list(found.values()) == [
        ((160, 96), True),
        ((96, 160), False),
        ((96, 160), False),
        ((160, 96), True),
    ]


def test_a_picture_is_decoded_once_until_its_file_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    real = picture_resolver.inspect_picture

    def counted(path: Path, *options: Any) -> Any:
        calls.append(path)
        return real(path, *options)

    monkeypatch.setattr(picture_resolver, "inspect_picture", counted)
    before = settings(folder)
    assert settings(folder) == before
    assert len(calls) == 1
    (folder / "cache/pictures.json").write_text('{"damaged": {"sha256": 5}}')
    assert settings(folder) == before
    assert len(calls) == 2
    monkeypatch.setattr(picture_resolver, "version", lambda _: "99.0")  # it may decode to other pixels
    assert settings(folder) == before
    assert len(calls) == 3
    Image.new("RGB", (157, 111), (1, 2, 3)).save(folder / "other.png")
    (folder / "other.png").replace(folder / "cat.png")
    assert settings(folder) != before


def test_a_shot_keeps_the_size_of_the_one_it_continues_if_its_model_renders_that_size(folder: Path) -> None:
    continued = item(folder, image={"shot": "a"})
    for variant, before, size in (
        (I2V, (112, 80), (112, 80)),
        (TI2V_5B, (128, 64), (128, 64)),
        (TI2V_5B, (1280, 720), (1248, 704)),  # by the rule of its area
    ):
        parent = SimpleNamespace(
            index=0, id="a", output=folder / "a.mp4", frames=5, width=before[0], height=before[1]
        )
        parent.frame_key = lambda frame: "key"
        memo = PictureMemo(folder / "cache" / "pictures.json")
        assert resolve_pictures(continued, variant, memo, cast(Any, parent))[1] == size


def test_files_of_a_shot_are_named_by_the_first_picture(folder: Path) -> None:
    pictures, _ = resolve(folder, image="cat.png")
    assert pictures
    assert pictures.name == "cat"
    assert isinstance(pictures.first.source, PictureFile)
