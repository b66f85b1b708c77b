#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster as a JobSet (one pod a host; GKE tells the pods of each other):
#
#   IMAGE=registry/bmjax:1 CLAIM=runs ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x4 scripts/launch_gke.sh CONFIG [key=value ...]
#
# IMAGE            an image with bmjax[tpu] installed
# CLAIM            a ReadWriteMany volume claim (Filestore) with the data, for the output: mounted as /mnt/bmjax, where
#                  relative paths of CONFIG start
# ACCELERATOR      tpu-v5p-slice, tpu-v6e-slice, tpu-v5-lite-podslice
# TOPOLOGY         the slice's shape, 4x4x4 or 16x16
# CHIPS            of a host (4)
# SLICES           how many slices (1); with mesh.data=SLICES only gradients go between them
# NAME             of the JobSet (bmjax)
# RESTARTS         after how many failures or preemptions it goes on (20)
# The cluster needs the JobSet controller. A pod that is told to go has 5 minutes to write its checkpoint.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; fi
: "${IMAGE:?}" "${CLAIM:?}" "${ACCELERATOR:?}" "${TOPOLOGY:?}"
name=${NAME:-bmjax} chips=${CHIPS:-4}
hosts=$((${TOPOLOGY//x/*} / chips))
config=$1; shift
command=$(python3 -c 'import json, sys; print(json.dumps(["python", "-m", "bmjax", "train", "/config/train.yaml", *sys.argv[1:]]))' "$@" stop_code=75)

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
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
            containers:
            - name: train
              image: $IMAGE
              workingDir: /mnt/bmjax
              command: $command
              ports: [{containerPort: 8471}, {containerPort: 8482}]
              resources:
                limits: {google.com/tpu: $chips}
              volumeMounts:
              - {name: runs, mountPath: /mnt/bmjax}
              - {name: config, mountPath: /config}
            volumes:
            - name: runs
              persistentVolumeClaim: {claimName: $CLAIM}
            - name: config
              configMap: {name: $name-config}
YAML
echo "kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$name --prefix"
