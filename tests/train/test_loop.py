import csv
import dataclasses
import errno
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import types

import pytest
import safetensors.torch
import torch
from PIL import Image

from asag import families
from asag.checkpoint import load_detector
from asag.runtime.coco_evaluation import CocoResult
from asag.train.checkpointing import has_run, kept_states
from asag.train.config import TrainConfig
from asag.train.config_file import read_config_file
from asag.train.devices import resolve_device
from asag.train.evaluation import Evaluation
from asag.train.initialization import load_backbone, untrained_detector
from asag.train.loop import WEIGHTS_FILE, train
from asag.train.pictures import read_table
from asag.train.reporting import EVALUATIONS_FILE, LOSSES_FILE, group_losses
from asag.train.run import CONFIG_FILE
from asag.train.synthetic import write_synthetic_dataset
from tests.train.child_run import micro_families


def weights_of(folder):
    return safetensors.torch.load_file(folder / WEIGHTS_FILE)


def assert_equal_weights(folder, other):
    ours, theirs = weights_of(folder), weights_of(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def rows_of(folder):
    with (folder / LOSSES_FILE).open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_resumed_run_ends_with_the_same_bits(config, tmp_path, ema_decay):
    whole = dataclasses.replace(config, ema_decay=ema_decay)
    train(whole, progress=False)
    sliced = dataclasses.replace(whole, output=tmp_path / "sliced")
    for stop, resume in ((1, False), (4, True), (None, True)):
        # Other random numbers in between must not matter.
        torch.manual_seed(99)
        result = train(
            dataclasses.replace(sliced, stop_after=stop, resume=resume, workers=int(stop == 4)), progress=False
        )
        assert result.step == (stop or 6)
        assert result.finished == (stop is None)
    assert_equal_weights(config.output, sliced.output)
    assert [row["step"] for row in rows_of(sliced.output)] == ["1", "2", "4", "6"]


def test_a_run_that_was_killed_before_its_last_weights_were_written_writes_them(config):
    config = dataclasses.replace(config, steps=2)
    train(config, progress=False)
    whole = (config.output / WEIGHTS_FILE).read_bytes()
    (config.output / WEIGHTS_FILE).write_bytes(b"those of an earlier step")
    assert train(dataclasses.replace(config, resume=True), progress=False).finished
    assert (config.output / WEIGHTS_FILE).read_bytes() == whole


def test_the_seed_decides(config, tmp_path):
    one_step = dataclasses.replace(config, steps=1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(dataclasses.replace(one_step, output=tmp_path / name, seed=seed), progress=False)
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_equal_weights(tmp_path / "a", tmp_path / "c")


def test_what_a_run_leaves(config, shapes, caplog):
    with caplog.at_level(logging.INFO, logger="asag.train"):
        result = train(dataclasses.replace(config, evaluation_interval=None), progress=False)
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("step 6/6") and "images/s" in line and "anchors" in line for line in lines)
    assert any("AP50" in line for line in lines)
    assert result.finished
    assert result.weights.is_file()
    assert result.evaluation is not None
    assert result.evaluation.images == 3
    detector, info = load_detector(result.weights)
    assert info.category_ids == (1, 2, 3, 5, 7, 11)
    assert detector.config.classes == 6
    recorded = json.loads((config.output / CONFIG_FILE).read_text())
    assert recorded["training"]["seed"] == 0
    assert recorded["versions"]["torch"] == torch.__version__
    rows = rows_of(config.output)
    assert [row["step"] for row in rows] == ["1", "2", "4", "6"]
    assert float(rows[-1]["total"]) == pytest.approx(result.losses["total"], rel=1e-4)
    assert float(rows[0]["learning_rate"]) == pytest.approx(1e-3 / 3, rel=1e-4)
    assert not list(config.output.glob(".*"))


def test_training_lowers_the_loss(config):
    result = train(
        dataclasses.replace(config, steps=16, learning_rate=3e-3, milestones=(), ema_decay=None), progress=False
    )
    first = float(rows_of(config.output)[0]["total"])
    assert result.losses["total"] < 0.85 * first


def test_a_time_limit_stops_with_a_checkpoint(config):
    result = train(dataclasses.replace(config, time_limit=1e-3), progress=False)
    assert result.step == 1
    assert not result.finished
    assert has_run(config.output)
    assert train(dataclasses.replace(config, resume=True), progress=False).finished


def test_a_folder_with_a_run_is_not_overwritten(config):
    train(dataclasses.replace(config, steps=1), progress=False)
    before = (config.output / WEIGHTS_FILE).read_bytes()
    with pytest.raises(ValueError, match="already holds a training run"):
        train(config, progress=False)
    with pytest.raises(ValueError, match=r"another configuration \(learning_rate 0.001 -> 0.1, steps 1 -> 6\)"):
        train(dataclasses.replace(config, resume=True, learning_rate=0.1), progress=False)
    assert (config.output / WEIGHTS_FILE).read_bytes() == before


def test_a_run_is_not_resumed_on_other_data(config, tmp_path):
    train(dataclasses.replace(config, stop_after=1), progress=False)
    other = write_synthetic_dataset(tmp_path / "other", train_images=5, val_images=1, image_size=96)
    with pytest.raises(ValueError, match=r"images 7 -> 5"):
        train(dataclasses.replace(config, resume=True, data=other), progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(config, shapes, tmp_path, workers):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    for path in (data / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"^cannot read image .*000\d\.jpg.*$") as error:
        train(dataclasses.replace(config, data=data, workers=workers), progress=False)
    assert "\n" not in str(error.value)


def test_photographs_are_learned(config, coco_tiny):
    config = config.replaced(data=coco_tiny, steps=8, learning_rate=2e-3, milestones=(), denoising_scale=0.4)
    result = train(config, progress=False)
    assert result.losses["total"] < 0.9 * float(rows_of(config.output)[0]["total"])
    assert "dn_loss_ce_0" in result.losses


def test_nothing_to_resume(config):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(dataclasses.replace(config, resume=True), progress=False)


def test_a_missing_validation_split_is_noticed_before_training(config, shapes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    (data / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match="instances_val2017"):
        train(dataclasses.replace(config, data=data, evaluation_interval=None), progress=False)
    assert not config.output.exists()


def test_a_loss_that_is_not_finite_stops_the_run(config):
    with pytest.raises(ValueError, match="lower the learning rate"):
        train(dataclasses.replace(config, learning_rate=1e30, warmup_steps=0, steps=20), progress=False)


def test_initial_weights(config, tmp_path):
    first = train(dataclasses.replace(config, steps=1), progress=False)
    continued = config.replaced(
        output=tmp_path / "next", initial_weights=first.weights, first_epoch=1, learning_rate=1e-12
    )
    train(dataclasses.replace(continued, backbone_learning_rate=1e-12), progress=False)
    ours, theirs = weights_of(tmp_path / "next"), weights_of(config.output)
    name = "head_embedding.weight"
    torch.testing.assert_close(ours[name], theirs[name])
    other = dataclasses.replace(config, output=tmp_path / "other", preset="asag-a-tiny", initial_weights=first.weights)
    with pytest.raises(ValueError, match=r"preset micro and does not fit asag-a-tiny"):
        train(other, progress=False)


def test_initial_weights_of_other_classes(config, shapes, tmp_path, caplog):
    first = train(dataclasses.replace(config, steps=1), progress=False)
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    annotations = data / "annotations" / "instances_train2017.json"
    content = json.loads(annotations.read_text())
    content["categories"].append({"id": 99, "name": "spiral"})
    annotations.write_text(json.dumps(content))
    other = dataclasses.replace(config, data=data, output=tmp_path / "other", initial_weights=first.weights, steps=1)
    with caplog.at_level(logging.WARNING):
        result = train(other, progress=False)
    assert any("has 6 of the 7 classes" in record.getMessage() for record in caplog.records)
    assert load_detector(result.weights)[1].category_ids[-1] == 99


def test_backbone_weights(config, tmp_path):
    train(dataclasses.replace(config, steps=1), progress=False)
    detector, _ = load_detector(config.output / WEIGHTS_FILE)
    state = {name: torch.randn(value.shape).to(value.dtype) for name, value in detector.backbone.state_dict().items()}
    torch.save({**state, "fc.weight": torch.zeros(2, 2)}, tmp_path / "backbone.pth")
    load_backbone(detector, tmp_path / "backbone.pth")
    assert all(torch.equal(value, state[name]) for name, value in detector.backbone.state_dict().items())
    safetensors.torch.save_file({"conv1.weight": state["conv1.weight"]}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of resnet10"):
        load_backbone(detector, tmp_path / "part.safetensors")
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(ValueError, match="no PyTorch file"):
        load_backbone(detector, tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_backbone(detector, tmp_path / "none.pth")


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="unknown device"):
        resolve_device("abacus")


def test_the_parts_of_the_log_line_add_up():
    means = {"loss_ce": 1.0, "loss_ce_rpn": 2.0, "loss_ce_anchor": 3.0, "dn_loss_ce_0": 4.0, "loss_giou_1": 5.0}
    parts = {"loss_ce": "heads", "loss_ce_rpn": "proposals", "loss_ce_anchor": "anchors", "dn_loss_ce_0": "denoising"}
    parts |= {"loss_giou_1": "heads", "loss_giou_2": "heads"}
    training = types.SimpleNamespace(parts=parts, weights=dict.fromkeys(parts, 2.0))
    groups = group_losses({"step": 7.0, **means}, training)
    assert groups == {"heads": 12.0, "proposals": 4.0, "anchors": 6.0, "denoising": 8.0}


def test_a_full_disk_is_reported_and_training_goes_on(config, monkeypatch, caplog):
    save, calls = torch.save, []

    def full_at_first(content, stream):
        calls.append(content["step"])
        if content["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, stream)

    monkeypatch.setattr(torch, "save", full_at_first)
    with caplog.at_level(logging.INFO, logger="asag.train"):
        assert train(config, progress=False).finished
    lines = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert len(lines) == 1
    assert "step 4 could not be written" in lines[0]
    assert "No space left on device" in lines[0]
    assert "last good checkpoint is of step 2" in lines[0]
    assert calls == [2, 4, 6]
    assert [step for step, _ in kept_states(config.output)] == [2, 6]


def test_a_disk_that_is_full_at_the_end_stops_the_run_but_not_what_was_saved(config, monkeypatch):
    save = torch.save

    def full_at_last(content, stream):
        if content["step"] == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, stream)

    monkeypatch.setattr(torch, "save", full_at_last)
    with pytest.raises(OSError, match=r"step 6 could not be written.*of step 4; free some space and resume"):
        train(config, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(families, "FAMILIES", micro_families())
    assert train(dataclasses.replace(config, resume=True), progress=False).finished


def test_the_best_weights_are_kept(config, monkeypatch):
    scores = iter([0.1, 0.3, 0.2])

    def evaluate(detector, info, validation, **options):
        score = next(scores)
        return Evaluation(CocoResult(score, score, score, math.nan, score, score, 3))

    monkeypatch.setattr("asag.train.loop.evaluate_detector", evaluate)
    result = train(dataclasses.replace(config, evaluation_interval=2, keep_checkpoints=1), progress=False)
    assert result.evaluation.ap == 0.2
    assert json.loads((config.output / "best.json").read_text()) == {"step": 4, "score": 0.3}
    best = load_detector(config.output / "best.safetensors")[0].state_dict()
    last = load_detector(result.weights)[0].state_dict()
    assert any(not torch.equal(best[name], last[name]) for name in last)
    assert [row["AP"] for row in read_table(config.output / EVALUATIONS_FILE)] == [0.1, 0.3, 0.2]
    assert [step for step, _ in kept_states(config.output)] == [6]


def rising_until(monkeypatch, *scores):
    """Evaluations that give these scores, one after the other."""
    left = iter(scores)

    def evaluate(detector, info, validation, **options):
        score = next(left)
        return Evaluation(CocoResult(score, score, score, math.nan, score, score, 3))

    monkeypatch.setattr("asag.train.loop.evaluate_detector", evaluate)


def test_a_run_ends_when_nothing_gets_better(config, monkeypatch, caplog):
    config = dataclasses.replace(config, evaluation_interval=1, patience=2, picture_interval=0)
    rising_until(monkeypatch, 0.1, 0.3, 0.2, 0.3, 0.2, 0.4)
    # An interruption does not start the count anew.
    assert not train(dataclasses.replace(config, stop_after=3), progress=False).finished
    with caplog.at_level(logging.INFO):
        result = train(dataclasses.replace(config, resume=True), progress=False)
    assert (result.step, result.early, result.finished) == (4, True, True)
    assert "ended early, after 4 of 6 steps: 2 evaluations in a row" in caplog.text
    assert (result.best, result.best_score) == (config.output / "best.safetensors", 0.3)
    assert [step for step, _ in kept_states(config.output)][-1] == 4
    # It stays ended, and goes on where more patience is asked for.
    assert train(dataclasses.replace(config, resume=True), progress=False).step == 4
    result = train(dataclasses.replace(config, resume=True, patience=4), progress=False)
    assert (result.step, result.early, result.best_score) == (6, False, 0.4)
    with pytest.raises(ValueError, match="patience counts evaluations"):
        dataclasses.replace(config, evaluation_interval=0)


def test_frozen_parts_stay_as_they_are(config, tmp_path):
    parts = ("neck", "backbone.layer1", "backbone.bn1")
    train(dataclasses.replace(config, steps=1, freeze=parts), progress=False)
    torch.manual_seed(config.seed)
    start, end = untrained_detector(config, num_classes=6).state_dict(), weights_of(config.output)
    kept = {name for name in start if torch.equal(start[name], end[name])}
    frozen = {name for name in start if name.startswith(parts)}
    assert frozen <= kept, "running statistics too"
    assert any(name.startswith("backbone.layer2") and "running_mean" in name for name in set(start) - kept)
    with pytest.raises(ValueError, match=r"no part 'head' that could train; its parts are backbone, .*neck"):
        train(dataclasses.replace(config, output=tmp_path / "other", freeze=("head",)), progress=False)


def test_only_one_split_is_a_warning(config, shapes, tmp_path, caplog, monkeypatch):
    rising_until(monkeypatch, 0.1)
    content = (shapes / "annotations" / "instances_train2017.json").read_text()
    (tmp_path / "one" / "annotations").mkdir(parents=True)
    (tmp_path / "one" / "annotations" / "instances_default.json").write_text(content)
    (tmp_path / "one" / "images").symlink_to(shapes / "train2017")
    train(
        dataclasses.replace(config, data=tmp_path / "one", steps=1, evaluation_interval=1, picture_interval=0),
        progress=False,
    )
    assert "has one split, which is trained and evaluated on" in caplog.text


def test_steps_of_background_alone(config, shapes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    path = data / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] == first]
    path.write_text(json.dumps(content))
    background = config.replaced(data=data, background_images=True, batch_size=1, steps=3, denoising_scale=0.4)
    result = train(background, progress=False)
    assert result.step == 3
    assert json.loads((config.output / CONFIG_FILE).read_text())["images"] == 7
    assert all(math.isfinite(value) for value in result.losses.values())


def test_pictures_and_curves(config, shapes):
    train(dataclasses.replace(config, evaluation_interval=None, picture_interval=4), progress=False)
    pictures = sorted(path.name for path in (config.output / "pictures").iterdir())
    assert pictures == ["step-00000004.jpg", "step-00000006.jpg"]
    with Image.open(config.output / "pictures" / pictures[0]) as picture:
        assert picture.size == (652, 652)  # three images in two columns of 320 pixels
    if importlib.util.find_spec("matplotlib"):
        with Image.open(config.output / "curves.png") as curves:
            assert curves.width > 500


def test_a_run_is_recorded_and_repeated(config):
    train(config, progress=False)
    recorded = json.loads((config.output / CONFIG_FILE).read_text())
    assert recorded["versions"]["scipy"]
    assert recorded["git"] is None or len(recorded["git"]["commit"]) == 40
    again = TrainConfig.of(read_config_file(config.output / CONFIG_FILE))
    assert again.output == config.output.with_name("run-2")
    assert dataclasses.replace(again, output=config.output) == config
    train(again, progress=False)
    assert_equal_weights(config.output, again.output)


def test_own_files_without_a_folder_layout(config, shapes):
    own = dataclasses.replace(
        config,
        data=None,
        train_annotations=shapes / "annotations" / "instances_train2017.json",
        train_images=shapes / "train2017",
        val_annotations=shapes / "annotations" / "instances_val2017.json",
        val_images=shapes / "val2017",
        evaluation_interval=None,
        steps=1,
    )
    assert train(own, progress=False).evaluation.images == 3
    with pytest.raises(FileNotFoundError, match="are missing"):
        train(dataclasses.replace(own, output=config.output / "2", train_images=None), progress=False)


def test_crowdhuman_detectors_are_measured_as_such(config, shapes, monkeypatch):
    family, *others = families.FAMILIES
    micro = family.presets[config.preset]
    crowd = dataclasses.replace(micro.config, dataset="crowdhuman", queries=300, decoder="sparse_rcnn")
    crowd_preset = dataclasses.replace(micro, config=crowd, dataset="crowdhuman")
    family = dataclasses.replace(family, presets={**family.presets, "crowd": crowd_preset})
    monkeypatch.setattr(families, "FAMILIES", (family, *others))
    result = train(dataclasses.replace(config, preset="crowd", evaluation_interval=None, steps=1), progress=False)
    assert result.crowdhuman.images == 3
    assert 0 <= result.crowdhuman.recall <= 1
    assert set(read_table(config.output / EVALUATIONS_FILE)[0]) >= {"AP", "mMR", "recall"}


def test_tensorboard_events(config, shapes, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            written.append(folder.name)

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def add_image(self, name, pixels, step, dataformats):
            written.append((name, step, pixels.ndim, dataformats))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    train(dataclasses.replace(config, steps=1, evaluation_interval=None), progress=False)
    assert written[0] == "tensorboard"
    assert {("training/total", 1), ("training/learning_rate", 1), ("validation/AP", 1)} <= set(written)
    assert ("detections", 1, 3, "HWC") in written
    assert written[-1] == "closed"
