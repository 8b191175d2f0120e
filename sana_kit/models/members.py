"""Members of the SANA family, by the pipeline class that a checkpoint's model_index.json names."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Member:
    """How checkpoints of one pipeline class are drawn with.

    Attributes:
        name: for messages.
        num_inference_steps, guidance_scale: of an image unless told otherwise.
        strength: of an image that begins from another one, unless told otherwise.
        sprint: whether it is SANA-Sprint: few steps along a trigonometric path (SCMScheduler), guidance as an input of
            the transformer, no negative prompt. Else noise and image are mixed linearly (flow matching), and guidance
            is the difference of two predictions.
    """

    name: str
    num_inference_steps: int
    guidance_scale: float
    strength: float
    sprint: bool = False


_SANA = Member("SANA", 28, 2.0, 0.6)
_SPRINT = Member("SANA-Sprint", 2, 4.5, 0.5, sprint=True)

# The pipelines with perturbed attention or a ControlNet have SanaPipeline's parts, and its image without those two.
MEMBERS = {
    "SanaPipeline": _SANA,
    "SanaPAGPipeline": _SANA,
    "SanaControlNetPipeline": _SANA,
    "SanaSprintPipeline": _SPRINT,
    "SanaSprintImg2ImgPipeline": _SPRINT,
}

TRAINED = ("SanaPipeline",)  # what the trainer takes

NOT_TRAINED = (
    "it is SANA-Sprint, which is made by distilling a teacher model with an adversarial loss; this kit does not do"
    " that, and plain flow matching would undo it"
)
