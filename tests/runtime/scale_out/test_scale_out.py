"""Detecting with Ray, against a local Ray of two workers."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asag.runtime.errors import BackendUnavailableError
from asag.runtime.opening import open_session
from asag.runtime.scale_out.detection import detect_with_ray, find_sources
from asag.runtime.scale_out.worker import WorkerOptions

pyarrow = pytest.importorskip("pyarrow", reason="needs Ray Data: pip install 'ray[data]'")
pytest.importorskip("ray", reason="needs Ray Data: pip install 'ray[data]'")

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def write_images(folder: Path, count: int) -> list[Path]:
    """Photographs of different sizes in a tree, one of them on its side."""
    paths = []
    for number in range(count):
        path = folder / ("deep/er" if number % 2 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40 + 3 * number, 90 - number, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 1 else 1
        Image.fromarray(pixels).save(path, exif=exif)
        paths.append(path)
    return paths


def read_rows(output: Path) -> list[dict]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(output).to_pylist()


def check_row(row: dict, content: Path, model: Path) -> None:
    with open_session(model, threads=1) as session:
        (expected,) = session.detect([content], score_threshold=0.45)
        names = [session.metadata.category_name(label) for label in expected.labels.tolist()]
    assert (row["height"], row["width"]) == expected.image_size
    assert np.array_equal(np.array(row["boxes"], np.float32).reshape(-1, 4), expected.boxes)
    assert np.array_equal(np.array(row["scores"], np.float32), expected.scores)
    assert row["labels"] == expected.labels.tolist()
    assert row["category_names"] == names
    assert (row["overflow"], row["error"]) == (0, None)


@slow
@pytest.mark.usefixtures("local_ray")
def test_results_equal_the_single_process(toy_onnx: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 15)
    damaged, missing = tmp_path / "images/damaged.jpg", tmp_path / "missing.png"
    damaged.write_bytes(images[0].read_bytes()[:60])
    (tmp_path / "images/notes.txt").write_text("not an image")
    seen: list[tuple[int, int]] = []
    summary = detect_with_ray(
        WorkerOptions(toy_onnx, batch_size=2, score_threshold=0.45),
        [tmp_path / "images", missing],
        tmp_path / "results/found",
        workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = {row["id"]: row for row in read_rows(summary.output)}
    assert sorted(rows) == sorted(map(str, [*images, damaged, missing]))
    for path in images:
        check_row(rows[str(path)], path, toy_onnx)
    assert "damaged or unsupported" in rows[str(damaged)]["error"]
    assert "image not found" in rows[str(missing)]["error"]
    assert rows[str(missing)]["boxes"] is None
    assert (summary.images, summary.errors) == (15, 2)
    assert summary.detections == sum(len(row["scores"]) for row in rows.values() if row["error"] is None) > 0
    assert seen[-1] == (17, 17)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["found"]


@slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("in_struct", [True, False])
def test_parquet_in_parquet_out(toy_onnx: Path, tmp_path: Path, in_struct: bool) -> None:
    import pyarrow.parquet

    paths = write_images(tmp_path / "images", 6)
    contents = [*(path.read_bytes() for path in paths), b"nothing", None]
    folder = tmp_path / "tables"
    folder.mkdir()
    for part in range(4):
        some, numbers = contents[part::4], range(part, len(contents), 4)
        structs = [{"bytes": content, "path": f"{number}.png"} for content, number in zip(some, numbers, strict=True)]
        columns = {"image": structs} if in_struct else {"picture": some, "number": [1000 + n for n in numbers]}
        pyarrow.parquet.write_table(pyarrow.table(columns | {"label": ["x"] * len(some)}), folder / f"{part}.parquet")
    options = WorkerOptions(toy_onnx, score_threshold=0.45)
    if not in_struct:
        options = WorkerOptions(toy_onnx, score_threshold=0.45, image_column="picture", id_column="number")
    summary = detect_with_ray(options, [folder], tmp_path / "found", workers=1)
    rows = {row["id"]: row for row in read_rows(summary.output)}
    identities = [f"{number}.png" if in_struct else 1000 + number for number in range(8)]
    assert sorted(rows) == sorted(identities)
    for identity, path in zip(identities, paths, strict=False):
        check_row(rows[identity], path, toy_onnx)
    assert f"{identities[6]} is not an image" in rows[identities[6]]["error"]
    assert "holds no image" in rows[identities[7]]["error"]
    assert (summary.images, summary.errors) == (6, 2)


def worker_processes() -> list[int]:
    """Process ids of the actors below this process."""
    parents, workers = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if b"DetectionWorker" in (entry / "cmdline").read_bytes():
                    workers.append(int(entry.name))
            except (OSError, ValueError):
                continue  # it has just ended

    def is_below(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_below(parents[process]))

    return [worker for worker in workers if is_below(worker)]


@slow
@pytest.mark.usefixtures("local_ray")
def test_a_killed_worker_loses_nothing(toy_onnx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    first = folder / "0.png"
    # Large enough that a worker takes some seconds for all.
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)).save(first)
    for number in range(1, 80):
        (folder / f"{number}.png").hardlink_to(first)
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if 0 < done < total and not killed:
            killed.append(worker_processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    options = WorkerOptions(toy_onnx, score_threshold=0.45)
    summary = detect_with_ray(options, [folder], tmp_path / "found", workers=2, progress=kill_one)
    assert len(killed) == 1
    assert killed[0] not in worker_processes()
    rows = read_rows(summary.output)
    assert sorted(row["id"] for row in rows) == sorted(str(path) for path in folder.iterdir())
    check_row(rows[0], first, toy_onnx)
    assert all(row["scores"] == rows[0]["scores"] for row in rows)


@pytest.mark.usefixtures("local_ray")
def test_a_run_that_fails_leaves_nothing(toy_onnx: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 2)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(toy_onnx.read_bytes()[:300])
    with pytest.raises(ValueError, match="ONNX Runtime cannot open"):
        detect_with_ray(WorkerOptions(damaged), images, tmp_path / "results/found")
    with pytest.raises(ValueError, match="3 workers of 1 threads do not fit: Ray has 2 CPUs"):
        detect_with_ray(WorkerOptions(toy_onnx), images, tmp_path / "results/found", workers=3)
    with pytest.raises(BackendUnavailableError, match="no GPU among the resources of Ray"):
        detect_with_ray(WorkerOptions(toy_onnx, device="cuda"), images, tmp_path / "results/found")
    table = tmp_path / "table.parquet"
    table.write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot read the Parquet files"):
        detect_with_ray(WorkerOptions(toy_onnx), [table], tmp_path / "results/found")
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"1"], "name": ["a"]}), table)
    for options, reason in (
        (WorkerOptions(toy_onnx), "name the column that tells its rows apart; its columns are image, name"),
        (WorkerOptions(toy_onnx, id_column="file"), "has no column file; its columns are image, name"),
        (WorkerOptions(toy_onnx, image_column="name", id_column="image"), "column name is string, not encoded images"),
    ):
        with pytest.raises(ValueError, match=reason):
            detect_with_ray(options, [table], tmp_path / "results/found")
    assert not (tmp_path / "results").exists()


def test_wrong_arguments(toy_onnx: Path, tmp_path: Path) -> None:
    (image,) = write_images(tmp_path / "images", 1)
    options = WorkerOptions(toy_onnx)
    with pytest.raises(ValueError, match="is there already and not empty"):
        detect_with_ray(options, [image], tmp_path / "images")
    with pytest.raises(ValueError, match="is there already and not empty"):
        detect_with_ray(options, [image], image)
    with pytest.raises(ValueError, match="name a device without a number, not cuda:1"):
        detect_with_ray(WorkerOptions(toy_onnx, device="cuda:1"), [image], tmp_path / "found")
    with pytest.raises(ValueError, match="must be at least 1"):
        detect_with_ray(options, [image], tmp_path / "found", workers=0)
    with pytest.raises(FileNotFoundError, match=r"model not found: .*other\.onnx"):
        detect_with_ray(WorkerOptions(tmp_path / "other.onnx"), [image], tmp_path / "found")


def test_sources(tmp_path: Path) -> None:
    (image,) = write_images(tmp_path / "images", 1)
    table = tmp_path / "table.parquet"
    with pytest.raises(FileNotFoundError, match="Parquet file not found"):
        find_sources([table])
    table.touch()
    assert find_sources([table]) == ([], [str(table)])
    assert find_sources([image.parent, tmp_path / "named.dat"]) == ([str(image), str(tmp_path / "named.dat")], [])
    with pytest.raises(ValueError, match="either images or Parquet files"):
        find_sources([tmp_path])
    with pytest.raises(ValueError, match="is a video"):
        find_sources([tmp_path / "clip.mp4"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images found"):
        find_sources([tmp_path / "empty"])


def test_without_ray(toy_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'ray\[data\]'"):
        detect_with_ray(WorkerOptions(toy_onnx), [tmp_path / "a.png"], tmp_path / "found")
