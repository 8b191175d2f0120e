"""The card's snippet run as it stands, and the upload through the real huggingface_hub to a stand-in of the hub's API.

The stand-in answers what an upload asks (create, validate, preupload, git-LFS, commit) and keeps what it was sent;
the newer Xet transport of large files is not stood in for and is switched off.
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

import pytest
from helpers import KIT
from helpers.card_runs import TOKEN, make_run_folder, write
from PIL import Image

from sana_kit import model_card


@pytest.fixture
def run_folder(tmp_path):
    return make_run_folder(tmp_path)


@pytest.mark.parametrize("mode", ["lora", "loha", "full"])
def test_the_snippet_runs_as_it_stands(tiny_model, tmp_path, mode):
    """Where base model and weights lie under the names that the card gives them."""
    from diffusers import SanaTransformer2DModel
    from peft import LoHaConfig, LoraConfig

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
        kind = {"lora": LoraConfig, "loha": LoHaConfig}[mode]
        transformer.add_adapter(kind(r=2, target_modules=["to_q"]))
        adapter = {f"transformer.{k}": v for k, v in patch_sana._adapter_tensors(transformer).items()}
        adapter = {key.replace("transformer.transformer.", "transformer."): value for key, value in adapter.items()}
        config = patch_sana._lora_config(transformer)
        patch_sana.write_adapter(str(weights), adapter, config, patch_sana.base_model_fingerprint(transformer))
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "tiny").symlink_to(tiny_model)
    code = re.search(r"```python\n(.*?)\n```", card, re.S)[1]
    code = code.replace("hf_hub_download('me/weights', 'pytorch_lora_weights.safetensors')", "'me/weights'")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KIT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, code + done.stderr[-3000:]
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)


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
        cwd=KIT,
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
        model_card.ADAPTER_FILE,
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
    assert (run_folder / "README.md").is_file() and (run_folder / model_card.ADAPTER_FILE).is_file()


def test_push_checks_before_it_asks_the_hub(tmp_path):
    with pytest.raises(ValueError) as error:
        model_card.push(tmp_path, "not a name", token=TOKEN)
    for part in ("--hub_model_id=not a name", "no model card", model_card.ADAPTER_FILE):
        assert part in str(error.value)
