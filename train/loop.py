"""The training loop: one call from a configuration to trained weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from asag.checkpoint import save_detector
from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_evaluation import CocoResult
from asag.runtime.errors import one_line
from asag.runtime.files import write_json
from asag.train.checkpointing import keep_state, kept_states
from asag.train.config import TrainConfig
from asag.train.crowdhuman_evaluation import CrowdHumanResult
from asag.train.evaluation import Evaluation, detect, evaluate_detector
from asag.train.loading import StepSampler, make_loader
from asag.train.pictures import pictured_images, read_table, write_curves, write_grid
from asag.train.processes import joined_processes
from asag.train.reporting import EVALUATIONS_FILE, LOSSES_FILE, TrainingReport
from asag.train.run import BEST_RECORD, Run, prepare_run
from asag.train.run_folder import held_folder
from asag.train.schedule import evaluation_interval, warmup_steps
from asag.train.step import Piece, StepMaker
from asag.train.transforms import RandomCrop, TrainingTransform

WEIGHTS_FILE = "weights.safetensors"
BEST_FILE = "best.safetensors"
CURVES_FILE = "curves.png"
PICTURES_FOLDER = "pictures"


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    output: Path
    weights: Path
    """The checkpoint for export and evaluation (the averaged weights where there are such)."""
    step: int
    total_steps: int
    seconds: float
    """Time of this process in the loop, evaluation included."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Unweighted mean losses of the last log line, and their weighted ``total``."""
    evaluation: CocoResult | None = None
    """COCO results of the last weights, where the run is finished and was to evaluate (first process only)."""
    crowdhuman: CrowdHumanResult | None = None
    """CrowdHuman's measures likewise, for its detectors."""
    early: bool = False
    """Whether the run ended before its last step because evaluations brought nothing better."""
    best: Path | None = None
    """The checkpoint with the best score so far, where the run was evaluated."""
    best_score: float = math.nan
    """Its AP on the validation images."""

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; else it can be resumed."""
        return self.early or self.step >= self.total_steps


def train(config: TrainConfig, progress: bool = True) -> TrainResult:
    """Train a detector as `config` says; `progress` shows a bar and log lines in the terminal.

    The run's folder gets ``config.json``, ``losses.csv``, ``weights.safetensors``, the states to resume from, and what
    the configuration asks for besides; with ``config.resume`` the run goes on from the last state, and on the CPU ends
    with the same weights, bit by bit, as a run without interruption. Under torchrun every process calls this; the first
    one writes. Sets the seeds of torch's global random numbers.

    Raises FileNotFoundError or ValueError, with a line that says what to do, for a missing or wrong dataset, a folder
    that holds a run or in which one is running, starting weights that do not fit, and a loss that is no longer finite;
    OSError when the last weights cannot be written.
    """
    with joined_processes() as processes, held_folder(config.output, processes.is_main):
        run = prepare_run(config, processes)
        began = time.perf_counter()
        with TrainingReport(
            config.output, run.training, run.total_steps, run.state.step, progress, processes, config.tensorboard
        ) as report:
            _announce(run, report)
            try:
                evaluation = _make_steps(run, report, began)
            except KeyboardInterrupt:
                _say_what_is_kept(run, report)
                raise
        best_score = _best_score(config.output / BEST_RECORD, run.state.step + 1)
        return TrainResult(
            output=config.output,
            weights=config.output / WEIGHTS_FILE,
            step=run.state.step,
            total_steps=run.total_steps,
            seconds=time.perf_counter() - began,
            losses=report.last_losses,
            evaluation=evaluation.coco if evaluation is not None else None,
            crowdhuman=evaluation.crowdhuman if evaluation is not None else None,
            early=run.state.step < run.total_steps and _out_of_patience(run),
            best=config.output / BEST_FILE if best_score >= 0 else None,
            best_score=best_score if best_score >= 0 else math.nan,
        )


def _announce(run: Run, report: TrainingReport) -> None:
    config, count, found = run.config, run.processes.count, run.dataset.counts
    # What was wrong has had its line when the file was read.
    told = found.kept() if found.wrong else found.sentence()
    report.say(f"training images: {told}")
    names = run.dataset.category_names
    report.say(f"{len(names)} classes: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}")
    for remark in run.training.remarks:
        report.say(remark)
    if run.validation is None:
        report.say("no evaluation: no validation images were named, or none was asked for")
    cut = f" in {count} processes" if count > 1 else ""
    cut += f", {config.accumulate} pieces each" if config.accumulate > 1 else ""
    if run.state.step:
        report.say(f"resumed after step {run.state.step}")
    report.say(f"{run.total_steps} steps of {min(config.batch_size, len(run.dataset))} images{cut} on {run.device}")
    warmup = warmup_steps(config, run.total_steps)
    if warmup < config.warmup_steps:
        report.say(
            f"a short run: a warm-up of {warmup} in place of {config.warmup_steps} steps, and few detectors learn in so"
            " little; --steps or --epochs ask for more"
        )


def _say_what_is_kept(run: Run, report: TrainingReport) -> None:
    kept = kept_states(run.config.output)
    state = f"resume the run to go on from step {kept[-1][0]}" if kept else "there was no checkpoint yet"
    report.say(f"interrupted after step {run.state.step}; {state}")


def _make_steps(run: Run, report: TrainingReport, began: float) -> Evaluation | None:
    """Make the remaining steps with their log lines, checkpoints, evaluations and pictures."""
    config, state = run.config, run.state
    last = run.total_steps if config.stop_after is None else min(run.total_steps, config.stop_after)
    maker = StepMaker(state, run.training, config, run.processes, run.device)
    evaluating = evaluation_interval(config, run.total_steps, run.steps_per_epoch)
    evaluation, evaluated, saved, waited, worked = None, False, False, 0.0, 0.0
    started = time.perf_counter()
    early = _out_of_patience(run)
    for pieces in () if early else _steps(run, last):
        loaded = time.perf_counter()
        learning_rate = float(state.schedule.get_last_lr()[0])
        result = maker.make(pieces, run.epoch(state.step))
        state.step += 1
        step = state.step
        made = time.perf_counter()
        waited, worked = waited + loaded - started, worked + made - loaded
        report.step(result.losses, result.gradient_norm, min(config.batch_size, len(run.dataset)), made - started)
        stopping = step == last
        if config.time_limit is not None:
            stopping |= run.processes.any(made - began >= config.time_limit, run.device)
        if stopping or step == 1 or step % config.log_interval == 0:
            seconds = maker.timer.take() if maker.timer.enabled else {"step": worked}
            report.line(step, run.epoch(step - 1), learning_rate, {"data": waited, **seconds})
            waited = worked = 0.0
        evaluate_now = run.validation is not None and _due(step, run.total_steps, evaluating)
        # Before an evaluation too: whatever fails there, the steps are kept.
        if stopping or evaluate_now or step % config.checkpoint_interval == 0:
            _save(run, report, required=stopping)
            saved = True
        if evaluate_now and run.validation is not None:
            evaluation, evaluated = _evaluate(run, run.validation, report), True
            early = _out_of_patience(run)
        if run.validation is not None and _due(step, run.total_steps, config.picture_interval):
            _picture(run, run.validation, report)
        if stopping or early:
            break
        started = time.perf_counter()
    if not saved:  # nothing was left to do, but the run may have been killed before its last weights were written
        _save(run, report, required=True)
    if early and state.step < run.total_steps:
        report.say(
            f"ended early, after {state.step} of {run.total_steps} steps: {config.patience} evaluations in a row"
            " brought nothing better"
        )
    elif state.step < run.total_steps:
        report.say(f"stopped after {state.step} of {run.total_steps} steps; resume the run to go on")
        return None
    if run.validation is not None and not evaluated and not early:
        evaluation = _evaluate(run, run.validation, report)
    if run.processes.is_main:
        tables = config.output / LOSSES_FILE, config.output / EVALUATIONS_FILE
        write_curves(config.output / CURVES_FILE, *tables, run.training)
    return evaluation


def _steps(run: Run, last: int) -> Iterator[list[Piece]]:
    """This process's pieces of the steps from the state's up to step `last`."""
    config = run.config
    sampler = StepSampler(
        len(run.dataset),
        config.batch_size,
        last,
        config.seed,
        run.state.step,
        accumulate=config.accumulate,
        rank=run.processes.rank,
        count=run.processes.count,
    )
    crop = RandomCrop(config.crop_probability, config.crop_shorter_sides, config.crop_sides)
    transform = TrainingTransform(
        config.training_shorter_sides or (run.info.input.shorter_side,),
        run.info.input.longer_side,
        config.flip_probability,
        crop if config.crop_probability > 0 else None,
        run.info.input.interpolation,
    )
    loader = make_loader(run.dataset, transform, sampler, workers=config.workers, pin_memory=run.device.type == "cuda")
    pieces = (Piece(batch, places) for batch, places in zip(loader, sampler, strict=True))
    while True:
        try:
            step = list(islice(pieces, config.accumulate))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(_cause(error)) from None
        if not step:
            return
        yield step


def _cause(error: Exception) -> str:
    """The message of an error; of one that a worker process raised, without the worker's traceback around it."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{type(error).__name__}: ")


def _due(step: int, total_steps: int, interval: int) -> bool:
    return interval > 0 and (step == total_steps or step % interval == 0)


def _save(run: Run, report: TrainingReport, required: bool) -> None:
    """Write state and weights; a failure is reported, and raised (OSError) where nothing comes after."""
    if not run.processes.is_main:
        return
    output = run.config.output
    try:
        keep_state(output, run.state, run.computation(), run.config.keep_checkpoints)
        save_detector(output / WEIGHTS_FILE, run.state.deployable, run.info)
    except OSError as error:
        good = [step for step, _ in kept_states(output)]
        kept = f"the last good checkpoint is of step {good[-1]}" if good else "there is no earlier checkpoint"
        message = f"the checkpoint of step {run.state.step} could not be written ({one_line(error)}); {kept}"
        if required:
            raise OSError(f"{message}; free some space and resume the run") from None
        report.say(f"{message}; free some space, training goes on")


def _evaluate(run: Run, validation: CocoFolder, report: TrainingReport) -> Evaluation | None:
    """Evaluate in all processes, and keep the weights where they are the best so far; None but in the first."""
    state, output = run.state, run.config.output
    evaluation = evaluate_detector(
        state.deployable,
        run.info,
        validation,
        device=run.device,
        images=run.config.evaluation_images,
        processes=run.processes,
    )
    if evaluation is None:
        return None
    report.say(f"step {state.step}: {evaluation.sentence()}")
    report.evaluation(state.step, evaluation.coco.images, evaluation.values())
    if evaluation.score > _best_score(output / BEST_RECORD, state.step):
        try:
            save_detector(output / BEST_FILE, state.deployable, run.info)
            write_json(output / BEST_RECORD, {"step": state.step, "score": evaluation.score})
        except (OSError, ValueError) as error:
            report.say(f"the best weights, of step {state.step}, could not be written ({one_line(error)})")
    return evaluation


def _best_score(record: Path, step: int) -> float:
    """AP of the best weights of the steps before; less than any where there are none."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        return float(content["score"]) if content["step"] < step else -1.0
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0


def _out_of_patience(run: Run) -> bool:
    """Whether so many of the last evaluations as the configuration bears brought no better score.

    All processes must ask. The table of evaluations tells, so that a resumed run counts on.
    """
    if run.config.patience is None:
        return False
    scores = [row.get("AP", math.nan) for row in read_table(run.config.output / EVALUATIONS_FILE)]
    best = max((score for score in scores if not math.isnan(score)), default=math.nan)
    since = len(scores) - 1 - scores.index(best) if best in scores else len(scores)
    return run.processes.any(run.processes.is_main and since >= run.config.patience, run.device)


def _picture(run: Run, validation: CocoFolder, report: TrainingReport) -> None:
    """Draw the present detections on a few validation images."""
    if not run.processes.is_main:
        return
    step = run.state.step
    path = run.config.output / PICTURES_FOLDER / f"step-{step:08d}.jpg"
    found, metadata = detect(run.state.deployable, run.info, validation, pictured_images(validation), run.device)
    try:
        write_grid(path, validation, found, metadata)
        report.picture(path, step)
    except (OSError, ValueError) as error:
        report.say(f"the picture of step {step} could not be written ({one_line(error)})")
