"""The trainer's settings: flag, default, help, range and what a resume makes of it stand once, in a field here.

A new flag is one field of a section, and the room that uses it. Checks that need more than one setting, a file or a
library are in training/check.py. Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses

from sana_kit.data.sets import DataSet, SizeRule, data_set_of, data_sets, resolutions_of, size_rule
from sana_kit.flags import REQUIRED, flag
from sana_kit.training.optimizers import OPTIMIZERS, UNDER_DEEPSPEED, one_of

LR_SCHEDULERS: tuple[str, ...] = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant")
LR_SCHEDULERS += ("constant_with_warmup", "piecewise_constant")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "all", "none")
WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")
LORA_STARTS = ("gaussian", "kaiming", "orthogonal", "pissa", "olora")


def _vae_batch(text: str) -> int | str:
    """'auto' or a whole number of at least 1."""
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is neither auto nor a whole number of at least 1")
    return int(text)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    config: str | None = flag(
        None, "YAML file of settings; the command line overrides it. Each run saves its own as run.yaml.", path=True
    )
    dry_run: bool = flag(False, "Check everything, print the plan and end: 0 if the run can start, else 1.")
    dry_run_processes: int | None = flag(None, "Processes that the plan counts with; default: the launcher's.", low=1)
    chip: str | None = flag(None, "Chip that the plan counts with, e.g. 910B or H100; default: this machine's.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    pretrained_model_name_or_path: str = flag(
        REQUIRED, "Folder of a diffusers SanaPipeline, or its hub name.", path=True, resume="told"
    )
    revision: str | None = flag(None, "Hub revision of the model.")
    variant: str | None = flag(None, "Variant of the weight files, e.g. bf16.")
    cache_dir: str | None = flag(None, "Where downloads are kept.", path=True)
    train_mode: str = flag(
        "lora",
        "Train a LoRA adapter, every weight, or a ControlNet beside the frozen transformer.",
        choices=("lora", "full", "controlnet"),
        resume="fixed",
    )


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    adapter_type: str = flag(
        "lora",
        "Kind of adapter: lora (with --use_dora DoRA), lokr or loha; SanaPipeline itself loads lora alone.",
        resume="fixed",
    )
    rank: int = flag(4, "LoRA rank.", low=1, resume="fixed")
    lora_alpha: int | None = flag(
        None,
        "LoRA alpha; the update is scaled by alpha / rank. Default: the rank, a scale of 1.",
        low=1,
        resume="fixed",
    )
    lora_dropout: float = flag(0.0, "Dropout before the LoRA's first matrix.", low=0, below=1, resume="told")
    lora_layers: str | None = flag(
        None,
        "attention, attention+ffn, all, comma-separated names of layers, or a regular expression for whole names;"
        " default to_k,to_q,to_v.",
        resume="fixed",
    )
    lokr_factor: int = flag(
        -1, "LoKr: size of the first factor; -1: about the root of the layer's.", low=-1, resume="fixed"
    )
    use_rslora: bool = flag(False, "rsLoRA: scale the update by alpha / sqrt(rank), for high ranks.", resume="fixed")
    use_dora: bool = flag(False, "DoRA: train a magnitude for each output beside the LoRA.", resume="fixed")
    init_lora_weights: str = flag(
        "gaussian", "How the first matrix begins; the second is zero but with orthogonal.", choices=LORA_STARTS
    )
    init_lora: str | None = flag(
        None,
        "Adapter (any layout) to begin with, with its ranks, alphas, layers; or a sum: a:0.8,b:0.3.",
        path=True,
        resume="told",
    )
    save_merged: bool = flag(False, "Also write transformer/ with the LoRA merged into the weights.")

    @property
    def alpha(self) -> float:
        """LoRA alpha as it holds."""
        return self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def kind(self) -> str:
        """What is trained, as it is written."""
        return {"lokr": "LoKr", "loha": "LoHa"}.get(self.adapter_type, "DoRA" if self.use_dora else "LoRA")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    dataset_name: str | tuple[str, ...] | None = flag(
        None,
        "Hub name, or a local folder: parquet (pokemon-blip-captions layout) or imagefolder. Repeatable, also beside"
        " --instance_data_dir: several data sets in one run.",
        path=True,
        repeat=True,
    )
    dataset_config_name: str | None = flag(None, "Config of the hub data set.")
    dataset_split: str | None = flag(None, "Split of the data set; default: train, or the only one.")
    instance_data_dir: str | tuple[str, ...] | None = flag(
        None,
        "Folder of images; optional caption in a .txt of the same name, each line one of several. Repeatable.",
        path=True,
        repeat=True,
    )
    data_sets: tuple[dict, ...] = flag(
        (),
        "A data set with settings of its own, a JSON mapping, or in --config a list of mappings: dataset_name or"
        " instance_data_dir, columns, instance_prompt, caption_prefix, caption_suffix, repeats, resolution, buckets,"
        " crop, flip, and weight: samples of an epoch for each of its images. The rest is the run's. Repeatable.",
        repeat=True,
        metavar="JSON",
        convert=data_set_of,
    )
    streaming: bool = flag(
        False,
        "Read --dataset_name's .tar or .parquet shards as the run goes, without listing their rows; a window of images"
        " at a time is encoded, trained on, and removed. Needs --max_train_steps.",
        resume="told",
    )
    stream_window: int = flag(
        4096, "Images of a window of --streaming: so many are shuffled among each other.", low=1, resume="told"
    )
    image_column: str = flag("image", "Column of the images.", heading="columns and masks")
    caption_column: str | None = flag(
        None,
        "Column of the captions, or several, as a,b or weighted as a:3,b:1; a cell may list several captions. Each"
        " time that an image comes, one of its captions is drawn. Without it every image gets --instance_prompt.",
    )
    mask_column: str | None = flag(
        None,
        "Column of loss masks: white counts, black does not. Without it, NAME.mask.png beside an image is its mask.",
    )
    mask_outside: float = flag(
        0.0,
        "Weight of the loss outside the masks; a sample's weights are scaled to a mean of 1.",
        low=0,
        high=1,
        resume="told",
    )
    instance_prompt: str | None = flag(
        None, "Caption of images that have none, e.g. 'a photo of TOK dog'.", heading="captions"
    )
    caption_prefix: str = flag("", "Put before every caption as it is, e.g. 'TOK style, '.")
    caption_suffix: str = flag("", "Put behind every caption as it is.")
    caption_dropout: float = flag(
        0.0,
        "Share of the samples that train with the empty caption; SANA itself was trained with 0.1.",
        low=0,
        high=1,
        resume="told",
    )
    repeats: int = flag(
        1,
        "Use each image this often per epoch, each time with its own crop.",
        low=1,
        resume="told",
        heading="sizes and crops",
    )
    crops_per_image: int = flag(
        1,
        "Random crops and flips encoded of each image; each time that it comes it takes one of them.",
        low=1,
        resume="told",
    )
    resolution: int | tuple[int, ...] = flag(
        512,
        "Side of the square training images, in pixels; with --aspect_ratio_buckets also several, such as 512,1024.",
        low=1,
        convert=resolutions_of,
        resume="told",
    )
    aspect_ratio_buckets: bool = flag(
        False,
        "Train each image at the size of SANA's own tables that is nearest its shape, instead of at a square.",
        resume="told",
    )
    bucket_no_upscale: bool = flag(
        False, "With buckets: an image that is smaller than its bucket keeps its own size.", resume="told"
    )
    center_crop: bool = flag(False, "Crop the centre instead of a random place.", resume="told")
    crop_seed: int | None = flag(
        None,
        "Random crops and flips follow this number and the image's place; default: the image decides, so that every"
        " run finds its encodings again.",
        low=0,
        high=2**63 - 1,
        resume="told",
    )
    random_flip: bool = flag(False, "Flip images horizontally at random.", resume="told")
    skip_bad_images: bool = flag(False, "Leave out images that cannot be read (named and counted).", heading="reading")
    max_sequence_length: int = flag(300, "Most caption tokens that reach the transformer.", low=2, resume="told")
    complex_human_instruction: str = flag(
        "default",
        "Instruction before captions: 'default' (SanaPipeline's own), 'none', a JSON list, or a file.",
        path=True,
        resume="told",
    )
    dataloader_num_workers: int = flag(0, "Worker processes of the loader; 0: in this process.", low=0)

    @property
    def sets(self) -> tuple[DataSet, ...]:
        """All data sets of the run."""
        return data_sets({name: getattr(self, name) for name in self.__dataclass_fields__})

    @property
    def set_weights(self) -> tuple[float, ...] | None:
        """The weights of several data sets; None where all are 1."""
        weights = tuple(data_set.weight for data_set in self.sets)
        return None if all(weight == 1 for weight in weights) else weights

    @property
    def size_rules(self) -> tuple[SizeRule, ...]:
        """The sizes of each data set; none where all are the run's own."""
        rules = tuple(data_set.rule for data_set in self.sets)
        return () if all(rule == size_rule(self) for rule in rules) else rules

    @property
    def side(self) -> int:
        """The largest resolution: what memory and images of a run are reckoned with."""
        return max(side for rule in self.size_rules or (size_rule(self),) for side in rule.sides)


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    control_column: str | None = flag(None, "Column of the control images, beside --image_column.", resume="told")
    control_data_dir: str | tuple[str, ...] | None = flag(
        None,
        "Folder of control images that are called as the training images are; endings may differ. Several data sets"
        " share one, or have one each, in their order (repeatable).",
        path=True,
        repeat=True,
    )
    control_edges: bool = flag(
        False, "Control images are the outlines of the training images, computed.", resume="told"
    )
    controlnet_layers: int | None = flag(
        None, "Blocks of the ControlNet; default 7, or one less than the model has.", low=1, resume="fixed"
    )
    init_controlnet: str | None = flag(
        None,
        "ControlNet to begin with: a folder or hub name; its number of blocks is the run's.",
        path=True,
        resume="told",
    )
    validation_control_image: tuple[str, ...] = flag(
        (), "Control image of the validation prompts: one for all, or repeated, one for each in turn.", repeat=True
    )


@dataclasses.dataclass(frozen=True)
class EncodingConfig:
    encodings_dir: str | None = flag(
        None, "Where latents and prompt embeddings are kept; default output_dir/encodings.", path=True
    )
    encodings_disk_gb: float = flag(
        50.0, "Most GB that --streaming keeps in encodings_dir, images being read included.", above=0
    )
    vae_dtype: str = flag("bf16", "Dtype of the VAE.", choices=("bf16", "fp32"), resume="told")
    vae_batch_size: int | str = flag("auto", "Images per VAE call; 'auto' fits the free memory.", convert=_vae_batch)
    cache_latents: bool = flag(False, "Accepted; latents are always encoded once and kept.")
    offload: bool = flag(False, "Accepted; VAE and text encoder always leave memory after encoding.")


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    with_prior_preservation: bool = flag(False, "Add a loss on images of the class.", resume="told")
    class_data_dir: str | None = flag(None, "Folder of class images; missing ones are generated there.", path=True)
    class_prompt: str | None = flag(None, "Prompt of the class images.", resume="told")
    prior_loss_weight: float = flag(1.0, "Weight of the prior loss.", resume="told")
    num_class_images: int = flag(100, "How many class images there must be.", low=1, resume="told")
    sample_batch_size: int = flag(4, "Images per call when class images are generated.", low=1)


@dataclasses.dataclass(frozen=True)
class LengthConfig:
    seed: int | None = flag(
        None, "Seed of everything; without one a fresh seed is drawn and logged.", low=0, high=2**63 - 1, resume="told"
    )
    train_batch_size: int = flag(4, "Images per device and micro-step.", low=1, resume="told")
    gradient_accumulation_steps: int = flag(1, "Micro-steps per update.", low=1, resume="told")
    num_train_epochs: int = flag(
        1, "Epochs, unless --max_train_steps is given; with class images one of the larger set.", low=1
    )
    max_train_steps: int | None = flag(None, "Number of updates.", low=1, resume="told")


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    gradient_checkpointing: bool = flag(False, "Recompute blocks in the backward pass to save memory.")
    gradient_checkpointing_interval: int = flag(1, "Recompute every n-th block only.", low=1)
    memory_budget: str | None = flag(
        None,
        "Recompute as few blocks as let a step fit: GB of each device that the run may use, or auto, what is free on"
        " it (not on a CPU).",
    )
    mixed_precision: str | None = flag(
        None, "Default: what the accelerate config says.", choices=("no", "fp16", "bf16"), resume="told"
    )
    base_quantization: str | None = flag(
        None,
        "Keep the frozen weights of the blocks in few bits under the LoRA (nf4: bitsandbytes; int8, fp8: torchao); one"
        " process or DDP.",
        choices=("nf4", "int8", "fp8"),
        resume="told",
    )
    allow_tf32: bool = flag(False, "TF32 matrix products on CUDA.", resume="told")
    attention: str = flag(
        "auto", "Kernel of the cross-attention.", choices=("auto", "sdpa", "npu_fusion"), resume="told"
    )
    enable_npu_flash_attention: bool = flag(False, "The same as --attention=npu_fusion.")
    fused_blocks: str = flag(
        "off",
        "Hand-written SANA blocks with fewer passes over memory, where they fit, for compile in a form of its own; off"
        " unless asked for, since their rounding differs: runs begun without them must resume to the bit.",
        choices=("off", "auto"),
        resume="told",
    )
    compile: bool = flag(False, "torch.compile each transformer block (not on NPU).", resume="told")
    cuda_graphs: bool = flag(
        False, "CUDA: compile the transformer, play its passes as graphs of one shape. Not tried on a card yet."
    )
    local_rank: int = flag(-1, "Set by launchers.")


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    flow_shift: float | None = flag(None, "Time-step shift; default: the checkpoint's own.", above=0, resume="told")
    weighting_scheme: str = flag("none", "Time steps and weights.", choices=WEIGHTING_SCHEMES, resume="told")
    logit_mean: float = flag(0.0, "Mean of logit_normal.", resume="told")
    logit_std: float = flag(1.0, "Standard deviation of logit_normal.", above=0, resume="told")
    mode_scale: float = flag(1.29, "Scale of mode.", resume="told")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    optimizer: str = flag(
        "AdamW",
        f"{one_of(OPTIMIZERS)}; under DeepSpeed {UNDER_DEEPSPEED}.",
        resume="fixed",
    )
    learning_rate: float = flag(1e-4, "Peak learning rate.", low=0, resume="told")
    scale_lr: bool = flag(False, "Multiply the rate by batch size, accumulation and processes.")
    lr_scheduler: str = flag("constant", "Course of the learning rate.", choices=LR_SCHEDULERS, resume="told")
    lr_warmup_steps: int = flag(500, "Updates of warm-up, for schedulers that have one.", low=0, resume="told")
    lr_num_cycles: int = flag(1, "Restarts of cosine_with_restarts.", low=1, resume="told")
    lr_power: float = flag(1.0, "Power of polynomial.", resume="told")
    lr_step_rules: str | None = flag(
        None, "piecewise_constant's factors and the updates that they end at, e.g. 1:500,0.1:1000,0.01.", resume="told"
    )
    lora_plus_ratio: float = flag(
        1.0,
        "LoRA+: learning rate of lora_B in units of lora_A's; the paper's is 16.",
        above=0,
        resume="fixed",
        heading="betas and decay",
    )
    use_8bit_adam: bool = flag(False, "The same as --optimizer=adamw8bit.")
    adam_beta1: float = flag(0.9, "First beta.", low=0, below=1, resume="told")
    adam_beta2: float = flag(0.999, "Second beta.", low=0, below=1, resume="told")
    adam_weight_decay: float = flag(1e-04, "Weight decay.", low=0, resume="told")
    no_decay_norms: bool = flag(
        False, "No weight decay on norms, biases and tables of scales and shifts.", resume="fixed"
    )
    adam_weight_decay_text_encoder: float = flag(1e-03, "Accepted; the text encoder is not trained.")
    adam_epsilon: float = flag(1e-08, "Epsilon of AdamW and Prodigy.", low=0, resume="told")
    prodigy_beta3: float | None = flag(None, "Beta3 of Prodigy.", low=0, below=1, resume="told")
    prodigy_decouple: bool = flag(True, "Decoupled weight decay in Prodigy.", resume="told")
    prodigy_use_bias_correction: bool = flag(True, "Bias correction in Prodigy.", resume="told")
    prodigy_safeguard_warmup: bool = flag(True, "Prodigy's safeguard during warm-up.", resume="told")
    max_grad_norm: float = flag(
        1.0, "Clip gradients to this norm; 0: do not clip.", low=0, resume="told", heading="limits and averages"
    )
    ema_decay: float | None = flag(
        None,
        "Average the trained weights with this decay, e.g. 0.999; the average is the result.",
        low=0,
        below=1,
        resume="told",
    )
    ema_only_final: bool = flag(False, "Write the average alone, not the raw weights in raw/ too.")
    on_nan: str = flag(
        "stop", "A loss or gradient that is not finite: stop, or skip the update.", choices=("stop", "skip")
    )
    max_skipped_updates: int = flag(20, "So many skipped updates in a row end the run.", low=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    output_dir: str = flag("sana-dreambooth-lora", "Everything is written there.", path=True)
    checkpointing_steps: int = flag(500, "Write checkpoint-N every so many updates.", low=1)
    checkpoints_total_limit: int | None = flag(None, "Keep at most so many checkpoints.", low=1)
    resume_from_checkpoint: str | None = flag(None, "'latest', checkpoint-N, or a path.", path=True)
    overwrite_output_dir: bool = flag(False, "Set an earlier run in --output_dir aside and start anew.")
    upcast_before_saving: bool = flag(False, "Save the final adapter in float32.")
    push_to_hub: bool = flag(False, "Upload the result.")
    hub_token: str | None = flag(None, "Token for the upload (better: log in beforehand).")
    hub_model_id: str | None = flag(None, "Repository to upload to; default: the output folder's name.")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    validation_prompt: tuple[str, ...] = flag(
        (), "Prompt of images made during and after training; repeatable.", repeat=True
    )
    num_validation_images: int = flag(4, "Images per prompt and validation.", low=0)
    validation_epochs: int = flag(50, "Validate every so many epochs.", low=1)
    validation_steps: int | None = flag(None, "Validate every so many updates instead.", low=1)
    validation_resolution: int | None = flag(None, "Side of the validation images; default --resolution.", low=1)
    validation_inference_steps: int = flag(20, "Denoising steps of the validation images.", low=1)
    validation_guidance_scale: float = flag(4.5, "Guidance scale of the validation images.")
    validation_split: float = flag(
        0, "Images kept from training for a held-out loss: a share below 1, or how many.", low=0
    )
    validation_dataset: str | None = flag(
        None, "Other images for the held-out loss, in the layout and columns of --dataset_name.", path=True
    )
    early_stopping: int | None = flag(
        None, "End after so many held-out losses in a row that were not the lowest.", low=1
    )
    enable_vae_tiling: bool = flag(False, "Accepted; decoding is tiled where the size needs it.")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts to draw, each once; none where no image is asked for."""
        return tuple(dict.fromkeys(self.validation_prompt)) if self.num_validation_images else ()


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    report_to: str = flag("tensorboard", "Tracker.", choices=TRACKERS)
    logging_dir: str = flag("logs", "Folder of the trackers, inside output_dir.")
    logging_steps: int = flag(10, "Print and write figures every so many updates.", low=1)
    peak_tflops: float | None = flag(
        None, "Dense bf16 peak of one device in TFLOP/s, for MFU where it is not known.", above=0
    )
