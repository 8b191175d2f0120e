"""The launcher script: what it passes on, what it does not believe, and that it leaves nobody behind.

What it passes on is seen through a stand-in for Python that prints the command instead of running it.
"""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import KIT, script_environment

LAUNCHER = KIT / "finetune_sana_dreambooth_lora_deepspeed_bf16.sh"
STAND_IN = """#!{python}
import json, os, sys
words = sys.argv[1:]
if words[0].endswith("environment.py"):
    print(os.path.abspath(sys.argv[0]))
elif words[:2] == ["-m", "sana_kit.launch"]:
    names = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_LOG_LEVEL",
             "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TASK_QUEUE_ENABLE")
    told = {{"words": words, "env": {{name: os.environ.get(name) for name in names}}}}
    open(os.environ["TOLD"], "w").write(json.dumps(told))
    sys.exit(7)
"""


# A Python whose training is done at once and whose drawing would take a minute.
DRAWS_LONG = """#!{python}
import os, sys, time
words = sys.argv[1:]
if words[0].endswith("environment.py"):
    print(os.path.abspath(sys.argv[0]))
elif words[:2] == ["-m", "sana_kit.launch"]:
    os.makedirs("out")
    open("out/summary.json", "w").close()
elif "infer_" in words[0]:
    time.sleep(60)
"""
# `rm` as the launcher finds it: Ctrl-C comes while it runs.
INTERRUPTS = '#!/bin/sh\nkill -INT $PPID\nexec /bin/rm "$@"\n'


@pytest.fixture
def told(tmp_path):
    """told(*arguments, env=None, shell="bash"): (words of the run's command, environment, completed process)."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)

    def run(*arguments, env=None, shell="bash"):
        environment = {**script_environment(), "PYTHON": str(python), "TOLD": str(tmp_path / "told"), **(env or {})}
        command = [shell, str(LAUNCHER), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
        path = tmp_path / "told"
        seen = json.loads(path.read_text()) if path.exists() else {"words": [], "env": {}}
        return seen["words"], seen["env"], done

    return run


def value(words, flag):
    """The last value of a flag in a list of words, None without it."""
    found = None
    for index, word in enumerate(words):
        if word == flag:
            found = words[index + 1]
        elif word.startswith(flag + "="):
            found = word.partition("=")[2]
    return found


def test_the_exit_code_is_the_trainers_and_a_stop_has_half_an_hour(told):
    words, environment, done = told()
    assert done.returncode == 7 and environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "1800"
    assert told(env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"})[1]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "60"
    assert value(words, "--dataset_name") == "pokemon-blip-captions"
    assert value(words, "--instance_prompt") == "a pokemon"


def test_ones_own_images_get_no_prompt_of_the_launcher(told, tmp_path):
    for flag in ("--instance_data_dir", "--dataset_name"):
        assert value(told(f"{flag}={tmp_path}")[0], "--instance_prompt") is None
    assert value(told(f"--instance_data_dir={tmp_path}", "--instance_prompt=TOK")[0], "--instance_prompt") == "TOK"


def test_data_sets_behind_the_dashes_take_the_place_of_the_default(told, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 3\ndata_sets:\n- instance_data_dir: a\n")
    (tmp_path / "other.yaml").write_text("seed: 3\n")
    for more, column in (
        (["--dataset_name=mine"], "text"),
        (['--data_sets={"dataset_name": "mine"}'], None),
        (["--config=mine.yaml"], None),
    ):
        words, _, _ = told("--", *more)
        assert "pokemon-blip-captions" not in words and more[0] in words
        assert value(words, "--instance_prompt") is None and value(words, "--caption_column") == column
    assert value(told("--", "--config", "other.yaml")[0], "--dataset_name") == "pokemon-blip-captions"


def test_what_is_not_given_is_left_to_the_config(told, tmp_path):
    words, _, _ = told()
    assert value(words, "--gradient_accumulation_steps") is None and value(words, "--mixed_precision") is None
    assert value(words, "--num_processors") is None and "--small" not in words
    words, _, _ = told("--mixed_precision=no", "--num_processors=3", "--gradient_accumulation_steps", "2")
    assert value(words, "--mixed_precision") == "no" and value(words, "--gradient_accumulation_steps") == "2"
    assert value(words[: words.index("--")], "--num_processors") == "3"


def test_ascends_variables_are_set_where_cann_is(told):
    assert told()[1]["TASK_QUEUE_ENABLE"] is None
    assert told(env={"ASCEND_HOME_PATH": "/usr/local/Ascend"})[1]["TASK_QUEUE_ENABLE"] == "2"


def test_what_another_launcher_left_is_not_believed(told):
    leftovers = {"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "3", "ACCELERATE_USE_FSDP": "true"}
    _, environment, done = told(env={**leftovers, "ACCELERATE_LOG_LEVEL": "INFO"})
    assert [environment[name] for name in leftovers] == [None] * 4
    assert environment["ACCELERATE_LOG_LEVEL"] == "INFO"  # a setting, not a rank
    note = next(line for line in done.stderr.splitlines() if line.startswith("note: not used"))
    assert all(f"{name}={value}" in note for name, value in leftovers.items()) and "LOG_LEVEL" not in note


def test_a_tilde_within_a_word_is_the_home_folder(told, tmp_path):
    words, _, _ = told("--output_dir=~/out", "--model_name=~/model", env={"HOME": str(tmp_path)})
    assert value(words, "--output_dir") == f"{tmp_path}/out"
    assert value(words, "--pretrained_model_name_or_path") == f"{tmp_path}/model"


def test_sh_serves_as_well_as_bash(told):
    words, _, done = told("--seed=5", "--learning_rate=1e-3", shell="sh")
    assert done.returncode == 7 and value(words, "--seed") == "5" and value(words, "--learning_rate") == "1e-3"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_killed_launcher_or_a_closed_terminal_leaves_nobody(tiny_model, parquet_dataset, tmp_path, number):
    """SIGKILL: the kernel tells the run, which saves and ends. SIGHUP: it ends as by SIGTERM."""
    output = tmp_path / "out"
    command = ["bash", str(LAUNCHER), "--model_name", str(tiny_model), f"--dataset_name={parquet_dataset}"]
    command += ["--batch_size=1", "--num_processors=2", "--resolution=64", f"--output_dir={output}", "--"]
    command += ["--logging_steps=1", "--report_to=none"]
    environment = {**script_environment(), "PYTHON": sys.executable}
    with open(tmp_path / "log", "wb") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment, start_new_session=True)
    deadline, path = time.monotonic() + 300, output / "train_log.jsonl"
    while not path.exists() or '"event": "step"' not in path.read_text():
        assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    family = psutil.Process(run.pid).children(recursive=True)
    assert len(family) >= 3
    os.kill(run.pid, number)
    code = run.wait(timeout=200)
    assert psutil.wait_procs(family, timeout=200)[1] == [], "ranks were left training"
    assert list(output.glob("checkpoint-*")), "the run did not save"
    assert code == (143 if number == signal.SIGHUP else -9)


def test_ctrl_c_between_training_and_drawing_ends_at_once(tmp_path):
    """It comes while no process is there that it could be passed on to."""
    for name, text in (("python", DRAWS_LONG.format(python=sys.executable)), ("rm", INTERRUPTS)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**script_environment(), "PYTHON": str(tmp_path / "python")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = ["bash", str(LAUNCHER), "--quickstart", "--output_dir=out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=50)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("stopped by Ctrl-C after the training, whose result is in out\n")
