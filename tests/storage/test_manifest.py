from __future__ import annotations

import json
import random

import pytest
from jobs import damaged_copies
from manifests import body, phase, prompt, rule

from wancli.errors import EntryError
from wancli.storage import manifest
from wancli.storage.manifest_schema import Manifest

KEY = "0123456789abcdef"


@pytest.fixture
def output(tmp_path):
    """A finished shot: video, latents, manifest."""
    path = tmp_path / "a.b.mp4"
    path.write_bytes(b"video")
    (tmp_path / "a.b.latents.safetensors").write_bytes(b"latents")
    kept = [path, tmp_path / "a.b.latents.safetensors"]
    files = [manifest.file_record(file, tmp_path) for file in kept]
    manifest.write(manifest.manifest_path(path), body(key=KEY, files=files, prompts=[prompt("p", "猫")]))
    return path


def test_the_manifest_stands_beside_the_output(tmp_path):
    assert manifest.manifest_path(tmp_path / "a.b.mp4") == tmp_path / "a.b.manifest.json"


def test_the_json_that_was_written_is_the_json_that_is_read(tmp_path):
    path = tmp_path / "x.manifest.json"
    data = {"z": [1, 2.5, None, True], "a": {"nested": "ünïcode"}, "tiny": 1e-7}
    manifest.write(path, data)
    assert manifest.read_json(path) == data
    manifest.write(path, {"other": 1})
    assert manifest.read_json(path) == {"other": 1}


def test_numbers_as_keys_and_tuples_are_written_as_json_has_them(tmp_path):
    path = tmp_path / "x.manifest.json"
    manifest.write(path, {"hits": {2: 1, 10: 1}, "size": (832, 480)})
    assert manifest.read_json(path) == {"hits": {"2": 1, "10": 1}, "size": [832, 480]}


def test_a_manifest_is_read_as_typed_data_and_written_back_as_it_was(tmp_path):
    path = tmp_path / "x.manifest.json"
    later = body(later=[1]) | {"prompts": [prompt("p", "a red fox", later={"2": 0.5})]}
    manifest.write(path, later)
    record = manifest.read(path)
    assert isinstance(record, Manifest)
    assert record.prompt.text == "a red fox"
    assert record.as_dict() == later


def test_a_manifest_of_an_earlier_version_has_defaults_for_the_keys_that_came_later(tmp_path):
    path = tmp_path / "x.manifest.json"
    manifest.write(path, body())
    record = manifest.read(path)
    assert (record.loras, record.decoded, record.latent) == ([], None, None)
    assert record.model.kernels.attention == "auto"
    assert record.prompt.max_tokens == 256
    assert record.as_dict() == body()


@pytest.mark.parametrize(
    "changes",
    [{"key": None}, {"files": "x"}, {"shot": {}}, {"prompts": []}, {"phases": [{"name": "encode"}]}],
    ids=str,
)
def test_a_sealed_manifest_of_another_shape_is_one_error_with_the_name_of_its_file(tmp_path, changes):
    output = tmp_path / "x.mp4"
    path = manifest.manifest_path(output)
    manifest.write(path, body(**changes))
    with pytest.raises(EntryError, match=r"x\.manifest\.json: .*damaged, or of another version"):
        manifest.read(path)
    assert manifest.read_if_usable(path) is None
    (problem, *_) = manifest.find_problems(output, KEY)
    assert problem.path in (path, output)  # the video does not exist


@pytest.mark.parametrize("lacking", ["shot", "prompts", "phases", "predicted"])
def test_a_shot_is_done_by_its_key_and_files_whatever_else_its_manifest_lacks(output, lacking):
    path = manifest.manifest_path(output)
    whole = manifest.read_json(path)
    manifest.write(path, {name: value for name, value in whole.items() if name != lacking})
    assert manifest.is_done(output, KEY)
    assert manifest.read_if_usable(path) is None


def test_a_rule_whose_prompt_is_missing_is_damage(tmp_path):
    path = tmp_path / "x.manifest.json"
    manifest.write(path, body(injection=[rule("q")]))
    with pytest.raises(EntryError, match="damaged"):
        manifest.read(path)
    manifest.write(path, body(injection=[rule("q")], prompts=[prompt("p", "a"), prompt("q", "b")]))
    record = manifest.read(path)
    assert ([prompt.text for prompt in record.injected], record.negative) == (["b"], None)


def test_a_phase_is_recognised_by_its_id_and_without_one_by_what_was_measured():
    shared = {"seconds": 2.0, "rss_start": 3, "rss": 4}
    data = [phase("load", id="a"), phase("load", id="b"), phase("load", **shared), phase("load", **shared)]
    first, second, third, fourth = Manifest.model_validate(body(phases=data)).phases
    assert first.identity != second.identity
    assert third.identity == fourth.identity


def test_the_key_of_a_manifest_is_read_without_the_seal(output):
    path = manifest.manifest_path(output)
    path.write_text(path.read_text().replace('"seal": "', '"seal": "0'))
    assert manifest.peek_key(path) == KEY
    path.write_text("[]")
    assert manifest.peek_key(path) is None
    assert manifest.peek_key(output.with_name("none")) is None


def test_a_manifest_is_readable_json_with_its_schema(output):
    text = manifest.manifest_path(output).read_text()
    assert json.loads(text)["schema"] == manifest.SCHEMA
    assert "猫" in text
    assert len(text.splitlines()) > 5


def test_a_missing_manifest_is_none(tmp_path):
    assert manifest.read(tmp_path / "x.manifest.json") is None


def test_every_flipped_bit_and_every_cut_of_a_manifest_is_noticed(tmp_path):
    path = tmp_path / "x.manifest.json"
    manifest.write(path, {"key": KEY, "steps": 50, "files": []})
    whole = path.read_bytes()
    for data in [*damaged_copies(whole), whole + b"\n"]:
        path.write_bytes(data)
        with pytest.raises(EntryError, match="damaged"):
            manifest.read(path)


@pytest.mark.parametrize("text", ["[]", "null", '{"seal": NaN}', "[" * 100_000, '{"a": "\\ud800"}', "\xff"])
def test_other_json_is_a_damaged_manifest(tmp_path, text):
    path = tmp_path / "x.manifest.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(EntryError):
        manifest.read(path)


def test_a_number_that_json_does_not_have_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        manifest.write(tmp_path / "x.manifest.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_shot_is_done_when_its_manifest_and_all_its_files_verify(output):
    assert manifest.is_done(output, KEY)


def test_a_shot_of_another_job_is_not_done(output):
    assert not manifest.is_done(output, KEY[::-1])
    assert "another job" in manifest.find_problems(output, KEY[::-1])[0].text


def test_a_shot_without_a_manifest_is_not_done(output):
    manifest.manifest_path(output).unlink()
    assert not manifest.is_done(output, KEY)


@pytest.mark.parametrize("name", ["a.b.mp4", "a.b.latents.safetensors", "a.b.manifest.json"])
def test_any_damage_to_any_file_of_a_shot_is_named(output, name):
    path = output.with_name(name)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(rng.choice([bytes(flipped), whole[: rng.randrange(len(whole))], whole + b"x"]))
        (problem,) = manifest.find_problems(output, KEY)
        assert problem.path == path
        assert not manifest.is_done(output, KEY)
    path.unlink()
    assert manifest.find_problems(output, KEY)[0].path == path


def test_a_manifest_that_does_not_list_its_output_proves_nothing(tmp_path):
    output = tmp_path / "a.mp4"
    output.write_bytes(b"video")
    manifest.write(manifest.manifest_path(output), body(key=KEY, files=[]))
    assert not manifest.is_done(output, KEY)
    manifest.write(manifest.manifest_path(output), {"key": KEY})
    assert not manifest.is_done(output, KEY)
