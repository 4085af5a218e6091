"""What ``make test`` leaves to ``make test-all``: minutes of CPU for one thing more.

Of each of these a smaller, or another, test of the same thing stays in ``make test``.
"""

import re

import pytest

ALL_NAMES = pytest.StashKey[list[str]]()
"""Of all tests, in the configuration of a session that has collected them."""

# Layouts whose parts are shown alone: replicas, one rank under an engine, offload.
_MORE_LAYOUTS = r"\[(unsharded x2|ZeRO-3 x1|ZeRO-3 x2, CPU offload|FSDP2 x4 \(HSDP 2x2\))-?"

_PATTERNS = (
    # Real launchers and kills, of which others are started by forks; `make faults` kills more.
    r"checkpoint/test_faults\.py",
    r"checkpoint/test_elastic\.py::\w+\[(.*-two-again|two-four)-",
    r"cli/test_wheel\.py::test_it_trains_with_a_json_of_its_own",
    r"studies/test_scaling_launch\.py",
    r"studies/test_scaling_bytes\.py",
    r"distributed/test_nodes\.py::test_a_slurm_job_saves_before_its_time_is_up_and_goes_on",
    r"distributed/test_nodes\.py::test_a_node_that_dies_ends_the_other",
    r"distributed/test_nodes\.py::.*\[(fsdp2|zero3-two)",
    r"distributed/test_nodes\.py::test_the_first_node_alone_speaks_and_writes",
    r"distributed/test_nodes\.py::test_a_mistake_on_one_node_ends_both",
    r"cli/test_launch\.py::test_other_launchers_and_back_ends_train_alike\[(torchrun|accelerate)-",
    r"test_import\.py::test_it_trains_without_what_the_extras_install\[unsharded",
    r"test_import\.py::test_a_plan_without_a_json_is_made_without_deepspeed",
    r"test_import\.py::test_the_command_trains_without_deepspeed_and_matplotlib",
    r"test_import\.py::test_deepspeed_knows_the_optimizer\[(import deepspeed|.*importlib)",
    # A matrix of layouts, of which three are in `make test`; parity has all of them there.
    rf"optim/test_step_variants\.py::\w+{_MORE_LAYOUTS}",
    rf"sharding/test_parity\.py::test_live_runs_equal_the_float64_loop{_MORE_LAYOUTS}",
    rf"training/test_length_threshold\.py::test_a_rehearsal_changes_nothing\w*{_MORE_LAYOUTS}",
    r"training/test_length_threshold\.py::test_a_rehearsal_changes_nothing\w*\[.*-accumulated\]",
    r"training/test_length_threshold\.py::test_memory_that_runs_out_on_one_rank\w*\[.*-backward\]",
    r"training/test_trainer\.py::test_learning_rates_are_found_alike",
    r"training/test_length_threshold\.py::test_two_ranks_by_the_launcher",
    r"training/test_trl\.py::test_two_ranks_take_the_steps_of_one\[(.*-reward|fsdp2-dpo)\]",
    r"training/test_desync\.py::\w+\[ZeRO-3 x2, CPU offload",
    rf"sharding/test_parity\.py::test_replayed\w+{_MORE_LAYOUTS}\w+-addax, q = 4",
    r"optim/test_step_variants\.py::test_accumulation_and\w+\[(ZeRO|FSDP2).*-(accumulated|clipped)\]",
    r"optim/test_step_variants\.py::test_accumulation_and\w+\[.*-(mezo|ip-sgd), ",
    r"optim/test_step_variants\.py::test_a_poisoned_gradient\w+\[.*-fp16-",
    r"optim/test_step_variants\.py::test_layouts_agree_to_the_bit\w+\[inf-",
    r"training/test_length_threshold\.py::test_out_of_memory_lowers\w+\[.*-backward\]",
    r"training/test_trainer\.py::test_losses_norms_and_weights\w+\[.*-(zero3-1|none-2)\]",
    r"sharding/test_zero3\.py::\w+\[(untied|unused|weight-decay|frozen|persistence-0)-\w+",
    r"sharding/test_zero3\.py::\w+\[.*-1\]",
    r"sharding/test_zero3\.py::test_world_sizes_agree_to_fp32_rounding",
    r"sharding/test_zero3\.py::test_ranks_agree_on_every_g0_to_the_bit",
    r"sharding/test_fsdp2\.py::test_(passes_see|steps_move)\w+"
    r"\[(hsdp-bf16|four|whole|dropout|bf16|vocab|reshard)",
    r"sharding/test_streams\.py::\w+\[ZeRO-3, (small|two|MeZO, nothing)",
    # Builds and variants of the kernels.
    r"kernels/test_kernels\.py::\w+\[(avx2|sse2|2-lanes)",
    r"kernels/test_kernels\.py::test_triton_equals_the_reference\w+\[roundings",
    r"kernels/test_kernel_choice\.py::\w+\[set_fused_multiply_add",
    r"kernels/test_kernel_choice\.py::test_a_waiting_rank_does_not_build",
    r"kernels/test_kernels\.py::test_triton_compiles\w+\["
    r"(?!None|\*i16-None-1-True|\*i16-\*fp32-2|\*fp32-\*fp32-1-F)",
    # What is measured, of which the parts have tests of their own.
    r"benchmarks/test_benchmarks\.py::test_(the_record_is_complete|all_but_the_parts_train)",
    r"benchmarks/test_benchmarks\.py::test_(bytes|state)$",
    r"benchmarks/test_benchmarks\.py::test_the_model_that_was_written_is_loaded_and_saved",
    r"benchmarks/test_benchmarks\.py::test_a_step_and_its_parts_are_timed",
    r"planner/test_measured\.py",
    r"cli/test_plan\.py::test_(opt_66b_on_one_gpu|the_tied_gradient_of_opt_66b)",
    r"models/test_demo_model\.py::test_g0_correlates_with_the_gradient_along_z",
    r"models/test_demo_assets\.py",
    r"models/test_loading\.py::test_a_rank_holds_its_share_and_what_one_conversion_needs\[2",
    # More random walks and files.
    r"optim/test_calls_fuzzed\.py::test_a_walk_\w+\[.*, ([89]|\d\d)\)\]",
    r"data/test_rows_fuzzed\.py::test_(files_with_changed_bytes|long_lines)",
    r"data/test_rows_fuzzed\.py::test_one_bad_line_among_good_ones\[(half|another|nothing|any)",
)
_EXHAUSTIVE = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS))


def is_exhaustive(name: str) -> bool:
    """Return whether a test, ``tests/<path>::<name>``, is left to ``make test-all``."""
    return _EXHAUSTIVE.match(name.removeprefix("tests/")) is not None


def idle(names: list[str]) -> list[str]:
    """Return the patterns that match none of the names of all tests."""
    short = [name.removeprefix("tests/") for name in names]
    return [p for p in _PATTERNS if not any(re.match(p, name) for name in short)]
