#!/usr/bin/env bash
# Train on several machines under SLURM: one launcher on each, which starts one process per device. From the kit's folder:
#   sbatch --nodes=4 --gpus-per-node=8 --time=12:00:00 docs/slurm.sh 8 \
#     --model_name=/shared/Sana --dataset_name=/shared/images --output_dir=/shared/output
# The first word is the number of devices of each machine, all others are the launcher's. Ten minutes before the time
# limit, and at `scancel --signal=TERM`, the run saves and ends; submitted once more with
# `-- --resume_from_checkpoint=latest` at the end it goes on from there.
#SBATCH --job-name=sana
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@600
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
devices=$1
shift
${PYTHON:-python3} sana_kit/environment.py >/dev/null   # made once, before all machines ask for it
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SANA_ADDRESS=$address SANA_PORT=$((20000 + SLURM_JOB_ID % 10000)) SANA_PROCESSES=$((devices * SLURM_NTASKS))
# Every machine writes the accelerate config with its own number.
# shellcheck disable=SC2016
srun --wait=300 bash -c '
  config=$(mktemp --suffix=.yaml)
  sed -E "s/^( *)# (deepspeed_multinode_launcher: standard).*/\1\2/
          s/^(# )?main_process_ip:.*/main_process_ip: $SANA_ADDRESS/
          s/^(# )?main_process_port:.*/main_process_port: $SANA_PORT/
          s/^machine_rank:.*/machine_rank: $SLURM_PROCID/
          s/^num_machines:.*/num_machines: $SLURM_NTASKS/
          s/^num_processes:.*/num_processes: $SANA_PROCESSES/" bf16_accelerate_config.yaml >"$config"
  exec bash finetune_sana_dreambooth_lora_deepspeed_bf16.sh --config_file="$config" "$@"' launcher "$@"
