"""A small trainer of our own with the lines that `patch_sana.py` looks for in diffusers'
train_dreambooth_lora_sana.py.

Used by test_patch_sana.py: patched by the tool, then run under DeepSpeed ZeRO-2. By hand, unpatched, on one process:
    python tests/helpers/fake_upstream_trainer.py --pretrained_model_name_or_path TINY_PIPELINE --output_dir OUT
    --max_train_steps 4

It trains LoRA on a few fixed coloured squares with random prompt embeddings. Everything random follows from --seed,
the step and the rank alone, so a resumed run sees what an undisturbed one sees, and dropout included, both end with
the same bits.
"""

import argparse
import json
import os
import shutil

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from diffusers.utils import is_wandb_available
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

if is_wandb_available():
    import wandb


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=6)
    parser.add_argument("--checkpointing_steps", type=int, default=3)
    parser.add_argument("--checkpoints_total_limit", type=int, default=None)
    parser.add_argument("--resume_from_checkpoint", default=None, help="a checkpoint-N folder name, or latest")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default=None)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report_to", default=None)
    return parser.parse_args()


def newest_checkpoints(folder):
    names = [name for name in os.listdir(folder) if name.startswith("checkpoint-")]
    return sorted(names, key=lambda name: int(name.split("-")[1]))


def main(args):
    no_device = not torch.cuda.is_available()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if no_device else [],
    )
    os.makedirs(args.output_dir, exist_ok=True)
    set_seed(args.seed)

    vae = AutoencoderDC.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae")
    transformer = SanaTransformer2DModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="transformer")
    transformer.requires_grad_(False)
    vae.requires_grad_(False)
    weight_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    vae.to(dtype=torch.float32)
    transformer.to(accelerator.device, dtype=weight_dtype)
    transformer.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.rank,
            lora_dropout=0.1,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v"],
        )
    )

    def unwrap_model(model):
        return accelerator.unwrap_model(model)

    def save_model_hook(models, weights, output_dir):
        for model in models:
            SanaPipeline.save_lora_weights(output_dir, get_peft_model_state_dict(unwrap_model(model)))
            weights.pop()

    def load_model_hook(models, input_dir):
        state = SanaPipeline.lora_state_dict(input_dir)
        while models:
            model = unwrap_model(models.pop())
            set_peft_model_state_dict(model, {key.removeprefix("transformer."): state[key] for key in state})

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)

    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)

    # Four squares of one colour each, (4, 3, 64, 64) in [-1, 1], as latents (4, C, 8, 8); embeddings (4, 12, D).
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.rand(4, 3, 1, 1, generator=generator).expand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images.to(vae.dtype)).latent * vae.config.scaling_factor
    embeddings = torch.randn(4, 12, transformer.config.caption_channels, generator=generator)
    data = torch.utils.data.DataLoader(list(zip(latents.float(), embeddings, strict=True)), batch_size=1)

    transformer, optimizer, data = accelerator.prepare(transformer, optimizer, data)

    global_step = 0
    if args.resume_from_checkpoint:
        name = args.resume_from_checkpoint
        name = newest_checkpoints(args.output_dir)[-1] if name == "latest" else name
        accelerator.load_state(os.path.join(args.output_dir, name))
        global_step = int(name.split("-")[1])
        accelerator.print(f"resumed from step {global_step}")

    seen = global_step % len(data)  # of this epoch, before the checkpoint
    done = False
    while not done:
        transformer.train()
        for position, (clean, embedding) in enumerate(data):
            if position < seen:
                continue
            generator = torch.Generator().manual_seed(1000 * global_step + accelerator.process_index)
            set_seed(1000 * global_step + accelerator.process_index)  # dropout
            noise = torch.randn(clean.shape, generator=generator).to(clean.device)
            sigma = torch.rand(clean.shape[0], generator=generator).to(clean.device)
            noised = (1 - sigma.view(-1, 1, 1, 1)) * clean + sigma.view(-1, 1, 1, 1) * noise
            prediction = transformer(
                hidden_states=noised.to(weight_dtype),
                encoder_hidden_states=embedding.to(weight_dtype),
                encoder_attention_mask=torch.ones(embedding.shape[:2], device=embedding.device),
                timestep=sigma * 1000,
                return_dict=False,
            )[0]
            loss = (prediction.float() - (noise - clean)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

            if accelerator.sync_gradients:
                global_step += 1

                if accelerator.is_main_process:
                    if global_step % args.checkpointing_steps == 0:
                        if args.checkpoints_total_limit is not None:
                            old = newest_checkpoints(args.output_dir)
                            for name in old[: max(0, len(old) - args.checkpoints_total_limit + 1)]:
                                shutil.rmtree(os.path.join(args.output_dir, name))
                        save_path = os.path.join(args.output_dir, f"checkpoint-{global_step}")
                        accelerator.save_state(save_path)

            accelerator.print(json.dumps({"step": global_step, "loss": loss.item(), "vae": str(vae.dtype)}))
            if args.report_to == "wandb" and accelerator.is_main_process:
                wandb.log({"loss": loss.item()})

            if global_step >= args.max_train_steps:
                break

        seen = 0
        done = global_step >= args.max_train_steps

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        layers = get_peft_model_state_dict(unwrap_model(transformer))
        SanaPipeline.save_lora_weights(args.output_dir, transformer_lora_layers=layers)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
