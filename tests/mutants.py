"""One-line faults, each of which a test of `make test` notices. `make test-all` runs this file.

A fault is put into a copy of every script that has this line, as shared bodies are the same everywhere."""

import shutil
import sys

import pytest
from conftest import ROOT, SCRIPTS, run

# fmt: off
FAULTS = [  # script, the test that fails, a line or part of it, what stands there instead
    ("simclr", "test_simclr::test_loss_and_gradient_are_those_of_the_slow_version_and_of_lightly",
     "(z @ z.T / temperature)",
     "(z @ z.detach().T / temperature)"),
    ("simclr", "test_simclr::test_lars",
     'g = g + group["weight_decay"] * w',
     'g = g - group["weight_decay"] * w'),
    ("simclr", "test_simclr::test_colours_gray_blur_and_solarize_are_torchvision_s",
     "gray_of(x).mean(dim=(2, 3), keepdim=True)",
     "x.mean(dim=(2, 3), keepdim=True)"),
    ("simclr", "test_simclr::test_training_is_the_same_in_chunks_and_in_processes",
     "u = torch.rand(args.batch_size, 2, 9, generator=generator).chunk(world)[rank]",
     "u = torch.rand(args.batch_size // world, 2, 9, generator=generator)"),
    ("simclr", "test_failures::test_a_stop_does_not_disturb_the_alarm",
     "state = {name: saved[name] for name in state}",
     'state |= {name: saved[name] for name in ("step", "logged", "words")}'),
    ("simclr", "test_failures::test_kill_9_at_any_moment_and_the_same_command_again",
     "purge_step=run.step + 1",
     "purge_step=None"),
    ("simclr", "test_processes::test_a_worker_that_finds_no_image_ends_the_command",
     "traceback.clear_frames(error.__traceback__)",
     "pass"),
    ("simclr", "test_processes::test_a_run_changes_its_number_of_processes",
     "dist.all_reduce(total))[0]",
     "None)[0]"),
    ("moco", "test_processes::test_a_run_changes_its_number_of_processes",
     "torch.randperm(args.batch_size, generator=generator)",
     "torch.randperm(args.batch_size)"),
    ("moco", "test_processes::test_a_run_changes_its_number_of_processes",
     "every_k.chunk(world)[rank]",
     "every_k.chunk(world)[0]"),
    ("moco", "test_failures::test_a_signal_ends_the_run_after_its_step",
     "            if signals:\n                break",
     "            if signals and at_log:\n                break"),
    ("byol", "test_byol::test_momentum_of_a_run",
     "momentum_update(model.online, model.target, tau)",
     "momentum_update(model.online, model.target, args.momentum)"),
    ("byol", "test_byol::test_order_of_the_step_and_statistics",
     "byol_loss(prediction[:, 0], target[:, 1])",
     "byol_loss(prediction[:, 0], target[:, 0])"),
    ("dino", "test_dino::test_loss_and_center_by_hand",
     "others = log_p.sum(dim=0) - log_p[:2]",
     "others = log_p.sum(dim=0).expand(2, -1, -1)"),
    ("dino", "test_dino::test_what_the_optimizer_gets",
     "last_layer.zero_grad()",
     "last_layer.zero_grad(set_to_none=False)"),
    ("dino", "test_dino::test_two_processes_are_one",
     "center.lerp_(gather(mean[None]).mean(dim=0, keepdim=True)",
     "center.lerp_(mean[None]"),
    ("dino", "test_dino::test_temperatures_and_centers_of_a_run",
     "center = model.center.clone()  #",
     "center = model.center  #"),
    ("dino", "test_failures::test_a_signal_ends_the_run_after_its_step",
     'parts = {"model": model, "optimizer"',
     'parts = {"model": student, "optimizer"'),
    ("dinov2", "test_dino::test_two_processes_are_one",
     "sums = gather(sums[None]).sum(dim=0)",
     "sums = sums + 0"),
    ("dinov2", "test_dinov2::test_koleo",
     "fill_diagonal_(-2)",
     "fill_diagonal_(-1)"),
    ("dinov2", "test_dinov2::test_what_the_networks_and_losses_get",
     "h, *taught = teacher(images[0], None, hidden)",
     "h, *taught = teacher(images[0], masks, hidden)"),
    ("dinov2", "test_dinov2::test_what_the_optimizer_gets",
     'frozen = group["last"] and step < thaw',
     'frozen = group["last"] and step <= thaw'),
    ("clip", "test_clip::test_loss_and_gradient_are_slow_ones_and_open_clip_s_and_symmetric",
     "images @ gather(texts).T,",
     "images @ gather(texts).detach().T,"),
    ("clip", "test_clip::test_training_is_the_same_in_chunks_and_in_processes",
     "torch.autograd.backward([again, scale_again], grad)",
     "again.backward(grad[0])"),
    ("clip", "test_clip::test_schedule_decay_and_scale",
     "model.logit_scale.clamp_(0, math.log(100))",
     "model.logit_scale.clamp_(max=math.log(100))"),
    ("ijepa", "test_failures::test_a_signal_ends_the_run_after_its_step",
     "momentum = args.momentum + step / total",
     "momentum = args.momentum + (step - run.step) / total"),
    ("ijepa", "test_processes::test_a_run_changes_its_number_of_processes",
     "(mask.chunk(world, dim=-2)[rank] for mask in masks)",
     "(mask.chunk(world, dim=-2)[0] for mask in masks)"),
    ("ijepa", "test_failures::test_nan_stops_before_anything_is_saved",
     "                check_finite(step, loss, grad_norm, scaler)",
     "                pass"),
    ("eval_linear", "test_eval_linear::test_penalty_and_rate_are_chosen_on_whole_groups",
     "y, fold = labels.to(device), stratified_folds(labels, groups, 5, seed)",
     "y, fold = labels.to(device), stratified_folds(labels, torch.arange(len(labels)), 5, seed)"),
    ("eval_linear", "test_eval_linear::test_linear_probe_is_a_plain_loop",
     'nn.init.zeros_(head.bias), "weight_decay": 0.0}',
     'nn.init.zeros_(head.bias), "weight_decay": args.weight_decay}'),
    ("eval_linear", "test_eval_linear::test_untrained_resnets_take_statistics_of_images_for_learning",
     "[data.items[i] for i in learns.tolist()], device)",
     "data.items, device)"),
    ("eval_linear", "test_eval_linear::test_two_processes_write_what_one_writes",
     "range(rank, len(pictures), world)",
     "range(0, len(pictures), world)"),
    ("simclr", "test_data::test_links_are_followed_and_no_folder_counts_twice",
     "if os.path.realpath(at) in entered:",
     "if at in entered:"),
    ("simclr", "test_data::test_holes_are_black_and_leave_the_contrast_of_the_rest",
     "np.isfinite(values) & ~np",
     "~np.isnan(values) & ~np"),
    ("simclr", "test_data::test_views_depend_on_seed_epoch_and_index_alone",
     "manual_seed(seeded(1, self.args.seed, key)",
     "manual_seed(seeded(1, self.args.seed, index)"),
    ("mae", "test_fuzz::test_any_flags",
     '"mask_ratio": 1}',
     '"mask_ratio": math.inf}'),
    ("convert", "test_convert::test_features_are_those_of_the_published_code",
     'state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]',
     'state["cls_token"] = state["cls_token"]'),
    ("convert", "test_convert::test_heads_of_the_published_sizes",
     '("clip", dim): min(dim // 64, 16)',
     '("clip", dim): dim // 64'),
]
# fmt: on


@pytest.mark.slow
@pytest.mark.parametrize("script, test, line, fault", FAULTS, ids=[f"{f[0]}-{f[1]}" for f in FAULTS])
def test_a_fault_is_noticed(script, test, line, fault, tmp_path):
    assert (ROOT / f"{script}.py").read_text().count(line) == 1, f"{script}.py does not have once: {line}"
    copy = tmp_path / "main"
    shutil.copytree(ROOT / "tests", copy / "tests")
    shutil.copytree(ROOT / "benchmarks", copy / "benchmarks")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for path in SCRIPTS:
        (copy / path.name).write_text(path.read_text().replace(line, fault))
    file, _, name = test.partition("::")
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", f"tests/{file}.py", "-k", name]
    done = run(command, cwd=copy, timeout=300)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout
