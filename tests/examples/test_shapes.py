"""The parts of the miniature's training: words, sampler, stages that go on where they were, tables."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vpd_fast import VPD, VPDConfig, bundled
from vpd_fast.checkpoints.save import write_bundled
from vpd_fast.data.shapes import CLASSES, VOCABULARY, ShapesDataset, language, make_scene
from vpd_fast.errors import CheckpointError, InputError
from vpd_fast.models.text import TextEncoder

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
MODULES = [path.stem for path in SHAPES.glob("*.py")]


@pytest.fixture
def shapes(monkeypatch) -> SimpleNamespace:
    """The example's modules, which import each other by bare names."""
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(SHAPES))
    loaded = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    yield loaded
    for name in MODULES:
        sys.modules.pop(name, None)


def test_every_word_is_one_token(shapes, tmp_path) -> None:
    from transformers import CLIPTokenizer

    shapes.words.write_tokenizer(tmp_path, shapes.words.known_words(), 24)
    tokenizer = CLIPTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for word in shapes.words.known_words():
        assert len(tokenizer(word)["input_ids"]) == 3, word  # between start and end
    assert len(tokenizer("zyzzyva")["input_ids"]) > 3  # spelled
    assert tokenizer.convert_ids_to_tokens(tokenizer("A Photo of a Cube.")["input_ids"])[1:-1] == [
        f"{word}</w>" for word in ("a", "photo", "of", "a", "cube", ".")
    ]
    assert set((tmp_path / "words.txt").read_text().split()) == {*VOCABULARY, *CLASSES}


def test_merges_of_a_small_vocabulary_by_hand(shapes) -> None:
    assert shapes.words.merge_rules(["ab", "abc"]) == [("a", "b"), ("a", "b</w>"), ("ab", "c</w>")]


def test_a_mirror_changes_sides_and_order(shapes) -> None:
    mirrored = shapes.words.mirrored
    assert mirrored("a red cube and an orange ring") == "an orange ring and a red cube"
    assert mirrored("the leftmost cube right of the ring") == "the rightmost cube left of the ring"
    assert mirrored("the nearest cube behind the ring") == "the nearest cube behind the ring"


def test_texts_of_a_scene(shapes) -> None:
    scene, random = make_scene(0), np.random.default_rng(0)
    texts = [shapes.words.training_text(scene, False, random) for _ in range(400)]
    assert 20 <= texts.count("") <= 65
    assert texts.count(scene.caption) > 150
    assert any(text in {sentence for sentence, _ in scene.sentences} for text in texts)
    assert any("photo of" in text for text in texts)
    known = {*VOCABULARY, *CLASSES, *shapes.words.known_words()}
    for text in texts:
        assert {
            word for word in "".join(c if c.isalpha() else " " for c in text.lower()).split() if len(word) > 1
        } <= known


def test_noise_levels_are_those_of_stable_diffusion(shapes) -> None:
    levels = shapes.sampling.signal_levels()
    assert levels[0] == pytest.approx(1 - 0.00085, abs=1e-6)
    assert levels[999] == pytest.approx(0.0047, abs=1e-4)


def test_sampler_finds_the_only_image_there_is(shapes) -> None:
    """With the exact noise predictor of a single image, every start ends there."""
    only = torch.randn(1, 4, 2, 2).clamp(-2, 2)
    levels = shapes.sampling.signal_levels()

    def predict(x, timesteps):
        level = levels[timesteps][:, None, None, None]
        return (x - level.sqrt() * only) / (1 - level).sqrt()

    found = shapes.sampling.ddim(predict, torch.randn(3, 4, 2, 2), steps=10)
    # float32: a rounding of 2^-23 of numbers up to 3, times 15 = level^-1/2 at the noisiest step, in a few operations.
    torch.testing.assert_close(found, only.expand(3, -1, -1, -1), atol=2e-5, rtol=0)


def test_guidance_of_one_is_none(shapes) -> None:
    text, empty = torch.randn(2, 3, 4), torch.zeros(3, 4)

    def denoiser(x, timesteps, context):
        return x + context.mean((1, 2))[:, None, None, None]

    x, t = torch.randn(2, 5, 1, 1), torch.zeros(2)
    once = shapes.sampling.guided(denoiser, text, empty, 1.0)(x, t)
    torch.testing.assert_close(once, denoiser(x, t, text))
    twice = shapes.sampling.guided(denoiser, text, empty, 2.0)(x, t)
    torch.testing.assert_close(twice - x, 2 * (once - x))


def test_normalising_latents_leaves_images(shapes) -> None:
    model = shapes.models.Autoencoder().eval()
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before, (mean, log_variance) = model.decode(model.encode(images)), model.moments(images)
        shift, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
        model.normalise(shift, scale)
        after, (mean_after, log_after) = model.decode(model.encode(images)), model.moments(images)
    # Rounding of float32, 2^-24, grown by shift / scale (below 20 here) and the ten operations from latents to images.
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean_after.mean((0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean_after.std((0, 2, 3)), torch.ones(8), atol=1e-5, rtol=0)
    torch.testing.assert_close((0.5 * (log_after - log_variance)).exp()[0, :, 0, 0], 1 / scale, atol=0, rtol=1e-5)


def test_vpd_starts_from_what_pretraining_writes(shapes, tmp_path) -> None:
    text = shapes.models.make_text_encoder({"a": 0, "s": 1, "e": 2}, "s", "e")
    denoiser, autoencoder = shapes.models.Denoiser(), shapes.models.Autoencoder()
    shapes.pretrain.save_model(tmp_path, autoencoder, SimpleNamespace(denoiser=denoiser, text=text), {})
    config = VPDConfig(task="referring", tokens=24, base_size=128, backbone=shapes.models.BACKBONE)
    model = VPD.from_stable_diffusion(tmp_path / "sd.safetensors", config)
    ours = dict(denoiser.named_parameters())
    loaded = dict(model.unet.unet.diffusion_model.named_parameters())
    assert loaded.keys() == {name for name in ours if not name.startswith("out.")}
    assert all(torch.equal(loaded[name], ours[name]) for name in loaded)


def stage(shapes, folder: Path, interrupt_at: int | None = None, steps: int = 12, seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)

    def loss_of(step: int) -> torch.Tensor:
        if step == interrupt_at:
            signal.raise_signal(signal.SIGINT)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return (module(x) - x[:, :2]).square().mean()

    shapes.stages.train("stage", module, loss_of, folder, steps=steps, lr=0.1, identity={"seed": seed})
    return module


def test_a_stage_goes_on_bit_for_bit(shapes, tmp_path) -> None:
    whole = stage(shapes, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        stage(shapes, tmp_path / "broken", interrupt_at=7)
    state = torch.load(tmp_path / "broken" / "state" / "stage.pt", weights_only=True)
    assert state["step"] == len(state["losses"]) == 8  # the step that was interrupted is whole
    again = stage(shapes, tmp_path / "broken")
    assert torch.equal(whole.weight, again.weight)
    finished = stage(shapes, tmp_path / "broken", interrupt_at=0)  # no step is left to do
    assert torch.equal(whole.weight, finished.weight)


def test_a_state_of_other_settings_or_damaged_is_refused(shapes, tmp_path) -> None:
    stage(shapes, tmp_path)
    for other in ({"steps": 20}, {"seed": 1}):
        with pytest.raises(CheckpointError, match="was made with"):
            stage(shapes, tmp_path, **other)
    path = tmp_path / "state" / "stage.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="remove it to begin anew"):
        stage(shapes, tmp_path)


def test_scripts_end_with_one_line(shapes, tmp_path, capsys) -> None:
    def fails() -> None:
        raise FileNotFoundError(2, "No such file", "weights")

    def stops() -> None:
        raise KeyboardInterrupt

    assert shapes.script.run_script(lambda: None) == 0
    assert shapes.script.run_script(fails) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert shapes.script.run_script(stops) == 130
    with pytest.raises(argparse.ArgumentTypeError):
        shapes.script.positive("0")
    with pytest.raises(argparse.ArgumentTypeError, match="pose: tasks are"):
        shapes.script.task_names("depth,pose")


def test_settings_of_the_tasks_are_those_of_the_network(shapes) -> None:
    for task in ("segmentation", "referring", "depth"):
        config = shapes.finetune.config_of(task, Path("data"), Path("weights"), [])
        assert config.task == task
        assert VPDConfig.from_dict({"task": task, **config.model}).backbone == shapes.models.BACKBONE
        config.check_complete()


def test_variants_are_valid_and_say_what_they_change(shapes) -> None:
    names = [(variant.task, variant.name) for variant in shapes.experiments.VARIANTS]
    assert len(set(names)) == len(names)
    for variant in shapes.experiments.VARIANTS:
        shapes.finetune.config_of(variant.task, Path("data"), Path("weights"), list(variant.overrides))
    config = VPDConfig(num_classes=8, channels=32, base_size=128, backbone=shapes.models.BACKBONE)
    model = VPD(config)
    with torch.no_grad():
        model.class_embeddings.normal_()
    before = model.class_embeddings.clone()
    shapes.experiments.prepare(model, shapes.experiments.Variant("segmentation", "x", adapter=False), 0)
    assert torch.equal(model.context(1)[0], before)
    assert not any(p.requires_grad for p in model.text_adapter.parameters())
    shapes.experiments.prepare(model, shapes.experiments.Variant("segmentation", "x", constants=True), 0)
    assert model.class_embeddings.requires_grad
    assert not torch.equal(model.class_embeddings, before)


def rows() -> list[dict]:
    def curve(variant: str, seed: int, values: list[float], task: str = "referring") -> list[dict]:
        key = {"kind": "curve", "task": task, "variant": variant, "seed": seed, "metric": "mIoU"}
        return [{**key, "step": 10 * (i + 1), "value": value} for i, value in enumerate(values)]

    found = curve("pre-trained", 0, [0.4, 0.6]) + curve("pre-trained", 1, [0.4, 0.8])
    found += curve("random UNet", 0, [0.1, 0.3]) + curve("random UNet", 1, [0.1, 0.5])
    for seed in (0, 1):
        for precision, value in (("fp32", 0.7), ("bf16", 0.7), ("int8", 0.69), ("fp8", 0.65)):
            key = {"kind": "precision", "task": "segmentation", "variant": "pre-trained", "seed": seed}
            found.append({**key, "metric": "mIoU", "precision": precision, "value": value + seed / 10})
    return found


def test_tables(shapes) -> None:
    table = shapes.report.variants_table(rows(), "referring")
    assert "| pre-trained | 0.700 ± 0.141 |  | 2 |" in table
    assert "| random UNet | 0.400 ± 0.141 | -0.300 ± 0.000 | 2 |" in table
    assert "| referring | 0.400 | 20 | 10 steps |" in shapes.report.steps_table(rows())
    table = shapes.report.precision_table(rows())
    assert "| segmentation, mIoU | 0.7500 ± 0.0707 |" in table
    assert "| change to fp32 | +0.0000 ± 0.0000 | +0.0000 ± 0.0000 | -0.0100 ± 0.0000 | -0.0500 ± 0.0000 |" in table
    table = shapes.report.models_table()
    assert "| segmentation | mIoU |" in table
    assert "| referring | P@0.5, relations |" in table


def test_report_needs_rows_and_marks(shapes, tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(InputError, match="no rows"):
        shapes.report.write_report([], page)
    with pytest.raises(InputError, match="marks"):
        shapes.report.write_report(rows(), page)
    assert page.read_text() == "no marks"


def test_rows_of_other_settings_are_not_mixed(shapes, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    assert shapes.analysis.read_rows(path) == []
    path.write_text("{")
    with pytest.raises(InputError, match="not rows"):
        shapes.analysis.read_rows(path)
    row = {"task": "depth", "variant": "pre-trained", "seed": 0, "settings": {"steps": 1}}
    path.write_text(json.dumps(row) + "\n")
    (tmp_path / "sd.safetensors").touch()
    options = SimpleNamespace(
        output=tmp_path, weights=tmp_path, tasks=["depth"], seeds=1, steps=2, scenes=3, held_out=4
    )
    with pytest.raises(InputError, match="give another --output"):
        shapes.analysis.run(options)


def test_settings_know_what_a_run_was(shapes) -> None:
    variant = shapes.experiments.VARIANTS[0]
    options = SimpleNamespace(steps=2, scenes=3, held_out=4)
    base = shapes.analysis.settings_of(variant, 0, options, "weights")
    assert base == shapes.analysis.settings_of(variant, 0, options, "weights")
    for change in ({"adapter": False}, {"length": 2}, {"overrides": ("optimizer.lr=1.0",)}):
        assert shapes.analysis.settings_of(dataclasses.replace(variant, **change), 0, options, "weights") != base
    assert shapes.analysis.settings_of(variant, 1, options, "weights") != base
    assert shapes.analysis.settings_of(variant, 0, options, "others") != base


def test_what_is_missing_names_what_makes_it(shapes, tmp_path, monkeypatch, capsys) -> None:
    for name in ("finetune", "analysis", "pack"):
        monkeypatch.setattr(sys, "argv", [name, "--weights", str(tmp_path / "sd")])
        assert shapes.script.run_script(getattr(shapes, name).main) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / 'sd' / 'sd.safetensors'} is missing; it is made by: python ")
        assert error.count("\n") == 1


def test_accuracy_by_kind_of_sentence_adds_up(shapes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shapes.finetune, "ShapesDataset", functools.partial(ShapesDataset, length=6))
    model = VPD.from_pretrained("shapes-referring")
    found = shapes.finetune.measure(model, tmp_path, bundled.asset("shapes-text"), "test")
    data = ShapesDataset(tmp_path, "test", task="referring", length=6)
    kinds = [language.kind_of(sentence) for i in range(6) for sentence in data.load(i).sentences]
    mean = sum(found[f"P@0.5, {kind}"] for kind in kinds) / len(kinds)
    assert mean == pytest.approx(found["P@0.5"])


@pytest.mark.slow
def test_one_variant_of_the_analysis(shapes, tmp_path) -> None:
    """Three steps of a run, from the pre-trained weights to accuracy in each precision; every sentence counts."""
    weights = tmp_path / "sd"
    shapes.unpack.unpack(shapes.pack.PRETRAINED, weights)
    run = ["--data", tmp_path / "data", "--weights", weights, "--output", tmp_path / "out", "--tasks", "referring"]
    run += ["--steps", 2, "--scenes", 6, "--held-out", 3, "--seeds", 1]
    only = next(v for v in shapes.experiments.VARIANTS if v.task == "referring" and v.precisions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["analysis.py", *map(str, run)])
        patch.setattr(shapes.analysis, "VARIANTS", (only,))
        patch.delenv("TRITON_INTERPRET", raising=False)  # fp8 by the reference: kernels are slower
        assert shapes.script.run_script(shapes.analysis.main) == 0
        again = shapes.analysis.read_rows(tmp_path / "out" / "rows.jsonl")
        assert shapes.script.run_script(shapes.analysis.main) == 0  # nothing is left to do
        assert shapes.analysis.read_rows(tmp_path / "out" / "rows.jsonl") == again
    assert {row["kind"] for row in again} == {"curve", "precision"}
    assert [row["precision"] for row in again if row["kind"] == "precision"] == ["fp32", "bf16", "int8", "fp8"]
    assert {row["step"] for row in again if row["kind"] == "curve"} == {1, 2, 3}
    assert all(0 <= row["value"] <= 1 for row in again)
    page = (tmp_path / "out" / "shapes.md").read_text()
    assert "| referring, oIoU |" in page


def test_held_out_sentences_are_all_measured(shapes, tmp_path) -> None:
    scenes = shapes.analysis.Scenes.__new__(shapes.analysis.Scenes)
    scenes.samples, scenes.tokens = [None] * 2, [torch.zeros(3, 1, 1), torch.ones(2, 1, 1)]
    assert scenes.all_pairs() == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    drawn = scenes.draw(200, torch.Generator().manual_seed(0))
    assert set(drawn) == set(scenes.all_pairs())


def test_pretrained_weights_without_pretraining(shapes, tmp_path) -> None:
    shapes.unpack.unpack(shapes.pack.PRETRAINED, tmp_path)
    config = VPDConfig(task="referring", tokens=24, base_size=128, backbone=shapes.models.BACKBONE)
    model = VPD.from_stable_diffusion(tmp_path / "sd.safetensors", config)
    shapes.pack.check_encoder(model, tmp_path)
    bundled_model = VPD.from_pretrained("shapes-referring")  # was fine-tuned from it, its encoder was not
    for ours, theirs in zip(model.encoder_vq.parameters(), bundled_model.encoder_vq.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    encoders = [TextEncoder(name, remember=False) for name in (tmp_path, "shapes-text")]
    mine, packaged = (encoder.embed_sentences(["the red cube"], tokens=24) for encoder in encoders)
    assert torch.equal(mine, packaged)
    assert json.loads((tmp_path / "report.json").read_text())["psnr"] > 25
    # What was unpacked may be packed again beside what is there.
    for _ in range(2):
        write_bundled(tmp_path, "shapes-referring", model.state_dict(), model.config, {})
        model.load_state_dict(bundled.unpack(bundled.pack(model.state_dict())))


@pytest.mark.slow
def test_everything_from_nothing(tmp_path) -> None:
    """A few steps of each script, one after the other; the numbers mean nothing."""

    def run(script: str, *arguments: object) -> str:
        command = [sys.executable, str(SHAPES / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    data, sd, runs, assets = (tmp_path / name for name in ("data", "sd", "runs", "assets"))
    few = ("--scenes", 40, "--autoencoder-steps", 3, "--diffusion-steps", 3, "--batch", 8)
    run("pretrain.py", "--data", data, "--output", sd, *few)
    assert {"samples.png", "reconstructions.png", "sd.safetensors", "report.json"} <= {p.name for p in sd.iterdir()}
    assert TextEncoder(sd, remember=False).embed_sentences(["the cube"], tokens=24).shape == (1, 24, 96)
    settings = ("schedule.steps=2", "batch_size=4", "data.options.length=16", "data.val_options.length=4")
    run("finetune.py", "--data", data, "--weights", sd, "--output", runs, *settings)
    assert set(json.loads((runs / "depth" / "test.json").read_text())) == {"test", "unseen"}
    out = run(
        "pack.py",
        "--data",
        data,
        "--weights",
        sd,
        "--runs",
        runs,
        "--output",
        assets,
        "--pretrained",
        tmp_path / "p.safetensors",
    )
    assert "MB" in out
    assert len(list(assets.glob("shapes-*.safetensors"))) == 4
    rows_path = tmp_path / "analysis"
    few = ("--seeds", 1, "--steps", 2, "--scenes", 20, "--held-out", 4)
    page = tmp_path / "shapes.md"
    page.write_text((SHAPES.parents[1] / "docs" / "shapes.md").read_text())
    run("analysis.py", "--data", data, "--weights", sd, "--output", rows_path, "--page", page, *few)
    assert "| pre-trained |" in page.read_text()
    assert (tmp_path / "shapes-curves.png").is_file()
