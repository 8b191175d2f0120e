"""Latents and prompt embeddings: encoded once, kept on disk, found again.

Used by train_dreambooth_lora_sana.py (`encode`) and sana_kit/generation.py (`encode_prompts`). Tested by
`python -m pytest tests/test_encodings.py`.

The store is a folder of safetensors shards, latents/ and prompts/. Each tensor's name is the SHA-256 of everything
that its value depends on (`latents_key`, `prompt_key`), so a changed picture, caption, flag or model is never served
stale and the encodings of several flags live beside each other. Deleting the folder or a shard in it is always safe.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
import uuid
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from . import devices
from .dataset import (
    PictureSet,
    apply_transform,
    bad_picture_problems,
    check_pictures,
    default_workers,
    plan_transform,
    prefetch,
    progress_bar,
    to_unit_range,
)
from .run_log import give_usual_mode

FORMAT_VERSION = 1  # raise it when the value stored under a key changes its meaning
SHARD_ITEMS, SHARD_BYTES, SHARD_SECONDS = 512, 64 * 2**20, 60.0  # a shard is written when any of these is reached
STALE_SECONDS = 3600.0  # age at which an unfinished shard of a killed run is removed
VISIBLE_SECONDS = 60.0  # how long a shared file system may take to show another rank's shards
SHARED_SECONDS = 10.0  # after that a store that shows no file of another machine's rank counts as not shared
OPEN_SHARDS = 64  # file handles that a reading process keeps
TOKEN_MULTIPLE = 32  # padded caption lengths while encoding: few shapes for the device's compilers
# Above this side a tensor of the VAE's first stage (128 channels) passes 2^31 elements for one picture, which many
# kernels cannot index, so the picture is encoded in overlapping tiles of the size below.
WHOLE_ENCODE_SIDE, ENCODE_TILE, ENCODE_STRIDE = 3072, 2048, 1536
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


class StoreError(RuntimeError):
    """The encodings cannot be written, or a shard changed while it was in use; the message names file and remedy."""


class EncodingStopped(RuntimeError):
    """`should_stop` asked for an end; what was encoded is kept and the next start goes on from there."""


# ---------------------------------------------------------------------------------------------------------------------
# What an encoding depends on


def _file_fingerprint(path: Path) -> str:
    """Name, size and content of a file; of large weight files the header, the ends and the start of every tensor."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}:{size}:".encode())
    with open(path, "rb") as file:
        if size <= 64 * 2**20:
            digest.update(file.read())
            return digest.hexdigest()
        offsets = list(range(0, size, max(4096, size // 1024)))
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 2**26))
            digest.update(header)
            tensors = json.loads(header)
            offsets += [8 + length + v["data_offsets"][0] for k, v in tensors.items() if k != "__metadata__"]
        for offset in sorted(offsets):
            file.seek(offset)
            digest.update(file.read(4096))
        for offset in (0, max(0, size - 2**20)):
            file.seek(offset)
            digest.update(file.read(2**20))
    return digest.hexdigest()


def component_folder(model: str, subfolder: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The local folder of a pipeline's part; of a hub model its snapshot, with the part's config downloaded.

    Raises:
        ValueError: the model or the part is not there.
    """
    name = "tokenizer_config.json" if subfolder == "tokenizer" else "config.json"
    if os.path.isdir(model):
        folder = Path(model) / subfolder
        if not (folder / name).is_file():
            raise ValueError(
                f"--pretrained_model_name_or_path={model}: {subfolder}/{name} is missing; a complete SanaPipeline"
                " folder is needed."
            )
        return folder
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, f"{subfolder}/{name}", revision=revision, cache_dir=cache_dir)).parent
    except Exception as error:
        raise ValueError(
            f"--pretrained_model_name_or_path={model}: neither a folder here nor to be had from the hub"
            f" ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})."
        ) from None


def component_identity(
    model: str, subfolder: str, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None
) -> str:
    """Hex SHA-256 that stands for a part's weights and configuration, without loading it.

    Of a hub model the resolved commit counts; of a local folder the content of its small files and the fingerprints of
    its weight files, so a copied folder has the same identity and an exchanged weight file another.

    Raises:
        ValueError: the model or the part is not there.
    """
    folder = component_folder(model, subfolder, revision, cache_dir)
    parts: list[str] = [f"variant={variant}"]
    commit = folder.parent.name if folder.parent.parent.name == "snapshots" else None
    if commit is not None and not os.path.isdir(model):
        parts += [f"{model}@{commit}/{subfolder}"]
    else:
        parts += [_file_fingerprint(f) for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def vae_geometry(model: str, revision: str | None = None, cache_dir: str | None = None) -> dict:
    """{"factor": pixels per latent, "latent_channels", "scaling_factor"} from the VAE's config alone."""
    config = json.loads((component_folder(model, "vae", revision, cache_dir) / "config.json").read_text("utf-8"))
    channels = config.get("encoder_block_out_channels") or [128, 256, 512, 512, 1024, 1024]
    return {
        "factor": 2 ** (len(channels) - 1),
        "latent_channels": config.get("latent_channels", 32),
        "scaling_factor": config.get("scaling_factor", 1.0),
    }


def _key(**parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def latents_key(pictures: PictureSet, i: int, *, vae: str, vae_dtype: str, **transform) -> str:
    """Hex SHA-256 of all that the latents of sample i depend on; `vae` is its `component_identity`."""
    plan = plan_transform(pictures.size(i), index=pictures.position(i), **transform)
    return _key(
        format=FORMAT_VERSION,
        kind="latents",
        source=pictures.source_hash(i),
        scaled=plan.scaled,
        crop=plan.crop,
        flip=plan.flip,
        resolution=plan.resolution,
        vae=vae,
        dtype=vae_dtype,
    )


def prompt_key(
    prompt: str,
    instruction: list[str] | None,
    *,
    max_sequence_length: int,
    tokenizer: str,
    text_encoder: str,
    dtype: str,
) -> str:
    """Hex SHA-256 of all that a prompt's embeddings depend on."""
    return _key(
        format=FORMAT_VERSION,
        kind="prompt",
        text=preprocess_prompt(prompt),
        instruction=instruction or None,
        max_sequence_length=max_sequence_length,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        dtype=dtype,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Prompts, by the rule of SanaPipeline.encode_prompt (diffusers, pipeline_sana.py)


def preprocess_prompt(prompt: str) -> str:
    """What SanaPipeline does to a prompt with clean_caption=False: lower case, outer spaces off."""
    return prompt.lower().strip()


def tokenize_prompts(
    tokenizer, prompts: list[str], instruction: list[str] | None, max_sequence_length: int
) -> list[tuple[list[int], list[int]]]:
    """Per prompt: (token ids without padding, positions whose embeddings the transformer gets).

    SanaPipeline pads to the instruction's length + max_sequence_length - 2, keeps position 0 and the last
    max_sequence_length - 1 positions, and masks the padding; here the masked positions are left out from the start.
    """
    texts = [preprocess_prompt(p) for p in prompts]
    length = max_sequence_length
    if instruction:
        text = "\n".join(instruction)
        texts = [text + t for t in texts]
        length = len(tokenizer.encode(text)) + max_sequence_length - 2
    tokenizer.padding_side = "right"
    ids = tokenizer(texts, padding=False, max_length=length, truncation=True, add_special_tokens=True)["input_ids"]
    kept = [0] + list(range(length - max_sequence_length + 1, length))
    return [(list(row), [p for p in kept if p < len(row)]) for row in ids]


@torch.no_grad()
def encode_prompts(
    tokenizer,
    text_encoder,
    prompts: list[str],
    instruction: list[str] | None,
    max_sequence_length: int = 300,
    device: torch.device | None = None,
    batch: int = 16,
) -> list[torch.Tensor]:
    """Embeddings of the valid tokens of each prompt: list of (T, D) in the text encoder's dtype, on the CPU.

    Equal to SanaPipeline.encode_prompt's embeddings where its attention mask is 1: padding stands on the right and the
    encoder is causal, so it does not reach the valid tokens. Only the rounding of matrix products may differ with the
    shape of the batch (bf16). A negative prompt is encoded with instruction None, as the pipeline does.

    Args:
        instruction: complex human instruction put before each prompt; None or [] for none.
        batch: prompts per forward pass; they are grouped by length.
    """
    if not prompts:
        return []
    device = device or next(text_encoder.parameters()).device
    tokens = tokenize_prompts(tokenizer, prompts, instruction, max_sequence_length)
    order = sorted(range(len(prompts)), key=lambda i: (len(tokens[i][0]), i))
    results: list[torch.Tensor | None] = [None] * len(prompts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for i, embeds in zip(
            rows, _forward_text([tokens[i] for i in rows], tokenizer, text_encoder, device), strict=True
        ):
            results[i] = embeds
    return results


def _forward_text(tokens, tokenizer, text_encoder, device) -> list[torch.Tensor]:
    """One forward pass over tokenised prompts."""
    longest = max(len(ids) for ids, _ in tokens)
    longest += -longest % TOKEN_MULTIPLE
    pad = tokenizer.pad_token_id or 0
    ids = torch.full((len(tokens), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(tokens), longest), dtype=torch.long)
    for row, (line, _) in enumerate(tokens):
        ids[row, : len(line)] = torch.tensor(line, dtype=torch.long)
        mask[row, : len(line)] = 1
    hidden = text_encoder(ids.to(device), attention_mask=mask.to(device), use_cache=False)[0]  # (B, L, D)
    return [
        hidden[row, torch.tensor(kept, device=device, dtype=torch.long)].to("cpu").contiguous()
        for row, (_, kept) in enumerate(tokens)
    ]


def collate_prompt_embeds(embeds: list[torch.Tensor], multiple: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad (T_i, D) to the longest, rounded up to `multiple`: (B, T, D) with zeros behind, and a mask bool (B, T)."""
    longest = max(e.shape[0] for e in embeds)
    longest += -longest % multiple
    out = embeds[0].new_zeros((len(embeds), longest, embeds[0].shape[1]))
    mask = torch.zeros((len(embeds), longest), dtype=torch.bool)
    for row, e in enumerate(embeds):
        out[row, : e.shape[0]] = e
        mask[row, : e.shape[0]] = True
    return out, mask


# ---------------------------------------------------------------------------------------------------------------------
# Shards on disk


class _Index:
    """Where the tensors of wanted keys lie: arrays over rows, so that memory stays small for any number of items."""

    def __init__(self, folder: Path, wanted: dict[str, int]):
        self.folder, self.files = str(folder), []
        count = len(wanted)
        self.shard = np.full(count, -1, np.int32)
        self.offset = np.zeros(count, np.int64)
        self.nbytes = np.zeros(count, np.int64)
        self.tokens = np.zeros(count, np.int32)  # first dimension of the tensor
        self.crc = np.zeros(count, np.uint32)
        self.tail: tuple[int, ...] = ()  # the other dimensions, alike for all
        self.dtype = None
        self._reset()

    def _reset(self):
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_handles", "_pid")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def missing(self) -> np.ndarray:
        """Rows that no shard holds."""
        return np.flatnonzero(self.shard < 0)

    def read(self, row: int) -> torch.Tensor:
        """The tensor of a row, read by offset: a memory map's pages would count as resident memory of every worker.

        Raises:
            StoreError: the shard vanished or its bytes changed.
        """
        number = int(self.shard[row])
        path = os.path.join(self.folder, self.files[number])
        buffer, view = bytearray(int(self.nbytes[row])), 0
        try:
            handle = self._handle(number, path)
            while view < len(buffer):
                piece = os.pread(handle, len(buffer) - view, int(self.offset[row]) + view)
                if not piece:
                    break
                buffer[view : view + len(piece)] = piece
                view += len(piece)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be read ({error.strerror}); start again to encode what it held."
            ) from None
        if view < len(buffer) or zlib.crc32(buffer) != int(self.crc[row]):
            raise StoreError(f"{path}: its bytes changed on disk (checksum); delete this file and start again.")
        tensor = torch.frombuffer(buffer, dtype=self.dtype)
        return tensor.view(int(self.tokens[row]), *self.tail)

    def _handle(self, number: int, path: str) -> int:
        if self._pid != os.getpid():  # after a fork the handles stay valid, but each process closes its own
            self._reset()
        if number not in self._handles:
            while len(self._handles) >= OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[number] = os.open(path, os.O_RDONLY)
        self._handles.move_to_end(number)
        return self._handles[number]

    def close(self):
        """Close the shards of this process."""
        while self._pid == os.getpid() and self._handles:
            os.close(self._handles.popitem()[1])

    def __del__(self):
        try:
            self.close()
        except Exception:  # the interpreter may be shutting down
            pass


def _shard_header(path: Path) -> dict:
    """The header of a whole shard. Raises ValueError saying what is wrong with a damaged one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length <= 0 or 8 + length > size:
            raise ValueError(f"cut off at {size} bytes, inside its header")
        try:
            header = json.loads(file.read(length))
            checksums = json.loads(header.pop("__metadata__")["crc32"])
            ends = [entry["data_offsets"][1] for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"unreadable header ({type(error).__name__})") from None
    if size != 8 + length + max(ends, default=0):
        raise ValueError(f"{size} bytes instead of {8 + length + max(ends, default=0)}")
    for key, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES or key not in checksums:
            raise ValueError("not a shard of this kit")
        entry["start"], entry["crc"] = 8 + length + entry["data_offsets"][0], checksums[key]
    return header


def scan_store(folder: Path, wanted: dict[str, int], warn=None) -> _Index:
    """Find the wanted keys (key -> row) in a folder of shards. Damaged shards are set aside as *.damaged and named."""
    index = _Index(folder, wanted)
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):  # `_Team.meet` makes the folder or says why it cannot
        return index
    except OSError as error:
        raise StoreError(f"Encodings: {folder} cannot be read ({error.strerror}).") from None
    for name in names:
        if not name.endswith(".safetensors") or name.startswith("."):
            continue
        path = Path(folder) / name
        try:
            header = _shard_header(path)
        except FileNotFoundError:  # another rank has just set it aside
            continue
        except ValueError as error:
            set_aside = _set_aside(path)
            if warn is not None:
                warn(f"Encodings: {path} is damaged ({error}); {set_aside}. What it held is encoded again.")
            continue
        number = len(index.files)
        used = False
        for key, entry in header.items():
            row = wanted.get(key)
            if row is None or index.shard[row] >= 0:
                continue
            shape, dtype = entry["shape"], SAFETENSORS_DTYPES[entry["dtype"]]
            if index.dtype is None:
                index.dtype, index.tail = dtype, tuple(shape[1:])
            assert dtype == index.dtype and tuple(shape[1:]) == index.tail, (path, key, shape, dtype)
            index.shard[row], index.offset[row] = number, entry["start"]
            index.nbytes[row] = entry["data_offsets"][1] - entry["data_offsets"][0]
            index.tokens[row], index.crc[row] = shape[0], entry["crc"]
            used = True
        if used:
            index.files.append(name)
    return index


def _set_aside(path: Path) -> str:
    """Rename a damaged shard; returns what was done as part of a sentence."""
    for attempt in range(1000):
        target = path.with_name(path.name + ".damaged" + (f"-{attempt}" if attempt else ""))
        if not target.exists():
            try:
                os.replace(path, target)
            except FileNotFoundError:  # another rank was faster
                return "it was set aside"
            except OSError as error:
                return f"it could not be renamed ({error.strerror}) and is left unused"
            return f"it was renamed to {target.name}"
    return "it is left unused"


class _ShardWriter:
    """Collects tensors and writes them as shards: written beside, synced, then renamed."""

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix = Path(folder), prefix
        self.tensors, self.checksums, self.bytes, self.since = {}, {}, 0, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Write the rest, also when the encoding is stopped or fails: work that is done is kept."""
        if kind is None or not issubclass(kind, StoreError):
            self.flush()

    def add(self, key: str, tensor: torch.Tensor):
        """Take a CPU tensor; call `flush_if_due` where a group of items is whole."""
        tensor = tensor.contiguous()
        raw = tensor.view(torch.uint8).numpy()
        self.tensors[key], self.checksums[key] = tensor, zlib.crc32(raw)
        self.bytes += raw.nbytes

    def flush_if_due(self):
        late = time.monotonic() - self.since > SHARD_SECONDS
        if len(self.tensors) >= SHARD_ITEMS or self.bytes >= SHARD_BYTES or (self.tensors and late):
            self.flush()

    def flush(self):
        """Write what was collected.

        Raises:
            StoreError: the disk is full or the folder cannot be written; nothing half-written stays behind.
        """
        if self.tensors:
            from safetensors.torch import save_file

            name = uuid.uuid4().hex
            temporary = self.folder / f".unfinished-{name}"
            final = self.folder / f"{self.prefix}-{name}.safetensors"
            try:
                save_file(self.tensors, temporary, metadata={"crc32": json.dumps(self.checksums)})
                give_usual_mode([temporary])
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, final)
                _sync_folder(self.folder)
            except Exception as error:
                temporary.unlink(missing_ok=True)
                raise StoreError(
                    f"Encodings: {self.bytes / 2**20:.1f} MiB could not be written to {self.folder} ({error}). Free"
                    " some space or choose another folder for the encodings; what was written before is kept."
                ) from None
        self.tensors, self.checksums, self.bytes, self.since = {}, {}, 0, time.monotonic()


def _sync_folder(folder: Path):
    """Make a rename durable where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _remove_stale(folder: Path):
    """Remove unfinished shards that a killed run left; a live one is renamed within seconds."""
    for path in Path(folder).glob(".*"):
        if path.name.startswith((".unfinished-", ".probe-", ".failed-")):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except OSError:
                pass


# ---------------------------------------------------------------------------------------------------------------------
# The encoded data set


class EncodedPictures(torch.utils.data.Dataset):
    """Latents and prompt embeddings of a PictureSet, read from disk per sample; safe with forked and spawned workers.

    Memory holds the captions' keys and a few dozen bytes per sample; the tensors stay on disk.

    Attributes:
        pictures: the PictureSet after bad pictures were skipped; sample i here is sample i there.
        seconds: wall-clock time of the whole `encode` call on this rank.
        encoded_pictures, encoded_prompts: newly encoded by all ranks.
        reused_pictures, reused_prompts: distinct ones found on disk.
        picture_seconds, prompt_seconds: of this rank, model loading included.
        bytes: {"latents", "prompts"} on disk for this data set.
        scaling_factor, vae_factor, latent_channels: of the VAE. The latents are already multiplied by scaling_factor.
        messages: warnings for the log (damaged shards, skipped pictures).
    """

    def __init__(self, plan, make_key, facts):
        self.pictures = plan.pictures
        self._latents, self._prompts = plan.latents, plan.texts
        self._latent_rows, self._caption_rows = plan.latent_rows, plan.caption_rows
        self._prompt_rows, self._make_key = plan.prompt_keys, make_key
        self.__dict__.update(facts)

    def __len__(self) -> int:
        return len(self._latent_rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """{"latents": (C, h, w), "prompt_embeds": (T, D)} of sample i, on the CPU."""
        return {"latents": self.latents(i), "prompt_embeds": self.prompt_embeds(i)}

    def latents(self, i: int) -> torch.Tensor:
        """(C, h, w) in the VAE's dtype, multiplied by the VAE's scaling factor."""
        return self._latents.read(int(self._latent_rows[i]))

    def prompt_embeds(self, i: int) -> torch.Tensor:
        """(T, D) of sample i's caption."""
        return self._prompts.read(int(self._caption_rows[i]))

    def prompt_tokens(self) -> np.ndarray:
        """(N,) int32: valid tokens of each sample's caption, for statistics and length-aware batches."""
        return self._prompts.tokens[self._caption_rows]

    def prompt(self, prompt: str, instruction: list[str] | None = None) -> torch.Tensor:
        """(T, D) of a prompt that was among the captions or `extra_prompts`. Raises KeyError for any other."""
        row = self._prompt_rows.get(self._make_key(prompt, instruction))
        if row is None:
            raise KeyError(f"this prompt was not encoded with this instruction: {prompt[:80]!r}")
        return self._prompts.read(row)


class _PromptKeys:
    """Makes the key of (prompt, instruction); an object, so that the data set stays picklable."""

    def __init__(self, **parts):
        self.parts = parts

    def __call__(self, prompt, instruction):
        return prompt_key(prompt, instruction, **self.parts)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def encode(
    pictures: PictureSet,
    *,
    accelerator,
    pretrained_model_name_or_path: str,
    store_dir: str,
    resolution: int,
    center_crop: bool = False,
    random_flip: bool = False,
    seed: int = 0,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    max_sequence_length: int = 300,
    complex_human_instruction: list[str] | None = None,
    vae_dtype: torch.dtype = torch.bfloat16,
    text_encoder_dtype: torch.dtype = torch.bfloat16,
    vae_batch_size: int | str = "auto",
    text_batch_size: int = 16,
    extra_prompts: list[tuple[str, list[str] | None]] = (),
    skip_bad_images: bool = False,
    num_workers: int | None = None,
    should_stop=None,
    log=None,
) -> EncodedPictures:
    """Encode what is missing in the store, every rank its share, and return the data set of encodings.

    A collective call: every rank of `accelerator` (an Accelerator or PartialState) must make it, with equal arguments.
    The VAE and the text encoder are loaded only where something is missing, one after the other, and have left memory
    when this returns. Pictures still to be encoded are first decoded once, so that a corrupt one is an error before
    any weight is loaded. Machines with separate store folders are noticed: each then encodes all by itself.

    Items are encoded in groups that depend on the data set and the batch sizes alone, not on what is already there or
    on the number of ranks, so an interrupted encoding ends with the same bits as an undisturbed one.

    Args:
        store_dir: folder of the encodings; may be shared by runs, flags, models and data sets.
        extra_prompts: (prompt, instruction) pairs to encode too: validation prompts, negative ones (instruction None).
        vae_batch_size: pictures per VAE pass; 'auto' fits the device's free memory. Halved when memory runs out.
        num_workers: threads that decode ahead; None takes this process's share of the cores.
        should_stop: called between groups; True ends with EncodingStopped on every rank.
        log: called with a line of text, on the first rank; default: the module's logger.

    Raises:
        ValueError: flags, model parts or pictures that cannot be used, all of them at once; raised on every rank.
        StoreError: the store cannot be written or read; raised on every rank.
        EncodingStopped: see should_stop.
        RuntimeError: a rank failed in the models; every rank raises that rank's text.
    """
    started = time.monotonic()
    messages: list[str] = []

    def tell(text):
        messages.append(text)
        if accelerator.process_index == 0:
            (log or _default_log)(text)

    workers = default_workers() if num_workers is None else num_workers
    instruction = list(complex_human_instruction) if complex_human_instruction else None
    transform = {"resolution": resolution, "center_crop": center_crop, "random_flip": random_flip, "seed": seed}
    model = {
        "pretrained_model_name_or_path": pretrained_model_name_or_path,
        "revision": revision,
        "variant": variant,
        "cache_dir": cache_dir,
    }
    store = Path(store_dir)
    team = _Team(accelerator, store)

    def settle():
        """Check the flags; say what the encodings depend on."""
        geometry = _check_arguments(
            model, resolution, max_sequence_length, vae_dtype, text_encoder_dtype, vae_batch_size, text_batch_size
        )
        parts = ("vae", "text_encoder", "tokenizer")
        return geometry, {
            p: component_identity(pretrained_model_name_or_path, p, revision, variant, cache_dir) for p in parts
        }

    try:
        geometry, identity = team.run_alone(settle)
        dtype_names = {v: k for k, v in devices.DTYPES.items()}
        latents_of = {"vae": identity["vae"], "vae_dtype": dtype_names[vae_dtype], **transform}
        make_key = _PromptKeys(
            max_sequence_length=max_sequence_length,
            tokenizer=identity["tokenizer"],
            text_encoder=identity["text_encoder"],
            dtype=dtype_names[text_encoder_dtype],
        )

        def plan(pictures):
            return _Plan(store, pictures, latents_of, instruction, extra_prompts, make_key, tell)

        todo = team.run_alone(lambda: plan(pictures))
        encoded = {"pictures": 0, "prompts": 0}
        own_seconds = {"pictures": 0.0, "prompts": 0.0}
        if any(team.gather(todo.incomplete())):
            team.meet()
            # Pictures that cannot be decoded: an error, or left out, before any weight is loaded.
            checked = team.run(lambda: check_pictures(pictures, todo.samples_to_check(team), num_workers=workers))
            bad = dict(sorted(item for found in checked for item in found))
            if bad:
                text = bad_picture_problems(list(bad.values()))
                left = pictures.without(list(bad))
                if not skip_bad_images or not len(left):
                    raise ValueError("The training pictures cannot be used:\n- " + text)
                tell("--skip_bad_images: " + text)
                pictures = left
                todo = team.run_alone(lambda: plan(pictures))
            team.run_alone(lambda: _check_space(store, todo.latents, geometry, resolution, vae_dtype))
            # Captions, then pictures: each model is alone in memory.
            jobs = {
                "prompts": lambda: _encode_missing_prompts(
                    todo, store / "prompts", model, text_encoder_dtype, max_sequence_length, text_batch_size,
                    accelerator.device, team, should_stop,
                ),
                "pictures": lambda: _encode_missing_pictures(
                    todo, store / "latents", model, vae_dtype, vae_batch_size, transform, workers,
                    accelerator.device, team, should_stop, tell,
                ),
            }  # fmt: skip
            for kind, job in jobs.items():
                results = team.run(job)
                encoded[kind] = sum(count for count, _ in results)
                own_seconds[kind] = results[accelerator.process_index][1]
            found = todo.found()
            team.run_alone(todo.complete)
        else:
            found = todo.found()
    finally:
        team.part()
    pictures.release()
    _tell_of_losses(todo, resolution, max_sequence_length, tell)
    facts = {
        "seconds": time.monotonic() - started,
        "encoded_pictures": encoded["pictures"],
        "encoded_prompts": encoded["prompts"],
        "reused_pictures": found["pictures"],
        "reused_prompts": found["prompts"],
        "picture_seconds": own_seconds["pictures"],
        "prompt_seconds": own_seconds["prompts"],
        "bytes": {"latents": int(todo.latents.nbytes.sum()), "prompts": int(todo.texts.nbytes.sum())},
        "scaling_factor": geometry["scaling_factor"],
        "vae_factor": geometry["factor"],
        "latent_channels": geometry["latent_channels"],
        "messages": messages,
    }
    return EncodedPictures(todo, make_key, facts)


def _tell_of_losses(todo, resolution, max_sequence_length, tell):
    """Say how many captions were cut and how many pictures had to be enlarged."""
    cut = int((todo.texts.tokens[np.unique(todo.caption_rows)] >= max_sequence_length).sum())
    if cut:
        tell(
            f"{cut} caption(s) reach --max_sequence_length={max_sequence_length} tokens; the rest is cut off, as by"
            " SanaPipeline."
        )
    small = sum(min(todo.pictures.size(i)) < resolution for i in todo.first_sample)
    if small:
        tell(f"{small} picture(s) are smaller than --resolution={resolution} and were enlarged.")


def _default_log(text: str):
    import logging

    logging.getLogger(__name__).warning(text)


def _check_arguments(model, resolution, max_sequence_length, vae_dtype, text_dtype, vae_batch, text_batch) -> dict:
    """The VAE's geometry. Raises ValueError gathering everything that is wrong with the flags and the model folder."""
    problems, geometry = [], None
    source = model["pretrained_model_name_or_path"], model["revision"], model["cache_dir"]
    try:
        geometry = vae_geometry(*source)
    except ValueError as error:
        problems.append(str(error))
    for part in ("text_encoder", "tokenizer") if geometry else ():
        try:
            component_folder(source[0], part, source[1], source[2])
        except ValueError as error:
            problems.append(str(error))
    if geometry and (resolution < geometry["factor"] or resolution % geometry["factor"]):
        factor = geometry["factor"]
        nearest = max(factor, round(resolution / factor) * factor)
        problems.append(
            f"--resolution={resolution}: must be a multiple of {factor}, the VAE's factor; the nearest is {nearest}."
        )
    if text_dtype == torch.float16:
        problems.append("--text_encoder_dtype=fp16: Gemma-2 gives NaN in fp16; use bf16 or fp32.")
    for flag, dtype in (("--text_encoder_dtype", text_dtype), ("--vae_dtype", vae_dtype)):
        if dtype not in devices.DTYPES.values():
            problems.append(f"{flag}={dtype}: use one of {', '.join(devices.DTYPES)}.")
    if max_sequence_length < 1:
        problems.append(f"--max_sequence_length={max_sequence_length}: must be at least 1.")
    if vae_batch != "auto" and (not isinstance(vae_batch, int) or vae_batch < 1):
        problems.append(f"--vae_batch_size={vae_batch}: must be 'auto' or at least 1.")
    if text_batch < 1:
        problems.append(f"--text_batch_size={text_batch}: must be at least 1.")
    if problems:
        raise ValueError("The pictures cannot be encoded:" + "".join(f"\n- {p}" for p in problems))
    return geometry


class _Plan:
    """What a data set needs, each distinct thing once, in an order that all ranks agree on, and where it lies on disk.

    Attributes:
        latent_keys, prompt_keys: key -> row.
        latent_rows, caption_rows: (N,) int64, the row of each sample's latents and of its caption.
        first_sample: a sample of each latent row.
        prompts: (prompt, instruction) of each prompt row.
        latents, texts: the indexes of the store.
    """

    def __init__(self, store, pictures, latents_of, instruction, extra_prompts, make_key, tell):
        self.store, self.pictures, self.tell = store, pictures, tell
        self.latent_keys: dict[str, int] = {}
        self.latent_rows, self.first_sample = np.zeros(len(pictures), np.int64), []
        for i in range(len(pictures)):
            key = latents_key(pictures, i, **latents_of)
            row = self.latent_keys.setdefault(key, len(self.latent_keys))
            if row == len(self.first_sample):
                self.first_sample.append(i)
            self.latent_rows[i] = row
        self.prompt_keys: dict[str, int] = {}
        self.prompts: list[tuple[str, list[str] | None]] = []
        self.caption_rows = np.zeros(len(pictures), np.int64)
        known: dict[str, int] = {}
        for i, caption in enumerate(pictures.captions):
            if caption not in known:
                known[caption] = self._prompt_row(caption, instruction, make_key)
            self.caption_rows[i] = known[caption]
        for prompt, its_instruction in extra_prompts:
            self._prompt_row(prompt, its_instruction, make_key)
        self.scan()

    def _prompt_row(self, prompt, instruction, make_key):
        row = self.prompt_keys.setdefault(make_key(prompt, instruction), len(self.prompt_keys))
        if row == len(self.prompts):
            self.prompts.append((prompt, instruction or None))
        return row

    def scan(self):
        """Look what the store holds now."""
        self.latents = scan_store(self.store / "latents", self.latent_keys, self.tell)
        self.texts = scan_store(self.store / "prompts", self.prompt_keys, self.tell)

    def incomplete(self) -> int:
        """How many encodings are missing."""
        return len(self.latents.missing()) + len(self.texts.missing())

    def found(self) -> dict[str, int]:
        """How many distinct encodings were there at the last scan."""
        return {
            "pictures": len(self.latent_keys) - len(self.latents.missing()),
            "prompts": len(self.prompt_keys) - len(self.texts.missing()),
        }

    def samples_to_check(self, team) -> list[int]:
        """A sample of each missing latent row of this rank's share."""
        missing = set(self.latents.missing().tolist())
        return [self.first_sample[row] for row in team.share(range(len(self.latent_keys))) if row in missing]

    def complete(self):
        """Scan until nothing is missing: other ranks' shards may take a moment to show on a shared file system.

        Raises:
            StoreError: something is missing although every rank has finished.
        """
        deadline = time.monotonic() + VISIBLE_SECONDS
        while True:
            self.scan()
            if not self.incomplete():
                return
            if time.monotonic() > deadline:
                total = len(self.latent_keys) + len(self.prompt_keys)
                raise StoreError(
                    f"Encodings: {self.incomplete()} of {total} are missing in {self.store} after all ranks have"
                    " finished. Is another process deleting files there? Start again to encode them."
                )
            _refresh_listing(self.store / "latents")
            _refresh_listing(self.store / "prompts")
            time.sleep(0.5)


def _refresh_listing(folder: Path):
    """Make a network file system look at a folder anew: its clients do so after a change of their own."""
    path = folder / f".probe-{uuid.uuid4().hex}"
    try:
        path.touch()
        path.unlink()
    except OSError:
        pass


def _check_space(store, latents, geometry, resolution, vae_dtype):
    """Raise StoreError when the missing latents cannot fit on the disk; captions' lengths are not known yet."""
    import shutil

    side = resolution // geometry["factor"]
    size = torch.finfo(vae_dtype).bits // 8
    needed = len(latents.missing()) * geometry["latent_channels"] * side * side * size
    free = shutil.disk_usage(store).free
    if needed > free:
        raise StoreError(
            f"Encodings: {len(latents.missing())} latents need {needed / 2**20:.0f} MiB, but {store} has only"
            f" {free / 2**20:.0f} MiB free. Free some space or choose another folder for the encodings."
        )


# --- ranks


class _Team:
    """The ranks that encode together: those that see the same store folder."""

    def __init__(self, accelerator, store: Path):
        self.accelerator, self.store = accelerator, store
        self.members = [accelerator.process_index]
        self.token: str | None = None

    def gather(self, item) -> list:
        """The items of all ranks, in rank order."""
        if self.accelerator.num_processes == 1:
            return [item]
        from accelerate.utils import gather_object

        return gather_object([item])

    def meet(self):
        """Find out which ranks share the store: each leaves a file there and looks whose it sees."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes

        def prepare():
            try:
                for part in ("latents", "prompts"):
                    (self.store / part).mkdir(parents=True, exist_ok=True)
                    _remove_stale(self.store / part)
                _remove_stale(self.store)
                (self.store / f".probe-{token}-{rank}").touch()
            except OSError as error:
                raise StoreError(
                    f"Encodings: {self.store} cannot be written ({error.strerror}). Choose another folder for them."
                ) from None

        token = self.gather(uuid.uuid4().hex)[0]
        self.token = token
        self.run(prepare)
        if world == 1:
            return
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0") or 0)
        deadline = time.monotonic() + SHARED_SECONDS
        while True:
            seen = sorted(int(p.name.rsplit("-", 1)[1]) for p in self.store.glob(f".probe-{token}-*"))
            # Ranks of one machine always share the folder; those of others may, and then show within a few seconds.
            if len(seen) == world or local == world or time.monotonic() > deadline:
                break
            _refresh_listing(self.store)
            time.sleep(0.2)
        views = self.gather(seen)
        self.members = seen
        if any(views[other] != seen for other in seen):
            raise StoreError(
                f"Encodings: the ranks disagree on who shares {self.store} ({views}). Put the encodings on a file"
                " system that all machines share, or on one that each machine has for itself."
            )

    def share(self, items) -> list:
        """This rank's part of a list that is alike on all ranks."""
        return list(items)[self.members.index(self.accelerator.process_index) :: len(self.members)]

    def failed(self) -> bool:
        """Whether another rank has failed, so that going on is useless."""
        return self.token is not None and (self.store / f".failed-{self.token}").exists()

    def run_alone(self, job):
        """Run `job` on this rank and return its own result; any rank's error is raised on all ranks."""
        result, error = None, None
        try:
            result = job()
        except Exception as caught:
            error = caught
            if self.token is not None and self.accelerator.num_processes > 1:
                try:
                    (self.store / f".failed-{self.token}").touch()
                except OSError:
                    pass
        if self.accelerator.num_processes == 1:
            if error is not None:
                raise error
            return result
        verdict = None if error is None else (type(error).__name__, str(error))
        verdicts = self.gather(verdict)
        failures = [(rank, v) for rank, v in enumerate(verdicts) if v is not None]
        if failures:
            # A rank that only stopped because another failed has nothing to say.
            telling = [f for f in failures if f[1][0] != "_OtherRankFailed"] or failures
            kinds = {"ValueError": ValueError, "StoreError": StoreError, "EncodingStopped": EncodingStopped}
            kind = kinds.get(telling[0][1][0], RuntimeError)
            text = "\n".join(dict.fromkeys(f"rank {rank}: {message}" for rank, (_, message) in telling))
            raise kind(text) from error
        return result

    def run(self, job) -> list:
        """Run `job` on every rank and return all results; any rank's error is raised on all ranks."""
        return self.gather(self.run_alone(job))

    def part(self):
        """Remove this rank's traces from the store."""
        if self.token is not None:
            for name in (f".probe-{self.token}-{self.accelerator.process_index}", f".failed-{self.token}"):
                try:
                    (self.store / name).unlink(missing_ok=True)
                except OSError:  # a store that cannot be written has its own error
                    pass


class _OtherRankFailed(RuntimeError):
    """Ends a rank's share early; the failed rank's own error is what gets raised."""


def _poll(team: _Team, should_stop):
    if should_stop is not None and should_stop():
        raise EncodingStopped("Encoding was stopped on request; start again to go on where it was.")
    if team.failed():
        raise _OtherRankFailed("another rank failed")


def dtype_argument(cls, dtype: torch.dtype) -> dict:
    """{"dtype": ...} or {"torch_dtype": ...}: whichever `cls.from_pretrained` of the installed version knows."""
    try:
        source = inspect.getsource(inspect.unwrap(cls.from_pretrained))
    except (OSError, TypeError):
        source = ""
    return {"dtype" if 'pop("dtype"' in source else "torch_dtype": dtype}


# --- captions


def load_text_encoder(model: dict, dtype: torch.dtype, device: torch.device):
    """(tokenizer, text encoder in eval mode on the device) of a SanaPipeline; `model`: from_pretrained's arguments."""
    from transformers import AutoModel, AutoTokenizer, PreTrainedModel

    path, cache = model["pretrained_model_name_or_path"], model["cache_dir"]
    where = {"revision": model["revision"], "cache_dir": cache}
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer", **where)
    text_encoder = AutoModel.from_pretrained(
        path,
        subfolder="text_encoder",
        variant=model["variant"],
        **where,
        **dtype_argument(PreTrainedModel, dtype),
    )
    return tokenizer, text_encoder.to(device).eval().requires_grad_(False)


def _encode_missing_prompts(
    plan, folder, model, dtype, max_sequence_length, batch, device, team, should_stop
) -> tuple[int, float]:
    """Encode this rank's share of the missing prompts; (how many, seconds)."""
    started = time.monotonic()
    keys, prompts, missing = list(plan.prompt_keys), plan.prompts, set(plan.texts.missing().tolist())

    def by_length(row):
        prompt, instruction = prompts[row]
        return "\n".join(instruction or []), len(prompt), prompt

    # Groups of alike length; made from all prompts so that a group is the same whatever is already there.
    order = sorted(range(len(keys)), key=by_length)
    groups, current = [], []
    for row in order:
        if current and (len(current) == batch or prompts[current[0]][1] != prompts[row][1]):
            groups.append(current)
            current = []
        current.append(row)
    groups += [current] if current else []
    share = [g for g in team.share(groups) if missing.intersection(g)]
    if not share:
        return 0, 0.0
    _poll(team, should_stop)
    tokenizer, text_encoder = load_text_encoder(model, dtype, device)
    done, total = 0, sum(len(missing.intersection(g)) for g in share)
    with _ShardWriter(folder, "prompts") as writer, progress_bar(total, "Encoding captions", "caption") as bar:
        for group in share:
            _poll(team, should_stop)
            embeds = _text_group(
                tokenizer,
                text_encoder,
                [prompts[r][0] for r in group],
                prompts[group[0]][1],
                max_sequence_length,
                device,
            )
            for row, tensor in zip(group, embeds, strict=True):
                if row not in missing:
                    continue
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"The text encoder gave NaN or infinite values for the caption {prompts[row][0][:80]!r}; use"
                        " --text_encoder_dtype=fp32."
                    )
                writer.add(keys[row], tensor)
                done += 1
                bar.update()
            writer.flush_if_due()
    del text_encoder, tokenizer
    devices.empty_cache(device)
    return done, time.monotonic() - started


def _text_group(tokenizer, text_encoder, prompts, instruction, max_sequence_length, device):
    """One group of prompts, in halves when the device's memory does not suffice."""
    try:
        return encode_prompts(
            tokenizer, text_encoder, prompts, instruction, max_sequence_length, device, batch=len(prompts)
        )
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(prompts) == 1:
            raise
    devices.empty_cache(device)
    half = len(prompts) // 2
    arguments = (instruction, max_sequence_length, device)
    return _text_group(tokenizer, text_encoder, prompts[:half], *arguments) + _text_group(
        tokenizer, text_encoder, prompts[half:], *arguments
    )


# --- pictures


def load_vae(model: dict, dtype: torch.dtype, device: torch.device):
    """The AutoencoderDC of a SanaPipeline in eval mode on the device."""
    from diffusers import AutoencoderDC

    vae = AutoencoderDC.from_pretrained(
        model["pretrained_model_name_or_path"],
        subfolder="vae",
        revision=model["revision"],
        variant=model["variant"],
        cache_dir=model["cache_dir"],
        **dtype_argument(AutoencoderDC, dtype),
    )
    return vae.to(device).eval().requires_grad_(False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is used up (CUDA, NPU and CPU allocators)."""
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def group_size(vae_batch_size: int | str, resolution: int, device: torch.device) -> int:
    """Pictures per group: fixed by flag, resolution and kind of device alone, so that groups never depend on chance.

    'auto' is 8 pictures of 1024 px on an accelerator, where the device is busy with that, and one on a CPU.
    """
    if vae_batch_size != "auto":
        return int(vae_batch_size)
    whole = 8 if device.type != "cpu" else 1
    return max(1, min(64, int(whole * (1024 / resolution) ** 2)))


def pictures_that_fit(group: int, resolution: int, channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """The largest halving of `group` whose activations take at most half of the free memory.

    The first stage works at full resolution with `channels` channels. A pass holds up to 5.1 such tensors at once in
    fp32 and 7.1 in bf16 (resident memory, DC-AE f32c32 of a quarter of the width at 512 px, on a CPU); 8 are reserved.
    """
    free = devices.free_memory_bytes(device)
    each = 8 * channels * resolution * resolution * (torch.finfo(dtype).bits // 8)
    while free is not None and group > 1 and group * each > free / 2:
        group = (group + 1) // 2
    return group


@torch.no_grad()
def encode_pixels(vae, pixels: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f) * scaling_factor in the VAE's dtype, on the CPU."""
    parameter = next(vae.parameters())
    latents = vae.encode(pixels.to(parameter.device, parameter.dtype)).latent
    return (latents * vae.config.scaling_factor).to("cpu")


def _encode_missing_pictures(
    plan, folder, model, dtype, vae_batch_size, transform, workers, device, team, should_stop, tell
) -> tuple[int, float]:
    """Encode this rank's share of the missing pictures; (how many, seconds)."""
    started = time.monotonic()
    resolution = transform["resolution"]
    size = group_size(vae_batch_size, resolution, device)
    pictures, first_sample, keys = plan.pictures, plan.first_sample, list(plan.latent_keys)
    missing = set(plan.latents.missing().tolist())
    groups = [list(range(k, min(k + size, len(keys)))) for k in range(0, len(keys), size)]
    share = [g for g in team.share(groups) if missing.intersection(g)]
    if not share:
        return 0, 0.0
    _poll(team, should_stop)
    vae = load_vae(model, dtype, device)
    if resolution > WHOLE_ENCODE_SIDE:
        vae.enable_tiling(ENCODE_TILE, ENCODE_TILE, ENCODE_STRIDE, ENCODE_STRIDE)
    fit = pictures_that_fit(
        size, min(resolution, ENCODE_TILE), vae.config.encoder_block_out_channels[0], dtype, device
    )

    def pixels_of(group):
        """uint8 (B, resolution, resolution, 3)"""
        batch = []
        for row in group:
            i = first_sample[row]
            decision = plan_transform(pictures.size(i), index=pictures.position(i), **transform)
            batch.append(apply_transform(pictures.load(i), decision))
        return torch.from_numpy(np.stack(batch))

    done, total = 0, sum(len(missing.intersection(g)) for g in share)
    with _ShardWriter(folder, "latents") as writer, progress_bar(total, "Encoding pictures") as bar:
        for group, pixels in zip(share, prefetch(pixels_of, share, workers, workers + 1), strict=True):
            _poll(team, should_stop)
            pixels = to_unit_range(pixels.to(device))
            latents, position = [], 0
            while position < len(group):
                try:
                    latents.append(encode_pixels(vae, pixels[position : position + fit]))
                    position += fit
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    if fit == 1:
                        raise RuntimeError(
                            f"The VAE cannot encode one picture of {resolution} px in the memory of {device}; lower"
                            f" --resolution, use --vae_dtype=bf16 or free memory ({error})."
                        ) from None
                devices.empty_cache(device)  # outside the except block, so that the failed tensors are gone
                fit = max(1, fit // 2)
                tell(f"Encoding: out of memory, going on with {fit} picture(s) at a time.")
            latents = torch.cat(latents)
            finite = torch.isfinite(latents.flatten(1)).all(dim=1).tolist()
            for row, tensor, good in zip(group, latents, finite, strict=True):
                if row not in missing:
                    continue
                if not good:
                    raise ValueError(
                        f"The VAE gave NaN or infinite latents for {pictures.name(first_sample[row])}; use"
                        " --vae_dtype=bf16 or fp32."
                    )
                writer.add(keys[row], tensor)
                done += 1
                bar.update()
            writer.flush_if_due()
    del vae
    devices.empty_cache(device)
    return done, time.monotonic() - started
