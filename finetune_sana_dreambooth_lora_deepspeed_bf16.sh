#!/usr/bin/env bash
# Fine-tune SANA with LoRA: DeepSpeed ZeRO-2, bf16, all devices of this machine. Nothing in here needs editing.
#   bash finetune_sana_dreambooth_lora_deepspeed_bf16.sh --quickstart
#   bash finetune_sana_dreambooth_lora_deepspeed_bf16.sh --model_name=/models/Sana --dataset_name=/data/pokemon-blip-captions
set -uo pipefail
main() {  # the whole script is one function, so that bash has read it all: it may be edited while it runs
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ---------------------------------------------------------------------------------------------------------- defaults
model_name="Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers"
dataset_name="pokemon-blip-captions"
batch_size=8
num_processors=""        # default: as many as there are devices, 8 where none can be counted
max_train_steps=5000
mixed_precision="bf16"
resolution=1024
gradient_accumulation_steps=1
config_file="$here/bf16_accelerate_config.yaml"
output_dir="./output"
caption_column=""        # default: text where the data set is not a folder of loose pictures
instance_data_dir=""
instance_prompt="a pokemon"
quickstart=no
extra=()
given=()

usage() {
  cat <<'HELP'
Fine-tune SANA with LoRA under DeepSpeed ZeRO-2. Flags as --name=value or --name value:

  --model_name                   hub name or folder  [Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers]
  --dataset_name                 hub name or folder  [pokemon-blip-captions]
  --batch_size                   pictures per device and micro-step  [8]
  --num_processors               processes, one per device  [the devices found]
  --max_train_steps              updates  [5000]
  --mixed_precision              bf16, fp16 or no  [bf16]
  --resolution                   side of the training pictures in pixels  [1024]
  --gradient_accumulation_steps  micro-steps per update  [1]
  --config_file                  accelerate config  [bf16_accelerate_config.yaml beside this file]
  --output_dir                   everything is written there  [./output]
  --caption_column               column of the captions  [text]
  --instance_data_dir            folder of your own pictures, captions in .txt files, instead of --dataset_name
  --instance_prompt              caption of pictures without one  [a pokemon; "in my style" for --quickstart
                                 with --instance_data_dir]
  --quickstart                   a small shipped model and picture set: trains, then draws without and with the LoRA;
                                 with --instance_data_dir on your own pictures
  --help                         this text

Anything after -- goes to train_dreambooth_lora_sana.py as it is (its --help lists all flags), e.g.
  bash finetune_sana_dreambooth_lora_deepspeed_bf16.sh --batch_size 4 -- --rank=16 --validation_prompt="a blue pokemon"

Exit code: the trainer's (0 done; 143 or 130 after SIGTERM or Ctrl-C with a checkpoint saved; anything else failed).
HELP
}

# --------------------------------------------------------------------------------------------------------- arguments
known="model_name dataset_name batch_size num_processors max_train_steps mixed_precision resolution gradient_accumulation_steps config_file output_dir caption_column instance_data_dir instance_prompt"
while [ $# -gt 0 ]; do
  case "$1" in
    --) shift; extra=("$@"); break ;;
    --help|-h) usage; exit 0 ;;
    --quickstart) quickstart=yes; shift; continue ;;
    --*=*) name=${1%%=*}; name=${name#--}; value=${1#*=}; shift ;;
    --*) name=${1#--}
      case " $known " in
        *" $name "*) [ $# -ge 2 ] || { echo "error: --$name needs a value" >&2; exit 2; }; value=$2; shift 2 ;;
        *) value=""; shift ;;
      esac ;;
    *) echo "error: unexpected word '$1'; flags begin with --, and what is meant for the trainer follows a lone --" >&2; exit 2 ;;
  esac
  case " $known " in
    *" $name "*) printf -v "$name" '%s' "$value"; given+=("$name") ;;
    *) echo "error: unknown flag --$name. Known: $(printf -- '--%s ' $known)--quickstart --help; flags of the trainer go after --" >&2
       exit 2 ;;
  esac
done
is_given() { local g; for g in ${given[@]+"${given[@]}"}; do [ "$g" = "$1" ] && return 0; done; return 1; }
for name in ${given[@]+"${given[@]}"}; do
  [ -n "${!name}" ] || { echo "error: --$name=: needs a value" >&2; exit 2; }
done
for name in batch_size max_train_steps resolution gradient_accumulation_steps num_processors; do
  if [ "$name" = num_processors ] && [ -z "$num_processors" ]; then continue; fi
  case "${!name}" in
    ''|*[!0-9]*|0) echo "error: --$name=${!name}: must be a whole number of at least 1" >&2; exit 2 ;;
  esac
done
[ -f "$config_file" ] || { echo "error: --config_file=$config_file: no such file" >&2; exit 2; }

# ------------------------------------------------------------------------------------------------------- environment
# The active environment where it satisfies requirements_sana.txt, else .venv beside this file.
python=$("${PYTHON:-python3}" "$here/sana_kit/environment.py") || exit $?
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

# ------------------------------------------------------------------------------------------------- devices, variables
# The doctor names every problem of the host with a remedy; its last line is "<kind> <count>".
doctor=$("$python" -m sana_kit.doctor) || { printf '%s\n' "$doctor" >&2; exit 1; }
printf '%s\n' "$doctor"
read -r device_kind device_count <<<"$(printf '%s\n' "$doctor" | tail -n 1)"

if [ "$device_kind" = npu ]; then
  # README.md, "Environment variables", says what each does. Any of them set outside is kept.
  export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
  export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
  export ASCEND_GLOBAL_EVENT_ENABLE=${ASCEND_GLOBAL_EVENT_ENABLE:-0}
  export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
  export COMBINED_ENABLE=${COMBINED_ENABLE:-1}
  export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}
  export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}
  export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-7200}
  export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
  export ACLNN_CACHE_LIMIT=${ACLNN_CACHE_LIMIT:-100000}
  # Newer torch_npu reads PYTORCH_ALLOC_CONF; both set is an error there.
  if [ -z "${PYTORCH_ALLOC_CONF:-}" ]; then
    export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
  fi
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

# -------------------------------------------------------------------------------------------------------- quick start
# What says where the user's pictures are counts behind the -- too; the quick start reads them itself.
skip=()
for ((i = 0; i < ${#extra[@]}; i++)); do
  case "${extra[i]}" in
    --instance_data_dir=*) instance_data_dir=${extra[i]#*=} ;;
    --instance_data_dir) instance_data_dir=${extra[i + 1]-} ;;
    --instance_prompt=*) instance_prompt=${extra[i]#*=}; given+=(instance_prompt) ;;
    --instance_prompt) instance_prompt=${extra[i + 1]-}; given+=(instance_prompt) ;;
    --skip_bad_images) skip=(--skip_bad_images) ;;
  esac
done
quickstart_item() { "$python" -m sana_kit.quickstart --print "$@"; }
own=()
if [ "$quickstart" = yes ]; then
  if [ -n "$instance_data_dir" ]; then
    is_given instance_prompt || instance_prompt="in my style"
    own=("--instance_data_dir=$instance_data_dir" "--instance_prompt=$instance_prompt" ${skip[@]+"${skip[@]}"})
  fi
  is_given output_dir || output_dir="./quickstart_output"
  is_given model_name || model_name=$(quickstart_item model_path) || exit 1
  [ -n "$instance_data_dir" ] || is_given dataset_name || dataset_name=$(quickstart_item dataset_path) || exit 1
  quickstart_flags=$(quickstart_item training_flags) || exit 1
  prompts=$(quickstart_item prompts ${own[@]+"${own[@]}"}) || exit 1   # before training: pictures of one's own may be bad
  if [ "$device_kind" = cpu ] && [ -z "$num_processors" ]; then num_processors=2; fi
fi

# ---------------------------------------------------------------------------------------------------------- processes
if [ -z "$num_processors" ]; then
  num_processors=$device_count
  [ "$device_kind" = cpu ] && num_processors=1
fi
config_machines=$(sed -n 's/^num_machines:[[:space:]]*\([0-9]*\).*/\1/p' "$config_file"); config_machines=${config_machines:-1}
config_port=$(sed -n 's/^main_process_port:[[:space:]]*\([0-9]*\).*/\1/p' "$config_file")
if [ "$device_kind" != cpu ] && [ "$config_machines" -le 1 ] && [ "$num_processors" -gt "$device_count" ]; then
  echo "error: --num_processors=$num_processors: this machine has $device_count $device_kind device(s). Ask for at most that many." >&2
  exit 2
fi
launch=(--config_file "$config_file" --mixed_precision "$mixed_precision")
if [ "$config_machines" -le 1 ]; then
  launch+=(--num_processes "$num_processors")
  # A free port where the config names none, so that two runs on one machine do not collide.
  port=$("$python" - "${config_port:-0}" <<'PY'
import socket, sys
with socket.socket() as s:
    try:
        s.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        sys.exit(f"error: main_process_port: {sys.argv[1]} is in use; free it, or name another one in the accelerate config")
    print(s.getsockname()[1])
PY
  ) || exit 1
  launch+=(--main_process_port "$port")
elif is_given num_processors; then
  launch+=(--num_processes "$num_processors")   # over all machines together
fi
if [ "$device_kind" = cpu ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + num_processors - 1) / num_processors ))}
fi

# --------------------------------------------------------------------------------------------------------------- train
trainer=(--pretrained_model_name_or_path "$model_name" --output_dir "$output_dir")
if [ "$quickstart" = yes ]; then
  while IFS= read -r flag; do trainer+=("$flag"); done <<<"$quickstart_flags"
  # What was given on this command line comes after the quick start's own flags and so counts.
  is_given mixed_precision && trainer+=(--mixed_precision "$mixed_precision")
  is_given resolution && trainer+=(--resolution "$resolution")
  is_given batch_size && trainer+=(--train_batch_size "$batch_size")
  is_given gradient_accumulation_steps && trainer+=(--gradient_accumulation_steps "$gradient_accumulation_steps")
  is_given max_train_steps && trainer+=(--max_train_steps "$max_train_steps")
else
  trainer+=(
    --mixed_precision "$mixed_precision"
    --resolution "$resolution"
    --train_batch_size "$batch_size"
    --gradient_accumulation_steps "$gradient_accumulation_steps"
    --max_train_steps "$max_train_steps"
    --learning_rate 1e-4 --lr_scheduler constant --lr_warmup_steps 0 --seed 0
    --checkpointing_steps 1000 --checkpoints_total_limit 3 --dataloader_num_workers 2
  )
fi
trainer+=("--instance_prompt=$instance_prompt")
if [ -n "$instance_data_dir" ]; then
  trainer+=("--instance_data_dir=$instance_data_dir")
  # Given together with what belongs to a data set, the trainer says what is wrong.
  is_given dataset_name && trainer+=(--dataset_name "$dataset_name")
  is_given caption_column && trainer+=(--caption_column "$caption_column")
else
  trainer+=(--dataset_name "$dataset_name" --caption_column "${caption_column:-text}")
fi
trainer+=(${extra[@]+"${extra[@]}"})

error_file=$(mktemp) || exit 1
export SANA_ERROR_FILE=$error_file
stamp=$(mktemp) || exit 1
caught=""
child=""
forward() { caught=$1; [ -n "$child" ] && kill -s "$1" "$child" 2>/dev/null; }
trap 'forward TERM' TERM
trap 'forward INT' INT
# In a session of its own, so that Ctrl-C reaches the run once, through this script, and not once more from the terminal.
setsid "$python" -m accelerate.commands.launch "${launch[@]}" "$here/train_dreambooth_lora_sana.py" "${trainer[@]}" &
child=$!
status=0
while :; do
  wait "$child"; status=$?
  kill -0 "$child" 2>/dev/null || break   # a signal ends `wait` early: wait on until the run has ended
done
if [ -n "$caught" ] && [ "$output_dir/summary.json" -nt "$stamp" ]; then
  # accelerate does not pass the trainer's code on after a signal; its summary says that it stopped as asked.
  [ "$caught" = TERM ] && status=143 || status=130
fi
if [ $status -ne 0 ] && [ -s "$error_file" ]; then
  printf '\n--- the run ended with:\n' >&2
  cat "$error_file" >&2
fi
rm -f "$error_file" "$stamp"
if [ -n "$caught" ]; then
  [ $status -eq 143 ] || [ $status -eq 130 ] || { [ "$caught" = TERM ] && status=143 || status=130; }
  exit $status
fi
[ $status -eq 0 ] || exit $status

# -------------------------------------------------------------------------------------------------------------- result
"$python" -m sana_kit.reports --result-block "$output_dir" || exit $?
if [ "$quickstart" = yes ]; then
  # The same prompts and seeds without and with the LoRA, by the kit's own inference scripts.
  printf '\ndrawing without and with the LoRA\n'
  # What an earlier quick start drew into this folder is not compared again.
  rm -f "$output_dir/before/manifest.jsonl" "$output_dir/after/manifest.jsonl"
  drawing=()
  while IFS= read -r prompt; do drawing+=("--prompt=$prompt"); done <<<"$prompts"
  while IFS= read -r flag; do drawing+=("$flag"); done <<<"$(quickstart_item inference_flags)"
  "$python" "$here/infer_sana_text2img_bf16.py" --model_path "$model_name" --output_path "$output_dir/before" \
    --overwrite "${drawing[@]}" || exit $?
  "$python" "$here/infer_sana_text2img_lora_bf16.py" --model_path "$model_name" --output_path "$output_dir/after" \
    --lora_weights "$output_dir" --overwrite "${drawing[@]}" || exit $?
  "$python" -m sana_kit.quickstart --compare "$output_dir/before" "$output_dir/after" "$output_dir/before_after.png" \
    ${own[@]+"${own[@]}"} --json "$output_dir/before_after.json" || exit $?
  "$python" -m sana_kit.reports "$output_dir" || exit $?
  "$python" -m sana_kit.reports "$output_dir/after" --gallery --base "$output_dir/before" || exit $?
fi
exit 0
}
main "$@"
