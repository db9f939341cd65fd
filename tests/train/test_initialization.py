from types import SimpleNamespace

import pytest

from asag.train.config import TrainConfig
from asag.train.initialization import starting_detector

DATASET = SimpleNamespace(category_ids=(1, 2), category_names=("circle", "star"))


@pytest.mark.parametrize(("learn_norms", "learn"), [(None, True), (True, True), (False, False)])
def test_whether_the_norms_learn(learn_norms: bool | None, learn: bool, caplog: pytest.LogCaptureFixture) -> None:
    config = TrainConfig.for_preset("asag-a-tiny", ".", ".", learn_norms=learn_norms)
    detector, _ = starting_detector(config, DATASET)  # type: ignore[arg-type]
    detector.train()
    assert {norm.training for norm in detector.backbone.norms()} == {learn}
    assert detector.backbone.conv1.weight.requires_grad is learn
    assert detector.backbone.layer2[0].conv1.weight.requires_grad
    assert ("learn_norms=true" in caplog.text) is not learn
