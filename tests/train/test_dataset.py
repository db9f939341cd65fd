import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch.utils.data import DataLoader
from torchvision.ops import box_convert

from asag.normalization import IMAGE_MEAN, IMAGE_STD, ImageNormalization
from asag.runtime.metadata import ModelMetadata
from asag.runtime.preprocessing import prepare, resize, resized_size
from asag.train.dataset import DetectionDataset, open_training_split
from asag.train.loading import StepSampler, make_loader, steps_per_epoch
from asag.train.transforms import RandomCrop, Sample, TrainingTransform, collate
from tests.runtime import layouts


def write_dataset(root, images, annotations, categories=({"id": 2, "name": "cat"}, {"id": 7, "name": "dog"})):
    """A dataset folder; `images` are (id, height, width)."""
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    records = []
    for identifier, height, width in images:
        name = f"{identifier}.png"
        pixels = np.random.default_rng(identifier).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train2017" / name)
        records.append({"id": identifier, "file_name": name, "height": height, "width": width})
    content = {"images": records, "annotations": annotations, "categories": list(categories)}
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(content))
    return path


def metadata(input_type):
    return ModelMetadata(
        family="asag",
        preset="mine",
        choices={},
        stages=(),
        half_layers=(),
        precision="fp32",
        input_height=128,
        input_width=128,
        input_type=input_type,
        shorter_side=96,
        longer_side=128,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
        category_ids=(1,),
        category_names=("thing",),
        nms_iou=None,
        max_detections=100,
        package_version="0",
        weights_digest="",
    )


def annotation(image_id, box, category_id=2, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, **more}


def test_classes_and_boxes_follow_from_the_file(tmp_path):
    write_dataset(tmp_path, [(1, 40, 60)], [annotation(1, [50, 30, 20, 5], category_id=7), annotation(1, [1, 2, 3, 4])])
    dataset = open_training_split(tmp_path)
    image, target = dataset[0]
    assert dataset.category_ids == (2, 7)
    assert dataset.category_names == ("cat", "dog")
    assert image.size == (60, 40)
    assert target["labels"].tolist() == [1, 0]
    assert target["boxes"].tolist() == [[50, 30, 60, 35], [1, 2, 4, 6]]


@pytest.mark.parametrize("write", layouts.LAYOUTS)
def test_training_opens_every_layout(tmp_path, write):
    write(tmp_path)
    dataset = open_training_split(tmp_path)
    assert dataset.counts.images_without_objects == 1
    found = {}
    for index in range(len(dataset)):
        _, target = dataset[index]
        names = [dataset.category_names[label] for label in target["labels"]]
        boxes = map(tuple, target["boxes"].round(decimals=3).tolist())
        found[Path(dataset.file_name(index)).stem] = list(zip(names, boxes, strict=True))
    assert found == {name: objects for name, objects in layouts.OBJECTS["train"].items() if objects}


def test_what_is_left_out_is_counted(tmp_path, caplog):
    bad = [[5, 5, 0, 4], [5, 5, -3, 4], [float("nan"), 1, 2, 2], [100, 0, 5, 5], [1, 2, 3], "box", [-9, 0, 5, 5]]
    write_dataset(
        tmp_path,
        [(1, 40, 40), (2, 31, 200), (3, 40, 40), (4, 40, 40), (5, 32, 32)],
        [
            annotation(1, [1, 1, 5, 5]),
            annotation(1, [1, 1, 20, 20], iscrowd=1),
            annotation(2, [1, 1, 5, 5]),
            annotation(3, [1, 1, 20, 20], iscrowd=1),
            annotation(5, [0, 0, 32, 32]),
            annotation(99, [1, 1, 5, 5]),
            *(annotation(4, box) for box in bad),
        ],
    )
    with caplog.at_level("WARNING"):
        dataset = open_training_split(tmp_path)
    assert [dataset.file_name(index) for index in range(len(dataset))] == ["1.png", "5.png"]
    assert dataset.counts.objects == 2
    assert dataset.counts.of_file.bad_boxes == len(bad)
    assert dataset.counts.of_file.annotations_without_image == 1
    assert dataset.counts.crowd_annotations == 2
    assert dataset.counts.small_images == 1
    assert dataset.counts.images_without_objects == 2
    assert len(caplog.records) == 1
    assert f"{len(bad)} bad boxes" in dataset.counts.sentence()


def test_images_without_any_annotation_are_background(tmp_path):
    write_dataset(
        tmp_path,
        [(number, 40, 40) for number in range(1, 6)],
        [annotation(1, [1, 1, 5, 5]), annotation(2, [1, 1, 9, 9], iscrowd=1), annotation(3, [1, 1, 0, 5])],
    )
    dataset = open_training_split(tmp_path, background_images=True)
    assert [dataset.file_name(index) for index in range(len(dataset))] == ["1.png", "4.png", "5.png"]
    _, target = dataset[2]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert (dataset.counts.background_images, dataset.counts.images_without_objects) == (2, 2)
    assert dataset.counts.sentence().startswith("3 images with 1 objects and 2 of them without; left out: 2 images")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset not found"):
        open_training_split(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json"):
        open_training_split(tmp_path)
    path = write_dataset(tmp_path / "data", [(1, 40, 40)], [annotation(1, [1, 1, 5, 5])])
    (tmp_path / "data" / "train2017" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images .* 1\.png"):
        open_training_split(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="no images"):
        DetectionDataset(tmp_path / "elsewhere", path)


def test_a_picture_of_another_size_is_refused(tmp_path):
    write_dataset(tmp_path, [(1, 40, 40)], [annotation(1, [1, 1, 5, 5])])
    Image.new("RGB", (50, 40)).save(tmp_path / "train2017" / "1.png")
    with pytest.raises(ValueError, match=r"50 x 40 pixels, but .* says 40 x 40"):
        open_training_split(tmp_path)[0]


def test_real_photographs(coco_tiny):
    dataset = open_training_split(coco_tiny)
    assert len(dataset.category_ids) == 80
    assert dataset.category_ids[-1] == 90
    image, target = dataset[0]
    assert image.mode == "RGB"
    assert len(target["boxes"]) == len(target["labels"]) > 0
    assert int(target["labels"].max()) < 80


@given(
    height=st.integers(32, 120),
    width=st.integers(32, 120),
    flips=st.booleans(),
    corner=st.tuples(st.floats(0, 0.6), st.floats(0, 0.6)),
    extent=st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.4)),
)
@settings(max_examples=40, deadline=None)
def test_the_transform_keeps_boxes_on_their_pixels(height, width, flips, corner, extent):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    fractions = torch.tensor([[*corner, corner[0] + extent[0], corner[1] + extent[1]]], dtype=torch.float32)
    boxes = fractions * torch.tensor([width, height, width, height])
    transform = TrainingTransform((64,), 96, flip_probability=float(flips))
    sample = transform(image, {"boxes": boxes, "labels": torch.tensor([1])}, np.random.default_rng(1))
    expected_size = resized_size(height, width, 64, 96)
    assert sample.pixels.shape[1:] == expected_size
    expected_boxes = box_convert(fractions, "xyxy", "cxcywh")
    expected_pixels = torch.from_numpy(np.asarray(resize(image, expected_size)).copy()).permute(2, 0, 1)
    if flips:
        expected_boxes[:, 0] = 1 - expected_boxes[:, 0]
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected_pixels = torch.from_numpy(np.asarray(resize(mirrored, expected_size)).copy()).permute(2, 0, 1)
    torch.testing.assert_close(sample.boxes, expected_boxes, atol=1e-5, rtol=1e-5)
    assert torch.equal(sample.pixels, expected_pixels)


@pytest.mark.parametrize("interpolation", ["antialias", "bilinear"])
@pytest.mark.parametrize(("height", "width"), [(61, 200), (200, 61), (128, 160), (90, 90)])
def test_training_and_inference_see_the_same_pixels(height, width, interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    transform = TrainingTransform((96,), 128, flip_probability=0, interpolation=interpolation)
    batch = collate([transform(image, target, np.random.default_rng(0))])
    for input_type in ("uint8", "float32"):
        contract = dataclasses.replace(metadata(input_type), interpolation=interpolation)
        tensors = prepare([image], contract)
        height_padded, width_padded = batch.images.shape[2:]
        assert np.array_equal(tensors["sizes"], batch.sizes.numpy())
        assert not tensors["images"][:, :, height_padded:].any()
        assert not tensors["images"][:, :, :, width_padded:].any()
        found = torch.from_numpy(tensors["images"][:, :, :height_padded, :width_padded])
        if input_type == "uint8":
            assert torch.equal(found, batch.images)
        else:
            torch.testing.assert_close(found, ImageNormalization()(batch.images, batch.sizes))


@given(sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_batches_pad_to_multiples_of_32_with_normalized_zeros(sizes):
    samples = [
        Sample(torch.full((3, *size), 200, dtype=torch.uint8), torch.zeros(1, 4), torch.tensor([index]))
        for index, size in enumerate(sizes)
    ]
    batch = collate(samples)
    height, width = batch.images.shape[2:]
    assert height % 32 == width % 32 == 0
    assert height - max(h for h, _ in sizes) < 32
    assert width - max(w for _, w in sizes) < 32
    assert batch.sizes.tolist() == [list(map(float, size)) for size in sizes]
    assert [int(target["labels"]) for target in batch.targets] == list(range(len(sizes)))
    normalized = ImageNormalization()(batch.images, batch.sizes)
    for index, (h, w) in enumerate(sizes):
        content = normalized[index, :, :h, :w]
        expected = (200 / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
        torch.testing.assert_close(content, expected[:, None, None].expand_as(content))
        assert normalized[index, :, h:].count_nonzero() == normalized[index, :, :, w:].count_nonzero() == 0


@given(images=st.integers(1, 40), batch=st.integers(1, 12), first=st.integers(0, 30), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_order_does_not_depend_on_where_it_starts(images, batch, first, seed):
    everything = list(StepSampler(images, batch, 40, seed))
    assert list(StepSampler(images, batch, 40, seed, first)) == everything[first:]
    per_epoch = steps_per_epoch(images, batch)
    epoch = [index for places in everything[:per_epoch] for _, index in places]
    assert len(set(epoch)) == len(epoch) == per_epoch * min(batch, images)
    assert all(number == step // per_epoch for step, places in enumerate(everything) for number, _ in places)


def test_batches_do_not_depend_on_workers_or_random_state(tmp_path):
    images = [(index, 40 + index, 50) for index in range(1, 7)]
    write_dataset(tmp_path, images, [annotation(index, [1, 1, 20, 30]) for index, _, _ in images])
    dataset = open_training_split(tmp_path)
    transform = TrainingTransform((32, 48, 64), 96)

    def loader(**options) -> DataLoader:
        sampler = StepSampler(len(dataset), 2, 7, 5, options.pop("first_step", 0))
        return make_loader(dataset, transform, sampler, **options)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    expected = list(loader())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    for first, workers in ((0, 2), (4, 0)):
        found = list(loader(first_step=first, workers=workers))
        assert len(found) == 7 - first
        for ours, theirs in zip(found, expected[first:], strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.sizes, theirs.sizes)
            assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(ours.targets, theirs.targets, strict=True))


def test_missing_images_can_be_skipped(tmp_path, caplog):
    write_dataset(tmp_path, [(1, 40, 40), (2, 40, 40)], [annotation(1, [1, 1, 5, 5]), annotation(2, [1, 1, 5, 5])])
    (tmp_path / "train2017" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="skip_missing_images=true"):
        open_training_split(tmp_path)
    with caplog.at_level("WARNING"):
        dataset = open_training_split(tmp_path, skip_missing=True)
    assert (len(dataset), dataset.counts.missing_images) == (1, 1)
    assert "1 images whose file is missing" in caplog.text
    (tmp_path / "train2017" / "2.png").unlink()
    with pytest.raises(ValueError, match="nothing to train on"):
        open_training_split(tmp_path, skip_missing=True)


def test_missing_pictures_of_a_list_can_be_skipped(tmp_path, caplog):
    layouts.yolo_lists(tmp_path)
    (tmp_path / "pictures" / "a.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"first is pictures/a\.png: complete them, .*; --set skip_missing_images=true"
    ):
        open_training_split(tmp_path)
    with caplog.at_level("WARNING"):
        dataset = open_training_split(tmp_path, skip_missing=True)
    assert dataset.counts.missing_images == 1
    assert "1 images whose file is missing" in caplog.text
    (tmp_path / "pictures" / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"c\.png is not an image"):
        open_training_split(tmp_path, skip_missing=True)


def test_a_turned_picture_has_the_size_it_is_shown_with(tmp_path):
    write_dataset(tmp_path, [(1, 40, 60)], [annotation(1, [1, 1, 5, 5])])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 60)).save(tmp_path / "train2017" / "1.png", exif=exif)
    assert open_training_split(tmp_path)[0][0].size == (60, 40)


def test_annotations_of_pixels_as_stored_are_named_and_can_be_used(tmp_path):
    write_dataset(tmp_path, [(1, 60, 40)], [annotation(1, [1, 1, 5, 5])])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 60)).save(tmp_path / "train2017" / "1.png", exif=exif)
    with pytest.raises(ValueError, match=r"EXIF orientation turns the picture.*--stored-pixels"):
        open_training_split(tmp_path)
    assert open_training_split(tmp_path, stored_pixels=True)[0][0].size == (40, 60)


def test_a_picture_that_cannot_be_read_is_found_before_training(tmp_path):
    write_dataset(tmp_path, [(1, 40, 40)], [annotation(1, [1, 1, 5, 5])])
    (tmp_path / "train2017" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png is not an image in a known format"):
        open_training_split(tmp_path)


@given(
    height=st.integers(100, 300),
    width=st.integers(100, 300),
    corner=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)),
    extent=st.tuples(st.floats(0.1, 0.3), st.floats(0.1, 0.3)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_crops_keep_boxes_on_their_pixels(height, width, corner, extent, seed):
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top = round(corner[0] * width), round(corner[1] * height)
    right, bottom = left + max(8, round(extent[0] * width)), top + max(8, round(extent[1] * height))
    right, bottom = min(right, width), min(bottom, height)
    pixels[top:bottom, left:right] = 255
    target = {
        "boxes": torch.tensor([[left, top, right, bottom]], dtype=torch.float32),
        "labels": torch.tensor([3]),
    }
    crop = RandomCrop(1.0, (80, 100, 120), (76, 120))
    image, cut = crop(Image.fromarray(pixels), target, np.random.default_rng(seed))
    for side in image.size:
        assert 76 <= side <= 120
    bright = np.argwhere(np.asarray(image)[..., 0] > 127)
    assert len(cut["boxes"]) == len(cut["labels"]) <= 1
    if len(bright) and len(cut["boxes"]):
        x0, y0, x1, y1 = cut["boxes"][0].tolist()
        found = [bright[:, 1].min(), bright[:, 0].min(), bright[:, 1].max() + 1, bright[:, 0].max() + 1]
        assert found == pytest.approx([x0, y0, x1, y1], abs=1.0)
        assert min(x0, y0) >= 0
        assert x1 <= image.width
        assert y1 <= image.height
    elif len(cut["boxes"]):
        x0, y0, x1, y1 = cut["boxes"][0].tolist()
        assert min(x1 - x0, y1 - y0) <= 1
    else:
        assert not len(bright)


def test_a_crop_that_misses_every_object_leaves_an_empty_target():
    image = Image.new("RGB", (400, 400))
    target = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]]), "labels": torch.tensor([1])}
    transform = TrainingTransform((64,), 96, crop=RandomCrop(1.0, (400,), (64, 64)))
    sample = transform(image, target, np.random.default_rng(3))
    assert sample.boxes.shape == (0, 4)
    assert sample.pixels.shape == (3, 64, 64)


def test_half_of_the_images_are_cropped():
    crop = RandomCrop(0.5)
    image = Image.new("RGB", (640, 480))
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    generator = np.random.default_rng(0)
    kept = sum(crop(image, target, generator)[0] is image for _ in range(200))
    assert 70 < kept < 130
