"""Groups of ranks that encode together, one group a scenario; imports once, then forks.

Started by test_encoding_ranks.py: python encode_groups.py MODEL WORK KILLS SCENARIOS. The last line is RESULT and a
JSON object. SCENARIOS is "all", or "kills" for the killed runs and what they are compared with.
"""

import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback

import torch
from accelerate import PartialState

from sana_kit.data.discover import load_images
from sana_kit.distributed import Ranks
from sana_kit.encodings import encode as encode_module
from sana_kit.encodings import encode_images, peers
from sana_kit.encodings import store as store_module
from sana_kit.encodings.settings import EncodingSettings
from sana_kit.models.folder import find_model

MODEL, WORK, KILLS, SCENARIOS = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]


def group(world, job, timeout=90):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                LOCAL_WORLD_SIZE=str(world),
                MASTER_PORT=str(port),
                OMP_NUM_THREADS="1",
                ACCELERATE_TORCH_DEVICE="cpu",
            )
            # Before any thread: torch makes its pool of threads anew after a fork, and two threads that ask for it at
            # once find none ("pool INTERNAL ASSERT FAILED").
            torch.set_num_threads(1)
            try:
                result = job(rank)
            except Exception as error:
                result = {"error": type(error).__name__ + ": " + str(error)}
                if not isinstance(error, (ValueError, RuntimeError)):
                    traceback.print_exc()
            with open(f"{WORK}/result-{rank}.json", "w") as file:
                json.dump(result, file)
            os._exit(0)
        children.append(pid)
    limit, alive = time.time() + timeout, set(children)
    while alive and time.time() < limit:
        for pid in list(alive):
            if os.waitpid(pid, os.WNOHANG)[0]:
                alive.discard(pid)
        time.sleep(0.02)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if alive:
        return "hung"
    print(f"{time.time() - limit + timeout:.1f} s", file=sys.stderr)
    return [json.load(open(f"{WORK}/result-{rank}.json")) for rank in range(world)]


def digest(encoded):
    whole = hashlib.sha256()
    for i in range(len(encoded)):
        for tensor in encoded[i].values():
            whole.update(tensor.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def encode(folder, store, **changes):
    state = PartialState(cpu=True)
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    ranks = Ranks.of(state)
    settings = {"resolution": 64, "vae_batch_size": 2, "text_batch_size": 2, "num_workers": 1}
    encoded = encode_module.encode(
        load_images(instance_data_dir=folder, instance_prompt="x", ranks=ranks),
        find_model(MODEL)[0],
        EncodingSettings(encodings_dir=store, **{**settings, **changes}),
        ranks=ranks,
    )
    ranks.close()
    return {
        "digest": digest(encoded),
        "images": encoded.facts.encoded_images,
        "prompts": encoded.facts.encoded_prompts,
        "samples": len(encoded),
    }


def alone_on_its_machine(rank):
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    peers.SHARED_SECONDS = 1.0
    return encode(IMAGES, f"{WORK}/own{rank}")


def fails_in_the_model(rank):
    real = encode_images.encode_pixels

    def broken(vae, pixels):
        if rank == 1:
            raise RuntimeError("the device caught fire")
        time.sleep(0.2)
        return real(vae, pixels)

    encode_images.encode_pixels = broken
    return encode(IMAGES, WORK + "/store6")


def disagrees(rank):
    return encode(IMAGES, WORK + "/store7", resolution=64 if rank else 63)


def other_images(rank):
    return encode(WORK + ("/lacking" if rank else "/images"), WORK + "/store7")


IMAGES = WORK + "/images"
out = {}
if SCENARIOS == "all":
    out["one rank"] = group(1, lambda rank: encode(IMAGES, WORK + "/store1"))
    out["two ranks"] = group(2, lambda rank: encode(IMAGES, WORK + "/store2"))
    out["three ranks"] = group(3, lambda rank: encode(IMAGES, WORK + "/store3"))
    out["again on two"] = group(2, lambda rank: encode(IMAGES, WORK + "/store3"))
    out["idle ranks"] = group(3, lambda rank: encode(WORK + "/single", WORK + "/store4"))
    out["idle left"] = sorted(os.listdir(WORK + "/store4"))
    out["corrupt"] = group(3, lambda rank: encode(WORK + "/corrupt", WORK + "/store5"))
    out["corrupt left"] = sorted(os.listdir(WORK + "/store5"))
    out["skipped"] = group(3, lambda rank: encode(WORK + "/corrupt", WORK + "/store5", skip_bad_images=True))
    out["separate"] = group(2, alone_on_its_machine)
    out["failure"] = group(3, fails_in_the_model)
    out["failure left"] = sorted(os.listdir(WORK + "/store6"))
    out["flag error on one rank"] = group(2, disagrees)
    out["other images on one rank"] = group(2, other_images)
    out["other images left"] = os.path.exists(WORK + "/store7")


def slow(vae, pixels, real=encode_images.encode_pixels):
    time.sleep(0.1)
    return real(vae, pixels)


# Kills at random moments: the whole group of two dies, the next start goes on.
random.seed(0)
store_module.SHARD_ITEMS = 1


def killable(rank):
    encode_images.encode_pixels = slow
    return encode(WORK + "/many", WORK + "/store8", vae_batch_size=1)


store = WORK + "/store8"


def count():
    try:
        return len([n for n in os.listdir(store + "/latents") if n.endswith(".safetensors")])
    except FileNotFoundError:
        return 0


seen = []
for attempt in range(KILLS):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        group(2, killable)
        os._exit(0)
    if attempt % 2:  # any moment from the start on
        time.sleep(random.uniform(0.0, 1.0))
    else:  # some moment after the first new shard
        before, limit = count(), time.time() + 60
        while count() == before and time.time() < limit:
            time.sleep(0.005)
        time.sleep(random.uniform(0.0, 0.3))
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(pid, 0)
    seen.append(count())
out["kills"] = seen
out["after kills"] = group(2, lambda rank: encode(WORK + "/many", store, vae_batch_size=1))
out["undisturbed"] = group(1, lambda rank: encode(WORK + "/many", WORK + "/store9", vae_batch_size=1))


def concurrent(rank):
    # two runs of one rank each in one store at the same time
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        os.environ.pop(name)
    return encode(WORK + "/many", WORK + "/store10", vae_batch_size=1)


if SCENARIOS == "all":
    out["concurrent"] = group(2, concurrent)
print("RESULT " + json.dumps(out))
