import dataclasses

import pytest
import torch
from torch import nn

from asag.families import FAMILIES, all_presets, find_preset
from asag.families.asag.training.settings import ASAGSettings
from asag.runtime.records import to_json
from asag.train.averaging import average_of
from asag.train.config import TrainConfig
from asag.train.schedule import build_optimizer, build_schedule, learning_rate_factor
from asag.training.protocol import ParameterGroup, rates_of


def config(**options):
    return TrainConfig(**{"preset": "asag-a-tiny", "data": "data", "output": "run", **options})


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.backbone_like = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_the_backbone_has_its_own_rate_and_frozen_parts_none():
    parts = Parts()
    optimizer = build_optimizer(rates_of(parts), config())
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates == {
        id(parts.backbone.weight): 2e-5,
        id(parts.backbone.bias): 2e-5,
        id(parts.backbone_like.weight): 2e-4,
        id(parts.backbone_like.bias): 2e-4,
    }
    with pytest.raises(ValueError, match="no parameter"):
        build_optimizer(rates_of(parts.requires_grad_(False)), config())


def test_the_published_schedule():
    factor = learning_rate_factor(config(), total_steps=12_000, steps_per_epoch=1000)
    assert factor(0) == pytest.approx(1 / 3)
    assert factor(250) == pytest.approx(2 / 3)
    assert factor(500) == factor(7999) == 1
    assert factor(8000) == factor(10_999) == pytest.approx(0.1)
    assert factor(11_000) == factor(11_999) == pytest.approx(0.01)


def test_the_cosine_schedule_falls_to_its_end():
    factor = learning_rate_factor(config(schedule="cosine", warmup_steps=10, final_rate=0.05), 101, 10)
    values = [factor(step) for step in range(101)]
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[50] == pytest.approx(0.525)
    assert values[-1] == pytest.approx(0.05)


def test_the_scheduler_sets_both_groups():
    optimizer = build_optimizer(rates_of(Parts()), config())
    schedule = build_schedule(optimizer, config(warmup_steps=2, milestones=(1,)), total_steps=6, steps_per_epoch=3)
    seen = []
    for _ in range(5):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert seen[0] == pytest.approx([2e-4 / 3, 2e-5 / 3])
    assert seen[2] == pytest.approx([2e-4, 2e-5])
    assert seen[3] == pytest.approx([2e-5, 2e-6])


def test_a_group_takes_a_share_of_its_rate():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [ParameterGroup((first.weight,), factor=0.5), ParameterGroup((second.weight,), backbone=True, factor=0.1)]
    assert [group["lr"] for group in build_optimizer(groups, config()).param_groups] == pytest.approx([1e-4, 2e-6])


def test_every_recipe_makes_a_configuration():
    for preset in all_presets():
        made = TrainConfig.for_preset(preset.name, "data", "run").to_dict()
        assert {name: made[name] for name in preset.recipe} == to_json(dict(preset.recipe))
    published = TrainConfig.for_preset("asag-a-r50-1x-100", "data", "run")
    assert (published.epochs, published.milestones, published.learning_rate) == (12, (8, 11), 2e-4)
    assert TrainConfig.for_preset("asag-a-dn-r50-1x-100", "data", "run").settings.denoising_scale == 0.4


def test_a_preset_that_does_not_exist_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match=r"no preset 'asag-a-r5O-1x-100'; did you mean .*asag-a-r50-1x-100"):
        TrainConfig.for_preset("asag-a-r5O-1x-100", "data", "run")


def test_no_setting_of_a_family_is_called_like_a_field_of_all_runs():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for family in FAMILIES:
        assert not fields & {field.name for field in dataclasses.fields(family.settings)}


def test_overrides():
    made = TrainConfig.for_preset("asag-a-tiny", "data", "run", batch_size=3, learning_rate=None, denoising_scale=1)
    assert made.batch_size == 3
    assert made.learning_rate == find_preset("asag-a-tiny").recipe["learning_rate"]
    assert made.settings == ASAGSettings(denoising_scale=1.0)
    assert made.replaced(first_epoch=2, steps=9).settings == ASAGSettings(first_epoch=2, denoising_scale=1.0)
    assert made.replaced(denoising_scale=None, steps=9) == dataclasses.replace(made, settings=ASAGSettings(), steps=9)
    assert TrainConfig.of(made.to_dict()) == made
    continued = TrainConfig.for_preset("asag-a-tiny", "data", "run", initial_weights="trained.pt")
    assert continued.settings == ASAGSettings(first_epoch=1)
    assert continued.replaced(first_epoch=0).settings == ASAGSettings()
    with pytest.raises(ValueError, match="unknown training options: batch"):
        TrainConfig.for_preset("asag-a-tiny", "data", "run", batch=3)
    with pytest.raises(ValueError, match="unknown training options: settings"):
        TrainConfig.for_preset("asag-a-tiny", "data", "run", settings=ASAGSettings())
    with pytest.raises(ValueError, match="settings are dict; asag-a-tiny trains with ASAGSettings"):
        config(settings={})


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"learning_rate": float("nan")},
        {"steps": 0},
        {"ema_decay": 1.0},
        {"schedule": "linear"},
        {"milestones": (3, 1)},
        {"flip_probability": 1.5},
        {"training_shorter_sides": (16,)},
        {"evaluation_interval": -1},
        {"first_epoch": -1},
        {"first_epoch": 1.5},
        {"denoising_scale": 0},
        {"denoising_scale": "much"},
        {"denoising_scale": float("inf")},
        {"denoising_fall": 1.5},
    ],
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig.for_preset("asag-a-tiny", "data", "run", **wrong)


def test_the_average_follows_the_weights():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = average_of(module, decay=0.5)
    expected = module[0].weight.detach().clone()
    for count in range(6):
        with torch.no_grad():
            module[0].weight.add_(1)
            module[1].num_batches_tracked.fill_(count)
        average.update_parameters(module)
        decay = 0.0 if count == 0 else min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
    torch.testing.assert_close(average.module[0].weight, expected)
    assert int(average.module[1].num_batches_tracked) == 5
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not average.module.training
