"""The model card, and the upload through the real huggingface_hub to a stand-in of the hub's HTTP API on this machine.

Run: pytest tests/test_model_card.py. The stand-in answers what an upload asks (create, validate, preupload,
git-LFS, commit) and keeps what it was sent; the newer Xet transport of large files is not stood in for and is
switched off.
"""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sana_kit import model_card
from sana_kit.runlog import JsonLinesLog

ROOT = Path(__file__).parent.parent
TOKEN = "hf_abcdefghijklmnopqrstuvwx"


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])


@pytest.fixture
def run_folder(tmp_path):
    """A finished run's folder: log, validation images, weights, and things that must stay on the machine."""
    folder = tmp_path / "my-lora"
    prompts = ['a "quoted" prompt: with\nlines & `ticks` | bars', "一只小狗"]
    config = {
        "pretrained_model_name_or_path": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "dataset_name": "lambdalabs/pokemon-blip-captions",
        "instance_prompt": "a photo of sks dog",
        "validation_prompt": prompts,
        "max_train_steps": 500,
        "learning_rate": 1e-4,
        "variant": "bf16",
        "rank": 4,
        "lora_alpha": 4,
        "train_mode": "lora",
    }
    with JsonLinesLog(folder / "train_log.jsonl") as log:
        log.write("start", step=0, world_size=1, config=config)
        for step in (0, 500):
            files = [f"validation/step-{step:06d}/{i:02d}.png" for i in range(2)]
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (1600, 800), "red" if step else "gray").save(folder / file)
            log.write("validation", step=step, files=files, prompts=prompts, seeds=[8, 8])
    (folder / model_card.WEIGHTS).write_bytes(b"weights" * 1000)
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "optimizer.bin").write_bytes(b"state")
    (folder / "encodings").mkdir()
    (folder / "encodings" / "latents.safetensors").write_bytes(b"private images")
    return folder


def write(folder, **changes):
    arguments = {
        "base_model": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "dataset": "lambdalabs/pokemon-blip-captions",
        "trigger": "a photo of sks dog",
        "rank": 4,
        "command": f"accelerate launch train.py --hub_token={TOKEN} --hub_token {TOKEN} --rank=4",
        **changes,
    }
    return model_card.write_model_card(folder, **arguments)


def test_card_in_the_hubs_format(run_folder):
    path = write(run_folder)
    assert path == run_folder / "README.md"
    text = path.read_text(encoding="utf-8")
    data = front_matter(text)
    assert data["base_model"] == "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    assert data["base_model_relation"] == "adapter" and data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image" and data["datasets"] == ["lambdalabs/pokemon-blip-captions"]
    assert data["instance_prompt"] == "a photo of sks dog" and {"lora", "sana", "template:sd-lora"} <= set(
        data["tags"]
    )
    assert [item["text"] for item in data["widget"]] == ['a "quoted" prompt: with\nlines & `ticks` | bars', "一只小狗"]
    for item in data["widget"]:
        with Image.open(run_folder / item["output"]["url"]) as image:
            assert image.size == (1024, 512) and image.getpixel((0, 0)) == (255, 0, 0)  # of the last validation
    assert "license" not in data and text.count(model_card.LICENSE_MARK) == 2
    assert "| steps | `500` |" in text and "| rank, alpha | 4, 4 |" in text
    assert TOKEN not in text and "--hub_token=REMOVED --hub_token REMOVED --rank=4" in text
    assert f"torch {model_card.package_versions()['torch']}" in text
    code = re.search(r"```python\n(.*?)\n```", text, re.S)[1]
    compile(code, "card", "exec")
    assert "load_lora_weights(" in code and ", variant='bf16', torch_dtype=" in code
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.to_dict()["base_model"] == data["base_model"]  # the hub's own reader takes it


def test_the_users_licence_and_text_are_kept(run_folder):
    path = write(run_folder)
    chosen = path.read_text().replace(path.read_text().splitlines()[1], "license: cc-by-sa-4.0\nlicense_link: LICENSE")
    path.write_text(chosen)
    text = write(run_folder).read_text()
    data = front_matter(text)
    assert data["license"] == "cc-by-sa-4.0" and data["license_link"] == "LICENSE"
    assert model_card.LICENSE_MARK not in text and "The author chose `cc-by-sa-4.0`" in text
    path.write_text("# My own words\n")
    assert write(run_folder) == run_folder / "README.generated.md"
    assert path.read_text() == "# My own words\n"


def test_a_given_licence_wins(run_folder):
    assert front_matter(write(run_folder, license="apache-2.0").read_text())["license"] == "apache-2.0"


def test_local_paths_are_not_told(run_folder, tmp_path):
    base = tmp_path / "models" / "secret-base"
    base.mkdir(parents=True)
    text = write(run_folder, base_model=str(base), dataset=str(tmp_path), command=None).read_text()
    assert str(tmp_path) not in text and "secret-base" not in text
    data = front_matter(text)
    assert "base_model" not in data and "datasets" not in data
    (base / "model_index.json").write_text(json.dumps({"_name_or_path": "Owner/Known"}))
    assert front_matter(write(run_folder, base_model=str(base)).read_text())["base_model"] == "Owner/Known"


def test_before_and_after_stand_side_by_side(run_folder):
    text = write(run_folder).read_text()
    assert "| ![before](model_card/before_01.png) | ![after](model_card/image_01.png) |" in text
    with Image.open(run_folder / "model_card" / "before_01.png") as image:
        assert image.getpixel((0, 0)) == (128, 128, 128)


def test_the_command_tells_no_local_path(run_folder):
    words = ["accelerate", "launch", "--config_file", "/home/me/kit/a.yaml", "train.py", "--output_dir=./out/mine"]
    text = write(run_folder, command=[*words, "--rank=4", "--dataset_name=owner/set"]).read_text()
    assert (
        "accelerate launch --config_file a.yaml train.py --output_dir=mine --rank=4 --dataset_name=owner/set" in text
    )


def test_the_base_models_own_licence_is_named(run_folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: nvidia-scl\n---\n")
    assert "The base model says of itself: `nvidia-scl`" in write(run_folder, base_model=str(base)).read_text()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_snippet_runs_as_it_stands(tiny_model, tmp_path, mode):
    """Where base model and weights lie under the names that the card gives them."""
    from diffusers import SanaTransformer2DModel
    from peft import LoraConfig

    import patch_sana

    settings = {"resolution": 64, "validation_inference_steps": 2, "instruction": None}
    card = write(
        tmp_path / "card", base_model="owner/tiny", repo_id="me/weights", train_mode=mode, settings=settings
    ).read_text()
    weights = tmp_path / "me" / "weights"
    transformer = SanaTransformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    if mode == "full":
        transformer.save_pretrained(weights / "transformer")
    else:
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
        adapter = {f"transformer.{k}": v for k, v in patch_sana._adapter_tensors(transformer).items()}
        adapter = {key.replace("transformer.transformer.", "transformer."): value for key, value in adapter.items()}
        config = patch_sana._lora_config(transformer)
        patch_sana.write_adapter(str(weights), adapter, config, patch_sana.base_model_fingerprint(transformer))
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "tiny").symlink_to(tiny_model)
    code = re.search(r"```python\n(.*?)\n```", card, re.S)[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, code + done.stderr[-3000:]
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)


def test_full_fine_tuning_and_no_images(tmp_path):
    text = write(
        tmp_path, train_mode="full", rank=None, validation_prompts=["an owl"], versions={"torch": "1"}
    ).read_text()
    data = front_matter(text)
    assert data["base_model_relation"] == "finetune" and "lora" not in data["tags"]
    assert data["widget"] == [{"text": "an owl"}] and "<Gallery />" not in text and "Versions: torch 1." in text
    assert "SanaTransformer2DModel.from_pretrained" in text
    with pytest.raises(ValueError, match="train_mode='qlora'"):
        write(tmp_path, train_mode="qlora")


@pytest.mark.parametrize(
    ("command", "clean"),
    [
        (["x", f"--hub_token={TOKEN}", "--a=1"], "x --hub_token=REMOVED --a=1"),
        (["x", "--hub-token", "abc", "--a"], "x --hub-token REMOVED --a"),
        (["x", "--hub_token", "--a", "abc"], "x --hub_token --a abc"),
        ("WANDB_API_KEY=123 HF_TOKEN=abc x --b", "WANDB_API_KEY=REMOVED HF_TOKEN=REMOVED x --b"),
        (["x", "--note", f"see {TOKEN}"], "x --note 'see REMOVED'"),
        (["x", "https://me:pass@host/path"], "x https://REMOVED@host/path"),
        (["x", "--max_sequence_length=300", "--instance_prompt=a token of love"],
         "x --max_sequence_length=300 '--instance_prompt=a token of love'"),
    ],
)  # fmt: skip
def test_secrets_are_removed_from_the_command_and_nothing_else(command, clean):
    assert model_card.redact_command(command) == clean


def test_text_cannot_break_out_of_the_card(tmp_path):
    prompt = "x ``` y\n---\nlicense: evil"
    text = write(tmp_path, trigger=prompt, command=["echo", "````\n## Heading"]).read_text()
    assert front_matter(text)["instance_prompt"] == prompt and "license" not in front_matter(text)
    assert "`````bash" in text


# ---------------------------------------------------------------------------------------------------------------------
# Upload


class Hub(http.server.ThreadingHTTPServer):
    """What of the hub's HTTP API an upload needs; keeps the files of the last commit and all requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.blobs, self.files, self.private, self.refuse = [], {}, {}, None, None
        threading.Thread(target=self.serve_forever, daemon=True).start()


class HubHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, payload, status=200):
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        data, oid = self.body(), self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.blobs[oid] = data
        self.answer({})

    def do_POST(self):
        hub, path, data = self.server, self.path.split("?")[0], self.body()
        hub.requests.append((path, self.headers.get("Authorization")))
        if hub.refuse:
            return self.answer({"error": "Invalid username or password."}, hub.refuse)
        if path == "/api/repos/create":
            asked = json.loads(data)
            hub.private = asked.get("private") or asked.get("visibility") == "private"
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            return self.answer({"url": f"{hub.url}/{name}", "name": name, "id": "1"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/models/tester/my-lora/preupload/main":
            files = json.loads(data)["files"]
            modes = [{"path": f["path"], "shouldIgnore": False,
                      "uploadMode": "regular" if f["path"].endswith(".md") else "lfs"} for f in files]  # fmt: skip
            return self.answer({"files": modes})
        if path == "/tester/my-lora.git/info/lfs/objects/batch":
            objects = json.loads(data)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in objects]
            return self.answer({"transfer": "basic", "objects": actions})
        if path == "/api/models/tester/my-lora/commit/main":
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            return self.answer({"commitUrl": f"{hub.url}/tester/my-lora/commit/1", "commitOid": "1" * 40})
        return self.answer({"error": f"the stand-in does not know {path}"}, 404)

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        self.answer({"error": f"the stand-in does not know {self.path}"}, 404)


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def command(folder, hub_url, tmp_path, *arguments, token=TOKEN):
    """The command line in a process of its own: huggingface_hub reads its endpoint and offline mode when imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    } | ({"HF_TOKEN": token} if token else {})
    return subprocess.run(
        [sys.executable, "-m", "sana_kit.model_card", str(folder), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_push_uploads_card_images_and_weights_and_nothing_else(run_folder, tmp_path, hub):
    done = command(run_folder, hub.url, tmp_path, "--push_to_hub", "my-lora", "--private")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/tester/my-lora" in done.stdout
    assert model_card.LICENSE_MARK in done.stderr  # told, not decided
    assert set(hub.files) == {
        "README.md",
        model_card.WEIGHTS,
        *(f"model_card/{name}_0{number}.png" for name in ("before", "image") for number in (0, 1)),
    }
    for name, content in hub.files.items():
        assert content == (run_folder / name).read_bytes()
    assert hub.private is True
    asked = [request for request in hub.requests if "my-lora" in request[0] or request[0] == "/api/repos/create"]
    assert len(asked) >= 4 and {authorization for _, authorization in asked} == {f"Bearer {TOKEN}"}
    assert TOKEN.encode() not in b"".join(hub.files.values())
    assert "load_lora_weights('tester/my-lora')" in (run_folder / "README.md").read_text()


def test_push_refused_by_the_hub_names_the_remedy(run_folder, tmp_path, hub):
    hub.refuse = 401
    done = command(run_folder, hub.url, tmp_path, "--push_to_hub", "tester/my-lora", token=None)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tester/my-lora could not be uploaded" in done.stderr and "hf auth login" in done.stderr
    assert "--push_to_hub tester/my-lora" in done.stderr
    assert (run_folder / "README.md").is_file() and (run_folder / model_card.WEIGHTS).is_file()


def test_push_checks_before_it_asks_the_hub(tmp_path):
    with pytest.raises(ValueError) as error:
        model_card.push(tmp_path, "not a name", token=TOKEN)
    for part in ("--hub_model_id=not a name", "no model card", model_card.WEIGHTS):
        assert part in str(error.value)
