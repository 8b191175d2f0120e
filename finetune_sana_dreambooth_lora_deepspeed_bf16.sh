#!/usr/bin/env bash
# Fine-tune SANA with LoRA: DeepSpeed ZeRO-2, bf16, all devices of this machine. Nothing in here needs editing.
#   bash finetune_sana_dreambooth_lora_deepspeed_bf16.sh --quickstart
#   bash finetune_sana_dreambooth_lora_deepspeed_bf16.sh --model_name=/models/Sana --dataset_name=/data/pokemon-blip-captions
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # `sh finetune....sh`: other shells have neither arrays nor pipefail
set -uo pipefail
main() {  # the whole script is one function, so that bash has read it all: it may be edited while it runs
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ---------------------------------------------------------------------------------------------------------- defaults
model_name="Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers"
dataset_name="pokemon-blip-captions"
batch_size=8
num_processors=""        # default: as many as there are devices, 8 where none can be counted
max_train_steps=5000
mixed_precision=""       # default: what the accelerate config says, else bf16
resolution=1024
gradient_accumulation_steps=""   # default: what the accelerate config says, else 1
config_file="$here/bf16_accelerate_config.yaml"
output_dir="./output"
caption_column=""        # default: text where the data set is not a folder of loose images
instance_data_dir=""
instance_prompt=""       # default: "a pokemon" for the default data set, none for your own images
learning_rate=1e-4
seed=0
checkpointing_steps=1000
checkpoints_total_limit=3
quickstart=no
extra=()
given=()

usage() {
  cat <<'HELP'
Fine-tune SANA with LoRA under DeepSpeed ZeRO-2. Flags as --name=value or --name value; defaults in brackets.

model and images
  --model_name                   hub name or folder  [Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers]
  --dataset_name                 hub name or folder  [pokemon-blip-captions]
  --caption_column               its column of the captions  [text]
  --instance_data_dir            folder of your own images, captions in .txt files; with --dataset_name both are trained
  --instance_prompt              caption of images without one  [none for your own images; "a pokemon" for the
                                 default data set, "in my style" for --quickstart with --instance_data_dir]
  --resolution                   side of the training images in pixels  [1024]

training
  --batch_size                   images per device and micro-step  [8]
  --gradient_accumulation_steps  micro-steps per update  [the accelerate config's, else 1]
  --max_train_steps              updates  [5000]
  --learning_rate                peak learning rate, constant  [1e-4]
  --seed                         of everything  [0]
  --mixed_precision              bf16, fp16 or no  [the accelerate config's, else bf16]

output and checkpoints
  --output_dir                   everything is written there  [./output]
  --checkpointing_steps          write a checkpoint every so many updates  [1000]
  --checkpoints_total_limit      keep this run's newest so many  [3]

processes
  --num_processors               processes, one per device  [the devices found; 1 on a CPU]
  --config_file                  accelerate config  [bf16_accelerate_config.yaml beside this file]

  --quickstart                   a small shipped model and image set: trains, then draws without and with the LoRA;
                                 with --instance_data_dir on your own images
  --help                         this text

Anything after -- goes to train_dreambooth_lora_sana.py as it is (its --help lists all flags), e.g.
  bash finetune_sana_dreambooth_lora_deepspeed_bf16.sh --batch_size 4 -- --rank=16 --validation_prompt="a blue pokemon"
  bash finetune_sana_dreambooth_lora_deepspeed_bf16.sh --dataset_name=/data/set -- --dry_run   # checks, and tells the plan

A second run in a used folder is refused unless it resumes (-- --resume_from_checkpoint=latest), or sets the old run
aside (-- --overwrite_output_dir); --quickstart does the latter. A stop by SIGTERM, SIGHUP or Ctrl-C has
TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds [1800] to end its update and write its checkpoint.

Exit code: the trainer's (0 done; 143 or 130 after SIGTERM or Ctrl-C, with a checkpoint if an update was done;
anything else failed).
HELP
}

# --------------------------------------------------------------------------------------------------------- arguments
known="model_name dataset_name batch_size num_processors max_train_steps mixed_precision resolution"
known="$known gradient_accumulation_steps config_file output_dir caption_column instance_data_dir instance_prompt"
known="$known learning_rate seed checkpointing_steps checkpoints_total_limit"
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
    *) near=$("${PYTHON:-python3}" -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' \
         "$name" $known quickstart help 2>/dev/null)
       echo "error: unknown flag --$name.${near:+ Did you mean --$near?} --help lists all; flags of the trainer go after a lone --" >&2
       exit 2 ;;
  esac
done
is_given() { local g; for g in ${given[@]+"${given[@]}"}; do [ "$g" = "$1" ] && return 0; done; return 1; }
for name in ${given[@]+"${given[@]}"}; do
  [ -n "${!name}" ] || { echo "error: --$name=: needs a value" >&2; exit 2; }
done
# ~ in the middle of a word, as in --output_dir=~/out, is left to us by the shell.
for name in model_name dataset_name config_file output_dir instance_data_dir; do
  case "${!name}" in \~|\~/*) printf -v "$name" '%s' "$HOME${!name#\~}" ;; esac
done
for name in batch_size max_train_steps resolution gradient_accumulation_steps num_processors checkpointing_steps \
  checkpoints_total_limit; do
  if [ -z "${!name}" ]; then continue; fi
  case "${!name}" in
    ''|*[!0-9]*|0) echo "error: --$name=${!name}: must be a whole number of at least 1" >&2; exit 2 ;;
  esac
done
[ -f "$config_file" ] || { echo "error: --config_file=$config_file: no such file" >&2; exit 2; }

# --------------------------------------------------------------------------------------------------------- signals
caught=""
children=()
stop_as=""   # the signal that children get; empty: the one that came
early=""     # whether the run was ended before it could say so itself
# What bash starts in the background ignores Ctrl-C until it says otherwise.
deaf() {
  local mask
  mask=$(sed -n 's/^SigIgn:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) && [ $((0x${mask:-0} & 2)) -ne 0 ]
}
forward() {
  caught=$1
  local pid
  for pid in ${children[@]+"${children[@]}"}; do
    if [ "$1" = INT ] && deaf "$pid"; then early=yes; kill -s TERM "$pid" 2>/dev/null
    else kill -s "${stop_as:-$1}" "$pid" 2>/dev/null; fi
  done
}
watch() {  # PIDS: the processes that a signal goes to, also one that came while they were being started
  children=("$@")
  [ -z "$caught" ] || forward "$caught"
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward TERM' HUP   # the terminal was closed: the run ends as by SIGTERM
await() {  # the exit code of a process: a signal ends `wait` early, so it waits on until the process has ended
  local code
  while :; do
    wait "$1"; code=$?
    kill -0 "$1" 2>/dev/null || return $code
  done
}
before_the_run() {  # after each thing that is done before it
  [ -n "$caught" ] || return 0
  [ "$caught" = INT ] || exit 143
  echo "stopped by Ctrl-C before the run began" >&2
  exit 130
}

# ------------------------------------------------------------------------------------------------------- environment
# What another launcher left in this shell would be believed by every process that is started below. Settings such as
# ACCELERATE_LOG_LEVEL are no such thing and stay.
leftovers=()
for name in $(compgen -e); do
  case "$name" in
    RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_*|MASTER_ADDR|MASTER_PORT| \
    CROSS_RANK|CROSS_SIZE|LOCAL_SIZE|MPI_LOCALNRANKS|MPI_LOCALRANKID|OMPI_COMM_WORLD_*|PMI_*|PMIX_*|MV2_COMM_WORLD_*| \
    TORCHELASTIC_*|PET_*|SANA_LAUNCHED|ACCELERATE_USE_*|ACCELERATE_DEEPSPEED_*|ACCELERATE_DYNAMO_*|ACCELERATE_CONFIG_DS_FIELDS| \
    ACCELERATE_MIXED_PRECISION|ACCELERATE_GRADIENT_*|ACCELERATE_NUM_PROCESSES|FSDP_*|MEGATRON_LM_*|PARALLELISM_CONFIG_*)
      leftovers+=("$name=${!name}"); unset "$name" ;;
  esac
done
[ ${#leftovers[@]} -eq 0 ] || echo "note: not used, since this script starts its own processes: ${leftovers[*]}" >&2

# The active environment where it satisfies requirements_sana.txt, else .venv beside this file.
python=$("${PYTHON:-python3}" "$here/sana_kit/environment.py") || exit $?
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

# --------------------------------------------------------------------------------------------------- Ascend's variables
if [ -e /dev/davinci_manager ] || [ -n "${ASCEND_HOME_PATH:-}${ASCEND_TOOLKIT_HOME:-}" ]; then
  # docs/ascend.md, "Environment variables", says what each does. Any of them set outside is kept.
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
# What says where the user's images are counts behind the -- too; the quick start reads them itself.
names_data() { grep -Eqs '^(dataset_name|instance_data_dir|data_sets):' "$1"; }
skip=()
other_data=no # data sets that the trainer is told of in another way
for ((i = 0; i < ${#extra[@]}; i++)); do
  case "${extra[i]}" in
    --instance_data_dir=*) instance_data_dir=${extra[i]#*=} ;;
    --instance_data_dir) instance_data_dir=${extra[i + 1]-} ;;
    --instance_prompt=*) instance_prompt=${extra[i]#*=}; given+=(instance_prompt) ;;
    --instance_prompt) instance_prompt=${extra[i + 1]-}; given+=(instance_prompt) ;;
    --skip_bad_images) skip=(--skip_bad_images) ;;
    --dataset_name | --dataset_name=*) other_data=table ;;
    --data_sets | --data_sets=*) other_data=yes ;;
    --config=*) names_data "${extra[i]#*=}" && other_data=yes ;;
    --config) names_data "${extra[i + 1]-}" && other_data=yes ;;
  esac
done
own=()
[ -n "$instance_data_dir" ] || [ "$other_data" != no ] || is_given dataset_name || is_given instance_prompt ||
  [ "$quickstart" = yes ] || instance_prompt="a pokemon"
if [ "$quickstart" = yes ]; then
  if [ -n "$instance_data_dir" ]; then
    is_given instance_prompt || instance_prompt="in my style"
    own=("--instance_data_dir=$instance_data_dir" "--instance_prompt=$instance_prompt" ${skip[@]+"${skip[@]}"})
  fi
  is_given output_dir || output_dir="./quickstart_output"
  # before training: images of one's own may be bad
  found=$(trap '' INT; "$python" -m sana_kit.quickstart --shell ${own[@]+"${own[@]}"}) || { before_the_run; exit 1; }
  before_the_run
  quickstart_model_path="" quickstart_dataset_path=""
  quickstart_training_flags=() quickstart_prompts=() quickstart_inference_flags=()
  eval "$found"   # quickstart_model_path=..., quickstart_prompts=(...), each value quoted by shlex
  is_given model_name || model_name=$quickstart_model_path
  [ -n "$instance_data_dir" ] || is_given dataset_name || dataset_name=$quickstart_dataset_path
fi

# --------------------------------------------------------------------------------------------------------------- train
trainer=(--pretrained_model_name_or_path "$model_name" --output_dir "$output_dir")
if [ "$quickstart" = yes ]; then
  trainer+=("${quickstart_training_flags[@]}")
  # What was given on this command line comes after the quick start's own flags and so counts.
  is_given mixed_precision && trainer+=(--mixed_precision "$mixed_precision")
  is_given resolution && trainer+=(--resolution "$resolution")
  is_given batch_size && trainer+=(--train_batch_size "$batch_size")
  is_given gradient_accumulation_steps && trainer+=(--gradient_accumulation_steps "$gradient_accumulation_steps")
  is_given max_train_steps && trainer+=(--max_train_steps "$max_train_steps")
  for name in learning_rate seed checkpointing_steps checkpoints_total_limit; do
    is_given "$name" && trainer+=("--$name" "${!name}")
  done
  # A second quick start sets the first one's files aside, unless it is told to resume.
  case " ${extra[*]-} " in *" --resume_from_checkpoint"*) ;; *) trainer+=(--overwrite_output_dir) ;; esac
else
  is_given mixed_precision && trainer+=(--mixed_precision "$mixed_precision")
  is_given gradient_accumulation_steps && trainer+=(--gradient_accumulation_steps "$gradient_accumulation_steps")
  trainer+=(
    --resolution "$resolution"
    --train_batch_size "$batch_size"
    --max_train_steps "$max_train_steps"
    --learning_rate "$learning_rate" --lr_scheduler constant --lr_warmup_steps 0 --seed "$seed"
    --checkpointing_steps "$checkpointing_steps" --checkpoints_total_limit "$checkpoints_total_limit"
    --dataloader_num_workers 2
  )
fi
if [ -n "$instance_prompt" ] || is_given instance_prompt; then trainer+=("--instance_prompt=$instance_prompt"); fi
if [ -n "$instance_data_dir" ]; then
  trainer+=("--instance_data_dir=$instance_data_dir")
  # Both together are two data sets.
  is_given dataset_name && trainer+=(--dataset_name "$dataset_name")
  is_given caption_column && trainer+=(--caption_column "$caption_column")
elif [ "$other_data" != no ] && ! is_given dataset_name; then
  if is_given caption_column || [ "$other_data" = table ]; then trainer+=(--caption_column "${caption_column:-text}"); fi
else
  trainer+=(--dataset_name "$dataset_name" --caption_column "${caption_column:-text}")
fi
trainer+=(${extra[@]+"${extra[@]}"})

launch=("--config_file=$config_file")
[ -z "$num_processors" ] || launch+=("--num_processors=$num_processors")
[ "$quickstart" = no ] || launch+=(--small)
# torch's launcher kills ranks this long after a signal (30 s by its own default): an update and a checkpoint take longer
# on large models. Newer torch reads it (2.13 does, 2.7 does not); older ones keep their 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
export SANA_LAST_WORDS=later   # what the run made is told below, last
# It checks everything, starts the processes, and says last how they ended. In a session of its own, so that Ctrl-C
# reaches the run once, through this script, and not once more from the terminal. Killed outright (SIGKILL), this script
# takes the run with it: the kernel then sends SIGTERM to that process.
setsid "$python" -m sana_kit.launch $$ "${launch[@]}" -- "${trainer[@]}" &
watch $!
await $!; status=$?
[ -z "$early" ] || before_the_run
if [ -n "$caught" ]; then
  [ $status -ne 0 ] || { [ "$caught" = TERM ] && status=143 || status=130; }
  exit $status
fi
[ $status -eq 0 ] || exit $status
case " ${extra[*]-} " in *" --dry_run "*) exit 0 ;; esac

# -------------------------------------------------------------------------------------------------------------- result
[ -f "$output_dir/summary.json" ] || exit 0   # with folders of their own, the first of several machines alone has it
# Whatever follows can be had again from what is saved: a signal ends it at once, and one line says so.
stop_as=TERM
ended() {  # CODE: of what ran last
  if [ -n "$caught" ]; then
    [ "$caught" = INT ] && word="Ctrl-C" || word="a signal"
    echo "stopped by $word after the training, whose result is in $output_dir" >&2
    [ "$caught" = INT ] && exit 130
    exit 143
  fi
  [ "$1" -eq 0 ] || exit "$1"
}
finish() {
  setsid "$@" &
  watch $!
  await $!
  ended $?
}
if [ "$quickstart" = no ]; then
  finish "$python" -m sana_kit.reports --result-block "$output_dir"
  exit 0
fi
finish "$python" -m sana_kit.reports --result-block --block-only "$output_dir"
# The same prompts and seeds without and with the LoRA, by the kit's own inference scripts.
printf '\ndrawing without and with the LoRA\n'
# What an earlier quick start drew into this folder is not compared again.
rm -f "$output_dir/before/manifest.jsonl" "$output_dir/after/manifest.jsonl"
drawing=("--model_path=$model_name" --overwrite "${quickstart_prompts[@]/#/--prompt=}" "${quickstart_inference_flags[@]}")
before=("$python" "$here/infer_sana_text2img_bf16.py" "${drawing[@]}" --output_path "$output_dir/before")
after=("$python" "$here/infer_sana_text2img_lora_bf16.py" "${drawing[@]}" --output_path "$output_dir/after"
  --lora_weights "$output_dir")
if is_given model_name; then
  finish "${before[@]}"
  finish "${after[@]}"
else
  # The shipped model is small: both sides are drawn at once, each on half of a host's cores (threads that wait for one
  # another spinning take several times as long where others use the cores, too). What the first says is shown if it fails.
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  half=(env "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? 1 : cores < 16 ? cores / 2 : 8))}"
    "OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}")
  said=$(mktemp) || exit 1
  setsid "${half[@]}" "${before[@]}" >"$said" 2>&1 &
  first=$!
  setsid "${half[@]}" "${after[@]}" &
  watch "$first" $!
  await $!; status=$?
  [ $status -eq 0 ] || kill "$first" 2>/dev/null
  await "$first"; first=$?
  [ $status -ne 0 ] || [ $first -eq 0 ] || { cat "$said" >&2; status=$first; }
  rm -f "$said"
  ended $status
fi
finish "$python" -m sana_kit.quickstart --compare "$output_dir/before" "$output_dir/after" "$output_dir/before_after.png" \
  ${own[@]+"${own[@]}"} --json "$output_dir/before_after.json" --run "$output_dir"
exit 0
}
main "$@"
