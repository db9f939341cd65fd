"""What a person is told and shown while a run goes on, and what is noticed before it begins."""

import dataclasses
import json
import logging
import shutil

import pytest

from asag.train.config import TrainConfig
from asag.train.loop import train
from asag.train.pictures import read_table
from asag.train.reporting import EVALUATIONS_FILE
from asag.train.schedule import EVALUATIONS, evaluation_interval
from asag.train.step import StepMaker


@pytest.fixture
def copied(shapes, tmp_path):
    """A copy of the synthetic dataset, to spoil."""
    return shutil.copytree(shapes, tmp_path / "copied")


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records]


def test_an_interrupted_run_tells_where_it_can_go_on(config, monkeypatch, caplog):
    make = StepMaker.make

    def interrupted(self, pieces, epoch):
        if self._state.step == 3:
            raise KeyboardInterrupt
        return make(self, pieces, epoch)

    monkeypatch.setattr(StepMaker, "make", interrupted)
    with caplog.at_level(logging.INFO, logger="asag.train"), pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    assert "interrupted after step 3; resume the run to go on from step 2" in lines_of(caplog)
    with caplog.at_level(logging.INFO, logger="asag.train"), pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(config, output=config.output / "2", checkpoint_interval=5), progress=False)
    assert "interrupted after step 3; there was no checkpoint yet" in lines_of(caplog)


def test_a_resumed_run_tells_where_it_goes_on(config, caplog):
    train(dataclasses.replace(config, stop_after=1), progress=False)
    with caplog.at_level(logging.INFO, logger="asag.train"):
        train(dataclasses.replace(config, resume=True, stop_after=2), progress=False)
    assert "resumed after step 1" in lines_of(caplog)


def test_what_is_wrong_in_the_annotations_is_told_once(config, copied, caplog):
    path = copied / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [0, 0, -1, 5]
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.INFO, logger="asag.train"):
        train(dataclasses.replace(config, data=copied, steps=1), progress=False)
    assert sum("1 bad boxes" in line for line in lines_of(caplog)) == 1


def test_validation_may_lack_classes_and_number_them_otherwise(config, copied, caplog):
    path = copied / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    first, last = content["categories"][0], content["categories"][-1]
    content["categories"] = [last | {"id": 1}, first | {"id": 2}]
    numbers = {last["id"]: 1, first["id"]: 2}
    kept = [one for one in content["annotations"] if one["category_id"] in numbers]
    content["annotations"] = [one | {"category_id": numbers[one["category_id"]]} for one in kept]
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.INFO, logger="asag.train"):
        done = train(dataclasses.replace(config, data=copied, steps=1, evaluation_interval=1), progress=False)
    assert done.evaluation is not None
    assert any("AP is of 2 of the" in line for line in lines_of(caplog))
    content["categories"][0]["name"] = "something else"
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="the classes are not the same: the classes of the training images are"
    ) as caught:
        train(
            dataclasses.replace(config, data=copied, output=config.output / "again", steps=1, evaluation_interval=1),
            progress=False,
        )
    assert "--classes" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "damaged", "another size"])
def test_the_images_of_validation_are_checked_before_the_first_step(config, copied, damage):
    victim = sorted((copied / "val2017").iterdir())[1]
    if damage == "missing":
        victim.unlink()
        expected = rf"1 of 3 images of .*instances_val2017\.json are missing in .*val2017, the first is {victim.name}"
    elif damage == "damaged":
        victim.write_bytes(b"no picture")
        expected = rf"{victim.name} is not an image in a known format"
    else:
        shutil.copy(next((copied / "train2017").iterdir()), victim)
        path = copied / "annotations" / "instances_val2017.json"
        content = json.loads(path.read_text())
        content["images"][1]["width"] += 1
        path.write_text(json.dumps(content))
        expected = rf"{victim.name} is \d+ x \d+ pixels, but instances_val2017\.json says"
    config = dataclasses.replace(config, data=copied, evaluation_interval=None)
    with pytest.raises((FileNotFoundError, ValueError), match=expected):
        train(config, progress=False)
    assert not config.output.exists()
    # Images that are not evaluated on need not be there.
    train(dataclasses.replace(config, evaluation_images=1, steps=1, picture_interval=0), progress=False)


def test_a_run_is_evaluated_after_every_epoch(config, caplog):
    train(dataclasses.replace(config, evaluation_interval=None, picture_interval=0), progress=False)
    assert [row["step"] for row in read_table(config.output / EVALUATIONS_FILE)] == [3, 6]
    assert not (config.output / "pictures").exists()


@pytest.mark.parametrize(
    ("total", "per_epoch", "interval"),
    [(12 * 7330, 7330, 7330), (36 * 7330, 7330, 3 * 7330), (40, 200, 200), (7, 1, 1)],
)
def test_a_run_is_evaluated_a_dozen_times_at_most(total, per_epoch, interval):
    config = TrainConfig.for_preset("asag-a-r50-1x-100", "data", "run")
    assert evaluation_interval(config, total, per_epoch) == interval
    assert -(-total // interval) <= EVALUATIONS
    assert evaluation_interval(dataclasses.replace(config, evaluation_interval=5), total, per_epoch) == 5
