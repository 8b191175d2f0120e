"""Every command of README.md and of the pages in docs/, replayed in a copy of the kit on a tiny model; the Chinese
pages have the same commands. A command that stands on several pages runs once.

What cannot run on this machine is listed in NOT_HERE, with the reason. `bash tests/run.sh` is the run that this test
is part of.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import KIT, run, script_environment

NOT_HERE = {
    "source /usr/local/Ascend/ascend-toolkit/set_env.sh": "needs CANN",
    "pip install torch==2.13.0 torch_npu==2.13.0": "breaks torch where CANN is missing",
    "bash tests/run.sh": "is this run",
    "python -m sana_kit.playground --model_path=Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers "
    "--lora_weights=output": "runs until it is ended; tests/integration/test_playground.py has its tests",
    "bash finetune_sana_dreambooth_lora_deepspeed_bf16.sh --quickstart": "has a test of its own below",
}


PAGES = [
    "README.md",
    *sorted(f"docs/{page.name}" for page in (KIT / "docs").glob("*.md") if page.name != "CHANGELOG.md"),
]


def chinese(page):
    return "README_zh.md" if page == "README.md" else page.replace("docs/", "docs/zh/")


def commands(*pages):
    """The command lines of the ```bash blocks, continued lines joined, each once."""
    return list(dict.fromkeys(line for page in pages for line in lines_of(page)))


def lines_of(readme):
    found = []
    for block in re.findall(r"^[ ]*```bash\n(.*?)^[ ]*```", (KIT / readme).read_text(encoding="utf-8"), re.S | re.M):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.strip():
                found.append(line.strip())
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_chinese_page_has_the_same_commands_and_sections(page):
    assert lines_of(chinese(page)) == lines_of(page)
    levels = [re.findall(r"^(#+) ", (KIT / name).read_text(encoding="utf-8"), re.M) for name in (page, chinese(page))]
    assert levels[0] == levels[1], "a section is on one of the two pages only"


def test_the_readme_is_short_and_the_pages_have_commands():
    for readme in ("README.md", "README_zh.md"):
        assert len((KIT / readme).read_text(encoding="utf-8").splitlines()) < 250
    assert len(commands(*PAGES)) > 20


def test_what_is_not_run_here_is_still_on_a_page():
    assert set(NOT_HERE) <= set(commands(*PAGES))


def anchors(text):
    """The names that a page's headings have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *map(chinese, PAGES)])
def test_every_link_leads_somewhere(page):
    text = (KIT / page).read_text(encoding="utf-8")
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text)):
        if target.startswith("https://"):
            continue
        file = (KIT / page).parent / target if target else KIT / page
        assert file.exists(), (page, target)
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), (page, target, anchor)


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_every_file_of_the_tree_and_every_test_of_the_table_is_there(readme):
    text = (KIT / readme).read_text(encoding="utf-8")
    tree = re.search(r"^```\nREADME.*?^```", text, re.S | re.M).group(0)
    for name in re.findall(r"[\w./]+\.(?:py|sh|yaml|txt|md)\b", tree):
        assert (KIT / name).exists(), (readme, name)
    for name in re.findall(r"`python (?:-m pytest )?(tests/[\w/]+\.py)", text):
        assert (KIT / name).exists(), (readme, name)
    for name, words in re.findall(r"`python -m pytest (\S+) -k (\w+)`", text):
        tests = (KIT / name).read_text(encoding="utf-8")
        assert re.search(rf"^def test\w*{words}", tests, re.M), (readme, name, words)


@pytest.mark.parametrize("page", ["docs/ascend.md", "docs/zh/ascend.md"])
def test_the_environment_variables_of_the_pages_are_those_of_the_launcher(page):
    text = (KIT / page).read_text(encoding="utf-8")
    launcher = (KIT / "finetune_sana_dreambooth_lora_deepspeed_bf16.sh").read_text()
    exported = dict(re.findall(r"export ([A-Z_]+)=\$\{\w+:-([^}]*)\}", launcher))
    assert len(exported) >= 13
    for name, value in exported.items():
        row = re.search(rf"^\| {name} \| ([^|]*) \|", text, re.M)
        assert row, name
        cell = re.split(r"[ （]", row.group(1))[0]
        assert value.startswith("$") or cell == value, (name, row.group(1), value)


# What other programs' flags are called on the pages.
OTHERS_FLAGS = {"--config_file", "--num_processes", "--multi_gpu", "--gpus-per-node", "--nodes", "--time", "--signal"}


@functools.lru_cache
def known_flags():
    """Every flag of the kit's own scripts: fields that are settings, and words of argparse and of the launcher."""
    found = set(OTHERS_FLAGS)
    sources = [*KIT.glob("*.py"), *KIT.glob("*.sh"), *(KIT / "sana_kit").rglob("*.py")]
    for path in [*sources, *(KIT / "tests" / "benchmarks").glob("*.py"), *(KIT / "tests" / "stacks").glob("*.sh")]:
        text = path.read_text(encoding="utf-8")
        found |= {f"--{name}" for name in re.findall(r"^    (\w+): .+ = flag\(", text, re.M)}
        found |= {f"--{name}" for name in re.findall(r'\boff="(\w+)"', text)}
        found |= set(re.findall(r'"(--[a-z][\w-]*)"', text)) | set(
            re.findall(r"^ +(--[a-z]\w*)(?:\)| {2})", text, re.M)
        )
        names = " ".join(re.findall(r'known="(?:\$known )?([\w ]+)"', text))
        found |= {f"--{name}" for name in names.split()}
    return found


@pytest.mark.parametrize("page", [*PAGES, *map(chinese, PAGES)])
def test_every_flag_on_the_pages_exists(page):
    """Commands that are shown without being replayed, and flags in sentences."""
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (KIT / page).read_text(encoding="utf-8")))
    assert {flag for flag in named - known_flags() if not flag.startswith("--prodigy_")} == set()


@pytest.fixture(scope="module")
def kit_copy(tmp_path_factory):
    """The kit as git has it (with what is not yet committed), in a folder of its own."""
    target = tmp_path_factory.mktemp("copy") / "kit"
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=KIT, capture_output=True, text=True
    ).stdout.split("\n")
    if not any(listing):  # unpacked without git
        shutil.copytree(KIT, target, ignore=shutil.ignore_patterns(".venv", "__pycache__", "output", ".git"))
        return target
    for name in filter(None, listing):
        if (KIT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(KIT / name, target / name)
    return target


def on_tiny_things(line, model, data, images):
    """A command of the pages with names, sizes and counts that this machine can do."""
    words = shlex.split(line)
    out = []
    for word in words:
        word = re.sub(r"Efficient-Large-Model/\w+", str(model), word)
        word = re.sub(r"(?<![\w/])pokemon-blip-captions", str(data), word)
        word = word.replace("my_images", str(images))
        if words[0] == "accelerate":  # the launcher's commands train on the shipped set as it is; six images do here
            word = word.replace("sana_kit/quickstart_assets/style_dataset", str(data))
        for old, new in {
            r"max_train_steps=\d+": "max_train_steps=3",
            r"resolution=1024": "resolution=64",
            r"batch_size=8": "batch_size=1",
            r"num_processes=4": "num_processes=1",
        }.items():
            word = re.sub(old, new, word)
        out.append(word)
    while "--num_processes" in out:
        at = out.index("--num_processes")
        out[at : at + 2] = ["--num_processes=2"]
    if out[:1] == ["bash"] and out[1].startswith("finetune"):  # whose defaults are the real model and data
        extra = [f"--model_name={model}", f"--dataset_name={data}", "--resolution=64", "--batch_size=1"]
        extra += ["--max_train_steps=3", "--num_processors=1"]
        given = {word.split("=")[0] for word in out}
        alone = any("instance_data_dir" in word for word in out)
        extra = [e for e in extra if e.split("=")[0] not in given and not (alone and "dataset" in e)]
        out[2:2] = extra
    elif out[:2] == ["accelerate", "launch"]:
        out[:2] = [sys.executable, "-m", "accelerate.commands.launch"]
    elif out[0] == "python":
        out[0] = sys.executable
    elif out[0] == "pip":
        out[:1] = [sys.executable, "-m", "pip"]
    script = next((word for word in out if word.startswith("infer_")), None)
    if script:
        if not any(word.startswith("--model_path") for word in out):
            out.append(f"--model_path={model}")
        out += ["--num_inference_steps=2", "--height=64", "--width=64", "--complex_human_instruction=none"]
        if "--seeds" not in out:
            out += ["--seeds", "8"]
    if any(word.endswith("train_dreambooth_lora_sana.py") for word in out) and "patch_sana.py" not in out:
        out.append("--complex_human_instruction=none")
    return out


@pytest.mark.slow
def test_every_command_of_the_pages_runs(kit_copy, tiny_model, parquet_dataset, image_folder):
    dreambooth = kit_copy / "diffusers" / "examples" / "dreambooth"
    dreambooth.mkdir(parents=True)
    (kit_copy / "diffusers" / "src" / "diffusers").mkdir(parents=True)
    (kit_copy / "diffusers" / "src" / "diffusers" / "__init__.py").write_text('__version__ = "0.0.0"\n')
    (kit_copy / "diffusers" / "setup.py").write_text("")
    shutil.copy(KIT / "tests" / "helpers" / "fake_upstream_trainer.py", dreambooth / "train_dreambooth_lora_sana.py")
    environment = {**script_environment(), "PYTHON": sys.executable, "PYTHONPATH": ""}
    ran = 0
    for line in commands(*PAGES):
        if line in NOT_HERE:
            continue
        if line.startswith("cp -r"):  # over diffusers, from where the scripts must run as well
            # test_overlay.py runs the scripts from such a copy; here the copy itself
            words = ["bash", "-c", "cd .. && " + line.replace("sana_finetune", "kit").replace(" diffusers", " over")]
            (kit_copy.parent / "over" / "examples" / "dreambooth").mkdir(parents=True)
        else:
            words = on_tiny_things(line, tiny_model, parquet_dataset, image_folder)
        done = run(words, cwd=kit_copy, env=environment)
        assert done.returncode == 0, f"{line}\n{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        ran += 1
    assert ran >= 18
    assert (kit_copy / "output" / "pytorch_lora_weights.safetensors").exists()
    assert (kit_copy / "output_full" / "transformer").is_dir()


@pytest.mark.slow
def test_the_quick_start_changes_the_images(kit_copy):
    """The first of the README's two commands, whole. The measured distance to the fine-tuning set must fall as
    stated.
    """
    import json

    environment = {k: v for k, v in script_environment(threads=1).items() if k != "OMP_NUM_THREADS"}
    environment.update(PYTHON=sys.executable, PYTHONPATH="")
    command = ["bash", "finetune_sana_dreambooth_lora_deepspeed_bf16.sh", "--quickstart"]
    done = run(command, cwd=kit_copy, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    output = kit_copy / "quickstart_output"
    for name in ("before_after.png", "report.html", "pytorch_lora_weights.safetensors", "after/gallery.html"):
        assert (output / name).stat().st_size > 1000, name
    assert json.loads((output / "summary.json").read_text())["world_size"] == (2 if not os.environ.get("CUDA") else 1)
    print(done.stdout[-1500:])
    return_value = json.loads((output / "before_after.json").read_text())
    assert return_value
