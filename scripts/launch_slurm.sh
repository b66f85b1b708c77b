#!/usr/bin/env bash
# Train on GPU nodes under SLURM, one process a node with all of its GPUs:
#
#   sbatch --nodes=8 scripts/launch_slurm.sh CONFIG [key=value ...]
#
# The processes find each other through SLURM. Two minutes before the time limit, and on preemption, SLURM sends
# SIGTERM: a checkpoint is written, and the job queued again. Data and output must lie on a file system that all nodes
# see. PYTHON: the interpreter (python) of an environment in which `pip install '.[cuda]'` was run in bmjax's clone.
#SBATCH --job-name=bmjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=bmjax-%j.log
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p}' "$0"; exit 2; fi
: "${SLURM_JOB_ID:?start it with sbatch}"
code=0
srun "${PYTHON:-python}" -m bmjax train "$@" stop_code=75 || code=$?
[[ $code == 75 ]] && exec scontrol requeue "$SLURM_JOB_ID"
# Where a node is gone, nothing on it can say what to do; this line does.
[[ $code == 0 ]] || echo "bmjax: a process ended with code $code; the same command resumes from the newest checkpoint" >&2
exit "$code"
