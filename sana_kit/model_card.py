"""The model card (README.md, in the hub's format) beside a run's weights, and the upload to the hub.

Used by the trainer at its end (`--push_to_hub` uploads). By hand, from an output folder:
    python -m sana_kit.model_card OUTPUT_DIR                                   writes the card again
    python -m sana_kit.model_card OUTPUT_DIR --push_to_hub USER/NAME           and uploads card, images and weights
The token of the upload is the stored login (`hf auth login`) or the environment's HF_TOKEN; it is written nowhere.
The text is in model_card_template.md.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import HfApi, ModelCardData
from PIL import Image

from patch_sana import ADAPTER_FILE
from sana_kit.card_snippet import snippet
from sana_kit.data.sets import data_sets, several
from sana_kit.encodings.instruction import parse_instruction
from sana_kit.files import write_atomic
from sana_kit.flags import Parser, is_secret
from sana_kit.launchers import accelerate_flags
from sana_kit.runlog import load_run

MARK = "<!-- Written by sana_kit.model_card. Delete this line to keep your own text: the card is then left alone. -->"
LICENSE_MARK = "CHOOSE A LICENCE BEFORE PUBLISHING"
IMAGE_FOLDER = "model_card"
PLACEHOLDER = "USER/REPOSITORY"  # until the upload knows the name
BASE_PLACEHOLDER = "PATH_OR_NAME_OF_THE_BASE_MODEL"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
_PACKAGES = ("torch", "torch_npu", "diffusers", "transformers", "accelerate", "deepspeed", "peft", "safetensors")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_SECRET_TEXT = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")
REMOVED = "REMOVED"
# What a run of each mode makes, and how the hub calls its relation to the base model.
_TRAINED = {
    "lora": ("LoRA weights", "adapter"),
    "lokr": ("LoKr weights", "adapter"),
    "loha": ("LoHa weights", "adapter"),
    "full": ("transformer weights (all of them trained)", "finetune"),
    "controlnet": ("ControlNet weights", "adapter"),
}
_SHOWN_SETTINGS = (
    ("max_train_steps", "steps"),
    ("train_batch_size", "batch size per device"),
    ("gradient_accumulation_steps", "gradient accumulation"),
    ("resolution", "resolution"),
    ("learning_rate", "learning rate"),
    ("lr_scheduler", "schedule"),
    ("optimizer", "optimizer"),
    ("weighting_scheme", "weighting scheme"),
    ("flow_shift", "flow shift"),
    ("mixed_precision", "precision"),
    ("seed", "seed"),
)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a training, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def redact_command(command: str | Sequence[str]) -> str:
    """A command line without secrets, otherwise as it was: values of token, secret, password and key flags and
    environment variables, hub tokens anywhere, and passwords inside URLs become REMOVED.
    """
    words = shlex.split(command) if isinstance(command, str) else list(command)
    result, hide_next = [], False
    for word in words:
        if hide_next and not word.startswith("--"):
            hide_next = False
            result.append(REMOVED)
            continue
        name, equals, _ = word.partition("=")
        secret = is_secret(name.lstrip("-").replace("-", "_"))
        hide_next = secret and word.startswith("--") and not equals
        result.append(f"{name}={REMOVED}" if secret and equals else _SECRET_TEXT.sub(REMOVED, word))
    return shlex.join(result)


def this_command() -> str:
    """The command line of this process under accelerate, with accelerate's flags, without secrets."""
    return redact_command(["accelerate", "launch", *accelerate_flags(sys.argv[0]), *sys.argv])


def without_local_paths(command: str | Sequence[str]) -> str:
    """A command line whose local paths are shortened to their last part; flags and everything else stay."""
    words = shlex.split(command) if isinstance(command, str) else list(command)
    result = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if re.match(r"(~|\.{1,2})?/", value):
            value = Path(value).name or value
        result.append(f"{flag}{equals}{value}")
    return shlex.join(result)


def hub_id(name: str | None) -> str | None:
    """`name` where it can be a repository of the hub; None for nothing, and for local folders (no card tells them)."""
    if not name or os.path.exists(name) or not _HUB_ID.match(name):
        return None
    return name


def _base_model(name: str | None) -> str | None:
    """The hub's name of the base model; a local copy may still know it from its model_index.json."""
    found = hub_id(name)
    index = Path(name or "") / "model_index.json"
    if found is None and name and index.is_file():
        try:
            found = hub_id(json.loads(index.read_text(encoding="utf-8")).get("_name_or_path"))
        except (ValueError, AttributeError):
            return None
    return found


def _front_matter(text: str) -> dict:
    """The metadata of a card; {} where there is none."""
    found = re.match(r"^---\s*\n(.*?)\n---\s*(\n|$)", text, re.S)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _fence(text: str, language: str) -> str:
    """A code block that `text` cannot break out of."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _inline(text: str) -> str:
    """`text` as inline code, on one line, in a table cell too."""
    text = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _validation_images(output_dir: Path, last: bool) -> list[dict]:
    """[{"file", "prompt", "seed"}] of the last (or first) validation in the log whose images are there."""
    if not (output_dir / "train_log.jsonl").is_file():
        return []
    validations = load_run(output_dir / "train_log.jsonl").validations
    for line in reversed(validations) if last else validations:
        files, prompts, seeds = (line.get(key) or [] for key in ("files", "prompts", "seeds"))
        found = [
            {
                "file": output_dir / file,
                "prompt": prompts[i] if i < len(prompts) else "",
                "seed": seeds[i] if i < len(seeds) else None,
            }
            for i, file in enumerate(files)
            if (output_dir / file).is_file()
        ]
        if found:
            return found
    return []


def _copy_images(output_dir: Path, images: Sequence[dict], prefix: str, limit: int) -> list[dict]:
    """Copies of at most 1024 px in `model_card/`, named `prefix`_NN.png; each item with the copy's "url" added."""
    folder, copies = output_dir / IMAGE_FOLDER, []
    for number, entry in enumerate(images[:limit]):
        with Image.open(entry["file"]) as opened:
            copy = opened.convert("RGB")
        copy.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
        path = folder / f"{prefix}_{number:02d}.png"
        write_atomic(path, functools.partial(copy.save, format="PNG", optimize=True))
        copies.append({**entry, "url": f"{IMAGE_FOLDER}/{path.name}"})
    for stale in folder.glob(f"{prefix}_*.png"):
        if not any(copy["url"].endswith(stale.name) for copy in copies):
            stale.unlink()
    return copies


def _pairs(before: list[dict], after: list[dict]) -> list[dict]:
    """[{"prompt", "before", "after"}] of images of the same prompt and seed; none where both are the same files."""
    known = {(item["prompt"], item["seed"]): item for item in before}
    return [
        {"prompt": item["prompt"], "before": known[key]["url"], "after": item["url"]}
        for item in after
        if (key := (item["prompt"], item["seed"])) in known and known[key]["file"] != item["file"]
    ]


def _base_licence(base_model: str | None) -> str | None:
    """The licence that the card of a local copy of the base model names."""
    card = Path(base_model or "") / "README.md"
    if not base_model or not card.is_file():
        return None
    data = _front_matter(card.read_text(encoding="utf-8", errors="replace"))
    return data.get("license_name") or data.get("license")


def _render(**context: object) -> str:
    """The template filled in; values of the user are escaped by `fence` and `inline`."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(fence=_fence, inline=_inline)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(mark=MARK, **context)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _widget(shown: list[dict], prompts: Sequence[str]) -> list[dict]:
    """The hub's gallery: the images with their prompts, prompts alone where there is no image."""
    with_images = [{"text": item["prompt"] or " ", "output": {"url": item["url"]}} for item in shown]
    return with_images or [{"text": prompt} for prompt in prompts]


def write_model_card(
    output_dir: str | os.PathLike,
    *,
    base_model: str,
    dataset: str | Sequence[str] | None = None,
    trigger: str | None = None,
    validation_prompts: Sequence[str] = (),
    command: str | Sequence[str] | None = None,
    train_mode: str = "lora",
    rank: int | None = None,
    lora_alpha: float | None = None,
    license: str | None = None,
    versions: dict[str, str] | None = None,
    images: Sequence[dict] | None = None,
    repo_id: str | None = None,
    settings: dict | None = None,
) -> Path:
    """Write `output_dir/README.md`, the card of the weights beside it; returns its path.

    The licence is the user's to choose: the card says so until the front matter names one, and a licence that stands
    there already is kept. A README.md that this function did not write (or whose mark was removed) is left alone; the
    card then goes to README.generated.md.

    Args:
        base_model: hub name, or a local folder, whose path the card does not tell.
        dataset: hub name of the data set, or a local folder (not told either); or several.
        trigger: words that the captions share; None where they share none.
        validation_prompts: example prompts, used where no image is there.
        command: command line of the run; secrets are removed from it, local paths shortened.
        train_mode: "lora", "lokr", "loha", "full" or "controlnet".
        rank, lora_alpha: of the adapter.
        license: a licence id of the hub, such as "apache-2.0".
        versions: {package: version}; default those installed.
        images: [{"file": path, "prompt": str, "seed": int or None}]; default the last validation of the run's log.
        repo_id: repository name for title and usage; default a placeholder.
        settings: the run's configuration; default the log's. "instruction" in it is what prompts had before them:
            "default" (SanaPipeline's own), None, or a list of lines.

    Raises:
        ValueError: an unknown train_mode.
    """
    if train_mode not in _TRAINED:
        raise ValueError(f"train_mode={train_mode!r}: must be one of {', '.join(_TRAINED)}.")
    output_dir, lora = Path(output_dir), train_mode in ("lora", "lokr", "loha")
    path, kept = _where_to_write(output_dir)
    settings = _logged_settings(output_dir) if settings is None else settings
    base, licence = _base_model(base_model), {"license": license} if license else kept
    data = [found for name in several(dataset) if (found := hub_id(name))]
    chosen = _validation_images(output_dir, last=True) if images is None else list(images)
    shown = _copy_images(output_dir, chosen, "image", limit=8)
    before = _copy_images(output_dir, _validation_images(output_dir, last=False), "before", limit=8)
    widget = _widget(shown, validation_prompts)
    prompts = [*(item["prompt"] for item in shown), *validation_prompts, trigger, "a photo of a red rose"]
    example = next(prompt for prompt in prompts if prompt).replace("\n", " ")
    told = versions if versions is not None else package_versions()
    what = _TRAINED[train_mode][0] + (f" of rank {rank}" if lora and rank else "")
    card = _render(
        card_data=_card_data(base, data, train_mode, licence, trigger, widget),
        title=(repo_id or output_dir.resolve().name).split("/")[-1],
        gallery=bool(shown),
        what=what,
        base_link=_link(base),
        data_link=" and ".join(_link(name, "datasets/") for name in data) or None,
        trigger=trigger,
        snippet=snippet(base or BASE_PLACEHOLDER, repo_id or PLACEHOLDER, settings, example, train_mode),
        pairs=_pairs(before, shown),
        rows=_setting_rows(base, rank if lora else None, lora_alpha, settings),
        command=without_local_paths(redact_command(command)) if command else None,
        versions=", ".join(f"{name} {number}" for name, number in told.items()),
        licence=licence.get("license"),
        licence_mark=LICENSE_MARK,
        base_licence=_base_licence(base_model),
    )
    return write_atomic(path, lambda file: file.write(card.encode()))


def _trained(config: dict) -> str:
    """What a run of that configuration trained: a key of _TRAINED."""
    mode = config.get("train_mode") or "lora"
    return config.get("adapter_type") or mode if mode == "lora" else mode


def _logged_settings(output_dir: Path) -> dict:
    """The configuration of the run's log, with the "instruction" that it names; {} without one.

    Raises:
        UserError: the instruction was a file, which is not there any more.
    """
    log = output_dir / "train_log.jsonl"
    configs = load_run(log).configs if log.is_file() else []
    settings = dict(configs[-1]) if configs else {}
    named = settings.get("complex_human_instruction", "default")
    if not isinstance(named, str) or named.strip().lower() != "default":
        settings["instruction"] = parse_instruction(named)
    return settings


def _setting_rows(base: str | None, rank: int | None, lora_alpha: float | None, settings: dict) -> list[tuple]:
    """(name, value) of the table of settings."""
    rows = [("base model", _inline(base) if base else "a local copy")]
    rows += [("rank, alpha", f"{rank}, {lora_alpha if lora_alpha is not None else rank}")] if rank else []
    return rows + [(label, _inline(settings[key])) for key, label in _SHOWN_SETTINGS if settings.get(key) is not None]


def _where_to_write(output_dir: Path) -> tuple[Path, dict]:
    """(path of the card, licence entries that the user put into the card that is there)."""
    path = output_dir / "README.md"
    previous = path.read_text(encoding="utf-8") if path.is_file() else ""
    kept = {key: value for key, value in _front_matter(previous).items() if key.startswith("license") and value}
    return (output_dir / "README.generated.md" if previous and MARK not in previous else path), kept


def _card_data(base: str, data: list[str], mode: str, licence: dict, trigger: str | None, widget: list[dict]) -> str:
    """The front matter as YAML."""
    tags = ["text-to-image", "diffusers", "diffusers-training", "sana", "sana-diffusers"]
    tags += {"lora": ["lora", "template:sd-lora"], "controlnet": ["controlnet"]}.get(mode, [])
    more: dict[str, Any] = {"base_model_relation": _TRAINED[mode][1]} if base else {}
    more |= licence
    more |= {"instance_prompt": trigger} if trigger else {}
    more |= {"widget": widget} if widget else {}
    card = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
        datasets=data or None,
        **more,
    )
    mark = "" if licence else f"# {LICENSE_MARK}: put e.g. `license: apache-2.0` in place of this line\n"
    return mark + card.to_yaml()


def _link(name: str | None, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if name else ""


def push(
    output_dir: str | os.PathLike,
    repo_id: str,
    token: str | None = None,
    *,
    private: bool = False,
    commit_message: str = "SANA fine-tuning",
) -> str:
    """Upload the card, its images and the weights to `repo_id`, made where it is missing; returns its address.

    Nothing else of the folder leaves the machine: no checkpoints, no encodings, no logs.

    Args:
        repo_id: "name" or "user/name".
        token: None takes the stored login or HF_TOKEN.

    Raises:
        ValueError: a name that cannot be a repository's, or nothing to upload.
        RuntimeError: the hub refused or was not reached; the message names the command that tries again.
    """
    output_dir = Path(output_dir)
    problems = []
    if not _HUB_ID.match(repo_id or ""):
        problems.append(f"--hub_model_id={repo_id}: not a repository name. Use NAME or USER/NAME.")
    if not (output_dir / "README.md").is_file():
        problems.append(f"{output_dir}/README.md: no model card there. `python -m sana_kit.model_card` writes it.")
    folders = [output_dir / part / "config.json" for part in ("transformer", "controlnet")]
    if not any(path.is_file() for path in (output_dir / ADAPTER_FILE, *folders)):
        problems.append(
            f"{output_dir}: neither {ADAPTER_FILE} nor transformer/ nor controlnet/ is there; did the run end?"
        )
    if problems:
        raise ValueError(" ".join(problems))
    if not _front_matter((output_dir / "README.md").read_text(encoding="utf-8")).get("license"):
        print(f"warning: {output_dir}/README.md: {LICENSE_MARK} (front matter, `license:`).", file=sys.stderr)

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private, repo_type="model").repo_id
        card = (output_dir / "README.md").read_text(encoding="utf-8")
        if MARK in card and PLACEHOLDER in card:
            named = card.replace(PLACEHOLDER, repo_id).encode()
            write_atomic(output_dir / "README.md", lambda file: file.write(named))
        api.upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            commit_message=commit_message,
            allow_patterns=["README.md", ADAPTER_FILE, f"{IMAGE_FOLDER}/*.png", "transformer/*", "controlnet/*"],
        )
    except Exception as error:  # of huggingface_hub, its HTTP client or the network, by version
        again = f"python -m sana_kit.model_card {shlex.quote(str(output_dir))} --push_to_hub {repo_id}"
        reason = _SECRET_TEXT.sub(REMOVED, str(error))
        raise RuntimeError(
            f"--push_to_hub: {repo_id} could not be uploaded ({type(error).__name__}: {reason}). The weights are safe"
            f" in {output_dir}. Check the login (`hf auth login`, or HF_TOKEN) and the network, then: {again}"
        ) from error
    return f"{api.endpoint}/{repo_id}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m sana_kit.model_card", description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", help="output folder of a training run")
    parser.add_argument("--license", help="licence id of the hub, such as apache-2.0")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="upload card, images and weights there")
    parser.add_argument("--private", action="store_true", help="make the repository private where it is new")
    options = parser.parse_args(arguments)
    output_dir = Path(options.output_dir)
    try:
        configs = load_run(output_dir / "train_log.jsonl").configs
        if not configs:
            raise ValueError(f"{output_dir}/train_log.jsonl: holds no configuration.")
        config = configs[-1]
        prompts = config.get("validation_prompt") or []
        path = write_model_card(
            output_dir,
            base_model=config.get("pretrained_model_name_or_path"),
            dataset=[data_set.name for data_set in data_sets(config)],
            trigger=config.get("trigger"),
            validation_prompts=[prompts] if isinstance(prompts, str) else prompts,
            command=config.get("command"),
            train_mode=_trained(config),
            rank=config.get("rank"),
            lora_alpha=config.get("lora_alpha"),
            license=options.license,
        )
        print(path)
        if options.push_to_hub:
            print(push(output_dir, options.push_to_hub, private=options.private))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
