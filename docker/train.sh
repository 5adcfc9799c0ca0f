#!/usr/bin/env bash
# Go on with the run in RUN_DIR where there is one, and start it where there is none: what a job
# that is started again after a failure has to do. `train` alone never overwrites a run.
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
exists='import sys, fsspec; files, path = fsspec.url_to_fs(sys.argv[1]); print(files.exists(path))'
found=$(python -c "$exists" "$run_dir/config.yaml")
if [ "$found" = True ]; then
  exec freshpairs resume "$run_dir"
fi
exec freshpairs train "$config" cluster.address=auto run.dir="$run_dir" "$@"
