"""Configurations: presets, overrides, round trips, and what is said about mistakes."""

from __future__ import annotations

import json

import pytest
import torch

from vpd_fast.errors import InputError
from vpd_fast.training import build
from vpd_fast.training.config import TrainConfig, differences, load_config, preset_names


def test_presets_are_the_originals_settings():
    assert preset_names() == ["ade20k", "nyu", "refcoco", "refcoco+", "refcocog"]
    ade = load_config("ade20k")
    assert (ade.task, ade.schedule.steps, ade.batch_size, ade.data.size) == ("segmentation", 80_000, 2, 512)
    assert (ade.optimizer.lr, ade.optimizer.weight_decay, ade.optimizer.betas) == (8e-5, 1e-3, (0.9, 0.999))
    assert ade.schedule.name == "poly_warmup"
    assert ade.schedule.options == {"power": 1.0, "warmup_steps": 1500, "warmup_ratio": 1e-6}
    for name, tokens in (("refcoco", 40), ("refcoco+", 40), ("refcocog", 77)):
        refer = load_config(name)
        assert (refer.task, refer.data.kind, refer.model) == ("referring", name, {"tokens": tokens})
        assert (refer.schedule.epochs, refer.schedule.steps, refer.schedule.options) == (40, None, {"power": 0.9})
        assert (refer.optimizer.lr, refer.optimizer.weight_decay, refer.batch_size) == (5e-5, 1e-2, 4)
    assert load_config("refcocog").data.options == {"split_by": "umd"}
    nyu = load_config("nyu")
    assert (nyu.task, nyu.schedule.epochs, nyu.batch_size, nyu.data.size) == ("depth", 25, 3, 480)
    assert (nyu.optimizer.weight_decay, nyu.optimizer.lr, nyu.schedule.name) == (0.1, 5e-4, "up_down")
    assert nyu.schedule.options == {"min_lr": 3e-5, "max_lr": 5e-4}
    for name in preset_names():
        config = load_config(name)
        assert config.precision == "fp32"
        assert all(vars(config.quirks).values())


@pytest.mark.parametrize("name", ["ade20k", "refcoco", "refcoco+", "refcocog", "nyu"])
def test_schedules_take_the_presets_options(name):
    from vpd_fast.training.schedules import make_schedule

    schedule = load_config(name).schedule
    factor = make_schedule(schedule.name, steps=1000, **schedule.options)
    assert 0 < factor(500) <= 1


def test_round_trips(tmp_path):
    config = load_config("refcocog", ["checkpointing=[0,1]", "optimizer.clip=1", "model.backbone.num_heads=4"])
    assert (config.checkpointing, config.optimizer.clip) == ((0, 1), 1.0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert load_config(tmp_path / "config.json") == config


def test_overrides_are_yaml_and_numbers_may_be_written_without_a_point():
    overrides = [
        "optimizer.lr=8e-5",
        "data.root=/data/ADE",
        "schedule.steps=null",
        "schedule.epochs=3",
        "model={tokens: 9}",
    ]
    config = load_config("refcoco", [*overrides, "log.tensorboard=false", "optimizer.betas=[0.9, 0.99]"])
    assert config.optimizer.lr == 8e-5
    assert (config.data.root, config.schedule.steps, config.schedule.epochs) == ("/data/ADE", None, 3)
    assert (config.model, config.log.tensorboard, config.optimizer.betas) == ({"tokens": 9}, False, (0.9, 0.99))


def test_files_build_on_presets_and_on_each_other(tmp_path):
    (tmp_path / "one.yaml").write_text("base: ade20k\nbatch_size: 8\noptimizer: {lr: 1.0e-3}\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\nseed: 3\n")
    config = load_config(tmp_path / "two.yaml")
    assert (config.batch_size, config.seed, config.optimizer.lr, config.optimizer.weight_decay) == (8, 3, 1e-3, 1e-3)
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    with pytest.raises(InputError, match="built on itself"):
        load_config(tmp_path / "two.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "optimiser is not a setting, did you mean optimizer?"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate is not a setting; optimizer has lr, weight_decay"),
        ("optimizer.weight_dacay=1", "did you mean weight_decay?"),
        ("model.num_clases=3", "model.num_clases is not a setting, did you mean num_classes"),
        ("model.backbone.heads=3", "model.backbone.heads is not a setting"),
        ("model.task=depth", "task=depth"),
        ("optimizer=3", "optimizer must be a section of settings, got 3"),
        ("batch_size=two", "batch_size must be a whole number, got 'two'"),
        ("batch_size=true", "batch_size must be a whole number, got True"),
        ("batch_size=0", "batch_size must be positive, got 0"),
        ("optimizer.lr=fast", "optimizer.lr must be a number, got 'fast'"),
        ("optimizer.clip=-1", "optimizer.clip must be positive"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be a list of numbers"),
        ("checkpointing=some", "checkpointing must be true or false or a list of numbers, got 'some'"),
        ("precision=fp16", "precision must be one of auto, fp32, bf16, got 'fp16'"),
        ("encoder.precision=int4", "encoder.precision must be one of plain, fp32, bf16, int8, got 'int4'"),
        ("task=detection", "task must be one of segmentation, referring, depth, got 'detection'"),
        ("data.size=100", "data.size must be a multiple of 32, got 100"),
        ("data.size=96", "data.size must be a multiple of 64 for segmentation, got 96"),
        ("seed=-1", "seed must not be negative"),
        ("seed", "overrides look like optimizer.lr=1e-4, got 'seed'"),
        ("data.root=[", "is not a YAML value"),
        ("log..every=1", "overrides look like"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(InputError) as raised:
        load_config("ade20k", [override])
    assert message in str(raised.value)


def test_names_of_presets_and_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"neither a file nor a preset, did you mean ade20k\?"):
        load_config("ade2k")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="expected settings as key: value, got a list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="is not readable YAML"):
        load_config(tmp_path / "broken.yaml")


def test_what_has_no_default_is_asked_for():
    with pytest.raises(InputError, match="data.root is not set"):
        load_config("nyu").check_complete()
    with pytest.raises(InputError, match="got none of them"):
        load_config("nyu", ["data.root=x"]).check_complete()
    with pytest.raises(InputError, match="got stable_diffusion and random"):
        load_config("nyu", ["data.root=x", "init.random=1", "init.stable_diffusion=x"]).check_complete()
    with pytest.raises(InputError, match="either steps or epochs, got both"):
        load_config("nyu", ["data.root=x", "init.random=1", "schedule.steps=5"]).check_complete()
    with pytest.raises(InputError, match="got neither"):
        load_config("nyu", ["data.root=x", "init.random=1", "schedule.epochs=null"]).check_complete()
    load_config("nyu", ["data.root=x", "init.random=1"]).check_complete()


def test_differences_by_key():
    old = load_config("ade20k")
    new = load_config("ade20k", ["optimizer.lr=1", "log.every=7", "data.workers=9", "data.size=640"])
    assert differences(old, new, ["log", "data.workers"]) == [
        "data.size is 640, was 512", "optimizer.lr is 1.0, was 8e-05",
    ]  # fmt: skip
    assert len(differences(old, new)) == 4
    assert differences(old, old) == []


def test_precision_of_the_machine():
    cpu = torch.device("cpu")
    assert [build.choose_precision(name, cpu) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    with pytest.MonkeyPatch.context() as patch:
        for supported, precision in ((True, "bf16"), (False, "fp32")):
            patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
            assert build.choose_precision("auto", cpu) == precision


def test_settings_that_stand_for_more_than_memory_holds(tmp_path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for text in ("\n".join(lines), "data: " + "[" * 10_000):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(InputError, match="is not readable YAML"):
            load_config(tmp_path / "a.yaml")
