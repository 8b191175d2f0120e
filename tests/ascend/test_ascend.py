"""The kit on an emulated Ascend host: the real torch_npu over a stand-in CANN runtime (tests/ascend/README.md).

    python -m pytest tests/ascend/test_ascend.py      (about 3 minutes on 2 cores)

Skipped with the reason where the host cannot be built; with ASCEND_EMULATION_REQUIRED=1 that is a failure instead.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import KIT, events, free_port, run_trainer, script_environment
from helpers.inferring import draw_here, member_runs
from helpers.upstream import REFERENCE_COMMIT, TRAINER, upstream_source
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(KIT / "tests" / "ascend"))

import build_host
import device_checks

LAUNCHER = "finetune_sana_dreambooth_lora_deepspeed_bf16.sh"
CONFIG = "bf16_accelerate_config.yaml"
DROPOUT = ["--enable_npu_flash_attention", "--lora_dropout", "0.2", "--fused_blocks", "auto"]
DTYPES = ("float32", "bfloat16")
STEPS = 4


@pytest.fixture(scope="session")
def ascend():
    """A function: the environment of a process on an emulated host with so many devices."""
    try:
        build_host.environment()
    except build_host.CannotBuild as reason:
        if os.environ.get("ASCEND_EMULATION_REQUIRED") == "1":
            raise
        pytest.skip(f"no emulated Ascend host here: {reason}")

    def environment(devices=2, **variables):
        variables = {**script_environment(), **build_host.environment(devices), **variables}
        variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], str(KIT)])
        return {**variables, "PYTHON": sys.executable, "ASCEND_EMULATED_NO_CUDA": str(KIT)}

    return environment


def run(command, environment, timeout=400):
    """Run a command in the kit's folder; its output is shown when it fails."""
    result = subprocess.run(
        list(map(str, command)), env=environment, cwd=KIT, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result


def assert_all_true(found):
    wrong = [f"{group}: {name}" for group, checks in found.items() for name, good in checks.items() if not good]
    assert not wrong, wrong


# ---------------------------------------------------------------------------------------------------------------------
# The device


@pytest.fixture(scope="session")
def checks(ascend, tiny_model, tmp_path_factory):
    """What tests/ascend/device_checks.py found, and the images that it drew."""
    folder = tmp_path_factory.mktemp("ascend")
    run([sys.executable, KIT / "tests/ascend/device_checks.py", folder, tiny_model], ascend())
    return {**json.loads((folder / "checks.json").read_text()), "images": dict(np.load(folder / "images.npz"))}


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_equal_the_cpus(checks, dtype):
    rows = [row for row in checks["operators"] if row["dtype"] == dtype]
    assert len(rows) == len(device_checks.OPERATORS)
    wrong = [row for row in rows if "failed" in row or max(row["forward"], row["backward"] or 0) > row["bound"]]
    assert not wrong, json.dumps(wrong, indent=1)
    with_gradient = [row for row in rows if row["backward"] is not None]
    assert len(with_gradient) >= 85
    print(dtype, len(rows), "operators, largest error", max(max(r["forward"], r["backward"] or 0) for r in rows))


def test_fused_operators_ran(checks):
    """The comparison above is worth something only if torch_npu really reached its fused kernels."""
    calls = checks["kernels"]
    per_dtype = sum(name.startswith(("attention", "npu_fusion")) for name, *_ in device_checks.OPERATORS)
    not_fused = ("attention, additive mask", "attention, 3 dimensions")
    assert (
        calls["aclnnFlashAttentionScore"] == calls["aclnnFlashAttentionScoreGrad"] == 2 * (per_dtype - len(not_fused))
    )
    assert calls["aclnnRmsNorm"] == calls["aclnnRmsNormGrad"] == 4
    assert calls["aclnnInplaceCopy"] > 100 and calls["aclnnDropoutDoMask"] > 0


REASONS = {  # a part of each refusal
    "CPU and NPU in one operator": "on the same device",
    "a CPU weight": "on the same device",
    "a CPU index for embedding": "on the same device",
    "CPU key in fused attention": "on the same device",
    "two NPUs in one operator": "on the same device",
    "a device that is not there": "107001",
    "a CPU generator": "'npu' device type",
    "fused: unknown layout": "BSH/SBH/BNSD/BSND/TND",
    "fused: wrong number of heads": "do not fit layout BNSD with 3 heads",
    "fused: mask B11S": "attenMask [2, 1, 1, 5]",
    "fused: mask per head but not per batch": "attenMask [1, 4, 7, 5]",
    "fused: mask of another length": "attenMask [7, 6]",
    "fused: additive mask": "must be BOOL or UINT8",
    "fused: head dim above 768": "1 to 768",
    "fused: float64": "DOUBLE",
    "fused: key of another head dim": "head dims 16, 8",
    "fused: keep_prob 0": "(0, 1]",
    "rms norm: weight of another length": "gamma [4] is not the end of x [2, 8]",
    "torch.cuda from the kit's code": "called torch.cuda.is_available on an Ascend host",
    "more memory than there is": "out of memory",
}


@pytest.mark.parametrize("case", REASONS)
def test_refused_as_on_hardware(checks, case):
    assert set(checks["refused"]) == set(REASONS)
    assert REASONS[case] in (checks["refused"][case] or "not refused")


def test_random_numbers(checks):
    assert_all_true(checks["generators"])


def test_copies(checks):
    assert_all_true({"copies": checks["copies"]})


def test_dtypes(checks):
    """float64 becomes float32 on the device, as torch_npu says, and comes to the host as asked."""
    assert checks["dtypes"] == {
        "double() on the device": "torch.float32",
        "to the host as float64": "torch.float64",
        "complex comes back": True,
        "item": 3.0,
    }


def test_memory_figures(checks):
    memory = checks["memory"]
    assert 8 * 2**20 <= memory["allocated"] <= 8 * 2**20 + 4096
    assert memory["total"] == 64 * 2**30 and 0 < memory["total"] - memory["free"] < 2**30
    assert memory["given back"] and memory["peak"] and memory["pinned"]


@pytest.mark.parametrize("dtype, largest, mean", [("float32", 2e-5, 1e-6), ("bfloat16", 0.08, 0.004)])
def test_pipeline_draws_the_cpus_images(checks, tiny_model, dtype, largest, mean):
    """diffusers' attention, the kit's with torch's operator, and with Ascend's, against diffusers' on the CPU."""
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(tiny_model, torch_dtype=getattr(torch, dtype))
    expected = device_checks.draw(pipeline)
    for attention in ("diffusers", "sdpa", "npu_fusion"):
        difference = np.abs(checks["images"][f"{attention}_{dtype}"] - expected)
        assert difference.max() <= largest and difference.mean() <= mean, (attention, difference.max())
    # 2 layers x 3 steps, guidance in one batch: for each dtype once by torch's operator, once by Ascend's
    assert checks["pipeline_kernels"]["aclnnFlashAttentionScore"] == 2 * 2 * 2 * 3


# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def test_collectives(ascend, tmp_path):
    """ProcessGroupHCCL of torch_npu with 3 processes."""
    script = KIT / "tests/ascend/collective_checks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 3, "--master_port", free_port()]
    run([*command, script, tmp_path], ascend(3))
    ranks = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(3)]
    for rank, found in enumerate(ranks):
        assert found["backend"] == "hccl" and found["device"] == f"npu:{rank}"
        for dtype in ("float32", "bfloat16", "float16", "int64", "int32"):
            assert found[f"all_reduce {dtype}"] == [30, 33, 36]
        assert found["all_reduce MAX"] == [20, 21, 22]
        assert found["all_reduce MIN"] == [0, 1, 2]
        assert found["all_reduce AVG"] == [10, 11, 12]
        assert found["all_reduce async"] == [30, 33, 36]
        assert found["all_gather"] == [[0, 1], [10, 11], [20, 21]]
        assert found["all_gather_into_tensor"] == [0, 1, 10, 11, 20, 21]
        assert found["reduce_scatter_tensor"] == [[30, 33], [36, 39], [42, 45]][rank]
        assert found["broadcast"] == [20, 21, 22]
        assert found["scatter"] == [10 * rank, 10 * rank + 1]
        assert found["all_to_all_single"] == [rank, rank + 10, rank + 20]
        assert found["all_gather_object"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert found["broadcast_object_list"] == [{"from": 0}]
        assert found["all_reduce of two"] == ([10, 11] if rank == 1 else [20, 22])
        assert found["chain"] == [2**5 * 2]  # the mean of 1, 2 and 3, doubled five times
        assert found["ddp weight"] == [0.5] and found["ddp gradient"] == [2]
        assert found["calls"]["HcclAllReduce"] >= 10
        assert rank == 2 or "another rank ended" in found["after a rank ended"]
    assert ranks[2]["reduce"] == [30, 33, 36] and ranks[2]["recv"] == [70, 71, 72]


# ---------------------------------------------------------------------------------------------------------------------
# The real scripts


def train(output, environment, model, data, *flags, launcher=True):
    """4 steps on 2 devices by the launcher, as a user calls it, or by accelerate; returns the steps in the log."""
    common = ["--resolution", 64, "--max_train_steps", STEPS, "--output_dir", output]
    if launcher:
        command = ["bash", KIT / LAUNCHER, "--model_name", model, "--dataset_name", data, "--num_processors", 2]
        command += ["--batch_size", 2, *common, "--"]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", KIT / CONFIG]
        command += ["--num_processes", 2, "--main_process_port", free_port(), KIT / TRAINER, "--dataset_name", data]
        command += ["--pretrained_model_name_or_path", model, "--caption_column", "text", "--train_batch_size", 2]
        command += ["--mixed_precision", "bf16", *common]
    command += ["--rank", 4, "--learning_rate", "1e-3", "--seed", 3, "--checkpointing_steps", 2, "--logging_steps", 1]
    run([*command, "--encodings_dir", output.parent / "encodings", *flags], environment)
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


def counters_of_ranks(folder):
    """What each rank of a run counted (ASCEND_EMULATED_COUNTERS); launchers and the doctor use no collectives."""
    found = [json.loads(file.read_text()) for file in folder.glob("counters-*.json")]
    return [counters for counters in found if "HcclAllReduce" in counters["kernels"]]


def adapter(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="session")
def trained(ascend, tiny_model, parquet_dataset, tmp_path_factory):
    """A run of the launcher on 2 NPUs, fused attention and validation: its folder, steps, counters of both ranks."""
    folder = tmp_path_factory.mktemp("npu")
    environment = ascend(2, ASCEND_EMULATED_COUNTERS=str(folder / "counters-%p.json"))
    validation = [
        "--validation_prompt",
        "a red square",
        "--validation_steps",
        STEPS,
        "--validation_inference_steps",
        2,
    ]
    flags = ["--enable_npu_flash_attention", *validation]
    steps = train(folder / "output", environment, tiny_model, parquet_dataset, *flags)
    return {"folder": folder / "output", "steps": steps, "ranks": counters_of_ranks(folder)}


@pytest.fixture(scope="session")
def warm(ascend, trained, tiny_model, parquet_dataset, tmp_path_factory):
    """A run with dropout and fused blocks that finds its encodings: nothing but training touches the device."""
    folder = tmp_path_factory.mktemp("warm")
    shutil.copytree(trained["folder"].parent / "encodings", folder / "encodings")
    environment = ascend(2, ASCEND_EMULATED_COUNTERS=str(folder / "counters-%p.json"))
    steps = train(folder / "whole", environment, tiny_model, parquet_dataset, *DROPOUT, launcher=False)
    return {"folder": folder / "whole", "steps": steps, "ranks": counters_of_ranks(folder)}


def test_training_on_npus_equals_the_cpus(trained, tiny_model, parquet_dataset, tmp_path):
    """ZeRO-2 in bf16, encoding included: the same images, noise and steps give the same adapter, up to rounding."""
    environment = {**script_environment(), "PYTHON": sys.executable}
    expected = train(tmp_path / "cpu", environment, tiny_model, parquet_dataset)
    assert [s["step"] for s in trained["steps"]] == [s["step"] for s in expected] == list(range(1, STEPS + 1))
    for found, reference in zip(trained["steps"], expected, strict=True):
        assert found["loss"] == pytest.approx(reference["loss"], rel=2e-3)
    found, reference = adapter(trained["folder"]), adapter(tmp_path / "cpu")
    assert found.keys() == reference.keys()
    for name in reference:
        # 4 steps of AdamW at 1e-3 move a weight by at most 4e-3; a gradient near 0 may take the other sign
        assert (found[name].float() - reference[name].float()).abs().max() <= 8e-3, name
    moved = [torch.cat([a[n].flatten().float() for n in sorted(a) if "lora_B" in n]) for a in (found, reference)]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.99


def test_training_used_the_fused_kernels(trained, tiny_model):
    """Per rank: 2 layers x 4 steps forward and backward; no other kernel of attention; HCCL for the gradients."""
    assert len(trained["ranks"]) == 2
    for rank in trained["ranks"]:
        calls = rank["kernels"]
        assert calls["aclnnFlashAttentionScoreGrad"] == 2 * STEPS
        assert calls["aclnnFlashAttentionScore"] >= 2 * STEPS
        assert calls["aclnnRmsNorm"] > 0
        assert calls["HcclAllReduce"] > 0 and calls["HcclAllGather"] > 0


def test_training_dtypes(trained, warm):
    """No float64 and no complex numbers reach the device in encoding, training and validation; few whole numbers."""
    for rank in trained["ranks"] + warm["ranks"]:
        assert sum(rank["operators"].values()) > 1000
        assert not [name for name in rank["operators"] if "float64" in name or "complex" in name]
    for rank in warm["ranks"]:
        whole_numbers = sum(calls for name, calls in rank["operators"].items() if "int64" in name)
        assert whole_numbers < 10 * STEPS and whole_numbers < 0.03 * sum(rank["operators"].values())


def test_validation_images(trained):
    images = sorted((trained["folder"] / "validation").rglob("*.png"))
    assert images
    for image in images:
        assert Image.open(image).size == (64, 64) and np.asarray(Image.open(image)).std() > 1


def test_resume_is_exact(ascend, trained, warm, tiny_model, parquet_dataset):
    """With dropout, whose masks the NPU's generator draws: 4 steps equal 2, a resume and 2 more, bit by bit."""
    half = warm["folder"].parent / "half"
    shutil.copytree(warm["folder"], half)
    shutil.rmtree(half / f"checkpoint-{STEPS}")
    for name in ("pytorch_lora_weights.safetensors", "train_log.jsonl", "summary.json"):
        (half / name).unlink()
    flags = [*DROPOUT, "--resume_from_checkpoint", "latest"]
    resumed = train(half, ascend(2), tiny_model, parquet_dataset, *flags, launcher=False)
    assert [s["step"] for s in resumed] == [3, 4]
    assert [s["loss"] for s in resumed] == [s["loss"] for s in warm["steps"][2:]]
    assert [s["loss"] for s in warm["steps"]] != [s["loss"] for s in trained["steps"]]  # the dropout was at work
    expected, found = adapter(warm["folder"]), adapter(half)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)


def generate(script, output, environment, model, processes, *flags):
    """Images of one of the inference scripts as {name: array}."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--num_processes", processes]
        command += ["--main_process_port", free_port()]
    command += [KIT / script, "--model_path", model, "--output_path", output, "--prompt", "a red square"]
    command += ["--prompt", "a blue dog", "--seeds", 8, 23, "--num_inference_steps", 2, "--dtype", "fp32"]
    run([*command, "--height", 64, "--width", 64, *flags], environment)
    jobs = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert len(jobs) == 4
    return {job["file"]: np.asarray(Image.open(output / job["file"])) for job in jobs}


def test_inference_scripts(ascend, trained, tiny_model, tmp_path):
    """Distributed with LoRA on 2 and 3 NPUs, and the single-device script: the same bytes, and the CPU's images."""
    lora = ["--lora_weights", trained["folder"]]
    distributed, single = "infer_sana_text2img_distrib.py", "infer_sana_text2img_lora_bf16.py"
    on_two = generate(distributed, tmp_path / "two", ascend(2), tiny_model, 2, *lora, "--attention", "npu_fusion")
    on_three = generate(distributed, tmp_path / "three", ascend(3), tiny_model, 3, *lora, "--attention", "npu_fusion")
    on_one = generate(single, tmp_path / "one", ascend(1), tiny_model, 1, *lora)
    on_cpu = generate(single, tmp_path / "cpu", script_environment(), tiny_model, 1, *lora)
    assert on_two.keys() == on_three.keys() == on_one.keys() == on_cpu.keys()
    for name, expected in on_cpu.items():
        assert np.array_equal(on_two[name], on_three[name]), name
        assert np.abs(on_two[name].astype(int) - expected).max() <= 1, name
        assert np.abs(on_one[name].astype(int) - expected).max() <= 1, name


@pytest.fixture(scope="module")
def several(ascend, tiny_model, tiny_sprint, image_folder, tmp_path_factory):
    """Folders of the CPU and of one NPU, with a ControlNet trained and every way to draw; the CPU's drawings."""
    folder = tmp_path_factory.mktemp("several")
    runs, training = member_runs(folder, tiny_model, tiny_sprint), controlnet_flags(tiny_model, image_folder)
    expected = draw_here(runs, folder / "cpu")
    assert run_trainer(*training, f"--output_dir={folder / 'cpu' / 'trained'}") == 0
    told = [[*flags, "--output_path", str(folder / "npu" / name)] for name, flags in runs.items()]
    told = {"train": [*training, f"--output_dir={folder / 'npu' / 'trained'}"], "draw": told}
    (folder / "runs.json").write_text(json.dumps(told))
    here = ascend(1)
    here["PYTHONPATH"] = os.pathsep.join([here["PYTHONPATH"], str(KIT / "tests")])
    run([sys.executable, KIT / "tests/ascend/several_runs_here.py", folder / "runs.json"], here)
    return folder, expected


def controlnet_flags(model, images):
    return [
        *(f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={images}", "--train_mode=controlnet"),
        *("--control_edges", "--instance_prompt=a drawing", "--resolution=64", "--train_batch_size=2", "--seed=0"),
        *("--max_train_steps=3", "--learning_rate=1e-3", "--mixed_precision=bf16", "--complex_human_instruction=none"),
        *("--report_to=none", "--logging_steps=1", "--vae_dtype=fp32"),
    ]


def test_every_member_and_way_to_draw(several):
    """SANA-Sprint, ControlNet, perturbed attention, init image and mask on an NPU: the CPU's images."""
    folder, expected = several
    for name, files in expected.items():
        assert json.loads((folder / "npu" / name / "summary.json").read_text())["device"] == "npu"
        for file in files:
            mine, other = (np.asarray(Image.open(folder / place / name / file)) for place in ("npu", "cpu"))
            assert np.abs(mine.astype(int) - other).max() <= 1, file


def test_training_a_controlnet_equals_the_cpus(several):
    losses, weights = [], []
    for place in ("npu", "cpu"):
        run_folder = several[0] / place / "trained"
        assert json.loads((run_folder / "summary.json").read_text())["device_type"] == place
        losses.append([event["loss"] for event in events(run_folder, "step")])
        weights.append(load_file(run_folder / "controlnet" / "diffusion_pytorch_model.safetensors"))
    assert len(losses[1]) == 3 and losses[0] == pytest.approx(losses[1], rel=2e-3)
    moved = [torch.cat([w[n].flatten().float() for n in sorted(w) if "controlnet_blocks" in n]) for w in weights]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("version", ["reference", "today"])
def test_patched_upstream_trainer(ascend, tiny_model, image_folder, tmp_path, version):
    """diffusers' own trainer after `python patch_sana.py`: trains on 2 NPUs under ZeRO-2, saves, resumes."""
    (tmp_path / TRAINER).write_bytes(upstream_source({"reference": REFERENCE_COMMIT, "today": "HEAD"}[version]))
    run([sys.executable, KIT / "patch_sana.py", tmp_path / TRAINER], script_environment())
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import os, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path[0] = os.path.dirname(sys.argv[0])\n"
        "import diffusers, transformers.image_utils  # these look for the real torchvision\n"
        f"sys.path.append({str(KIT / 'tests' / 'distributed' / 'workers' / 'stand_in')!r})\n"
        'runpy.run_path(sys.argv[0], run_name="__main__")\n'
    )
    config = tmp_path / "zero2.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nmixed_precision: bf16\nnum_machines: 1\n"
        "num_processes: 2\nuse_cpu: false\ndeepspeed_config:\n  gradient_accumulation_steps: 1\n"
        "  gradient_clipping: 1.0\n  zero_stage: 2\n"
    )
    environment = ascend(2, ASCEND_EMULATED_COUNTERS=str(tmp_path / "counters-%p.json"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command += ["--main_process_port", free_port(), runner, tmp_path / TRAINER]
    command += ["--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", tmp_path / "images"]
    command += ["--instance_prompt", "a square", "--resolution", 64, "--train_batch_size", 1, "--seed", 0]
    command += ["--mixed_precision", "bf16", "--checkpointing_steps", 2, "--output_dir", tmp_path / "out"]
    command += ["--learning_rate", "1e-3", "--enable_npu_flash_attention"]
    (tmp_path / "images").mkdir()
    for image in image_folder.glob("*.png"):  # upstream opens every file of the folder
        shutil.copy(image, tmp_path / "images")
    run([*command, "--max_train_steps", 2], environment)
    run([*command, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"], environment)
    second, fourth = adapter(tmp_path / "out" / "checkpoint-2"), adapter(tmp_path / "out" / "checkpoint-4")
    assert second.keys() == fourth.keys() == adapter(tmp_path / "out").keys() and len(second) == 24
    change = max((second[k].float() - fourth[k].float()).abs().max().item() for k in second)
    assert 0 < change < 5e-3  # 2 steps of AdamW at 1e-3 from where it stopped
    assert all(c["kernels"]["aclnnFlashAttentionScoreGrad"] > 0 for c in counters_of_ranks(tmp_path))


def test_more_processes_than_cards_are_refused_before_anything_runs(ascend, tiny_model, tmp_path):
    done = subprocess.run(
        ["bash", KIT / LAUNCHER, "--model_name", tiny_model, "--num_processors=4", f"--output_dir={tmp_path / 'out'}"],
        env=ascend(devices=2),
        cwd=KIT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "--num_processors=4: this machine has 2 npu device(s). Ask for at most that many." in done.stderr


def test_doctor_names_the_devices(ascend):
    result = run([sys.executable, "-m", "sana_kit.doctor"], ascend(3, ASCEND_RT_VISIBLE_DEVICES="0,2"))
    assert result.stdout.splitlines()[-1] == "npu 2"
    assert "Ascend910B2" in result.stdout and "torch_npu 2.13.0" in result.stdout


def test_run_sh_passes_command_and_code_on(ascend):
    environment = {**script_environment(), "ASCEND_EMULATED_DEVICES": "5"}
    program = "import sys, torch; print(torch.npu.device_count()); sys.exit(torch.npu.device_count())"
    command = ["bash", str(Path(build_host.HERE) / "run.sh"), "python", "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.stdout.strip(), result.returncode) == ("5", 5), result.stderr
