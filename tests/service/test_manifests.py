"""The manifests in `service/deploy`: Ray's own checks accept them, and their settings are ours."""

import json
import subprocess

import yaml

from scripts import environment

DEPLOY = environment.ROOT / "service" / "deploy"
PROGRAM = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema
from service.fleet import application

validate_config(prepare_config(yaml.safe_load(open("service/deploy/ray-cluster.yaml"))))
text = yaml.safe_load(open("service/deploy/ray-service.yaml"))["spec"]["serveConfigV2"]
config = ServeDeploySchema.model_validate(yaml.safe_load(text))
(app,) = config.applications
assert app.import_path == "service.fleet:application"
deployment = application(app.args)._bound_deployment
options = deployment.ray_actor_options
scaling = deployment._deployment_config.autoscaling_config
span = scaling.min_replicas, scaling.max_replicas
print("result", json.dumps([options["num_gpus"], deployment.max_ongoing_requests, span, app.args]))
"""


def read(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def test_ray_accepts_the_manifests_and_builds_the_application() -> None:
    done = subprocess.run(
        [environment.service_python(), "-c", PROGRAM],
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    gpus, ongoing, span, arguments = json.loads(done.stdout.rsplit("result ", 1)[1])
    assert gpus == 1
    assert span == [arguments["least"], arguments["most"]]
    assert ongoing > arguments["queued"] + arguments["rows"]


def test_pods_have_the_key_the_port_and_as_many_gpus_as_replicas() -> None:
    spec = read("ray-service.yaml")["spec"]
    serve = yaml.safe_load(spec["serveConfigV2"])
    cluster = spec["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    (arguments,) = (one["args"] for one in serve["applications"])
    assert cluster["authOptions"] == {"mode": "token"}
    assert group["maxReplicas"] == arguments["most"]
    for part in (cluster["headGroupSpec"], group):
        (container,) = part["template"]["spec"]["containers"]
        assert "GLM_IMAGE_SERVICE_KEY" in [one["name"] for one in container["env"]]
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        assert ports["serve"] == serve["http_options"]["port"]
        assert str(ports["metrics"]) == part["rayStartParams"]["metrics-export-port"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_versions_agree() -> None:
    (pinned,) = [
        line.removeprefix("ray[serve]==").removesuffix(".*")
        for line in (DEPLOY.parent / "requirements.txt").read_text().splitlines()
        if line.startswith("ray")
    ]
    version = read("ray-service.yaml")["spec"]["rayClusterConfig"]["rayVersion"]
    assert version.startswith(f"{pinned}.")
    assert f"FROM rayproject/ray:{version}-" in (DEPLOY / "Dockerfile").read_text()


def test_the_cluster_has_its_token_on_and_no_dashboard() -> None:
    cluster = read("ray-cluster.yaml")
    assert "--env=RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "--include-dashboard=false" in " ".join(cluster["head_start_ray_commands"])
    assert cluster["max_workers"] >= len(cluster["provider"]["worker_ips"])
