"""Job to Plan: defaults, the keys of shots, and errors that are reported before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import (
    CAT,
    FISH,
    SPIECE,
    TINY,
    change_tensors,
    checkpoint,
    rule,
    run_wancli,
    tiny_job,
    words,
    write_job,
)

from wancli.errors import CheckpointError, EntryError, JobError
from wancli.injection.exprs import Text
from wancli.job.cli_overrides import CliOverrides
from wancli.job.loader import load
from wancli.models.variants import NEGATIVE_PROMPT, T2V, T2V_14B, T2V_A14B, TI2V_5B
from wancli.plan import planner as planning
from wancli.plan.render_plan import Plan
from wancli.plan.shot import Shot
from wancli.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def memo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hashes of weights, shared by all tests."""
    return tmp_path_factory.mktemp("memo") / "hashes.json"


@pytest.fixture
def decide(tmp_path: Path, memo: Path) -> Callable[..., Plan]:
    """A job, as a mapping or as changes to the tiny one, planned."""

    def decided(job: dict[str, Any] | None = None, *, measure: bool = False, **changes: Any) -> Plan:
        path = write_job(tmp_path, tiny_job(**changes) if job is None else job)
        return planning.build_plan(load(path), memo, measure=measure)

    return decided


def only(plan: Plan) -> Shot:
    (shot,) = plan.shots
    return shot


def problems(decide: Callable[..., Plan], **changes: Any) -> list[str]:
    with pytest.raises(JobError) as caught:
        decide(**changes)
    return [line.rpartition("job.yaml")[2] for line in str(caught.value).splitlines()]


# ---- defaults ----


def test_defaults_are_those_that_the_model_was_made_for(decide: Callable[..., Plan]) -> None:
    shot = only(decide({"model": str(TINY), "prompt": CAT}))
    assert (shot.width, shot.height, shot.frames, shot.fps) == (T2V.width, T2V.height, T2V.frames, T2V.fps)
    assert (shot.steps, shot.shift, shot.guidance) == (T2V.steps, T2V.shift, T2V.guidance)
    assert shot.latent_shape == (16, 21, 60, 104)
    assert shot.tokens == 32760
    assert (shot.solver, shot.seed, shot.noise, shot.crf, shot.codec) == ("unipc", 0, "cpu", 16, "h264")
    assert shot.negative is not None
    assert shot.negative.tokens == Tokenizer(SPIECE).tokenize(NEGATIVE_PROMPT, 512, truncate=True)
    assert (shot.id, shot.keep_latents, shot.measure, shot.rules) == ("0000", False, False, ())


def test_each_variants_row_sets_the_shape_of_its_latents(decide: Callable[..., Plan]) -> None:
    """Token counts of the official sizes, as published."""
    shot = only(decide())
    for variant, shape, tokens in (
        (T2V_14B, (16, 21, 90, 160), 75_600),
        (T2V_A14B, (16, 21, 90, 160), 75_600),
        (TI2V_5B, (48, 31, 44, 80), 27_280),
    ):
        model = replace(shot.model, checkpoint=replace(shot.model.checkpoint, variant=variant))
        made_for = replace(
            shot, model=model, width=variant.width, height=variant.height, frames=variant.frames
        )
        assert (made_for.latent_shape, made_for.tokens) == (shape, tokens)


def test_a_distilled_solver_brings_its_own_steps_shift_and_guidance(decide: Callable[..., Plan]) -> None:
    shot = only(decide(sampler={"solver": "distill4"}))
    assert (shot.steps, shot.shift, shot.guidance, shot.negative) == (4, 5.0, 1.0, None)
    assert problems(decide, sampler={"solver": "distill4", "steps": 8}) == [
        ":9: sampler.steps: distill4 has 4 steps, not 8"
    ]


def test_at_guidance_1_the_negative_prompt_is_not_even_tokenised(decide: Callable[..., Plan]) -> None:
    shot = only(decide(sampler={"guidance": 1}, negative="fog " * 600))
    assert shot.negative is None
    assert shot.table.branches == ("cond",)
    assert [text.tokens.text for text in shot.prompts] == [CAT]


def test_an_empty_negative_is_a_prompt_and_any_other_empty_text_an_error(decide: Callable[..., Plan]) -> None:
    negative = only(decide(negative="")).negative
    assert negative is not None
    assert negative.tokens.ids == (1,)
    assert problems(decide, prompt="  ") == [":3: prompt: is empty"]
    assert problems(decide, inject=[rule(prompt="")]) == [":10: inject.0.prompt: is empty"]


def test_measuring_can_be_turned_on_from_outside(decide: Callable[..., Plan]) -> None:
    assert only(decide(measure=True)).measure


# ---- keys ----

PIXELS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": CAT + " Butterflies."},
    "negative": {"negative": "market"},
    "size": {"size": "80x64"},
    "frames": {"frames": 5},
    "seed": {"seed": 1},
    "noise": {"noise": "cuda"},
    "solver": {"sampler": {"steps": 2, "solver": "dpm++"}},
    "steps": {"sampler": {"steps": 3}},
    "shift": {"sampler": {"steps": 2, "shift": 3.0}},
    "guidance": {"sampler": {"steps": 2, "guidance": 4.0}},
    "no guidance": {"sampler": {"steps": 2, "guidance": 1}},
    "dtype": {"memory": {"dtype": "bf16"}},
    "max_tokens": {"text": {"max_tokens": 512}},
    "no rule": {"inject": []},
    "rule.prompt": {"inject": [rule(prompt="rain")]},
    "rule.blocks": {"inject": [rule(blocks="26-39")]},
    "rule.strength": {"inject": [rule(strength=0.61)]},
    "rule.steps": {"inject": [rule(steps="0")]},
    "rule.step_strength": {"inject": [rule(step_strength=[1, 0.5])]},
    "rule.branch": {"inject": [rule(branch="both")]},
    "rule.blend": {"inject": [rule(blend="output-mix")]},
    "rule.gain": {"inject": [rule(gain=1.5)]},
    "a second rule": {"inject": [rule(), rule(prompt="rain")]},
}
VIDEO = {
    "fps": {"video": {"fps": 24}},
    "crf": {"video": {"crf": 20}},
    "codec": {"video": {"codec": "h265"}},
    "decode_chunk": {"memory": {"decode_chunk": 8}},
}
NEITHER = {
    "measure": {"measure": True},
    "output": {"output": "elsewhere/{key}.mp4"},
    "id": {"id": "a"},
    "labels": {"labels": {"take": 3}},
    "keep_latents": {"video": {"keep_latents": True}},
    "truncate, when nothing is cut": {"text": {"truncate": True}},
    "white space": {"prompt": "  " + CAT.replace(" ", "\n  ")},
    "a default, said": {"sampler": {"steps": 2, "solver": "unipc", "shift": 5, "guidance": 5.0}},
    "blocks in other words": {"inject": [rule(blocks=["late"])]},
    "steps in other words": {"inject": [rule(steps="0-100%")]},
    "strengths one by one": {"inject": [rule(strength=[0.6] * 13)]},
}


def keys(decide: Callable[..., Plan], **changes: Any) -> tuple[str, str]:
    shot = only(decide(**({"inject": [rule()]} | changes)))
    return shot.latents_key, shot.key


@pytest.mark.parametrize("name", PIXELS)
def test_both_keys_change_with_what_changes_pixels(decide: Callable[..., Plan], name: str) -> None:
    before, after = keys(decide), keys(decide, **PIXELS[name])
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("name", VIDEO)
def test_what_the_latent_does_not_depend_on_changes_only_the_key(
    decide: Callable[..., Plan], name: str
) -> None:
    before, after = keys(decide), keys(decide, **VIDEO[name])
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("name", NEITHER)
def test_no_key_changes_with_what_changes_no_pixel(decide: Callable[..., Plan], name: str) -> None:
    assert keys(decide) == keys(decide, **NEITHER[name])


def test_all_these_jobs_have_different_keys(decide: Callable[..., Plan]) -> None:
    found = [keys(decide, **changes)[1] for changes in ({}, *PIXELS.values(), *VIDEO.values())]
    assert len(set(found)) == len(found)


def test_a_key_depends_on_the_compute_dtype_of_fp8_weights(decide: Callable[..., Plan]) -> None:
    """Prompts from files are the same on a GPU, whose text encoder would have run in bf16."""
    shot = only(decide(memory={"dtype": "fp8", "device": "cpu"}))
    on_gpu = replace(shot, model=replace(shot.model, device="cuda"))
    assert shot.latents_key != on_gpu.latents_key


def test_keys_depend_on_the_weights_and_not_on_their_path(
    decide: Callable[..., Plan], tmp_path: Path
) -> None:
    model = checkpoint(tmp_path)
    assert keys(decide) == keys(decide, model=str(model))
    for name, same_latent in (
        ("Wan2.1_VAE.pth", True),
        ("models_t5_umt5-xxl-enc-bf16.pth", False),
        ("diffusion_pytorch_model.safetensors", False),
    ):
        before = keys(decide, model=str(model))
        change_tensors(model / name, lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1))
        after = keys(decide, model=str(model))
        assert (before[0] == after[0]) is same_latent
        assert before[1] != after[1]


def test_an_embedding_file_is_identified_by_its_content_and_index(
    decide: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, texts in (("a", ("x", "y")), ("b", ("x", "y")), ("c", ("y", "x"))):
        out = tmp_path / f"{name}.safetensors"
        assert run_wancli(capsys, "encode", "-q", "--model", TINY, "--out", out, *texts).code == 0
    found = [
        keys(decide, prompt={"embedding": f"{name}.safetensors", "index": i})[1]
        for name in "abc"
        for i in (0, 1)
    ]
    assert found[:2] == found[2:4]
    assert len(set(found)) == 4


def test_an_embedding_file_must_exist_be_whole_and_have_the_index(
    decide: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.safetensors"
    assert run_wancli(capsys, "encode", "-q", "--model", TINY, "--out", out, "x").code == 0
    for said, problem in (
        (
            {"embedding": "a.safetensors", "index": 1},
            "'a.safetensors' contains 1 embeddings, from 0; there is no 1",
        ),
        ({"embedding": "no.safetensors"}, "'no.safetensors' cannot be read: No such file or directory"),
        ({"embedding": "."}, "'.' cannot be read: Is a directory"),
    ):
        assert problems(decide, prompt=said) == [f":3: prompt: {problem}"]
    out.write_bytes(out.read_bytes()[:50])

    def cut() -> dict[str, Any]:
        return {"prompt": {"embedding": "a.safetensors"}}

    with pytest.raises(EntryError) as caught:
        decide(items=[{"id": "a"}, {"id": "b"} | cut(), {"id": "c", "inject": [rule(**cut())]}])
    why = "'a.safetensors': not an embedding file of wancli, or damaged"
    assert [line.partition("job.yaml")[2] for line in str(caught.value).splitlines()] == [
        f":12: items.1.prompt: {why}",
        f":16: items.2.inject.0.prompt: {why}",
    ]
    assert "wancli encode --out" in caught.value.hint
    found = problems(decide, items=[cut(), {"size": "1x1"}])
    assert [line.split(": ")[1] for line in found] == ["items.0.prompt", "items.1.size"]


# ---- outputs ----


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("out/{job}.mp4", "out/job.mp4"),
        ("{item}.mp4", "0.mp4"),
        ("{item:04d}-{id}.mp4", "0000-first.mp4"),
        ("{slug}.mp4", "a-gray-tabby-cat-walks-through-a-sunlit-garden-i.mp4"),
        ("{job}/{seed:05d}.mp4", "job/00007.mp4"),
        ("{series}-{take}-{strength}-{dry}.mp4", "a-3-0.6-True.mp4"),
        ("../up/{id}.mp4", "../up/first.mp4"),
    ],
)
def test_an_output_template_knows_the_job_the_shot_and_its_labels(
    decide: Callable[..., Plan], tmp_path: Path, template: str, name: str
) -> None:
    labels = {"series": "a", "take": 3, "strength": 0.6, "dry": True}
    shot = only(decide(output=template, id="first", seed=7, labels=labels))
    assert shot.output == (tmp_path / name).parent.resolve() / Path(name).name


def test_the_key_field_is_the_beginning_of_the_key(decide: Callable[..., Plan]) -> None:
    shot = only(decide(output="{key}.mp4"))
    assert shot.output.stem == shot.key[:12]
    assert shot.latents.name == f"{shot.key[:12]}.latents.safetensors"
    assert shot.manifest.name == f"{shot.key[:12]}.manifest.json"


def test_labels_in_names_are_without_what_windows_refuses(
    decide: Callable[..., Plan], tmp_path: Path
) -> None:
    labels = {"blocks": "auto:top8", "prompt": "A red circle moves up."}
    for template, name in (
        ("{id}_{blocks}.mp4", "0000_auto-top8.mp4"),
        ("{prompt}.mp4", "A red circle moves up.mp4"),
    ):
        assert only(decide(output=f"out/{template}", labels=labels)).output.name == name


@pytest.mark.parametrize("suffix", [".mp4", ".manifest.json", ".latents.safetensors", ".state.safetensors"])
def test_what_was_rendered_with_a_colon_in_its_name_keeps_it(
    decide: Callable[..., Plan], tmp_path: Path, suffix: str
) -> None:
    shot = only(decide(output="out/{blocks}.mp4", labels={"blocks": "auto:top8"}))
    shot.output.parent.mkdir()
    (shot.output.parent / f"auto:top8{suffix}").touch()
    found = only(decide(output="out/{blocks}.mp4", labels={"blocks": "auto:top8"}))
    assert found.output.name == "auto:top8.mp4"


def test_a_label_cannot_pose_as_a_field(decide: Callable[..., Plan]) -> None:
    assert only(decide(output="{seed}.mp4", labels={"seed": "x"}, seed=5)).output.name == "5.mp4"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("out/{sed}.mp4", "no field {sed}"),
        ("out/{id:04d}.mp4", "cannot write {id} as '04d'"),
        ("out/{.mp4", "a lone { in the template"),
        ("out/x.avi", "'out/x.avi' does not end in .mp4"),
        ("out/x", "'out/x' does not end in .mp4"),
        ("", "not a name inside the output folder"),
        ("out/", "not a name inside the output folder"),
        ("out/{slash}.mp4", "{slash} is 'a/b'"),
        ("out/{dots}/x.mp4", "'..' is not a safe file name"),
        ("out/{esc}.mp4", "{esc} is '\\x1b[2J'"),
        ("out/.{id}.mp4", "'.0000.mp4' is not a safe file name"),
        ("out/" + "x" * 300 + ".mp4", "a name of 304 bytes; at most 235 fit"),
        ("loop/x.mp4", "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_an_impossible_output_is_an_error_with_its_line(
    decide: Callable[..., Plan], tmp_path: Path, template: str, problem: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (found,) = problems(decide, output=template, labels={"slash": "a/b", "dots": "..", "esc": "\x1b[2J"})
    assert found.startswith(f":2: output: {problem}")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("clip", "CLIP"),
        ("straße", "STRASSE"),
        (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")),
        (unicodedata.normalize("NFD", "CAFÉ"), unicodedata.normalize("NFC", "café")),
    ],
)
def test_two_shots_cannot_write_one_file_on_any_file_system(
    decide: Callable[..., Plan], first: str, second: str
) -> None:
    (problem,) = problems(decide, output="{id}.mp4", items=[{"id": first}, {"id": second, "seed": 2}])
    assert problem.startswith(":2: output: shots 0 and 1 would both write ")
    assert problem.endswith(f"/{second}.mp4")


def test_the_shots_of_a_sweep_share_the_work_of_planning(
    decide: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = Tokenizer.tokenize

    def counted(self: Tokenizer, text: str, *rest: Any, **named: Any) -> Any:
        read.append(text)
        return real(self, text, *rest, **named)

    monkeypatch.setattr(Tokenizer, "tokenize", counted)
    axes = {"seed": list(range(20)), "inject.0.blocks": ["early", "late"]}
    plan = decide(
        output="{id}.mp4",
        prompt="One of many.",
        inject=[rule(prompt="Two of many.")],
        matrix=axes,
        negative="No.",
    )
    assert len(plan.shots) == len({shot.key for shot in plan.shots}) == 40
    assert {text: read.count(text) for text in read} == {"One of many.": 1, "Two of many.": 1, "No.": 1}
    assert len({id(shot.table) for shot in plan.shots}) == 2


def test_a_path_is_relative_to_the_file_that_says_it(decide: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "tiny").symlink_to(TINY)
    write_job(tmp_path / "shared", {"model": "tiny", "output": "out/{id}.mp4"}, "base.yaml")
    shot = only(decide({"extends": "shared/base.yaml", "prompt": CAT, "size": "64x64", "frames": 1}))
    assert shot.model.checkpoint.root == TINY
    assert shot.output == tmp_path / "out" / "0000.mp4"


def test_unselected_shots_are_known_and_no_two_may_collide(
    decide: Callable[..., Plan], tmp_path: Path, memo: Path
) -> None:
    job = tiny_job(output="{item}.mp4", items=[{"seed": n} for n in range(6)])
    plan = planning.build_plan(load(write_job(tmp_path, job), CliOverrides(items="1-4", shard="1/2")), memo)
    assert [shot.index for shot in plan.shots] == [3, 4]
    assert [shot.index for shot in plan.unselected] == [0, 1, 2, 5]
    everything = decide(job)
    assert plan.shots == everything.shots[3:5]
    with pytest.raises(JobError, match="shots 0 and 1 would both write"):
        planning.build_plan(
            load(write_job(tmp_path, job | {"output": "x.mp4"}), CliOverrides(items="5")), memo
        )


def test_the_same_output_by_two_paths_is_one_output(decide: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    items = [{"output": "real/x.mp4"}, {"output": "link/x.mp4"}]
    (problem,) = problems(decide, items=items)
    assert problem.startswith(":11: items.1.output: shots 0 and 1 would both write ")


def test_a_video_named_like_the_attention_maps_of_another_is_refused(decide: Callable[..., Plan]) -> None:
    items = [{"output": "x.mp4", "attention": {"words": ["cat"]}}, {"output": "X.attention.mp4"}]
    (problem,) = problems(decide, items=items)
    assert problem.startswith(":14: items.1.output: the attention maps of shot 0 would be written over")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        ("832x481", "832x481 is not made of multiples of 16; nearest is 832x480"),
        ("1x1", "1x1 is not made of multiples of 16; nearest is 16x16"),
        ("840x470", "840x470 is not made of multiples of 16; nearest is 832x464"),
        ("0x64", "0x64 is not made of multiples of 16; nearest is 16x64"),
        ("832", "'832' is not a size"),
        ("832x", "'832x' is not a size"),
        ("832*480", "'832*480' is not a size"),
        ("832 x 480", "'832 x 480' is not a size"),
        ("-16x16", "'-16x16' is not a size"),
        ("16x16x16", "'16x16x16' is not a size"),
        ("9999999999x16", "'9999999999x16' is not a size"),
    ],
)
def test_a_bad_size_is_answered_with_the_nearest_good_one(
    decide: Callable[..., Plan], size: str, problem: str
) -> None:
    assert problems(decide, size=size) == [f":5: size: {problem}"]


@pytest.mark.parametrize(
    ("frames", "near"), [(2, "1 or 5"), (4, "1 or 5"), (80, "77 or 81"), (82, "81 or 85"), (3, "1 or 5")]
)
def test_a_bad_number_of_frames_is_answered_with_the_nearest_good_ones(
    decide: Callable[..., Plan], frames: int, near: str
) -> None:
    assert problems(decide, frames=frames) == [f":6: frames: {frames} is not 4n+1; nearest are {near}"]


@pytest.mark.parametrize(
    ("change", "key", "problem"),
    [
        ({"blocks": "27-40"}, "blocks", "40 is past the last block (39)"),
        ({"blocks": [3, "39-27"]}, "blocks", "'39-27' is empty"),
        (
            {"blocks": "last"},
            "blocks",
            "'last' is not a block set; write 27-39, 0-39:4, 7, or one of all, early",
        ),
        ({"blocks": -1}, "blocks", "-1 is not a block set"),
        ({"steps": 2}, "steps", "2 is past the last step (1)"),
        ({"steps": "1-0"}, "steps", "'1-0' is empty"),
        ({"steps": "50-20%"}, "steps", "'50-20%' is not a range of the steps"),
        ({"steps": "first"}, "steps", "'first' is not a step range"),
        ({"strength": [1, 0.5]}, "strength", "2 strengths for 13 positions"),
        ({"step_strength": [1, 1, 1]}, "step_strength", "3 strengths for 2 positions"),
        ({"blend": "replace"}, "strength", "replace needs strength 1"),
        ({"blend": "concat", "strength": -0.5}, "strength", "concat needs strengths above 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_rule_that_does_not_fit_is_an_error_at_its_key(
    decide: Callable[..., Plan], change: dict[str, Any], key: str, problem: str
) -> None:
    said = rule() | change
    (found,) = problems(decide, inject=[{"prompt": "x"}, {key: said[key]} | said])
    assert found.startswith(f":11: inject.1.{key}: {problem}")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": {"sigma": [0.0, 0.1]}}, "reaches no block: none of the 2 steps is in its range"),
        ({"steps": "80-90%"}, "reaches no block: none of the 2 steps is in its range"),
    ],
)
def test_a_rule_that_reaches_no_step_is_an_error(
    decide: Callable[..., Plan], change: dict[str, Any], problem: str
) -> None:
    assert problems(decide, inject=[rule() | change]) == [f":10: inject.0: {problem}"]


def test_a_rule_for_the_negative_branch_needs_one(decide: Callable[..., Plan]) -> None:
    (problem,) = problems(decide, inject=[rule(branch="uncond")], sampler={"steps": 2, "guidance": 1})
    assert problem == ":11: inject.0: reaches no block: guidance 1 has no uncond branch"


def test_a_named_range_that_a_shallow_model_does_not_have_is_an_error(
    decide: Callable[..., Plan], tmp_path: Path
) -> None:
    model = checkpoint(tmp_path)

    def keep_two_blocks(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.startswith("blocks.") and int(n.split(".")[1]) > 1]:
            del tensors[name]

    change_tensors(model / "diffusion_pytorch_model.safetensors", keep_two_blocks)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    (problem,) = problems(decide, model=str(model), inject=[rule(blocks="late")])
    assert problem.endswith("inject.0: reaches no block: this range is empty in a model of 2 blocks")
    assert only(decide(model=str(model), inject=[rule(blocks="early")])).rules[0].blocks == ((0, 0.6),)


def test_rows_that_concat_joined_cannot_be_interpolated_and_the_plan_says_so(
    decide: Callable[..., Plan],
) -> None:
    joined, lerp = rule(blend="concat"), rule(prompt="rain", blocks="39")
    (problem,) = problems(decide, inject=[joined, lerp])
    assert "inject: context-lerp follows concat in block 39" in problem
    for fine in (
        [lerp, joined],
        [joined, lerp | {"blocks": "0-26"}],
        [joined, lerp | {"blend": "output-mix"}],
    ):
        assert only(decide(inject=fine)).rules
    # a replaced cell has forgotten what was joined
    assert only(decide(inject=[joined, rule(blend="replace", strength=1), lerp])).rules


def test_a_rule_that_later_rules_overwrite_everywhere_is_an_error(decide: Callable[..., Plan]) -> None:
    replacing = rule(prompt="rain", blend="replace", strength=1)
    (problem,) = problems(decide, inject=[rule(), replacing])
    assert problem == ":10: inject.0: reaches no block: later rules replace every cell that it changes"
    assert len(only(decide(inject=[rule(), replacing | {"blocks": "27-38"}])).rules) == 2
    assert len(only(decide(inject=[replacing, rule()])).rules) == 2
    assert len(only(decide(inject=[rule(), rule(prompt="rain")])).rules) == 2


def test_a_model_that_is_not_found_is_an_error_with_the_path_searched(
    decide: Callable[..., Plan], tmp_path: Path
) -> None:
    assert problems(decide, model="no/such") == [":1: model: 'no/such' not found"]
    assert problems(decide, model="x" * 300)[0].endswith("cannot be read: File name too long")
    assert problems(decide, model="~nosuchuser/x") == [
        ":1: model: the home folder of '~nosuchuser/x' is not known"
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"job.yaml:1: model: .*/file: truncated or damaged"):
        decide(model="file")
    with pytest.raises(CheckpointError, match=r"yaml:\d+: items.1.model: .*: no Wan transformer") as caught:
        decide(items=[{"id": "a"}, {"id": "b", "model": "."}])
    assert caught.value.hint.startswith("give an official or a diffusers folder")


def test_problems_of_all_items_are_reported_together_and_shared_ones_once(
    decide: Callable[..., Plan],
) -> None:
    found = problems(decide, frames=4, items=[{"seed": 1}, {"seed": 2}, {"size": "1x1"}, {"frames": 7}])
    assert [line.split(": ")[1] for line in found] == ["frames", "items.2.size", "items.3.frames"]


def test_all_problems_of_a_shot_are_told_at_once_in_the_order_of_the_file(
    decide: Callable[..., Plan],
) -> None:
    found = problems(
        decide,
        output="out/{ID}.mp4",
        size="500x300",
        frames=24,
        sampler={"steps": 4},
        inject=[rule(blocks="Erly", steps="50%"), rule(blocks=["late", 50])],
        loras=[{"path": "none.safetensors"}],
        save_every="soon",
    )
    keys = [line.split(": ")[1] for line in found]
    rules = ["inject.0.blocks", "inject.0.steps", "inject.1.blocks"]
    assert keys == ["output", "size", "frames", *rules, "loras.0.path", "save_every"]


# ---- prompts ----


def test_a_prompt_may_fill_its_256_tokens_and_not_one_more(decide: Callable[..., Plan]) -> None:
    assert len(only(decide(prompt=words(256))).prompt.tokens.ids) == 256
    assert problems(decide, prompt=words(257)) == [
        ":3: prompt: the prompt has 257 tokens, text.max_tokens is 256"
    ]
    assert len(only(decide(prompt=words(257), text={"max_tokens": 512})).prompt.tokens.ids) == 257


def test_a_prompt_that_is_cut_is_a_warning_with_the_count(decide: Callable[..., Plan]) -> None:
    plan = decide(prompt=words(300), text={"truncate": True})
    assert plan.warnings == ("shot 0000: 44 of 300 tokens of a prompt are cut off",)
    assert len(only(plan).prompt.tokens.ids) == 256


def test_warnings_of_one_kind_are_one_line_with_the_first_shots_and_details(
    decide: Callable[..., Plan],
) -> None:
    items = [{"prompt": words(300 + n), "seed": n} for n in range(60)]
    assert decide(items=items, text={"truncate": True}, output="out/{id}.mp4").warnings == (
        "shots 0000, 0001, 0002 and 57 more: 44 of 300, 45 of 301, 46 of 302, 47 of 303, 48 of 304, "
        "49 of 305 and 54 more tokens of a prompt are cut off",
    )


@pytest.mark.parametrize(
    ("prompt", "pieces", "way_out"),
    [
        ("A (red:1.4) circle", "(red:1.4)", "write them plainly, and `emphasis: {red: 1.4}`"),
        ("A circle, ((masterpiece))", "((masterpiece))", "`emphasis: {masterpiece: 1.21}`"),
        ("A circle <lora:style:0.8>", "<lora:style:0.8>", "name the file under `loras`"),
        ("A [red:blue:0.5] circle", "[red:blue:0.5]", "`inject` swaps prompts between steps"),
        ("A {red|blue} __shape__", "{red|blue}, __shape__", "`matrix` renders alternatives"),
        ("A circle --w 832 --d -1 --n blurry", "--w 832, --d -1, --n blurry", "are keys of the job"),
    ],
)
def test_the_syntax_of_other_programs_is_a_warning_with_a_way_out(
    decide: Callable[..., Plan], prompt: str, pieces: str, way_out: str
) -> None:
    (warning,) = decide(prompt=prompt, inject=[rule(prompt=f"Fish, {prompt}", branch="both")]).warnings
    assert warning.startswith(f"shot 0000: {pieces} in a prompt ")
    assert way_out in warning


@pytest.mark.parametrize(
    "prompt",
    ["A circle (red) at 16:9: slow -- calm", "2:1 odds [a] {b} (at 10:30 pm) well-known __", "(a: b)"],
)
def test_ordinary_brackets_colons_and_dashes_are_no_syntax(decide: Callable[..., Plan], prompt: str) -> None:
    assert decide(prompt=prompt).warnings == ()


def test_more_frames_than_the_model_was_trained_with_are_advised_against(decide: Callable[..., Plan]) -> None:
    assert decide(frames=81).warnings == ()
    assert decide(frames=161).warnings == (
        "shot 0000: 161 frames: Wan 2.1 T2V was trained with 81; a longer video repeats itself or decays",
    )


def test_seeds_that_draw_one_noise_on_the_cpu_are_a_warning(decide: Callable[..., Plan]) -> None:
    swept = [1, 2, 2**32 + 1, 2**33 + 1, 2**62 + 2]
    seeds: dict[str, Any] = {"matrix": {"seed": swept}, "output": "out/{seed}.mp4"}
    assert decide(**seeds).warnings == (
        f"seeds 1 and {2**32 + 1} and {2**33 + 1}, 2 and {2**62 + 2} draw the same noise: "
        "a CPU takes the low 32 bits of a seed",
    )
    assert decide(noise="cuda", **seeds).warnings == ()


def test_an_injection_that_changes_nothing_is_a_warning(decide: Callable[..., Plan]) -> None:
    assert decide(inject=[rule(strength=0)]).warnings == (
        "shot 0000: an injection has strength 0 and changes nothing",
    )
    assert decide(inject=[rule(prompt=CAT)]).warnings == (
        "shot 0000: the injected prompt is the main prompt; nothing will change",
    )
    assert decide(inject=[rule(prompt=CAT, branch="both")]).warnings == ()
    assert decide(inject=[rule()]).warnings == ()


def test_guidance_on_a_distilled_model_is_a_warning(decide: Callable[..., Plan]) -> None:
    (warning,) = decide(sampler={"solver": "distill4", "guidance": 3}).warnings
    assert warning == "shot 0000: distilled models need guidance 1; 3 blurs the video"


# ---- large ----


def test_a_job_of_a_thousand_items_is_planned(decide: Callable[..., Plan]) -> None:
    items = [{"id": f"i{i}", "seed": i} for i in range(1000)]
    plan = decide(output="{id}.mp4", sampler={"steps": 50}, inject=[rule()], items=items)
    assert len({shot.key for shot in plan.shots}) == 1000
    assert len({id(shot.prompt.tokens) for shot in plan.shots}) <= 1000
    assert [shot.seed for shot in plan.shots] == list(range(1000))


def test_the_table_of_a_shot_is_small_however_many_steps_there_are(decide: Callable[..., Plan]) -> None:
    shot = only(decide(sampler={"steps": 1000}, inject=[rule(steps="0-40%")]))
    rows = {id(shot.table.row(step, branch)) for step in range(1000) for branch in ("cond", "uncond")}
    assert len(rows) == 3
    assert shot.table.row(999, "cond")[39] == ((Text(shot.prompt.id), 1.0),)


# ---- wancli plan ----


def test_the_strip_shows_what_each_block_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = {"prompt": FISH, "blocks": "early", "strength": 0.5, "steps": "0-1"}
    late = {"prompt": FISH, "blocks": "late", "steps": 3, "branch": "both"}
    job = write_job(tmp_path, tiny_job(sampler={"steps": 4, "shift": 3}, inject=[early, late]))
    result = run_wancli(capsys, "plan", job, "-v")
    assert result.code == 0
    lines = result.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("shot 0000: "))
    assert [line.rstrip() for line in lines[start + 1 : start + 14]] == [
        "          prompt  A gray tabby cat walks through a sunlit gar… (43 tokens)",
        "        negative  fog (3 tokens)",
        "        inject.0  Schools of tropical fish swim between vibra… (60 tokens)",
        "        inject.1  Schools of tropical fish swim between vibra… (60 tokens)",
        "        inject.0  0-13 at 0.5, steps 0-1, cond",
        "        inject.1  27-39 at 1, steps 3, cond+uncond",
        "           sigma  0:1.000 1:0.900 2:0.750 3:0.500 4:0.000",
        "           block  0.........1.........2.........3.........",
        "        cond 0-1  ▄▄▄▄▄▄▄▄▄▄▄▄▄▄··························",
        "          cond 2  ········································",
        "          cond 3  ···························█████████████",
        "      uncond 0-2  ········································",
        "        uncond 3  ···························█████████████",
    ]


def test_a_plan_as_json_is_one_document_with_all_decisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_wancli(capsys, "plan", write_job(tmp_path, tiny_job(inject=[rule()])), "--json")
    document = json.loads(result.out)
    (shot,) = document["shots"]
    assert shot["output"] == str(tmp_path / "out" / "clip.mp4")
    assert (shot["size"], shot["frames"], shot["tokens"], shot["seed"]) == ([64, 64], 1, 16, 0)
    assert len(shot["sigmas"]) == 3
    assert shot["inject"][0]["cells"] == 2 * 13
    assert [prompt["cached"] for prompt in document["prompts"]] == [False] * 3
    assert {phase["name"] for phase in document["memory"]} == {"encode", "sample", "decode"}
    assert result.err == ""


def test_a_plan_writes_only_the_cache_of_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, tiny_job())
    assert run_wancli(capsys, "plan", job, "--cache-dir", tmp_path / "cache").code == 0
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cache", "hashes.json", "job.yaml"]


@pytest.mark.parametrize(
    "text", ['id: "[red]x[/red]"', 'id: "[/]"', 'id: ":cat:"', "prompt: 'a :cat: [bold]'"], ids=str
)
def test_a_text_from_a_job_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    key, _, value = text.partition(": ")
    job = write_job(tmp_path, tiny_job(**{key: value.strip("\"'")}))
    assert value.strip("\"'") in run_wancli(capsys, "plan", job, "-v").out


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["render", "--help"], ["plan", "good.yaml", "-v"], ["plan", "bad.yaml"]],
    ids=" ".join,
)
def test_help_plan_and_job_errors_answer_without_torch(tmp_path: Path, arguments: list[str]) -> None:
    write_job(tmp_path, tiny_job(inject=[rule()]), "good.yaml")
    write_job(tmp_path, tiny_job(size="1x1"), "bad.yaml")
    program = (
        "import sys; from wancli.cli import run; code = run(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'diffusers', 'imageio_ffmpeg'} & set(sys.modules)\n"
        "print(f'HEAVY {sorted(heavy)}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"
