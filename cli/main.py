"""The command `asag`: its subcommands, and how errors reach a person."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from asag.cli.adopt import adopt
from asag.cli.bench import bench
from asag.cli.build import build
from asag.cli.console import HELP
from asag.cli.data import data
from asag.cli.demo import demo
from asag.cli.detect import detect
from asag.cli.evaluate import evaluate
from asag.cli.export import export
from asag.cli.inspect import inspect
from asag.cli.parity import parity
from asag.cli.quantize import quantize
from asag.cli.report import report
from asag.cli.serve import serve_repository
from asag.cli.train import train
from asag.cli.zoo import zoo

_EXTRA_OF_MODULE = {
    "torch": "train",
    "torchvision": "train",
    "safetensors": "train",
    "scipy": "train",
    "onnxscript": "train",
    "yaml": "train",
    "onnx": "train",
    "pycocotools": "runtime",
    "onnxruntime": "runtime",
}


class OrderedGroup(click.Group):
    """Lists its commands in the order of the work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order they were added."""
        return list(self.commands)


@click.group(cls=OrderedGroup, context_settings={**HELP, "max_content_width": 100})
@click.version_option(package_name="asag")
def asag() -> None:
    """Train sparse detectors, export them to ONNX, build engines, and prove that accuracy survived.

    The way of a model:

    \b
        asag train      a dataset in COCO's layout   ->  weights.safetensors
        asag export     weights.safetensors          ->  model.onnx
        asag adopt      another tool's model.onnx    ->  model.onnx
        asag quantize   model.onnx and images        ->  model.onnx in int8
        asag build      model.onnx                   ->  model.engine
        asag detect     any of the three, on images
        asag evaluate   any of the three, COCO AP
        asag parity     do they agree, image by image?
        asag bench      how fast is each?
        asag report     all of that as one page
        asag inspect    what is in the file?
        asag serve-repository   model.onnx or model.engine  ->  a Triton model repository

    `asag demo` does all of it on a small synthetic dataset. Errors are one line and exit with code 2; set ASAG_DEBUG=1
    to see where one comes from.
    """


for command in (
    train,
    export,
    adopt,
    quantize,
    build,
    detect,
    evaluate,
    parity,
    bench,
    report,
    inspect,
    serve_repository,
    zoo,
    data,
    demo,
):
    asag.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    try:
        code = asag.main(args=arguments, prog_name="asag", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        _fail("interrupted", 130)
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and later; the page itself is the message
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        where = error.ctx.command_path if error.ctx is not None else "asag"
        _fail(f"{error.format_message().rstrip('.')}; see `{where} --help`", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRA_OF_MODULE or os.environ.get("ASAG_DEBUG"):
            raise
        _fail(f"this needs {module}, which is not installed: pip install 'asag[{_EXTRA_OF_MODULE[module]}]'", 2)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("ASAG_DEBUG") or not _is_expected(error):
            raise
        _fail(str(error), 2)


def _is_expected(error: Exception) -> bool:
    """Whether an error is about the input or the machine; any other RuntimeError is a bug and keeps its traceback."""
    from asag.runtime.errors import BackendUnavailableError

    return isinstance(error, ValueError | OSError | BackendUnavailableError)


def _fail(message: str, code: int) -> None:
    click.echo(f"asag: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
