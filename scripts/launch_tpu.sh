#!/usr/bin/env bash
# Train on a Cloud TPU slice: asks for it as a queued resource, installs this checkout on every host, starts the same
# command on all of them, and goes on after a preemption. The hosts find each other through the slice's metadata.
#
#   PROJECT=p ZONE=us-east5-a ACCELERATOR=v5p-128 scripts/launch_tpu.sh CONFIG [key=value ...]
#
# PROJECT, ZONE    where the slice is
# ACCELERATOR      its type: v5p-128 (64 chips), v6e-256, ...
# SHARE            an NFS export (Filestore) as 10.0.0.2:/runs, mounted on every host as /mnt/bmjax, where relative paths
#                  of CONFIG start. Without one, student, data and output of CONFIG lie in a bucket (gs://...).
# NAME             of the slice (bmjax)
# RUNTIME          its image (by ACCELERATOR)
# SPOT             1: a spot slice, asked for again when it is taken away
# RETRIES          how often a training that stopped on a slice that is there is started again (2)
# DELETE           1: give the slice back at the end
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; fi
: "${PROJECT:?}" "${ZONE:?}" "${ACCELERATOR:?}"
name=${NAME:-bmjax}
case $ACCELERATOR in
  v6e-*) image=v2-alpha-tpuv6e ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  *) image=tpu-ubuntu2204-base ;;
esac
where=(--project "$PROJECT" --zone "$ZONE" --quiet)
config=$(realpath "$1"); shift
root=$(realpath "$(dirname "$0")/..")
arguments=
[[ $# -gt 0 ]] && arguments=$(printf ' %q' "$@")

state() { # empty where there is no such slice
  gcloud compute tpus queued-resources list "${where[@]}" --filter "name~/$name\$" --format 'value(state.state)' ||
    echo UNKNOWN
}

ask() {
  local spot=()
  [[ ${SPOT:-0} == 1 ]] && spot=(--spot)
  gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" \
    --accelerator-type "$ACCELERATOR" --runtime-version "${RUNTIME:-$image}" "${spot[@]}"
}

wait_for_slice() {
  while true; do
    case $(state) in
      ACTIVE) return ;;
      "") ask ;;
      FAILED | SUSPENDED | SUSPENDING)
        gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force && ask ;;
    esac
    sleep "${POLL:-30}"
  done
}

on_all() { gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$1"; }

folder=. mount=
if [[ -n ${SHARE:-} ]]; then
  folder=/mnt/bmjax
  mount="sudo mkdir -p /mnt/bmjax
    mountpoint -q /mnt/bmjax || { sudo apt-get -qq install -y nfs-common; sudo mount $SHARE /mnt/bmjax; }"
fi

install() {
  local bundle
  bundle=$(mktemp --suffix=.tar.gz)
  git -C "$root" archive --format=tar.gz -o "$bundle" HEAD
  gcloud compute tpus tpu-vm scp "$bundle" "$name:bmjax.tar.gz" "${where[@]}" --worker=all
  gcloud compute tpus tpu-vm scp "$config" "$name:bmjax.yaml" "${where[@]}" --worker=all
  rm -f "$bundle"
  on_all "set -e
    $mount
    rm -rf bmjax && mkdir bmjax && tar -xzf bmjax.tar.gz -C bmjax
    python3 -m venv venv && venv/bin/pip install -q './bmjax[tpu,buckets]'"
}

tries=0
while true; do
  wait_for_slice
  if install && on_all "cd $folder && ~/venv/bin/python -m bmjax train ~/bmjax.yaml$arguments stop_code=75"; then break; fi
  if [[ $(state) == ACTIVE ]]; then
    tries=$((tries + 1))
    if [[ $tries -gt ${RETRIES:-2} ]]; then echo "the training failed; see above; the same command resumes from the newest checkpoint" >&2; exit 1; fi
    echo "a process of the training was killed or failed, see above; starting it again, which resumes" >&2
  else
    echo "the slice was taken away; asking for another one, on which it resumes" >&2
  fi
done
[[ ${DELETE:-0} == 1 ]] && gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force
exit 0
