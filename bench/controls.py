"""Take one guard away, or put one mistake in, for each row of docs/RELIABILITY.md's table of faults: the row's tests must then fail.

    python bench/controls.py                                   all of them, some minutes: each with a copy of the project
    python bench/controls.py 3 22                              those of rows 3 and 22
    python bench/controls.py --json=bench/results/controls.json

A test that passes without the guard that it is about proves nothing. Each control replaces one piece of text in a copy of the
project and runs a test there, which must fail (not break while it is collected); all these tests are first run in a copy where
nothing is changed, and must pass. Row 25 is itself such controls for row 1, made at run time; its own is a comparison that sees
nothing. On a CPU; leaves out the pitfalls, and guards against a GPU's faults. Exit code 1 if a control was not noticed.
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

PROJECT = pathlib.Path(__file__).resolve().parent.parent
KILLED = "test_faults.py::test_a_run_killed_six_times_three_of_them_in_one_epoch_has_the_same_curve[nf4-6]"
INTERRUPTED = "test_faults.py::test_an_alert_that_rests_on_all_the_steps_so_far_is_told_at_the_same_step_by_a_run_that_was_interrupted"
SAVE_KILLED = "test_checkpoint.py::test_a_save_killed_at_any_call_leaves_only_checkpoints_that_verify"
ACCEPTED = "test_train.py::test_a_run_does_not_go_on_with_something_else_unless_that_is_accepted_by_name"
TWICE = "test_faults.py::test_told_twice_to_end_a_run_saves_one_step_boundary_and_goes_on_to_the_same_end[fault0-6]"
TEMPLATE = "test_faults_hostile.py::test_a_template_that_does_not_end_is_killed_in_a_process_of_its_own[template1-needed more than]"

CONTROLS = [  # (row, what is wrong then, file, text, text in its place, a test that must fail)
    (1, "the norms that clipping follows are not restored", "continuation.py", 'return state | {"origin"',
     'return state | {"norms": [], "origin"', KILLED),
    (1, "the noise scale begins anew", "continuation.py", 'return state | {"origin"',
     'return state | {"noise": [0.0, 0.0, None], "origin"', INTERRUPTED + "[between evaluations]"),
    (1, "alerts do not know the steps before", "train.py", "for line in record.read_metrics(run) if resume and ranks.FIRST else ():",
     "for line in ():", INTERRUPTED + "[between evaluations]"),
    (2, "a checkpoint is deleted file by file under its name", "checkpoint.py",
     "        os.rename(path, hidden)\n        path = hidden\n", "", SAVE_KILLED + "[False-before_retention]"),
    (2, "files are not flushed", "checkpoint.py", "        os.fsync(descriptor)\n        if hasattr", "        if hasattr",
     "test_checkpoint.py::test_files_and_folders_are_flushed_before_the_rename_and_the_rename_before_anything_is_deleted"),
    (2, "leftovers of a killed save stay", "checkpoint.py", "        _sweep(folder)  #", "        #",
     SAVE_KILLED + "[True-before_first]"),
    (3, "hashes are not compared", "checkpoint.py", '.hexdigest() != entry["sha256"]:\n                raise',
     '.hexdigest() == "":\n                raise',
     "test_checkpoint.py::test_one_flipped_bit_in_any_file_is_found_and_the_one_before_is_used[optimizer.safetensors]"),
    (3, "with no valid checkpoint a run begins afresh", "train.py", ' any(run.glob("checkpoints/step-*")) and not flags',
     ' False and not flags', "test_faults.py::test_with_every_checkpoint_damaged_a_run_neither_goes_on_nor_starts_afresh"),
    (4, "old checkpoints go before the new one is written", "checkpoint.py", "        _sweep(folder)  #",
     "        _sweep(folder), _retain(folder, 1, None)  #",
     "test_checkpoint.py::test_a_full_or_read_only_disk_leaves_older_checkpoints_intact_and_tells_the_space_needed"),
    (4, "the space that is needed is not told", "checkpoint.py", "it needs {needed / 2**20:.1f} MiB, ", "",
     "test_checkpoint.py::test_a_full_or_read_only_disk_leaves_older_checkpoints_intact_and_tells_the_space_needed"),
    (5, "signals are not caught", "train.py", "        signal.signal(number, note)\n", "        pass\n", TWICE),
    (5, "a window is never given up", "train.py", "time.monotonic() - interrupted[0][1] > PATIENCE", "False",
     "test_faults.py::test_a_window_that_would_take_too_long_after_a_signal_is_given_up_and_done_by_the_resumed_run"),
    (5, "a rank acts on a signal that the others have not heard of", "train.py",
     "            known[:] = [what for of_rank in told for what in of_rank[place]]\n",
     "            known[:] = [what for of_rank in told for what in of_rank[place]]\n        ending[:] = interrupted or ending\n",
     "test_ranks.py::test_a_signal_to_one_rank_at_a_bad_moment_leaves_none_behind[as the ranks ask each other before the first step]"),
    (6, "nobody looks whether the generators are there", "continuation.py", "refused = [name for name in changed if name not in accept]",
     "refused = []", ACCEPTED + "[generators]"),
    (7, "an evaluation draws from dropout's generator", "train.py", '        plan["evaluates"] = -ranks.most(-figures["max_tokens"])[0]\n',
     '        plan["evaluates"] = -ranks.most(-figures["max_tokens"])[0] + 0 * int(torch.rand(1))\n',
     "test_train.py::test_evaluating_saving_and_logging_do_not_change_the_curve"),
    (8, "a mean of the micro-batches' means", "train.py", "loss += forward_backward(batch, scaler[\"scale\"] / supervised) / supervised",
     "loss += forward_backward(batch, scaler[\"scale\"] / len(batch.targets) / len(window)) / len(batch.targets) / len(window)",
     "test_train.py::test_how_a_window_is_split_changes_nothing_but_rounding[none]"),
    (9, "the rate of the step before", "train.py", "learning_rate = schedule.learning_rate(step, ",
     "learning_rate = schedule.learning_rate(max(1, step - 1), ",
     "test_faults.py::test_the_rate_on_record_is_the_formulas_of_that_step_across_a_kill[no warm-up]"),
    (10, "an empty window is a step", "train.py", " & bool(supervised)", "",
     "test_train.py::test_a_window_without_a_supervised_token_is_skipped_and_does_not_stop_the_run"),
    (11, "steps that are not finite are applied", "train.py", "optimizer.found_inf = 1.0 - finite.float()",
     "optimizer.found_inf = 0.0 * finite.float()",
     "test_train.py::test_a_window_that_is_not_finite_is_skipped_with_its_rows_named[gradient alone]"),
    (12, "nothing is clipped", "train.py", "flat.grad.mul_(torch.clamp(threshold / (grad_norm + 1e-6), max=1.0) / scaler",
     "flat.grad.mul_(1.0 / scaler", "test_train.py::test_the_norm_is_logged_before_clipping_and_what_is_applied_is_clipped"),
    (12, "no spike is one", "rules.py", "if logarithm - usual > math.log(self.ratio)",
     "if False and logarithm - usual > math.log(self.ratio)", "test_alerts.py::test_a_spike_of_a_hundred_times_is_told_at_once"),
    (13, "half of the window's gradient stays when it is done again", "train.py", "            flat.grad.zero_()\n            try:\n",
     "            if not plan['shrunk']:\n                flat.grad.zero_()\n            try:\n",
     "test_faults.py::test_where_memory_runs_out_mid_window_the_same_window_is_done_again_in_smaller_pieces"),
    (13, "dropout draws on where the first attempt stopped", "continuation.py", '        torch.set_rng_state(states["torch"])\n',
     '        torch.set_rng_state(states["torch"]) if not set_generators.__dict__.setdefault("once", states) else None\n',
     "test_faults.py::test_a_window_that_is_done_again_draws_the_dropout_that_it_would_have_drawn"),
    (13, "what fitted is forgotten", "memory.py", "    if same:\n", "    if False:\n",
     "test_faults.py::test_what_fitted_is_remembered_by_the_run_that_goes_on_and_no_memory_is_missed_twice"),
    (13, "the row that does not fit is not named", "model.py", "    if len(batch.samples) == 1:\n", "    if False:\n",
     "test_faults.py::test_a_row_that_does_not_fit_even_alone_is_named_and_nothing_is_lost[training-4]"),
    (14, "all logits at once", "model.py", "for start in range(0, len(hidden), chunk):",
     "for start in range(0, len(hidden), chunk := len(hidden)):", "test_model.py::test_logits_never_exist_for_more_rows_than_a_chunk"),
    (15, "a worker is waited for without end", "pool.py", "future.result(HANG_SECONDS)", "future.result()",
     "test_audit.py::test_a_worker_that_raises_dies_or_hangs_is_told_with_its_rows"),
    (16, "a row of any length is encoded", "tokens.py", "    if len(text) > LONGEST_TEXT:\n", "    if False:\n",
     "test_faults_hostile.py::test_a_row_of_ten_megabytes_is_named_or_listed_before_it_is_encoded[text]"),
    (16, "half a surrogate pair is text", "tokens.py", '        text.encode("utf-8")\n', '        pass\n',
     "test_data.py::test_a_row_that_cannot_be_used_is_refused_by_name_with_the_reason"),
    (16, "a byte-order mark is part of the first row", "sources.py", '    if file.peek(3)[:3] == b"\\xef\\xbb\\xbf":\n',
     "    if False:\n", "test_data.py::test_every_kind_of_file_gives_the_same_rows_with_their_places"),
    (17, "any template will do", "tokens.py", "    if answer not in text or not closing:\n", "    if answer not in text:\n",
     "test_data.py::test_a_tokenizer_that_could_not_end_a_turn_is_refused"),
    (18, "what changed between two runs is not compared", "continuation.py", "refused = [name for name in changed if name not in accept]",
     "refused = []", ACCEPTED + "[training rows]"),
    (18, "the order of rows is not compared", "continuation.py", '"training rows": rows.digest, ', '"training rows": str(len(rows)), ',
     "test_faults.py::test_rows_in_another_order_or_another_tokenizer_is_another_run[training rows]"),
    (19, "unknown keys are passed over", "config.py", "                errors.append(f\"{section}.{name}: unknown key; \"",
     "                str(f\"{section}.{name}: unknown key; \"",
     "test_config.py::test_all_errors_come_in_one_message_with_exit_code_2_before_anything_is_loaded"),
    (20, "the steps that will be done again stay on record", "record.py", 'if values["step"] <= last_step)',
     'if values["step"] <= 10**9)', "test_record.py::test_after_a_kill_and_a_resume_each_step_is_there_once"),
    (20, "TensorBoard keeps what is done again", "record.py", "purge_step=last_step + 1", "purge_step=None",
     "test_record.py::test_after_a_kill_and_a_resume_each_step_is_there_once"),
    (21, "nothing holds the folder", "checkpoint.py", "        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "        pass\n",
     "test_faults.py::test_a_second_process_is_refused_while_the_first_trains_and_does_not_disturb_it"),
    (22, "the best goes with the old ones", "checkpoint.py", "if number >= keep and other != best_step:", "if number >= keep:",
     "test_checkpoint.py::test_the_newest_and_the_best_are_kept_and_nothing_else[2]"),
    (22, "later steps of a past count as the newest", "checkpoint.py", "        _set_aside(folder, step)\n", "",
     "test_checkpoint.py::test_higher_steps_of_a_past_that_the_run_left_are_set_aside_and_cost_no_other_checkpoint[2]"),
    (23, "a template is not tried", "trust.py", "    if problem:\n        raise", "    if False:\n        raise", TEMPLATE),
    (23, "links are followed", "trust.py", "if path.is_symlink() and not any", "if False and not any",
     "test_faults_hostile.py::test_a_link_that_leads_out_of_the_folder_is_refused_and_one_within_it_or_a"
     "_hubs_cache_is_not[model.safetensors]"),
    (23, "a header may name a tensor twice", "trust.py", "object_pairs_hook=_once", "object_pairs_hook=dict",
     "test_faults_hostile.py::test_a_hostile_weight_file_is_refused_before_a_tensor_is_read"),
    (23, "a configuration may ask for any size", "trust.py", "not abs(value) <= largest", "False",
     "test_faults_hostile.py::test_a_hostile_configuration_is_refused_before_it_takes_memory"),
    (23, "a pickle may be a checkpoint's file", "checkpoint.py", 'SUFFIXES = (".safetensors", ',
     'SUFFIXES = (".safetensors", ".bin", ".pkl", ".pt", ', "test_checkpoint.py::test_a_manifest_cannot_name_files_elsewhere_or_pickles"),
    (23, "tensors may be named like paths", "checkpoint.py", 'TENSOR_NAME = re.compile(r"(?!.*\\.\\.)', 'TENSOR_NAME = re.compile(r".*|',
     "test_checkpoint.py::test_a_hostile_tensor_file_is_refused_though_its_hash_is_right"),
    (24, "the digest of the weights leaves out every other word", "quant.py", "(part * (places * 0x", "(part[::2] * (places[::2] * 0x",
     "test_quant.py::test_a_fingerprint_changes_with_any_bit_of_any_byte"),
    (25, "a comparison of two runs that sees nothing", "tests/conftest.py", '    found = [f"step {x[\'step\']}: ',
     '    return []\n    found = [f"step {x[\'step\']}: ',
     "test_faults.py::test_a_resume_with_one_thing_wrong_does_not_have_the_same_curve[rate_shifted_by_one_step-train/learning_rate]"),
]


def copy_of(project, folder):
    """The project's own files, as they are, in `folder`."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=project, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (project / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project / name, folder / name)


def outcome(folder, tests):
    """(pytest's exit code, the first line that says what was wrong) of `tests` in that copy."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600)
    lines = done.stdout.strip().splitlines()
    wrong = next((line[1:].strip() for line in lines if line.startswith("E  ")), lines[-1] if lines else done.stderr[-200:])
    which = next((line.split("::")[1].split(" - ")[0] + ": " for line in lines if line.startswith("FAILED")), "")
    return done.returncode, re.sub(r"/tmp/|\S*/(pytest-\d+|rawlora-controls-\w+)/", "", which + wrong)[:250]


def main(argv):
    names = [argument.removeprefix("--json=") for argument in argv if argument.startswith("--json=")]
    rows = [int(argument) for argument in argv if argument.isdigit()]
    if len(names) + len(rows) != len(argv):
        print(__doc__)
        return 2
    chosen = [control for control in CONTROLS if not rows or control[0] in rows]
    results = []
    with tempfile.TemporaryDirectory(prefix="rawlora-controls-") as place:
        copy_of(PROJECT, pathlib.Path(place) / "whole")
        code, wrong = outcome(pathlib.Path(place) / "whole", sorted({control[5] for control in chosen}))
        if code:
            print(f"a test fails where nothing is changed: {wrong}")
            return 1
        for row, what, file, old, new, test in chosen:
            folder = pathlib.Path(place) / "changed"
            copy_of(PROJECT, folder)
            text = (folder / file).read_text(encoding="utf-8")
            assert text.count(old) == 1, (row, file, old, text.count(old))
            (folder / file).write_text(text.replace(old, new), encoding="utf-8")
            code, wrong = outcome(folder, [test])
            shutil.rmtree(folder)
            failed = code == 1 and wrong.startswith("test_")  # not an error before the test began
            results.append({"row": row, "wrong": what, "file": file, "test": test, "noticed": failed, "told": wrong})
            print(f"{'noticed' if failed else f'NOT NOTICED ({code})':<12} {row:>3}  {what}\n                  {wrong}", flush=True)
    missed = [result for result in results if not result["noticed"]]
    print(f"\n{len(results) - len(missed)} of {len(results)} controls noticed, in {len({result['row'] for result in results})} rows")
    if names:
        pathlib.Path(names[0]).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
