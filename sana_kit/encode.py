"""Encode a data set without training, so that one encoding serves many runs. Any number of processes and machines.

    python -m sana_kit.encode --encodings_dir=STORE --pretrained_model_name_or_path=MODEL --dataset_name=IMAGES \
        --caption_column=text --resolution=1024
    accelerate launch --multi_gpu --num_processes 8 -m sana_kit.encode ... the same ...

The flags are the trainer's (its --help explains them): those of the model, the images, the captions and the VAE count
here, and a training with the same ones and the same --encodings_dir finds everything encoded. Every process encodes
its share. Killed or stopped, the same command goes on from what is there. Captions of --validation_prompt are encoded,
too. With --with_prior_preservation the class images are drawn as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sana_kit.errors import Problem, UserError, run_as_script
from sana_kit.training.config import parse_args


def main(argv: Sequence[str] | None = None) -> int:
    """Encode; returns the exit code: 0, or 143 / 130 after a signal. See the head of this file.

    Raises:
        UserError: all problems with the flags, before a weight is loaded; images or captions that cannot be used.
    """
    config = parse_args(argv, "Encode a data set without training, for many runs; the flags are the trainer's.")
    if config.encodings_dir is None:
        raise UserError(Problem("encodings_dir", None, "needed: it says where the encodings go", "Name a folder."))
    if config.streaming:
        reason = "a stream keeps a window of its encodings, and this command all of them"
        raise UserError(Problem("streaming", None, reason, "Leave it out here, or train with it."))
    from sana_kit.training.encode_only import encode_only  # torch and diffusers: after the command line

    # Nothing is written elsewhere, and what a training left in its output folder is no matter of an encoding.
    return encode_only(config.replaced(output_dir=config.encodings_dir, resume_from_checkpoint=None, report_to="none"))


if __name__ == "__main__":
    sys.exit(run_as_script(main, expected=(ValueError,)))
