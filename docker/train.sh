#!/usr/bin/env bash
# Go on with the run in RUN_DIR where there is one, start it where there is none, and leave it where
# it is finished: what a job that is started again has to do. `train` alone never overwrites a run.
# The exit code is the run's: 0 finished, 3 stopped on purpose and resumable, 2 a mistake in what it
# was given, 1 a failure.
#
#   docker/train.sh CONFIG.yaml RUN_DIR [KEY.PATH=VALUE …]
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG.yaml RUN_DIR [KEY.PATH=VALUE …]" >&2
  exit 2
fi
config=$1 run_dir=$2
shift 2
# shellcheck disable=SC2016 # Python's own words
exists='import sys, fsspec
files, path = fsspec.url_to_fs(sys.argv[1])
print(*(name for name in sys.argv[2:] if files.exists(f"{path}/{name}")))'
found=$(python -c "$exists" "$run_dir" config.yaml policy/README.md)
case $found in
  "config.yaml policy/README.md") # the card is written last
    echo "finished: the policy is in $run_dir/policy"
    ;;
  config.yaml) exec freshpairs resume "$run_dir" ;;
  *) exec freshpairs train "$config" cluster.address=auto run.dir="$run_dir" "$@" ;;
esac
