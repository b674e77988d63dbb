#!/usr/bin/env bash
# Runs the harness's submission_runner.py on this submission: what a container does with the
# arguments it is given. A first argument that is not a flag is run as a command instead.
set -euo pipefail

usage() {
    cat << 'USAGE'
usage: [FLAGS] [-- FLAGS OF submission_runner.py]    or    COMMAND [ARGUMENTS]

Flags of the official start-up script, as `--flag value` or `--flag=value`:
  -w, --workload              official workload or variant                     [mnist]
  -d, --dataset               folder under HOME_DIR/data        [that of the workload]
  -f, --framework             pytorch                                        [pytorch]
  -s, --submission_path       module, relative to this submission or the harness
                                                            [submission/submission.py]
  -t, --tuning_search_space   points of the external ruleset
                                                          [tuning_search_space.json]
      --tuning_ruleset        external | self                               [external]
      --num_tuning_trials     trials of the external ruleset                       [5]
      --hparam_start_index, --hparam_end_index
                              first trial, and the one after the last      [all trials]
  -e, --experiment_name       folder under HOME_DIR/experiment_runs          [shampoo]
  -m, --max_global_steps      stop after this many steps             [the time limit]
      --rng_seed              seed                                            [random]
  -o, --overwrite             true: replace an experiment of this name         [false]
  -c, --save_checkpoints      false: keep no checkpoints                        [true]
  -h, --home_dir              folder that holds data/ and experiment_runs/         [/]
  -a, --keep_container_alive  true: stay after the run                         [false]
      --additional_requirements_path
                              pip installs these before, else nothing is run   [none]
      --traindiffs_test       true: run the harness's test of that name alone  [false]
  -i, --internal_contributor, -r, --rsync_data, --data_bucket, --logs_bucket
                              accepted, with a notice: nothing is copied from or to
                              Google's buckets, data have to be in place
Flags of this image:
      --resume_last_run       true: go on with the experiment of this name     [false]
      --torch_compile         false: do not compile the model                   [true]
      --num_gpus              processes to start                       [GPUs in sight]
      --offline_data          true: if there is no mnist, write a stand-in     [false]
      --dry_run               true: print the command and stop                 [false]
      --help                  this text
USAGE
}

fail() {
    echo "error: $*" >&2
    exit 2
}

if [[ $# -gt 0 && $1 != -* ]]; then
    exec "$@"
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
harness=${ALGOPERF_HARNESS_DIR:-/opt/harness}

declare -A option=(
    [workload]=mnist [dataset]='' [framework]=pytorch
    [submission_path]=submission/submission.py
    [tuning_search_space]=tuning_search_space.json [tuning_ruleset]=external
    [num_tuning_trials]=5 [hparam_start_index]='' [hparam_end_index]=''
    [experiment_name]=shampoo [max_global_steps]='' [rng_seed]=''
    [overwrite]=false [save_checkpoints]=true [home_dir]='' [keep_container_alive]=false
    [additional_requirements_path]='' [traindiffs_test]=false
    [internal_contributor]=false [rsync_data]=true [data_bucket]='' [logs_bucket]=''
    [resume_last_run]=false [torch_compile]=true [num_gpus]='' [offline_data]=false
    [dry_run]=false
)
declare -A short=(
    [w]=workload [d]=dataset [f]=framework [s]=submission_path [t]=tuning_search_space
    [e]=experiment_name [m]=max_global_steps [o]=overwrite [c]=save_checkpoints [h]=home_dir
    [a]=keep_container_alive [i]=internal_contributor [r]=rsync_data
)

passed_on=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --help) usage; exit 0 ;;
        --) shift; passed_on=("$@"); break ;;
        --*=*) name=${1%%=*} name=${name#--} value=${1#*=}; shift ;;
        -*)
            name=${1#-} name=${name#-}
            [[ $1 == --* ]] || name=${short[$name]:-$name}
            [[ $# -ge 2 ]] || fail "$1 needs a value (--help lists the flags)"
            value=$2; shift 2 ;;
        *) fail "unexpected argument '$1' (--help lists the flags)" ;;
    esac
    [[ -v option[$name] ]] || fail "unknown flag '$name' (--help lists the flags)"
    option[$name]=$value
done

for name in overwrite save_checkpoints keep_container_alive resume_last_run torch_compile \
    offline_data dry_run traindiffs_test internal_contributor rsync_data; do
    [[ ${option[$name]} == true || ${option[$name]} == false ]] ||
        fail "--$name must be true or false, got '${option[$name]}'"
done
[[ ${option[framework]} == pytorch ]] ||
    fail "--framework must be pytorch, the submission's framework, got '${option[framework]}'"
[[ ${option[tuning_ruleset]} == external || ${option[tuning_ruleset]} == self ]] ||
    fail "--tuning_ruleset must be external or self, got '${option[tuning_ruleset]}'"
[[ ${option[overwrite]} == false || ${option[resume_last_run]} == false ]] ||
    fail "--overwrite and --resume_last_run exclude each other"

if [[ ${option[internal_contributor]} == true ]]; then
    echo "notice: nothing is copied from or to Google's buckets: data have to lie in" \
        "${option[home_dir]}/data, results stay in ${option[home_dir]}/experiment_runs" >&2
elif [[ -n ${option[data_bucket]}${option[logs_bucket]} ]]; then
    echo "notice: --data_bucket and --logs_bucket are not used" >&2
fi

# The part of a workload's name before the first underscore is its data set's.
dataset=${option[dataset]:-${option[workload]%%_*}}
data_dir=${option[home_dir]}/data/$dataset
experiment_dir=${option[home_dir]}/experiment_runs
special=()
case $dataset in
    imagenet)
        data_dir+=/pytorch
        special=("--imagenet_v2_data_dir=$data_dir") ;;
    librispeech) special=("--librispeech_tokenizer_vocab_path=$data_dir/spm_model.vocab") ;;
esac

num_gpus=${option[num_gpus]:-$(python -c 'import torch; print(torch.cuda.device_count())')}
prefix=(python)
if ((num_gpus > 1)); then
    prefix=(torchrun --standalone --nnodes=1 "--nproc_per_node=$num_gpus")
fi

flags=(
    --framework=pytorch "--workload=${option[workload]}"
    "--submission_path=${option[submission_path]}" "--data_dir=$data_dir"
    "--experiment_dir=$experiment_dir" "--experiment_name=${option[experiment_name]}"
    "--tuning_ruleset=${option[tuning_ruleset]}"
    "--overwrite=${option[overwrite]}" "--save_checkpoints=${option[save_checkpoints]}"
    "--torch_compile=${option[torch_compile]}"
)
optional=(max_global_steps rng_seed)
if [[ ${option[tuning_ruleset]} == external ]]; then
    flags+=("--tuning_search_space=${option[tuning_search_space]}")
    optional+=(num_tuning_trials hparam_start_index hparam_end_index)
fi
for name in "${optional[@]}"; do
    [[ -z ${option[$name]} ]] || flags+=("--$name=${option[$name]}")
done
[[ ${option[resume_last_run]} == false ]] || flags+=(--resume_last_run=true)
command=("${prefix[@]}" "$harness/submission_runner.py" "${flags[@]}" "${special[@]}" \
    "${passed_on[@]}")

if [[ ${option[traindiffs_test]} == true ]]; then
    here=$harness
    command=(python tests/test_traindiffs.py)
fi

# Relative paths are this submission's, or the harness's where it has no such file.
cd "$here"
requirements=${option[additional_requirements_path]}
install=()
if [[ -n $requirements ]]; then
    [[ $requirements == /* || -e $requirements ]] || requirements=$harness/$requirements
    [[ -f $requirements ]] || fail "--additional_requirements_path: there is no file" \
        "'${option[additional_requirements_path]}' here or in $harness"
    install=(python -m pip install --requirement "$requirements")
fi
if [[ ${option[dry_run]} == true ]]; then
    [[ -z $requirements ]] || echo "$(printf '%q ' "${install[@]}")"
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
if [[ -n $requirements ]] && ! "${install[@]}"; then
    fail "--additional_requirements_path: pip could not install $requirements (message above)"
fi
if [[ ${option[traindiffs_test]} == true ]]; then
    exec "${command[@]}"
fi

if ! mkdir -p "$experiment_dir" || [[ ! -w $experiment_dir ]]; then
    fail "user $(id -u) may not write to $experiment_dir: give the container" \
        "--user \"\$(id -u):\$(id -g)\" of the folder's owner"
fi
# The runner would ask on the terminal whether to resume.
if [[ -e $experiment_dir/${option[experiment_name]}/${option[workload]}_pytorch && \
    ${option[overwrite]} == false && ${option[resume_last_run]} == false ]]; then
    fail "there is an experiment '${option[experiment_name]}' of ${option[workload]} in" \
        "$experiment_dir: --resume_last_run true, --overwrite true or another --experiment_name"
fi
if [[ ${option[offline_data]} == true && $dataset == mnist && \
    ! -f $data_dir/mnist/3.0.1/dataset_info.json ]]; then
    python -m workloads_smoke.harness_data "--data_dir=$data_dir"
fi

log_dir=$experiment_dir/logs
mkdir -p "$log_dir"
log=$log_dir/${option[workload]}_pytorch_$(date +%Y-%m-%d-%H-%M-%S).log
printf '%q ' "${command[@]}" | tee -a "$log"
echo | tee -a "$log"
status=0
"${command[@]}" 2>&1 | tee -a "$log" || status=$?
echo "submission_runner.py ended with status $status; log: $log"
if [[ ${option[keep_container_alive]} == true ]]; then
    sleep infinity
fi
exit "$status"
