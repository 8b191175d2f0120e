"""The trainer as its users start it: accelerate launch with DeepSpeed ZeRO-2, ZeRO-1 and DDP, the launcher, signals.

Real processes, real engines, a tiny model. `-m "not slow"` leaves out the many-kills test.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import KIT, events, launch, script_environment
from safetensors.torch import load_file

from sana_kit.training import checkpoints

TRAINER = "train_dreambooth_lora_sana.py"
LAUNCHER = KIT / "finetune_sana_dreambooth_lora_deepspeed_bf16.sh"


def weights(folder):
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def farthest(first, second):
    """Largest difference of two sets of tensors, relative to the largest value."""
    scale = max(value.float().abs().max().item() for value in first.values())
    return max((first[k].float() - second[k].float()).abs().max().item() for k in first) / scale


@pytest.fixture(scope="session")
def flags(tiny_model, parquet_dataset):
    """Two images per process, everything random on; a global batch of 4 on two processes."""
    return [
        f"--pretrained_model_name_or_path={tiny_model}",
        f"--dataset_name={parquet_dataset}",
        "--caption_column=text",
        "--instance_prompt=x",
        "--resolution=64",
        "--gradient_accumulation_steps=2",
        "--random_flip",
        "--max_train_steps=6",
        "--checkpointing_steps=3",
        "--logging_steps=1",
        "--lr_scheduler=linear",
        "--lr_warmup_steps=0",
        "--seed=5",
        "--mixed_precision=bf16",
        "--learning_rate=1e-2",
        "--complex_human_instruction=none",
        "--report_to=none",
        "--ema_decay=0.9",
        "--caption_dropout=0.3",
        "--validation_split=1",
        "--validation_steps=3",
    ]


def train(output, flags, *more, **how):
    done = launch(TRAINER, *flags, f"--output_dir={output}", *more, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def as_it_was_at(output, step, tmp_path):
    """A copy of a run whose newest checkpoint is `step`."""
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    for number, folder in checkpoints.list_checkpoints(copy):
        if number > step:
            shutil.rmtree(folder)
    return copy


@pytest.fixture(scope="session")
def zero2(flags, tmp_path_factory):
    """ZeRO-2 on two processes, 6 steps, dropout on."""
    output = tmp_path_factory.mktemp("zero2") / "out"
    train(output, flags, "--lora_dropout=0.2", "--train_batch_size=1", processes=2, engine="zero")
    return output


@pytest.fixture(scope="session")
def zero2_no_dropout(flags, tmp_path_factory):
    """The same without dropout, whose masks depend on the rank."""
    output = tmp_path_factory.mktemp("zero2n") / "out"
    train(output, flags, "--train_batch_size=1", processes=2, engine="zero")
    return output


def test_zero2_resumes_to_the_bit(zero2, flags, tmp_path):
    copy = as_it_was_at(zero2, 3, tmp_path)
    more = ["--lora_dropout=0.2", "--train_batch_size=1", "--resume_from_checkpoint=latest"]
    train(copy, flags, *more, processes=2, engine="zero")
    for part in ("", "raw", "best"):
        assert same(weights(zero2 / part), weights(copy / part)), part
    averages = [load_file(folder / "checkpoint-6" / "ema.safetensors") for folder in (zero2, copy)]
    assert same(*averages) and {value.dtype for value in averages[0].values()} == {torch.float32}
    before, after = ([(e["step"], e["raw"], e["ema"]) for e in events(f, "held_out")] for f in (zero2, copy))
    assert [step for step, _, _ in before] == [0, 3, 6] and after[-1] == before[-1] and len(after) == 4
    before, after = (load_file(folder / "checkpoint-6" / "optimizer.safetensors") for folder in (zero2, copy))
    assert same(before, after)
    assert {key.split("|")[1] for key in before} == {"master", "exp_avg", "exp_avg_sq"}


def test_zero2_keeps_float32_masters_of_its_bf16_adapter(zero2):
    adapter = weights(zero2 / "checkpoint-6")
    masters = load_file(zero2 / "checkpoint-6" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    finer = 0
    for key, tensor in adapter.items():
        master = masters[key.removeprefix("transformer.").replace(".weight", ".default.weight") + "|master"]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), tensor)
        finer += int((master != tensor.float()).sum())
    assert finer > 100


@pytest.mark.parametrize("processes, engine, batch", [(1, "zero", 2), (1, "single", 2), (2, "ddp", 1)])
def test_a_zero2_checkpoint_resumes_on_other_processes_and_engines(
    zero2_no_dropout, flags, tmp_path, processes, engine, batch
):
    """The global batch stays 4, so the curve must go on as it would have: bf16 and float32 LoRA weights differ by the
    rounding of a bf16 number (2^-8), sums over ranks by their order."""
    copy = as_it_was_at(zero2_no_dropout, 3, tmp_path)
    more = [f"--train_batch_size={batch}", "--resume_from_checkpoint=latest"]
    done = train(copy, flags, *more, processes=processes, engine=engine)
    assert farthest(weights(zero2_no_dropout), weights(copy)) < 2**-7
    old, new = (
        [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        for folder in (zero2_no_dropout, copy)
    )
    expected = {e["step"]: e["loss"] for e in old if e["event"] == "step"}
    for entry in [e for e in new if e["event"] == "step"][-3:]:
        assert entry["loss"] == pytest.approx(expected[entry["step"]], rel=2e-2)
    moments, again = (
        load_file(folder / "checkpoint-6" / "optimizer.safetensors") for folder in (zero2_no_dropout, copy)
    )
    pick = [key for key in moments if key.endswith("exp_avg_sq")]
    assert farthest({k: moments[k] for k in pick}, {k: again[k] for k in pick}) < 0.05
    if processes != 2:
        assert f"world_size was 2 when the checkpoint was written and is {processes} now" in done.stderr


def test_a_checkpoint_of_two_goes_on_with_three_and_back_to_zero2_from_one(zero2_no_dropout, flags, tmp_path):
    copy = as_it_was_at(zero2_no_dropout, 3, tmp_path)
    more = [
        "--train_batch_size=1",
        "--resume_from_checkpoint=latest",
        "--max_train_steps=5",
        "--checkpointing_steps=1",
    ]
    train(copy, flags, *more, processes=3, engine="zero")
    state = json.loads((copy / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["samples_seen"] == 3 * 4 + 2 * 6  # 3 steps of 2 x 2, then 2 of 3 x 2: none twice, none skipped
    assert state["optimizer"]["numbers"]["step"]["value"] == 5


def test_zero1_and_ddp_train_the_same_adapter_as_zero2(zero2_no_dropout, flags, tmp_path):
    config = tmp_path / "zero1.yaml"
    text = (KIT / "bf16_accelerate_config.yaml").read_text()
    assert "zero_stage: 2" in text
    config.write_text(text.replace("zero_stage: 2", "zero_stage: 1"))
    train(tmp_path / "one", flags, "--train_batch_size=1", processes=2, engine="zero", config=config)
    assert farthest(weights(zero2_no_dropout), weights(tmp_path / "one")) < 2**-7
    train(tmp_path / "ddp", flags, "--train_batch_size=1", processes=2, engine="ddp")
    assert farthest(weights(zero2_no_dropout), weights(tmp_path / "ddp")) < 2**-6


def test_full_fine_tuning_under_zero2_saves_a_model_folder(flags, tmp_path):
    more = ["--train_mode=full", "--train_batch_size=1", "--max_train_steps=2", "--learning_rate=1e-3"]
    train(tmp_path / "full", flags, *more, processes=2, engine="zero")
    tensors = load_file(tmp_path / "full" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "full" / "sana_kit_base.json").read_text())["base_model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, offload, mode", [(2, "cpu", "lora"), (2, "cpu", "full"), (3, "none", "full"), (3, "cpu", "full")]
)
def test_zero3_and_cpu_offload_by_the_config_resume_to_the_bit(flags, tmp_path, stage, offload, mode):
    """The moments come from the checkpoint: without them the second half would differ."""
    if offload == "cpu" and not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("DeepSpeed compiles its CPU optimizer, and there is no C++ compiler here")
    config = tmp_path / "config.yaml"
    text = (KIT / "bf16_accelerate_config.yaml").read_text()
    text = text.replace("zero_stage: 2", f"zero_stage: {stage}")
    config.write_text(text.replace("offload_optimizer_device: none", f"offload_optimizer_device: {offload}"))
    if stage == 3:
        flags = [flag for flag in flags if "ema" not in flag]
    more = ["--train_batch_size=1", f"--train_mode={mode}", "--learning_rate=1e-3"]
    how = {"processes": 2, "engine": "zero", "config": config}
    train(tmp_path / "whole", flags, *more, **how)
    copy = as_it_was_at(tmp_path / "whole", 3, tmp_path)
    shutil.rmtree(copy / "transformer", ignore_errors=True)
    (copy / "pytorch_lora_weights.safetensors").unlink(missing_ok=True)
    train(copy, flags, *more, "--resume_from_checkpoint=latest", **how)

    def trained(output):
        if mode == "lora":
            return weights(output)
        return load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")

    assert same(trained(tmp_path / "whole"), trained(copy))
    before, after = (load_file(o / "checkpoint-6" / "optimizer.safetensors") for o in (tmp_path / "whole", copy))
    assert same(before, after) and {key.split("|")[1] for key in before} == {"master", "exp_avg", "exp_avg_sq"}


def test_an_error_ends_all_ranks_with_one_message(flags, tmp_path):
    done = launch(TRAINER, *flags, f"--output_dir={tmp_path}", "--resolution=65", processes=2, engine="zero")
    assert done.returncode != 0
    assert done.stderr.count("--resolution=65: must be a multiple of 8") == 1
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("torch/distributed")[0]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_bytes_of_weights_and_optimizer_are_those_computed(mode):
    """What one of two devices holds, counted over its tensors, against `sana_kit.flops.training_bytes`."""
    bench = KIT / "tests" / "benchmarks" / "bench_memory.py"
    flags = ["--config=scaled", f"--train_mode={mode}", "--processes=2", "--json"]
    done = subprocess.run(
        [sys.executable, str(bench), *flags], capture_output=True, text=True, env=script_environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    computed, allocated = figures["computed"], figures["allocated"]
    for part in ("weights", "gradients", "masters", "moments"):
        assert abs(allocated[part] / computed[part] - 1) < 0.01, (part, figures)
    # The few activations and what gloo copies come on top of what is passing: here 3 MB.
    assert 0 <= allocated["passing"] - computed["passing"] < 4e6, figures


# ---------------------------------------------------------------------------------------------------------------------
# The launcher


def start_launcher(*arguments, env=None, **more):
    return subprocess.run(
        ["bash", str(LAUNCHER), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**script_environment(), "PYTHON": sys.executable, **(env or {})},
        **more,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batchsize=3"], "unknown flag --batchsize. Known: --model_name --dataset_name"),
        (["--batch_size=0"], "--batch_size=0: must be a whole number"),
        (["--max_train_steps", "many"], "--max_train_steps=many: must be a whole number"),
        (["--config_file=/no/file.yaml"], "--config_file=/no/file.yaml: no such file"),
        (["train"], "unexpected word 'train'"),
        (["--resolution"], "--resolution needs a value"),
        (["--instance_data_dir="], "--instance_data_dir=: needs a value"),
    ],
)
def test_the_launcher_refuses_what_it_does_not_know(arguments, message, tmp_path):
    done = start_launcher(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.iterdir())


# Where tokens are found by the libraries that read them; none may reach anything that a user might show to others.
SECRETS = {
    "HF_TOKEN": "hf_tokenoftheenvironment",
    "HUGGING_FACE_HUB_TOKEN": "hf_itsoldname",
    "WANDB_API_KEY": "0123456789wandbkeyoftheenvironment",
    "COMET_API_KEY": "cometkeyoftheenvironment",
}


def test_the_launcher_trains_prints_the_result_block_and_tells_no_secret(tiny_model, parquet_dataset, tmp_path):
    output = tmp_path / "out put"  # a space, as user's folders have
    done = start_launcher(
        "--model_name", tiny_model, f"--dataset_name={parquet_dataset}", "--batch_size=1", "--num_processors=2",
        "--max_train_steps=6", "--resolution=64", f"--output_dir={output}", "--", "--logging_steps=2", "--rank=2",
        "--checkpointing_steps=3", "--hub_token=hf_tokenoftheflag",
        "--validation_prompt=a red square", "--num_validation_images=1", "--validation_inference_steps=1",
        cwd=tmp_path, env=SECRETS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    told = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    told |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    for what in ("README.md", "report.html", "summary.json", "manifest.json", "events.out.tfevents", ".log"):
        assert any(what in str(path) for path in told), what  # so that the search below looked there
    for secret in ("hf_tokenoftheflag", *SECRETS.values()):
        assert [str(path) for path, content in told.items() if secret.encode() in content] == []
    for line in ("Average it/s", "Final Performance images/sec", "Final Train Loss", "E2E Training Duration"):
        assert line in done.stdout
    assert len(list(output.glob("*.log"))) == 1
    assert weights(output)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["global_step"] == 6


def test_the_launcher_returns_the_trainers_failure_and_shows_its_error_last(tiny_model, tmp_path):
    done = start_launcher("--model_name", tiny_model, "--dataset_name=/no/such/data", "--resolution=64", cwd=tmp_path)
    assert done.returncode != 0
    assert "/no/such/data" in done.stderr.strip().splitlines()[-1] or "/no/such/data" in done.stderr[-600:]


# ---------------------------------------------------------------------------------------------------------------------
# Signals and kills


def start_long_run(output, flags, *more, processes=2):
    """The trainer under ZeRO-2 in a session of its own, with enough steps to be interrupted."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)]
    command += ["--config_file", str(KIT / "bf16_accelerate_config.yaml"), "--num_processes", str(processes)]
    command += [str(KIT / TRAINER), *flags, f"--output_dir={output}", *more]
    log = open(output.with_suffix(".log"), "ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env=script_environment(), start_new_session=True)


def wait_for_step(output, step, process, timeout=120):
    """Wait until the run has logged `step`; fails if it ends before."""
    deadline = time.monotonic() + timeout
    path = output / "train_log.jsonl"
    while time.monotonic() < deadline:
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if entry["event"] == "step" and entry["step"] >= step:
                    return
        assert process.poll() is None, output.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.05)
    raise AssertionError("timeout")


def wait_for_new_step(output, process, timeout=120):
    """Wait until the run has logged a step since this call: the log also holds those of runs before."""

    def logged():
        path = output / "train_log.jsonl"
        return path.read_text().count('"event": "step"') if path.exists() else 0

    before, deadline = logged(), time.monotonic() + timeout
    while logged() <= before:
        assert process.poll() is None, output.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tree(pid):
    """A process and all its descendants: torch's launcher gives each rank a session of its own."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def nobody_left(processes, seconds=10):
    """Whether all of them end within some seconds."""
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def kill(processes):
    """SIGKILL all of them at once, as a lost machine or an out-of-memory killer does."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(processes, timeout=30)


def start_launcher_aside(output, *arguments):
    """The launcher in a session of its own, its output in a .log beside the output folder."""
    with open(output.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(
            ["bash", str(LAUNCHER), f"--output_dir={output}", *map(str, arguments)],
            stdout=log,
            stderr=log,
            cwd=output.parent,
            env={**script_environment(), "PYTHON": sys.executable},
            start_new_session=True,
        )


def test_the_launcher_passes_sigterm_on_saves_and_resumes_to_the_bit(tiny_model, parquet_dataset, tmp_path):
    arguments = [
        "--model_name", str(tiny_model), f"--dataset_name={parquet_dataset}", "--batch_size=1", "--num_processors=2",
        "--max_train_steps=120", "--resolution=64",
    ]  # fmt: skip
    more = ["--", "--logging_steps=1", "--lora_dropout=0.1", "--report_to=none", "--learning_rate=1e-3"]
    whole = start_launcher(*arguments, f"--output_dir={tmp_path / 'whole'}", *more, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr[-4000:]

    output = tmp_path / "stopped"
    process = start_launcher_aside(output, *arguments, *more)
    wait_for_step(output, 5, process)
    family = tree(process.pid)
    assert len(family) > 4
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143, output.with_suffix(".log").read_text()[-4000:]
    assert nobody_left(family)
    stopped_at = checkpoints.list_checkpoints(output)[-1][0]
    assert 5 <= stopped_at < 120 and checkpoints.find_damage(output / f"checkpoint-{stopped_at}") is None
    again = start_launcher(
        *arguments, f"--output_dir={output}", *more, "--resume_from_checkpoint=latest", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr[-4000:]
    assert same(weights(tmp_path / "whole"), weights(output))


def test_a_second_signal_ends_at_once_and_leaves_nobody(flags, tmp_path):
    """The first is answered after the step, which here takes minutes; the second does not wait for it."""
    output = tmp_path / "out"
    process = start_long_run(output, flags, "--max_train_steps=2", "--gradient_accumulation_steps=20000")
    deadline, log = time.monotonic() + 120, output / "train_log.jsonl"
    while not log.exists() or '"event": "start"' not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, output.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.05)
    family = tree(process.pid)
    try:
        time.sleep(1)  # well inside the step
        process.send_signal(signal.SIGTERM)
        time.sleep(2)
        assert all(child.is_running() for child in family)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) != 0
        assert nobody_left(family, seconds=2)
    finally:
        kill(family)
    assert "once more to end at once" in output.with_suffix(".log").read_text()
    assert not list(output.glob("checkpoint-*"))


def test_ctrl_c_saves_and_ends_with_130(tiny_model, parquet_dataset, tmp_path):
    """Ctrl-C reaches the launcher, which has put the run into a session of its own and passes it on."""
    output = tmp_path / "out"
    process = start_launcher_aside(
        output, "--model_name", tiny_model, f"--dataset_name={parquet_dataset}", "--batch_size=1",
        "--num_processors=2", "--resolution=64", "--", "--logging_steps=1", "--report_to=none",
    )  # fmt: skip
    wait_for_step(output, 3, process)
    family = tree(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert nobody_left(family)
    (step, folder), *_ = checkpoints.list_checkpoints(output)
    assert step >= 3 and checkpoints.find_damage(folder) is None
    assert "stopped by signal 2" in (output / "train_log.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_thirty_kills_at_random_moments_lose_nothing(flags, tmp_path):
    """SIGKILL of one rank or of the whole tree while encoding, training and saving; the same command resumes each
    time, and the finished adapter is that of an undisturbed run to the bit."""
    more = ["--train_batch_size=1", "--max_train_steps=1500", "--checkpointing_steps=8", "--checkpoints_total_limit=3"]
    more += ["--lora_dropout=0.1"]
    whole, output = tmp_path / "whole", tmp_path / "killed"
    train(whole, flags, *more, processes=2, engine="zero", timeout=600)
    generator = random.Random(0)
    kills, moments = 0, []
    while kills < 30:
        process = start_long_run(output, flags, *more, "--resume_from_checkpoint=latest")
        before = checkpoints.list_checkpoints(output)[-1][0] if checkpoints.list_checkpoints(output) else 0
        if kills < 5:  # while starting and encoding
            time.sleep(generator.uniform(3, 8))
        else:  # while training and saving: a checkpoint every 8 steps, each of some tens of milliseconds
            wait_for_new_step(output, process)
            time.sleep(generator.uniform(0, 1.5))
        assert process.poll() is None, "the run ended before it could be killed: give it more steps"
        family = tree(process.pid)
        ranks = [member for member in family if TRAINER in " ".join(member.cmdline()) and member.pid != process.pid]
        if kills % 2 and ranks:
            kill([generator.choice(ranks)])
            process.wait(timeout=120)  # the launcher notices and ends the other rank
            assert nobody_left(family)
        else:
            kill(family)
            process.wait(timeout=60)
        kills += 1
        moments.append(before)
    train(output, flags, *more, "--resume_from_checkpoint=latest", processes=2, engine="zero", timeout=600)
    print(f"{kills} kills, from checkpoints {moments}")
    assert kills >= 30 and max(moments) >= 40, moments  # most kills hit a run that was getting on
    assert same(weights(whole), weights(output))


# ---------------------------------------------------------------------------------------------------------------------
# Several machines: two launchers on one host, as two machines would start them


def machine_config(folder, rank, port):
    """The kit's yaml edited as README.md says: three lines uncommented, numbers set."""
    text = (KIT / "bf16_accelerate_config.yaml").read_text()
    for old, new in {
        "  # deepspeed_multinode_launcher: standard": "  deepspeed_multinode_launcher: standard",
        "# main_process_ip: localhost": "main_process_ip: 127.0.0.1",
        "# main_process_port: 6000": f"main_process_port: {port}",
        "machine_rank: 0": f"machine_rank: {rank}",
        "num_machines: 1": "num_machines: 2",
        "num_processes: 8": "num_processes: 2",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / f"machine{rank}.yaml"
    path.write_text(text)
    return path


def start_machines(tmp_path, outputs, flags, *more, script=TRAINER):
    """One launcher per "machine"; returns the processes."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank, output in enumerate(outputs):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(machine_config(tmp_path, rank, port)), str(KIT / script)]
        command += [*flags, f"--output_dir={output}", *more]
        log = open(tmp_path / f"machine{rank}.log", "ab")
        processes.append(
            subprocess.Popen(command, stdout=log, stderr=log, env=script_environment(), start_new_session=True)
        )
    return processes


@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "separate folders"])
def test_two_machines_train_save_and_resume(flags, zero2_no_dropout, tmp_path, shared):
    """Training, checkpoint and resume on two machines give what two processes on one machine give, to the bit."""
    outputs = [tmp_path / "out", tmp_path / ("out" if shared else "other")]
    for more in ([], ["--resume_from_checkpoint=latest"]):
        for process in start_machines(tmp_path, outputs, flags, "--train_batch_size=1", *more):
            assert process.wait(timeout=240) == 0, (tmp_path / "machine0.log").read_text()[-4000:]
        shutil.rmtree(outputs[0] / "checkpoint-6")  # the second time it must come from checkpoint-3
    assert same(weights(zero2_no_dropout), weights(outputs[0]))
    if not shared:
        assert not list(outputs[1].glob("checkpoint-*")) and (outputs[1] / "encodings").is_dir()


def test_a_lost_machine_ends_the_other_and_the_run_resumes(flags, tmp_path):
    output = tmp_path / "out"
    more = ["--train_batch_size=1", "--max_train_steps=400", "--checkpointing_steps=5"]
    first, second = start_machines(tmp_path, [output, output], flags, *more)
    wait_for_step(output, 6, first)
    family = tree(first.pid)
    kill(tree(second.pid))
    started = time.monotonic()
    assert first.wait(timeout=90) != 0
    assert time.monotonic() - started < 60  # the stated time
    assert nobody_left(family)
    step = checkpoints.list_checkpoints(output)[-1][0]
    train(
        output, flags, "--train_batch_size=1", f"--max_train_steps={step + 1}", "--resume_from_checkpoint=latest",
        processes=2, engine="zero",
    )  # fmt: skip


def test_a_port_in_use_is_an_error_that_names_it(tiny_model, parquet_dataset, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = tmp_path / "config.yaml"
        text = (KIT / "bf16_accelerate_config.yaml").read_text()
        config.write_text(text.replace("# main_process_port: 6000", f"main_process_port: {port}"))
        done = start_launcher(
            f"--model_name={tiny_model}", f"--dataset_name={parquet_dataset}", f"--config_file={config}", cwd=tmp_path
        )
    assert done.returncode != 0 and f"main_process_port: {port} is in use" in done.stderr
    assert not (tmp_path / "output").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_the_run_goes_on_once_there_is_room(
    flags, small_disk, tmp_path
):
    more = ["--train_batch_size=1", "--gradient_accumulation_steps=1", "--rank=8", "--max_train_steps=40"]
    more += ["--checkpointing_steps=2", f"--encodings_dir={tmp_path / 'encodings'}"]
    done = launch(TRAINER, *flags, f"--output_dir={small_disk}", *more, engine="python")
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr
    whole = checkpoints.list_checkpoints(small_disk)
    assert whole and all(checkpoints.find_damage(folder) is None for _, folder in whole)
    assert not [path for path in small_disk.iterdir() if "partial" in path.name]
    for _, folder in whole[:-1]:
        shutil.rmtree(folder)
    more += ["--resume_from_checkpoint=latest", "--checkpoints_total_limit=1"]
    train(small_disk, flags, *more, engine="python")
    assert weights(small_disk)


def test_a_read_only_output_folder_is_an_error_before_anything_is_loaded(flags, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = launch(TRAINER, *flags, f"--output_dir={small_disk}/out", engine="python")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert done.returncode == 1 and "cannot be written to (Read-only file system)" in done.stderr
    assert "Loading weights" not in done.stderr and not list(small_disk.iterdir())
