"""Checks of what images are drawn from and along: init image, mask, ControlNet, perturbed attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sana_kit.data.decode import inspect_image
from sana_kit.errors import ImageError, Problem, setting
from sana_kit.files import expand
from sana_kit.generation.inputs import InputImage, Inputs, first_step
from sana_kit.generation.jobs import Prompt
from sana_kit.inference.config import InputSettings
from sana_kit.inference.prompts import FIELD as PROMPTS
from sana_kit.models.folder import Model
from sana_kit.models.loading import draws_along_flow
from sana_kit.models.parts import OwnPart, find_controlnet

PAG_LAYERS = {20: (8,), 28: (14,)}  # by blocks: those of NVlabs' configurations of 1.6B and 0.6B


@dataclasses.dataclass(frozen=True)
class InputPlan:
    """`of(prompt)` are the inputs of a prompt's images."""

    of: Callable[[Prompt], Inputs]
    controlnet: OwnPart | None
    pag_layers: tuple[int, ...]


class _Reader:
    """Image files by path, each looked at once; problems name the flag or the prompts file."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        self.known: dict[str, InputImage | None] = {}

    def read(self, field: str, path: str) -> InputImage | None:
        if path not in self.known:
            self.known[path] = self._look(field, path)
        return self.known[path]

    def _look(self, field: str, path: str) -> InputImage | None:
        try:
            data = expand(path).read_bytes()
            facts = inspect_image(data, path)
        except OSError as error:
            self.problems.append(Problem(field, path, f"cannot be read ({error.strerror})"))
        except ImageError as error:
            self.problems.append(Problem(field, None, str(error)))
        else:
            return InputImage(str(expand(path)), facts.sha256.hex(), facts.width, facts.height)
        return None


def plan_inputs(
    settings: InputSettings, model: Model, prompts: Sequence[Prompt], *, num_inference_steps: int, scheduler: str
) -> tuple[InputPlan, list[Problem]]:
    """(plan, problems) of a run's inputs; a prompt's own entries count before the flags'.

    Args:
        num_inference_steps: of every image.
        scheduler: as in `load_scheduler`.
    """
    problems: list[Problem] = []
    reader = _Reader(problems)
    made = {prompt: _of_prompt(prompt, settings, model, num_inference_steps, reader) for prompt in prompts}
    begins = [inputs for inputs in made.values() if inputs.init_image is not None]
    if begins and not model.member.sprint and not draws_along_flow(model, scheduler):
        reason = f"the checkpoint's {model.scheduler_config.get('_class_name')} does not mix image and noise linearly"
        problems.append(Problem("init_image", None, reason, "Use scheduler flow-dpm or flow-euler."))
    if settings.strength is not None and not begins:
        problems.append(Problem("strength", settings.strength, "has no effect without an init image", "Name one."))
    controlnet = _controlnet(settings, model, list(made.values()), problems)
    layers = _pag_layers(settings, model, problems)
    return InputPlan(lambda prompt: made[prompt], controlnet, layers), list(dict.fromkeys(problems))


def _of_prompt(prompt: Prompt, settings: InputSettings, model: Model, steps: int, reader: _Reader) -> Inputs:
    """The inputs of one prompt; what is wrong goes to the reader's problems."""
    images: dict[str, Any] = {}
    for field in ("init_image", "mask_image", "control_image"):
        own, flag = getattr(prompt, field), getattr(settings, field)
        if own or flag:
            images[field] = reader.read(PROMPTS if own else field, own or flag)
    init, mask = images.get("init_image"), images.get("mask_image")
    masked = "mask_image" in images
    strength = prompt.strength or settings.strength or (1.0 if masked else model.member.strength)
    if "init_image" not in images:
        strength = 1.0
        if masked:
            reader.problems.append(Problem("mask_image", None, "has no effect without an init image", "Name one."))
    elif not masked and 0 < strength <= 1 and first_step(steps, strength) == 0:
        field = "strength" if prompt.strength is None else PROMPTS
        reason = f"of {steps} step(s) none is left out, so the init image would have no effect"
        remedy = "Take more steps." if steps == 1 else f"Take at most {(steps - 1) / steps:.2g}, or more steps."
        reader.problems.append(Problem(field, strength, reason, remedy))
    if masked and model.member.sprint:
        reason = f"{model.member.name} has too few steps for the kept part to guide the rest"
        reader.problems.append(Problem("mask_image", None, reason, "Draw with SANA."))
    if init and mask and (init.width, init.height) != (mask.width, mask.height):
        sizes = f"is {mask.width}x{mask.height} px, and the init image {init.width}x{init.height}"
        reader.problems.append(Problem("mask_image", mask.path, sizes, "Give a mask of the image's size."))
    scales: dict[str, Any] = {"control_scale": settings.control_scale} if "control_image" in images else {}
    return Inputs(**images, **scales, strength=strength, pag_scale=settings.pag_scale)


def _controlnet(
    settings: InputSettings, model: Model, inputs: Sequence[Inputs], problems: list[Problem]
) -> OwnPart | None:
    """The ControlNet of a run; every image needs one to see, or none has one."""
    seen = [entry.control_image is not None for entry in inputs]
    if settings.controlnet is None:
        if any(seen):
            problems.append(Problem("control_image", None, "has no effect without a ControlNet", "Name a controlnet."))
        elif settings.control_scale != 1.0:
            reason = "has no effect without a ControlNet"
            problems.append(Problem("control_scale", settings.control_scale, reason, "Name a controlnet."))
        return None
    found, wrong = find_controlnet(settings.controlnet, model)
    problems += wrong
    if not all(seen) and not problems:
        reason = f"{seen.count(False)} of {len(seen)} prompts have no control image"
        problems.append(Problem("controlnet", settings.controlnet, reason, f"Name one by {setting('control_image')}."))
    return found


def _pag_layers(settings: InputSettings, model: Model, problems: list[Problem]) -> tuple[int, ...]:
    """The blocks that perturbed attention guidance perturbs; none without it."""
    if not settings.pag_scale:
        if settings.pag_layers:
            shown = " ".join(map(str, settings.pag_layers))
            problems.append(Problem("pag_layers", shown, f"has no effect without {setting('pag_scale')}"))
        return ()
    if model.member.sprint:
        reason = f"{model.member.name} makes one prediction a step, which was distilled to be the guided one"
        problems.append(Problem("pag_scale", settings.pag_scale, reason, "Draw with SANA."))
        return ()
    count = model.transformer_config["num_layers"]
    layers = settings.pag_layers or PAG_LAYERS.get(count, ())
    if not layers:
        reason = f"this model has {count} blocks, for which no choice is known"
        problems.append(Problem("pag_layers", None, reason, "Name blocks, one near the middle first."))
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        problems.append(Problem("pag_layers", wrong[0], f"this model's blocks are 0 to {count - 1}"))
    return tuple(dict.fromkeys(layers))
