"""What only a GPU can answer, in runs of a few minutes: `python -m benchmarks.gpu_check RUN FOLDER`.

RUN is one of these, each with its most valuable steps first:

- `smoke`: do kernels, detectors and CUDA graphs work; compute-sanitizer.
- `speed`: whole detectors, then every kernel.
- `train`: ResNet-50 in 16 bits, the weights' parity in float32 and float16. With `--data` on those pictures.
- `engines`: TensorRT and TensorRT for RTX, where they are installed: build, inspect, compare.

Every step is a process with a time limit of its own and runs also when one before it failed. In FOLDER: summary.json
(versions; per step ok, failed or skipped, the reason and the seconds; rewritten after every step), the steps' JSON,
logs/ and work/. The last lines are a table. Exit code 0: some ran and none failed; 1: one failed; 2: none ran.

`--device cpu` rehearses: the same commands, small sizes, no hurry; what needs a GPU is skipped with the reason. This
file needs Python's standard library alone, and never changes the GPU's settings.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "checkpoints/asag-a-tiny.safetensors"
RUN_SECONDS = 240

RUNS_MODELS = ("click", "rich", "msgspec", "anyascii", "numpy", "PIL", "torch", "torchvision", "safetensors")
EXPORTS = (*RUNS_MODELS, "onnx", "onnxscript", "ml_dtypes")
TESTS = (*EXPORTS, "pytest", "hypothesis", "cuda.bindings", "onnxruntime")
LARGEST = ("deformable-detr-r50", "sparse-detr-r50-10", "adamixer-r101-3x-300", "asag-s-r50-3x-300")
"""Detectors of the other kinds, after `asag-a-r50-1x-100`."""

FACTS = """
import ctypes.util, importlib.metadata, subprocess
print("libnvinfer:", ctypes.util.find_library("nvinfer") or "not in the library path")
print(*sorted(f"{found.name} {found.version}" for found in importlib.metadata.distributions()), sep="; ")
asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv"]
print(subprocess.run(asked, capture_output=True, text=True).stdout)
"""
MACHINE = """
import json
from asag.runtime.machine import describe_machine
print(json.dumps(describe_machine().to_json()))
"""


@dataclass(frozen=True)
class Step:
    """A command behind `python`, its time limit in seconds, and what it needs: modules, `command:NAME`, files."""

    name: str
    seconds: float
    command: tuple[str | Path, ...]
    needs: tuple[str | Path, ...] = ()
    only_gpu: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended: `ok`, `failed` or `skipped`; the last line it printed."""

    step: str
    status: str
    seconds: float
    exit_code: int | None
    reason: str
    said_last: str


@dataclass(frozen=True)
class Request:
    """What a run is asked for."""

    output: Path
    device: str
    data: Path | None

    @property
    def work(self) -> Path:
        """Folder of models and data."""
        return self.output / "work"

    @property
    def rehearsal(self) -> bool:
        """Small sizes, on a CPU."""
        return self.device == "cpu"


def asag(*arguments: str | Path) -> tuple[str | Path, ...]:
    """A command of the package, which need not be installed."""
    return ("-m", "asag.cli.main", *arguments)


def smoke(request: Request) -> list[Step]:
    """Does it work at all."""

    def tests(name: str, seconds: float, *chosen: str, needs: tuple[str, ...] = ()) -> Step:
        how = ["--collect-only"] if request.rehearsal else ["--junitxml", str(request.output / f"{name}.xml")]
        if importlib.util.find_spec("pytest_timeout"):
            how += ["--timeout", "60"]
        return Step(name, seconds, ("-m", "pytest", "-q", "-m", "gpu", *how, *chosen), (*TESTS, *needs))

    kernels = "tests/trt_plugins/test_gpu.py"
    return [
        Step("facts", 30, ("-c", FACTS), ("command:nvidia-smi",)),
        tests("kernels", 110, kernels, "-k", "not sanitizer"),
        tests("detectors", 80, "tests/asag/test_ops_cuda.py", "tests/benchmarks"),
        tests("runtime", 60, "tests/runtime"),
        tests("sanitizer", 100, kernels, "-k", "sanitizer", needs=("command:compute-sanitizer",)),
    ]


def speed(request: Request) -> list[Step]:
    """How fast."""

    def whole(name: str, seconds: float, model: str | Path, *options: str) -> Step:
        size: tuple[str, ...] = ("--rounds", "30")
        if request.rehearsal:
            size = ("--rounds", "2", "--input-size", "96x128", "--no-compile")
        json_file = ("--json", request.output / f"{name}.json")
        command = ("-m", "benchmarks.latency", model, "--device", request.device, *size, *options, *json_file)
        return Step(name, seconds, command, RUNS_MODELS)

    first, others = ("asag-a-tiny", ("adamixer-tiny",)) if request.rehearsal else ("asag-a-r50-1x-100", LARGEST)
    batch = "2" if request.rehearsal else "16"
    ops = ("MultiScaleDeformableAttention", "SamplingMixing", "AdaptiveProbing", "PyramidRoIAlign", "SelectTokens")
    return [
        whole("whole-half", 75, first, "--half"),
        whole("whole-half-batch", 40, first, "--half", "--batch-size", batch, "--no-compile"),
        whole("whole", 75, first),
        *(kernels(request, op) for op in ops),
        *(whole(f"whole-{name}", 30, name, "--half", "--no-compile") for name in others),
        whole("whole-batch", 40, first, "--batch-size", batch, "--no-compile"),
        whole("tiny", 30, TINY, "--half", "--no-compile"),
        kernels(request, "GatherAnchors"),
    ]


def kernels(request: Request, op: str) -> Step:
    """One op's kernels, which no CPU runs; `tests/benchmarks` plays a GPU for them."""
    name = f"kernels-{op}"
    files = ("--output", request.output / f"{name}.md", "--json", request.output / f"{name}.json")
    command = ("-m", "benchmarks.kernels", "--op", op, "--sizes", "published", "--rounds", "10", *files)
    return Step(name, 30, command, (*RUNS_MODELS, "cuda.bindings"), only_gpu=True)


def train(request: Request) -> list[Step]:
    """Training in 16 bits on a GPU, and whether the weights survive export."""
    work, output, small = request.work, request.output, request.rehearsal
    profile = ("-m", "benchmarks.training", "--device", request.device, "--json", output / "training-step.json")
    profile += ("--preset", "asag-a-tiny", "--height", "96", "--width", "96") if small else ("--batch-size", "16")
    data, synthetic = request.data or work / "data", request.data is None
    compared = ("--device", request.device, "--no-stages", "--no-batch-check", "--json", output / "overfit-parity.json")
    compared += ("--split", "train2017") if request.data else ()
    annotations = data / "annotations/instances_train2017.json"
    values = {"flip_probability": 0, "schedule": "cosine", "warmup_steps": 1 if small else 60, "gradient_clip": 1.0}
    values |= {"evaluation_interval": 0, "picture_interval": 0, "time_limit": 100, "learn_norms": "true"}
    settings = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    recipe = ["--preset", "asag-a-tiny" if small else "asag-a-r50-1x-100", "--learning-rate", "4e-4"]
    recipe += ["--backbone-learning-rate", "4e-4", "--steps", "2" if small else "1000", "--quiet"]
    recipe += ["--batch-size", "2" if small else "16", "--workers", "0" if small else "8", "--device", request.device]
    overfitted = ("--val-annotations", annotations, "--val-images", data / "train2017")
    weights, files = work / "run/weights.safetensors", [work / f"{kind}.onnx" for kind in ("fp32", "fp16")]
    painted = ("--train-images", "4" if small else "200", "--val-images", "2" if small else "50")
    return [
        Step("training-step", 50, profile, (*RUNS_MODELS, "scipy", "yaml")),
        *([Step("data", 40, asag("data", "synthetic", data, *painted), RUNS_MODELS)] if synthetic else []),
        Step(
            "overfit",
            130,
            asag("train", "--data", data, *overfitted, *recipe, *settings, "-o", work / "run"),
            (*RUNS_MODELS, "scipy", "yaml", "pycocotools", annotations),
        ),
        *(
            Step(f"export-{file.stem}", 40, asag("export", weights, "-o", file, "--precision", file.stem), EXPORTS)
            for file in files
        ),
        Step(
            "overfit-parity",
            60,
            asag("parity", weights, *files, "--data", data, *compared),
            (*RUNS_MODELS, "onnxruntime", "pycocotools", *files),
        ),
    ]


def engines(request: Request) -> list[Step]:
    """Engines of both builders, against PyTorch, on drawn pictures."""
    work, output, device = request.work, request.output, request.device
    model, data = work / "model.onnx", work / "data"
    images = ("--train-images", "1", "--val-images", "2" if request.rehearsal else "100")
    trt = asag("build", model, "--backend", "tensorrt", "--timing-cache", work / "timings")
    calibrated = ("--batch", "1", "--precision", "int8", "--calibration", data / "val2017")

    def compare(name: str, *files: Path) -> Step:
        command = asag("parity", TINY, *files, "--data", data, "--device", device)
        command += ("--json", output / f"{name}.json", "--report", output / f"{name}.html")
        return Step(name, 400, command, (*RUNS_MODELS, "onnxruntime", "pycocotools", "jinja2", *files))

    rtx, engine, int8 = (work / f"{name}.engine" for name in ("rtx", "tensorrt", "tensorrt-int8"))
    builder = (*EXPORTS, "tensorrt", "cuda.bindings", model)
    return [
        Step("data", 120, asag("data", "synthetic", data, *images), RUNS_MODELS),
        Step("export", 120, asag("export", TINY, "-o", model), EXPORTS),
        compare("parity", model),
        Step("tensorrt-build", 500, (*trt, "-o", engine, "--batch", "1:4"), builder, only_gpu=True),
        Step("tensorrt-layers", 60, asag("inspect", engine, "--json", output / "layers.json"), (engine,)),
        compare("tensorrt-parity", engine),
        Step("tensorrt-build-int8", 500, (*trt, "-o", int8, *calibrated), builder, only_gpu=True),
        compare("tensorrt-parity-int8", engine, int8),
        Step("rtx-build", 300, asag("build", model, "-o", rtx), (*EXPORTS, "tensorrt_rtx_bindings", model)),
        *([] if request.rehearsal else [compare("rtx-parity", rtx)]),
    ]


RUNS: dict[str, Callable[[Request], list[Step]]] = {
    "smoke": smoke,
    "speed": speed,
    "train": train,
    "engines": engines,
}


class Runner:
    """Runs steps, with what each printed in `logs/`, and keeps the summary."""

    def __init__(self, request: Request, seconds: float) -> None:
        self.request, self.ends = request, time.monotonic() + seconds
        for folder in (request.output / "logs", request.work):
            folder.mkdir(parents=True, exist_ok=True)
        site = request.output / "site"
        paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if wheels := sorted((ROOT / "wheels").glob("*.whl")):
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
            subprocess.run([*pip, *map(str, wheels)], check=False)
        told = subprocess.run(
            [sys.executable, "-c", MACHINE], env=self.environment, capture_output=True, text=True, check=False, cwd=ROOT
        )
        self.machine = json.loads(told.stdout) if told.returncode == 0 else {"unknown": told.stderr[-300:]}
        self.summary = request.output / "summary.json"
        self.outcomes: dict[str, Outcome] = {}
        if self.summary.is_file():
            earlier = json.loads(self.summary.read_text())["steps"]
            self.outcomes = {step["step"]: Outcome(**step) for step in earlier}

    def lacking(self, step: Step) -> str:
        """What keeps a step from running, or nothing."""
        if step.only_gpu and self.request.rehearsal:
            return "needs a GPU"
        modules = [need for need in step.needs if isinstance(need, str) and not need.startswith("command:")]
        question = (
            "import importlib.util as u, sys\n"
            "def there(name):\n"
            "    try: return u.find_spec(name)\n"
            "    except ImportError: return None\n"
            "print(', '.join(f'no Python module {name}' for name in sys.argv[1:] if not there(name)))"
        )
        command = [sys.executable, "-c", question, *modules]
        told = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, cwd=ROOT)
        lacking = [told.stdout.strip()]
        for need in step.needs:
            if isinstance(need, Path) and not need.exists():
                lacking.append(f"no file {need.name}")
            elif str(need).startswith("command:") and not shutil.which(str(need)[8:]):
                lacking.append(f"no command {str(need)[8:]}")
        return ", ".join(filter(None, lacking))

    def run(self, step: Step) -> Outcome:
        """Run a step and note how it ended."""
        reason = self.lacking(step)
        patience = 5 if self.request.rehearsal else 1
        limit = min(patience * step.seconds, self.ends - time.monotonic())
        if not reason and limit < 1:
            reason = "no time left"
        outcome = Outcome(step.name, "skipped", 0.0, None, reason, "") if reason else self._execute(step, limit)
        self.outcomes[step.name] = outcome
        content = {"machine": self.machine, "steps": [asdict(found) for found in self.outcomes.values()]}
        partial = self.summary.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(self.summary)
        print(f"== {step.name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.reason}", flush=True)
        return outcome

    def _execute(self, step: Step, limit: float) -> Outcome:
        log = self.request.output / f"logs/{step.name}.log"
        began = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, step.command)],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            reason = ""
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                reason = f"stopped after {limit:.0f} s"
        seconds, code = time.monotonic() - began, process.returncode
        lines = [line for line in log.read_text(errors="replace").splitlines() if any(map(str.isalnum, line))] or [""]
        status = "failed" if code else "ok"
        if code in (0, 5) and "pytest" in step.command and " passed" not in lines[-1] and not self.request.rehearsal:
            status, reason = "skipped", f"no test ran: {lines[-1]}"
        elif code and not reason:
            reason = f"exit code {code}: {lines[-1]}"
        return Outcome(step.name, status, seconds, code, reason[:300], lines[-1][:300])


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per step."""
    rows = [("step", "status", "s", "said last, or the reason")]
    rows += [(o.step, o.status, f"{o.seconds:.0f}", o.reason or o.said_last) for o in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", choices=list(RUNS))
    parser.add_argument("output", type=Path, metavar="FOLDER", help="for results; earlier ones of other steps stay")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses with small sizes")
    parser.add_argument("--data", type=Path, help="COCO folder whose training pictures `train` takes")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--time-limit", type=float, default=None, help="seconds of all steps (240; engines 3600)")
    chosen = parser.parse_args(arguments)
    request = Request(chosen.output.resolve(), chosen.device, chosen.data and chosen.data.resolve())
    steps = RUNS[chosen.run](request)
    known = {step.name for step in steps}
    if unknown := set(chosen.only or ()) - known:
        parser.error(f"no step {', '.join(sorted(unknown))} in {chosen.run}; there are {', '.join(sorted(known))}")
    seconds = chosen.time_limit or (3600 if chosen.run == "engines" or request.rehearsal else RUN_SECONDS)
    runner = Runner(request, seconds)
    if chosen.device == "cuda" and not runner.machine.get("gpus"):
        print("no NVIDIA GPU that PyTorch can use; --device cpu rehearses", file=sys.stderr)
        return 2
    outcomes = [runner.run(step) for step in steps if not chosen.only or step.name in chosen.only]
    print(table(outcomes))
    if any(outcome.status == "failed" for outcome in outcomes):
        return 1
    return 0 if any(outcome.status == "ok" for outcome in outcomes) else 2


if __name__ == "__main__":
    sys.exit(main())
