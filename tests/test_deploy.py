"""What `deploy/` promises: each hardening of images, compose, systemd and Kubernetes, and that the product runs so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from busgen_cds import settings
from tests import confined
from tests.programs import absent, need

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNITS = [DEPLOY / "systemd" / name for name in ("busgen-cds.service", "busgen-cds@.service")]
IMAGES = [DEPLOY / "images" / name for name in ("clinic.Dockerfile", "trainer.Dockerfile")]


# -- images


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_images(file: Path) -> None:
    """An image runs as an ordinary user, with packages checked by hash, and holds no checkout, site or secret."""
    lines = re.sub(r"\\\n\s*", " ", file.read_text()).splitlines()
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER 10001:10001" in final
    assert not any(line.startswith(("ADD", "RUN")) for line in final[final.index("USER 10001:10001") :])
    assert not any(line.startswith("ADD") for line in lines)
    assert any("--require-hashes" in line for line in lines)
    assert not re.search(r"(?i)(password|secret|token|key)\s*=", file.read_text())
    for line in lines:
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--from"):
            assert all((ROOT / source).exists() for source in words[1:-1]), line
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored, "only what is named reaches the builder"


def test_the_clinic_has_no_torch() -> None:
    """The clinic's image has no torch; the trainer's has, and both have the same versions of everything else."""
    locked = {name: _locked(DEPLOY / "locks" / f"{name}.txt") for name in ("clinic", "train")}
    assert not {"torch", "monai", "peft", "pytest"} & set(locked["clinic"])
    assert {"monai", "peft"} <= set(locked["train"])
    assert "pytest" not in locked["train"]
    shared = set(locked["clinic"]) & set(locked["train"])
    assert len(shared) == len(locked["clinic"])
    assert all(locked["clinic"][name] == locked["train"][name] for name in shared)
    assert "clinic.txt" in IMAGES[0].read_text()
    assert "torch==2.13.0" in IMAGES[1].read_text()
    assert "torch" not in re.sub(r"(?m)^#.*$", "", IMAGES[0].read_text())


def _locked(file: Path) -> dict[str, str]:
    return dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", file.read_text()))


# -- compose


def test_compose() -> None:
    """Each service of the compose file is unprivileged, read-only, without capabilities, bounded, and under seccomp."""
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in document["services"].items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert "privileged" not in service, name
        assert set(service["security_opt"]) == {"no-new-privileges:true", "seccomp:./seccomp.json"}, name
        assert service["pids_limit"] > 0, name
        assert "noexec" in service["tmpfs"][0], name
        assert service["mem_limit"], name
        writable = [each["target"] for each in service["volumes"] if not each.get("read_only")]
        assert set(writable) <= {"/site", "/runs"}, name
        assert all("docker.sock" not in str(each) for each in service["volumes"]), name
    assert document["services"]["trainer"]["network_mode"] == "none"
    open_to_all = [port for port in document["services"]["clinic"]["ports"] if not port.startswith("127.0.0.1:")]
    assert open_to_all == ["2762:2762"], "DICOM over TLS alone"
    assert (DEPLOY / "seccomp.json").exists()


# -- seccomp

NEVER = {
    "add_key", "bpf", "chroot", "delete_module", "finit_module", "init_module", "io_uring_setup", "kexec_load",
    "keyctl", "mount", "move_mount", "open_by_handle_at", "perf_event_open", "pivot_root", "process_vm_readv",
    "process_vm_writev", "ptrace", "reboot", "request_key", "setns", "setuid", "settimeofday", "swapon", "umount2",
    "unshare", "userfaultfd",
}  # fmt: skip


def test_seccomp_profile() -> None:
    """The profile refuses by default, names calls that there are, and none that gives power over kernel or others."""
    profile = json.loads((DEPLOY / "seccomp.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = [name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]]
    assert len(allowed) == len(set(allowed)) > 150
    assert not NEVER & set(allowed)
    seccomp = confined.library()
    assert [name for name in (*allowed, *NEVER) if seccomp.seccomp_syscall_resolve_name(name.encode()) == -1] == []
    clone = next(rule for rule in profile["syscalls"] if rule["names"] == ["clone"])
    new_namespaces = 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000
    assert clone["args"] == [{"index": 0, "value": new_namespaces, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]


# -- systemd

HARDENED = {
    "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ReadWritePaths": "/srv/busgen-cds", "ProtectHome": "yes",
    "PrivateTmp": "yes", "PrivateDevices": "yes", "PrivateUsers": "yes", "CapabilityBoundingSet": "",
    "AmbientCapabilities": "", "RestrictSUIDSGID": "yes", "ProtectKernelTunables": "yes", "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes", "ProtectControlGroups": "yes", "ProtectClock": "yes", "ProtectHostname": "yes",
    "ProtectProc": "invisible", "RestrictNamespaces": "yes", "RestrictRealtime": "yes", "LockPersonality": "yes",
    "MemoryDenyWriteExecute": "yes", "SystemCallArchitectures": "native", "UMask": "0077", "User": "busgen-cds",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX", "LimitCORE": "0",
}  # fmt: skip


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_are_hardened(unit: Path) -> None:
    """Each unit has each hardening that SECURITY.md counts on, and calls of the kernel are filtered."""
    lines = [line.partition("=") for line in unit.read_text().splitlines() if re.match(r"[A-Z]\w+=", line)]
    said = {name: value for name, _, value in lines}
    assert {name: said.get(name) for name in HARDENED} == HARDENED
    filters = [value for name, _, value in lines if name == "SystemCallFilter"]
    assert filters == ["@system-service", "~@privileged @keyring @setuid"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_stop_is_told_to_the_program_alone(unit: Path) -> None:
    """A unit's stop lets what is being received end: the processes that receive are told by the program, not killed."""
    assert {"KillSignal=SIGTERM", "KillMode=mixed"} <= set(unit.read_text().splitlines())


@pytest.mark.program
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_units(unit: Path, tmp_path: Path) -> None:
    """systemd understands every line of the units, and rates their exposure 2.0 of 10 or less."""
    need("systemd-analyze")
    here = tmp_path / unit.name
    here.write_text(unit.read_text().replace("/opt/busgen-cds/bin/busgen-cds", sys.executable))
    checked = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, check=False)
    assert not [line for line in checked.stderr.splitlines() if "Unknown" in line or "Invalid" in line], checked.stderr
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", here],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert rated.returncode == 0, rated.stdout[-400:]


# -- Kubernetes


def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "busgen-cds.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_kubernetes_is_restricted() -> None:
    """The pod meets Kubernetes' restricted standard: no root, read-only, no capability, no token, seccomp, bounded."""
    found = manifests()
    assert found["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert found["ServiceAccount"]["automountServiceAccountToken"] is False
    pod = found["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "Localhost", "localhostProfile": "busgen-cds.json"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "privileged": False, "readOnlyRootFilesystem": True,
            "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)
        paths = [container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")]
        assert paths == ["/health", "/ready"]
    assert not [volume for volume in pod["volumes"] if "hostPath" in volume]


def test_kubernetes_lets_in_what_it_must() -> None:
    """Nothing reaches the pod but scanners and the pages' ingress; its settings are valid, its key is a secret."""
    found = manifests()
    policy = found["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule["from"] and rule["ports"] for rule in policy["ingress"])
    assert all(rule["to"] and rule["ports"] for rule in policy["egress"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / settings.FILE
        file.write_text(found["ConfigMap"]["data"]["busgen-cds.toml"])
        chosen = settings.read(file)
    assert chosen.web.secure
    assert chosen.listener.plain_from == ()
    assert chosen.storage.key == "env:SITE_KEY"
    container = found["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    assert container["env"][0]["name"] == "SITE_KEY"
    assert "secretKeyRef" in container["env"][0]["valueFrom"]


# -- for real


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of the container's user, in a tree that this user cannot write."""
    need("unshare", "setpriv", "mount")
    if os.geteuid() != 0:
        absent("confining needs root")
    above = Path(tempfile.mkdtemp(dir="/var/tmp"))
    above.chmod(0o755)
    site = above / "site"
    site.mkdir(mode=0o700)
    os.chown(site, int(confined.USER), int(confined.USER))
    yield site
    shutil.rmtree(above)


def inside(place: Path, *words: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", "TCP_NODELAY": "1"}
    return subprocess.run(
        confined.command(place, *words),
        capture_output=True, text=True, timeout=timeout, check=False, cwd=place, env=environment,
    )  # fmt: skip


_TRIES = """
import ctypes, os, pathlib, sys
libc = ctypes.CDLL(None, use_errno=True)
def refused(deed):
    try:
        deed()
    except OSError:
        return True
assert os.getuid() == os.geteuid() == 10001
status = pathlib.Path('/proc/self/status').read_text()
assert 'CapEff:\\t0000000000000000' in status and 'CapBnd:\\t0000000000000000' in status
assert 'NoNewPrivs:\\t1' in status and 'Seccomp:\\t2' in status
for where in ('/', '/etc', '/usr', '/var/tmp', '/root', '/home'):
    assert refused(lambda: pathlib.Path(where, 'x').write_text('x')), where
pathlib.Path('here').write_text('x')
assert libc.unshare(0x10000000) == -1 and ctypes.get_errno() == 1
assert libc.mount(b'none', b'/mnt', b'tmpfs', 0, None) == -1
assert libc.ptrace(0, 0, 0, 0) == -1
assert refused(lambda: os.setuid(0))
print('confined')
"""


@pytest.mark.program
def test_confinement_is_real(place: Path) -> None:
    """Confined as in a container, a process writes its own folder alone, and gets no other user, mount or namespace."""
    done = inside(place, sys.executable, "-c", _TRIES)
    assert done.stdout.strip() == "confined", done.stderr


@pytest.mark.program
@pytest.mark.slow
def test_the_product_runs_confined(place: Path) -> None:
    """The whole product, from image received to report delivered, runs confined: no root, no rights, read-only tree."""
    done = inside(place, sys.executable, "-m", "busgen_cds", "demo", "--once", "--folder", str(place / "demo"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (place / "demo").stat().st_uid == int(confined.USER)
    checked = inside(place, sys.executable, "-m", "busgen_cds", "sbom", "--out", str(place / "bom.json"))
    assert checked.returncode == 0, checked.stderr
