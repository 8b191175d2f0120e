"""The launcher end to end on a tiny model: what it prints, refuses, returns and keeps secret. Real processes."""

import json
import socket

import pytest
from helpers import adapter_weights, run
from helpers.runs import CONFIG, LAUNCHER, launcher_environment


def run_launcher(*arguments, env=None, cwd=None):
    return run(["bash", LAUNCHER, *arguments], env=launcher_environment(env), cwd=cwd)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batchsize=3"], "unknown flag --batchsize. Did you mean --batch_size?"),
        (["--batch_size=0"], "--batch_size=0: must be a whole number"),
        (["--max_train_steps", "many"], "--max_train_steps=many: must be a whole number"),
        (["--config_file=/no/file.yaml"], "--config_file=/no/file.yaml: no such file"),
        (["train"], "unexpected word 'train'"),
        (["--resolution"], "--resolution needs a value"),
        (["--instance_data_dir="], "--instance_data_dir=: needs a value"),
    ],
)
def test_the_launcher_refuses_what_it_does_not_know(arguments, message, tmp_path):
    done = run_launcher(*arguments, cwd=tmp_path)
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
    done = run_launcher(
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
    last = done.stdout.rstrip().splitlines()[-1]  # told once, behind the block
    assert last.startswith("draw with it: ") and done.stdout.count("draw with it: ") == 1
    assert len(list(output.glob("*.log"))) == 1
    assert adapter_weights(output)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["global_step"] == 6
    assert summary["memorisation"]["training_crops"] == 6  # both ranks' shares


def test_the_launcher_returns_the_trainers_failure_and_shows_its_error_last(tiny_model, tmp_path):
    done = run_launcher("--model_name", tiny_model, "--dataset_name=/no/such/data", "--resolution=64", cwd=tmp_path)
    assert done.returncode != 0
    assert "/no/such/data" in done.stderr.strip().splitlines()[-1] or "/no/such/data" in done.stderr[-600:]


def test_a_port_in_use_is_an_error_that_names_it(tiny_model, parquet_dataset, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = tmp_path / "config.yaml"
        config.write_text(CONFIG.read_text().replace("# main_process_port: 6000", f"main_process_port: {port}"))
        done = run_launcher(
            f"--model_name={tiny_model}", f"--dataset_name={parquet_dataset}", f"--config_file={config}", cwd=tmp_path
        )
    assert done.returncode != 0 and f"main_process_port: {port} is in use" in done.stderr
    assert not (tmp_path / "output").exists()
