"""The launch scripts, with stand-ins for the programs of a cluster that write down how they are called."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
CONFIG = SCRIPTS.parent / "configs" / "tinyr1_32b_math.yaml"


@pytest.fixture
def cluster(tmp_path):
    """(directory of stand-ins, their log): NAME answers as the file NAME.answer, a shell script, says."""
    log = tmp_path / "log"
    log.touch()

    def add(name: str, script: str = "") -> None:
        path = tmp_path / name
        path.write_text(
            f'#!/bin/bash\nprintf "%s" {name} >> {log}; printf " [%s]" "$@" >> {log}; echo >> {log}\n{script}\n'
        )
        path.chmod(0o755)

    return add, log, tmp_path


def run(script: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    return subprocess.run(
        [str(SCRIPTS / script), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )  # fmt: skip


@pytest.mark.parametrize("script", ["launch_tpu.sh", "launch_slurm.sh", "launch_gke.sh"])
def test_without_a_config_it_says_how_it_is_used(script, tmp_path):
    for arguments in ((), ("--help",)):
        done = run(script, tmp_path, *arguments)
        assert done.returncode == 2 and script in done.stdout and "CONFIG [key=value ...]" in done.stdout


def test_tpu_run_goes_on_after_a_preemption(cluster):
    add, log, folder = cluster
    # Not there, then being made, then there; taken away during the first training, and made again.
    add("gcloud", f"""
case "$*" in
  *" list "*) n=$(($(cat {folder}/n 2>/dev/null || echo 0) + 1)); echo $n > {folder}/n
    case $n in 1) ;; 2) echo PROVISIONING;; 3) echo ACTIVE;; 4|5) echo SUSPENDED;; *) echo ACTIVE;; esac;;
  *"bmjax train"*) [[ -e {folder}/once ]] || {{ touch {folder}/once; exit 1; }};;
esac""")  # fmt: skip
    done = run(
        "launch_tpu.sh", folder, str(CONFIG), "seq_len=32768", "data=[a b]", PROJECT="p", ZONE="z",
        ACCELERATOR="v5p-128", SHARE="10.0.0.2:/runs", SPOT="1", DELETE="1", POLL="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the slice was taken away" in done.stderr
    calls = log.read_text().splitlines()
    created = [line for line in calls if "[create]" in line]
    assert len(created) == 2 and all("[v5p-128]" in line and "[--spot]" in line for line in created)
    train = [line for line in calls if "bmjax train" in line]
    assert len(train) == 2 and "[--worker=all]" in train[0]
    assert r"train ~/bmjax.yaml seq_len=32768 data=\[a\ b\] stop_code=75" in train[0]
    assert "[delete]" in calls[-1]


def test_tpu_without_a_share_runs_from_a_bucket(cluster):
    add, log, folder = cluster
    add("gcloud", 'case "$*" in *" list "*) echo ACTIVE;; esac')
    done = run(
        "launch_tpu.sh", folder, str(CONFIG), "output=gs://b/run", PROJECT="p", ZONE="z", ACCELERATOR="v6e-16",
        POLL="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = log.read_text()
    assert "/mnt/bmjax" not in calls and "mount" not in calls and "[tpu,buckets]" in calls
    assert "train ~/bmjax.yaml output=gs://b/run stop_code=75" in calls


def test_failed_training_on_a_healthy_slice_is_an_error(cluster):
    add, log, folder = cluster
    add("gcloud", 'case "$*" in *" list "*) echo ACTIVE;; *"bmjax train"*) exit 1;; esac')
    done = run(
        "launch_tpu.sh", folder, str(CONFIG), PROJECT="p", ZONE="z", ACCELERATOR="v6e-256", SHARE="a:/b", POLL="0",
        RETRIES="1",
    )  # fmt: skip
    assert done.returncode == 1 and "the training failed" in done.stderr
    assert "the same command resumes from the newest checkpoint" in done.stderr.splitlines()[-1]
    assert log.read_text().count("bmjax train ~/bmjax.yaml stop_code=75]") == 2


@pytest.mark.parametrize("code, requeued", [(0, False), (75, True), (2, False)])
def test_slurm_queues_the_job_again_after_sigterm_only(cluster, code, requeued):
    add, log, folder = cluster
    add("srun", f"exit {code}")
    add("scontrol")
    done = run("launch_slurm.sh", folder, str(CONFIG), "output=a b", SLURM_JOB_ID="7")
    assert done.returncode == (0 if requeued else code)
    calls = log.read_text().splitlines()
    assert f"[-m] [bmjax] [train] [{CONFIG}] [output=a b] [stop_code=75]" in calls[0]
    assert (calls[1:] == ["scontrol [requeue] [7]"]) == requeued


def test_gke_writes_a_jobset_of_a_pod_a_host(cluster):
    add, log, folder = cluster
    add("kubectl", f'[[ "$*" == "apply -f -" ]] && (cat; echo ---) >> {folder}/applied; exit 0')
    done = run(
        "launch_gke.sh", folder, str(CONFIG), 'data=["a", "b"]', IMAGE="image:1", CLAIM="runs",
        ACCELERATOR="tpu-v5p-slice", TOPOLOGY="4x4x8", SLICES="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (jobset,) = [document for document in yaml.safe_load_all((folder / "applied").read_text()) if document]
    assert jobset["kind"] == "JobSet"
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == 32
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    (container,) = pod["containers"]
    assert container["command"][-3:] == ["/config/train.yaml", 'data=["a", "b"]', "stop_code=75"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["workingDir"] == "/mnt/bmjax"
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
    assert {"name": "runs", "mountPath": "/mnt/bmjax"} in container["volumeMounts"]


def test_gke_without_a_claim_runs_from_a_bucket(cluster):
    add, log, folder = cluster
    add("kubectl", f'[[ "$*" == "apply -f -" ]] && (cat; echo ---) >> {folder}/applied; exit 0')
    done = run(
        "launch_gke.sh", folder, str(CONFIG), "output=gs://b/run", IMAGE="i", ACCELERATOR="a", TOPOLOGY="2x2",
        ACCOUNT="trainer",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (jobset,) = [document for document in yaml.safe_load_all((folder / "applied").read_text()) if document]
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "trainer" and [volume["name"] for volume in pod["volumes"]] == ["config"]
    (container,) = pod["containers"]
    assert [mount["name"] for mount in container["volumeMounts"]] == ["config"]
    assert container["command"][-2:] == ["output=gs://b/run", "stop_code=75"]


@pytest.mark.parametrize("script, code, lines", [
    ("exit 0", 0, 0), ("exit 75", 75, 0), ("exit 2", 2, 1), ("kill -ABRT $$", 134, 1), ("kill -KILL $$", 137, 1),
    ("trap 'exit 75' TERM; kill -TERM $PPID; sleep 0.5 & wait; sleep 5", 75, 0),  # the pod is told to go
])  # fmt: skip
def test_gke_pod_says_what_to_do_when_its_training_dies(cluster, script, code, lines):
    add, log, folder = cluster
    add("kubectl", f'[[ "$*" == "apply -f -" ]] && (cat; echo ---) >> {folder}/applied; exit 0')
    add("python", script)
    done = run("launch_gke.sh", folder, str(CONFIG), IMAGE="i", CLAIM="c", ACCELERATOR="a", TOPOLOGY="2x2")
    assert done.returncode == 0, done.stderr
    (jobset,) = [document for document in yaml.safe_load_all((folder / "applied").read_text()) if document]
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    ended = subprocess.run(
        pod["containers"][0]["command"], env=environment, capture_output=True, text=True, timeout=30
    )  # fmt: skip
    assert ended.returncode == code
    assert ended.stderr.count("from the newest checkpoint") == lines, ended.stderr
