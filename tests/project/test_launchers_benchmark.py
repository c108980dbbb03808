"""The benchmark of launchers: the commands that it starts, and its table. No launcher is started here."""

import pytest
from accelerate.commands.launch import launch_command_parser

from benchmarks import gpu, launchers
from sq_llava.training.settings import parse_settings


@pytest.mark.parametrize("launcher", launchers.LAUNCHERS)
def test_commands_are_those_that_accelerate_and_training_take(launcher, tmp_path, monkeypatch):
    setting = launchers.on_cpus((1, 2))
    arguments = launchers.arguments_of(setting, launcher, 2, tmp_path, tmp_path / "out")
    command = launchers.command_of(launcher, 2, tmp_path / "out", arguments, killed=True)
    launch = launch_command_parser().parse_args(command[3:])
    assert launch.num_processes == 2 and launch.training_script == "benchmarks.launchers"
    assert launch.training_script_args[:3] == ["--process", str(tmp_path / "out"), "3"]
    monkeypatch.setattr("sq_llava.training.settings.SFTConfig.world_size", 2, raising=False)
    arguments, training_args, _ = parse_settings(launch.training_script_args[3:])
    assert arguments.full_finetuning and arguments.resume and arguments.global_batch_size == setting.rows
    assert training_args.max_steps >= launchers.KILLED_IN_STEP > training_args.save_steps
    assert setting.rows % (training_args.per_device_train_batch_size * 2) == 0


def test_gpus_are_used_in_powers_of_two():
    assert launchers.on_gpus(8).counts == (1, 2, 4, 8) and launchers.on_gpus(6).counts == (1, 2, 4)


def test_table_marks_losses_that_are_not_those_of_one_process():
    held = {"weights": 2**21, "weights in bfloat16": 2**20, "gradients": 2**22, "optimizer": 2**23}
    row = {"launcher": "fsdp2", "processes": 2, "rows_per_second": 3.0, "held": held, "peak": 2**24}
    rows = [row | {"loss_difference": 1e-6, "resumed_difference": 0.0}, row | {"loss_difference": 0.5}]
    lines = launchers.to_markdown({"rows": rows, "on_gpu": False}).splitlines()[-2:]
    assert lines[0] == "| fsdp2 | 2 | 2.0 | 1.0 | 4.0 | 8.0 | 16.0 | 1e-06 | 0e+00 | yes | 3.00 |"
    assert "| NO |" in lines[1]


def test_option_of_the_gpu_benchmark_runs_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launchers, "measure", lambda setting: {"rows": [], "on_gpu": setting.on_gpu})
    monkeypatch.setattr("sys.argv", ["gpu.py", "--distributed", "--tiny", "--output-dir", str(tmp_path)])
    gpu.main()
    assert "`python -m benchmarks.gpu --distributed`" in capsys.readouterr().out
