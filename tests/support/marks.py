"""The tests that are slow, and those that run again on every instruction set: patterns of node ids, with reasons.

tests/conftest.py sets the marks, and tests/run.py decides what runs when. A pattern is searched in
"test_x.py::test_y[id]". tests/test_suite.py fails if a pattern, with any choice among its alternatives, does not find
a test.
"""

import itertools
import re

SLOW: dict[str, str] = {
    r"^test_sanitize\.py::": "builds the package with GCC's sanitizers",
    r"^test_cuda_emulated\.py::": "compiles each CUDA source for an emulator that runs every GPU thread in turn",
    r"^test_cuda_build\.py::test_compiles_for_every_generation": "nvcc compiles each CUDA source three times",
    r"^test_build\.py::.*(wheel_for_every|without_a_compiler|editable_install)": "builds or installs the package",
    r"^test_packaging\.py::.*(wheel|distribution|editable)": "builds or installs the package",
    r"^test_gpu_command\.py::.*(every_triton_kernel|without_a_card|time_limit|chosen_file)": (
        "starts processes that import torch"
    ),
    r"^test_orthogonal_filter_proof\.py::.*(fifty_thousand|grid_of_a_thousand|thousand_layers|any_call|any_wide)": (
        "float64 recurrences of that depth, and drawn calls"
    ),
    r"^test_orthogonal_filter\.py::.*five_thousand": "a float64 recurrence of that depth",
    r"^test_orthogonal_filter_facts\.py::.*fifty_thousand": "trains a net of 50,000 layers",
    r"^test_parallel_depth\w*\.py::.*(fifty_thousand|50_000)": "the judge computes 50,000 layers in sequence",
    r"^test_pipeline\.py::.*fifty_thousand": "a net of that depth in pipelines of processes",
    r"^test_integration_export\.py::(?!test_(a_request(?!.*True)|a_trace_of|a_wrong_call|\w+_one_call))": (
        "torch's exporters and onnxruntime"
    ),
    r"^test_contract\.py::test_on_another_device": "every check of every function again, in a process of its own",
    r"^test_conversion\.py::test_fifty_thousand": "converts and folds 50,000 layers",
    r"^test_integration_hosts\.py::(?!test_(what_is_left|no_library))": "trains and exports models of other libraries",
    r"^test_train\.py::.*(killed_process|defaults_learn)": "trains in processes that are killed and resumed",
    r"^test_lcw_modules\.py::.*100_sigmoid_layers": "trains networks",
    r"^test_gradient_activation_facts\.py::.*saddle": "counts the steps that optimizers take off a saddle",
    r"^test_cli\.py::.*a_net_of_a_few_layers_is_drawn\[(?!0-1\])": "draws a report each",
    r"^test_cli\.py::.*(a_seed_repeats_a_run|flags_reach_the_run)": "runs the command several times",
    r"^test_flops\.py::.*order_of_import\[(?!import lcw_ops, torch;)": "a process for each order; the first is quick",
    r"^test_import\.py::.*a_thread_imports_torch.*warnings are errors": "starts the processes of the other case again",
    r"^test_profile_zoo\.py::test_every_slow_model": "imports the library transformers, and profiles 3000 layers",
    r"^test_verify_kernels\.py::.*(the_command_on_the_cpu|two_verifications|in_the_interpreter)": (
        "every case, or processes that import Triton"
    ),
    r"^test_matmul\.py::.*(kept_in_the_file|location_of_the_file)": "measures in processes of its own",
}

# Tests of memory bounds, and tests of values that reach different code on each instruction set. On the processor's
# fastest instruction set every test runs.
EVERY_INSTRUCTION_SET: tuple[str, ...] = (
    r"^test_(hypersphere|lcw_linear|weight_norm)_op\.py::test_nothing_but_the_arguments",
    r"^test_(orthogonal_filter_proof|gradient_activation_cpp|parallel_depth_cpp)\.py::test_nothing_but_the_arguments",
    r"^test_orthogonal_filter\.py::.*(every_size|every_kind|ulps|long_double|saturate)",
    r"^test_orthogonal_filter_proof\.py::.*(every_row|every_width|every_kind|all_of_float32|rounded)",
    r"^test_(hypersphere|weight_norm)_op\.py::(?!.*float16).*functions_of_rows",
    r"^test_hypersphere_op\.py::.*(test_sines|zero_has|smallest)",
    r"^test_weight_norm_op\.py::.*any_length",
    r"^test_(hypersphere|weight_norm)_op\.py::test_layers(?=.*own)(?=.*float32)",
    r"^test_gradient_activation_cpp\.py::.*(units|rounded_once|no_ordinary|same_bits)",
    r"^test_lcw_linear_op\.py::.*(beyond_its_arguments|weights_of_every_rank|every_byte|every_instruction_set)",
    r"^test_lcw_linear_op\.py::test_small_layers(?=.*own)(?=.*True)(?!.*float16)",
    r"^test_parallel_depth_cpp\.py::.*(every_size.*tanh|adjoint_sweep_of_every_size)",
    r"^test_parallel_depth_cpp\.py::.*relative_change",
)

MARKS = {"slow": tuple(SLOW), "every_instruction_set": EVERY_INSTRUCTION_SET}


def choices(pattern: str) -> list[str]:
    """Every pattern that this one stands for: with one alternative of each group "(a|b)".

    A negative lookahead "(?!a|b)" is one choice as it stands. "(?=a)" and "(?=b)" are others, which find the tests that
    it leaves out. So a part of the pattern that has no effect becomes a choice that finds nothing.
    """
    return ["".join(choice) for choice in itertools.product(*_alternatives(pattern))]


def _alternatives(pattern: str) -> list[list[str]]:
    """Split the pattern into parts that follow each other, and give the alternatives of each part."""
    parts: list[list[str]] = []
    place = 0
    while place < len(pattern):
        if pattern[place] != "(":
            end = place + (2 if pattern[place] == "\\" else 1)
            parts.append([pattern[place:end]])
            place = end
            continue
        end = _closing(pattern, place) + 1
        head = re.match(r"\((\?[:=!])?", pattern[place:end])[0]
        inner = [choice for text in _split(pattern[place + len(head) : end - 1]) for choice in choices(text)]
        if head == "(?!":
            parts.append([pattern[place:end], *(f"(?={choice})" for choice in inner)])
        else:
            parts.append([f"{head}{choice})" for choice in inner])
        place = end
    return parts


def _closing(pattern: str, opening: int) -> int:
    """The place of the parenthesis that closes the one at ``opening``."""
    depth = 0
    for match in re.finditer(r"\\.|[()]", pattern[opening:]):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return opening + match.start()
    raise ValueError(f"{pattern!r} has a parenthesis that is not closed")


def _split(text: str) -> list[str]:
    """Split at the bars that no inner parenthesis encloses."""
    found, depth, start = [], 0, 0
    for match in re.finditer(r"\\.|[()|]", text):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if match[0] == "|" and depth == 0:
            found.append(text[start : match.start()])
            start = match.end()
    return [*found, text[start:]]


def marks_of(node: str) -> list[str]:
    """The marks of the test "test_x.py::test_y[id]"."""
    return [mark for mark, patterns in MARKS.items() if any(re.search(pattern, node) for pattern in patterns)]
