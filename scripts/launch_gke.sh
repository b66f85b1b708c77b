#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster as a JobSet (one pod a host; GKE tells the pods of each other):
#
#   IMAGE=registry/bmjax:1 ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x4 scripts/launch_gke.sh CONFIG [key=value ...]
#
# IMAGE            an image in which `pip install '.[tpu,buckets]'` was run in bmjax's clone
# CLAIM            a ReadWriteMany volume claim (Filestore), mounted as /mnt/bmjax, where relative paths of CONFIG start.
#                  Without one, student, data and output of CONFIG lie in a bucket (gs://...).
# ACCOUNT          the Kubernetes service account that may use the bucket (default)
# ACCELERATOR      tpu-v5p-slice, tpu-v6e-slice, tpu-v5-lite-podslice
# TOPOLOGY         the slice's shape, 4x4x4 or 16x16
# CHIPS            of a host (4)
# SLICES           how many slices (1); with mesh.data=SLICES only gradients go between them
# NAME             of the JobSet (bmjax)
# RESTARTS         after how many failures or preemptions it goes on (20)
# The cluster needs the JobSet controller. A pod that is told to go has 5 minutes to write its checkpoint.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; fi
: "${IMAGE:?}" "${ACCELERATOR:?}" "${TOPOLOGY:?}"
name=${NAME:-bmjax} chips=${CHIPS:-4}
hosts=$((${TOPOLOGY//x/*} / chips))
config=$1; shift
# A pod's first process must outlive the training to say what to do; it passes SIGTERM on to it.
wrapper='trap "kill -TERM \$!" TERM
"$@" & child=$!
wait $child; code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
[ $code = 0 ] || [ $code = 75 ] ||
  echo "bmjax: a process ended with code $code; it goes on from the newest checkpoint, here or by the same command" >&2
exit $code'
command=$(python3 -c 'import json, sys; print(json.dumps(["sh", "-c", *sys.argv[1:]]))' \
  "$wrapper" bmjax python -m bmjax train /config/train.yaml "$@" stop_code=75)

folder=/tmp mounted= volume=
if [[ -n ${CLAIM:-} ]]; then
  folder=/mnt/bmjax
  mounted="- {name: runs, mountPath: /mnt/bmjax}"
  volume="- {name: runs, persistentVolumeClaim: {claimName: $CLAIM}}"
fi

kubectl create configmap "$name-config" --from-file=train.yaml="$config" --dry-run=client -o yaml | kubectl apply -f -
kubectl apply -f - <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-20}
  replicatedJobs:
  - name: slice
    replicas: ${SLICES:-1}
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            serviceAccountName: ${ACCOUNT:-default}
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
            containers:
            - name: train
              image: $IMAGE
              workingDir: $folder
              command: $command
              ports: [{containerPort: 8471}, {containerPort: 8482}]
              resources:
                limits: {google.com/tpu: $chips}
              volumeMounts:
              - {name: config, mountPath: /config}
              $mounted
            volumes:
            - name: config
              configMap: {name: $name-config}
            $volume
YAML
echo "kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$name --prefix"
