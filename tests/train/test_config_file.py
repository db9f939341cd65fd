import json

import click
import pytest

from asag.cli.train import resolve_config
from asag.families import find_preset
from asag.train.config import TrainConfig
from asag.train.config_file import read_config_file


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_replaces_the_recipe_and_the_command_line_replaces_the_file(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "preset: asag-a-tiny\ndata: shapes\noutput: runs/a\nlearning_rate: 3e-4\nepochs: 5\n"
        "training_shorter_sides: [288, 320]\n",
    )
    config = resolve_config(file, {"epochs": 7.0, "output": "runs/b", "seed": None})
    assert (config.preset, str(config.data), str(config.output)) == ("asag-a-tiny", "shapes", "runs/b")
    assert config.learning_rate == 3e-4  # YAML 1.1 takes 3e-4 for a text
    assert config.epochs == 7
    assert config.training_shorter_sides == (288, 320)
    assert config.batch_size == find_preset("asag-a-tiny").recipe["batch_size"]


def test_the_record_of_a_run_gives_the_same_configuration(tmp_path):
    config = TrainConfig.for_preset("asag-a-tiny", "shapes", tmp_path / "run", steps=9, resume=True, stop_after=3)
    # None where the recipe has a value must stay None.
    values = {**config.to_dict(), "ema_decay": None, "milestones": [2, 4]}
    (tmp_path / "run").mkdir()
    file = write(tmp_path / "run" / "config.json", json.dumps({"training": values, "versions": {}}))
    again = resolve_config(file, {})
    assert again.output == tmp_path / "run-2"
    assert (again.resume, again.stop_after, again.ema_decay, again.steps) == (False, None, None, 9)
    assert again.computation() == {**config.computation(), "ema_decay": None, "milestones": [2.0, 4.0]}
    assert resolve_config(file, {"epochs": 2.0}).steps is None


def test_the_record_of_an_earlier_version_is_read_and_written_alike():
    # As it was written when recipes went by a preset's name and one class held the fields of loop and method.
    record = {
        **{"preset": "asag-a-tiny", "data": "shapes", "output": "run", "train_split": "train2017"},
        **{"val_split": "val2017", "train_annotations": None, "train_images": None, "val_annotations": None},
        **{"val_images": None, "skip_missing_images": False, "epochs": 24.0, "steps": 9, "first_epoch": 0},
        **{"batch_size": 8, "accumulate": 1, "learning_rate": 0.0006, "backbone_learning_rate": 0.0006},
        **{"weight_decay": 0.05, "gradient_clip": 5.0, "warmup_steps": 200, "warmup_start": 1 / 3},
        **{"schedule": "cosine", "milestones": [], "decay_factor": 0.1, "final_rate": 0.01, "ema_decay": 0.998},
        **{"denoising_scale": 0.4, "denoising_fall": 0.0, "precision": "auto", "compile": False},
        **{"channels_last": None, "training_shorter_sides": [], "crop_probability": 0.0},
        **{"crop_shorter_sides": [400, 500, 600], "crop_sides": [384, 600], "flip_probability": 0.5, "seed": 0},
        **{"initial_weights": None, "backbone_weights": None, "learn_norms": None, "resume": False, "workers": 0},
        **{"device": "auto", "log_interval": 50, "checkpoint_interval": 500, "evaluation_interval": None},
        **{"evaluation_images": None, "keep_checkpoints": 2, "picture_interval": 1000, "tensorboard": True},
        **{"stop_after": None, "time_limit": None},
    }
    config = TrainConfig.of(record)
    assert {name: value for name, value in config.to_dict().items() if name in record} == record
    assert config == TrainConfig.for_preset("asag-a-tiny", "shapes", "run", steps=9, denoising_scale=0.4)
    # What a state of that version says of its run must be what a resumed one says, and the fields it lacks are off.
    computed = config.computation()
    assert all(record[name] == value if name in record else not value for name, value in computed.items())
    assert {"first_epoch", "denoising_scale", "denoising_fall"} < set(config.computation())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "steps: [1", "cannot read .* as YAML"),
        ("a.json", "{", "cannot read .* as JSON"),
        ("a.yaml", "[" * 5000, "cannot read .* as YAML"),
        ("a.json", "[" * 100_000, "cannot read .* as JSON"),
        ("a.json", '{"seed": NaN}', "cannot read .* as JSON"),
        ("a.yaml", "- 1\n", "one `name: value` per line"),
        ("a.yaml", "step: 4\nrate: 2\n", r"no training options \(rate, step\)"),
    ],
)
def test_files_that_are_no_configuration_are_refused_in_one_line(tmp_path, name, text, message):
    file = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message) as error:
        read_config_file(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path):
    for name in ("a.yaml", "a.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=rf"cannot read .*{name} as ") as error:
            read_config_file(tmp_path / name)
        assert "\n" not in str(error.value)


def test_numbers_with_an_exponent(tmp_path):
    text = "learning_rate: 2e-4\nweight_decay: .5e-3\nwarmup_start: 1.E-1\noutput: 1e5-again\ntrain_split: '2e-4'\n"
    values = read_config_file(write(tmp_path / "a.yaml", text))
    assert values == {
        "learning_rate": 2e-4,
        "weight_decay": 5e-4,
        "warmup_start": 0.1,
        "output": "1e5-again",
        "train_split": "2e-4",
    }


def test_a_setting_of_null_takes_a_value_away(tmp_path):
    given = {"preset": "asag-a-tiny", "data": tmp_path, "output": tmp_path, "seed": None}
    assert resolve_config(None, given).ema_decay == 0.998
    assert resolve_config(None, given, {"ema_decay": None}).ema_decay is None
    with pytest.raises(ValueError, match="learning_rate is None"):
        resolve_config(None, given, {"learning_rate": None})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_config_file(tmp_path / "none.yaml")


def test_data_and_output_must_come_from_somewhere(tmp_path):
    with pytest.raises(click.UsageError, match="--data"):
        resolve_config(None, {"output": tmp_path})
    with pytest.raises(click.UsageError, match="--output"):
        resolve_config(None, {"data": tmp_path})
    file = write(tmp_path / "run.yaml", "data: shapes\noutput: runs/a\n")
    with pytest.raises(click.UsageError, match="resume"):
        resolve_config(file, {"resume": True})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 1.5, "batch_size is 1.5; it must be a whole number"),
        ("compile", 1, "compile is 1; it must be true or false"),
        ("milestones", 3, "milestones is 3; it must be a list"),
        ("crop_sides", [384], r"crop_sides is \[384\]; it must be a list"),
        ("crop_sides", [600, 384], "crop_sides must be"),
        ("learning_rate", "fast", "learning_rate is 'fast'; it must be a number"),
        ("precision", "int8", "precision is 'int8'; choose one of"),
        ("accumulate", 0, "accumulate is 0; it must be a whole number >= 1"),
        ("workers", -1, "workers is -1; it must be a whole number >= 0"),
        ("gradient_clip", 0, "gradient_clip is 0; it must be a number > 0"),
        ("weight_decay", -1e-4, "weight_decay is -0.0001; it must be a number >= 0"),
        ("final_rate", 1.5, "final_rate is 1.5; it must be a number <= 1"),
        ("ema_decay", 1, "ema_decay is 1; it must be a number < 1"),
        ("epochs", float("inf"), "epochs is inf; it must be finite"),
        ("crop_sides", [16, 600], r"crop_sides is \[16, 600\]; \[0\] must be a whole number >= 32"),
        ("learning_rate", "2e-4", "learning_rate is '2e-4'; it must be a number"),
        ("seed", True, "seed is True; it must be a whole number"),
        ("backbone_weights", 3, "backbone_weights is 3; it must be a path"),
        ("train_split", 3, "train_split is 3; it must be a text"),
        ("val_images", "folder", "val_images needs val_annotations"),
        ("preset", 3, "preset must be a text"),
        ("preset", ["asag-a-tiny"], "preset must be a text"),
        ("preset", "asag-a-tinny", "no preset 'asag-a-tinny'; did you mean asag-a-tiny"),
        ("first_epoch", 0.5, "first_epoch must be a whole number"),
        ("denoising_scale", "0.4", "denoising_scale must be a number"),
    ],
)
def test_values_of_another_kind_are_named(name, value, message):
    given = {"preset": "asag-a-tiny", "data": "data", "output": "run", name: value}
    with pytest.raises(ValueError, match=message):
        TrainConfig.for_preset(**given)


def test_something_to_train_on():
    with pytest.raises(ValueError, match="nothing to train on"):
        TrainConfig.for_preset("asag-a-tiny", None, "run")
    assert TrainConfig.for_preset("asag-a-tiny", None, "run", train_annotations="a.json").data is None


def test_the_3x_recipe_crops_half_of_the_time():
    for preset in ("asag-a-r50-3x-100", "asag-s-crowdhuman"):
        config = TrainConfig.for_preset(preset, "data", "run")
        assert config.crop_probability == 0.5
        assert (config.crop_shorter_sides, config.crop_sides) == ((400, 500, 600), (384, 600))
        assert config.training_shorter_sides == (640, 672, 704, 736, 768, 800)
    assert TrainConfig.for_preset("asag-a-r50-1x-100", "data", "run").crop_probability == 0
