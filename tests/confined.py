"""Runs a command as a hardened container does: read-only tree, another user, no capability, our seccomp profile.

    python tests/confined.py FOLDER COMMAND…        FOLDER alone can be written; needs root and a mount namespace

The profile is `deploy/seccomp.json`, loaded by libseccomp as a container runtime loads it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

PROFILE = Path(__file__).parent.parent / "deploy" / "seccomp.json"
USER = "10001"
_TREE = """
mount --make-rprivate /
mount --bind "$1" "$1"
case "$2" in /root/*)  # a Python in root's own folder: shown to others, and nothing else of that folder
  mount --bind "$2" /mnt
  mount -t tmpfs -o mode=755 tmpfs /root
  mkdir -p "$2"
  mount --bind /mnt "$2"
  mount -o remount,bind,ro "$2"
  mount -o remount,ro /root
esac
case "$3" in /tmp/*) mount --bind "$3" /srv ;; esac  # a checkout in the folder that is hidden next
mount -o remount,bind,ro /
mount -t tmpfs -o noexec,nosuid,nodev,size=512m tmpfs /tmp
case "$3" in /tmp/*)
  mkdir -p "$3"
  mount --bind /srv "$3"
  mount -o remount,bind,ro "$3"
esac
cd "$1"
shift 3
exec setpriv --reuid $USER_ID --regid $USER_ID --clear-groups --no-new-privs --bounding-set -all --inh-caps -all "$@"
"""
_ALLOW, _MASKED_EQ, _DENY_WRITE_EXECUTE = 0x7FFF0000, 7, 65


def command(folder: Path, *words: str) -> list[str]:
    """The whole of it, for subprocess."""
    tree = _TREE.replace("$USER_ID", USER)
    return [
        "unshare",
        "--mount",
        "sh",
        "-ec",
        tree,
        "sh",
        str(folder),
        sys.base_prefix,
        str(Path(__file__).parent.parent),
        sys.executable,
        __file__,
        *words,
    ]


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def library() -> Any:
    found = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    found.seccomp_init.restype = ctypes.c_void_p
    found.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare),
    )  # fmt: skip
    found.seccomp_load.argtypes = (ctypes.c_void_p,)
    return found


def _refuse(number: int) -> int:
    return 0x00050000 | number


def load(profile: dict[str, Any]) -> None:
    """From here on, this process may ask the kernel for what the profile allows, and for nothing else."""
    seccomp = library()
    context = seccomp.seccomp_init(_refuse(profile["defaultErrnoRet"]))
    for rule in profile["syscalls"]:
        action = _ALLOW if rule["action"] == "SCMP_ACT_ALLOW" else _refuse(rule["errnoRet"])
        compared = [
            _Compare(each["index"], _MASKED_EQ, each["value"], each["valueTwo"]) for each in rule.get("args", ())
        ]
        for name in rule["names"]:
            number = seccomp.seccomp_syscall_resolve_name(name.encode())
            given = (_Compare * len(compared))(*compared)
            if seccomp.seccomp_rule_add_array(context, action, number, len(compared), given):
                raise OSError(f"the rule for {name} was not taken")
    if seccomp.seccomp_load(context):
        raise OSError("the profile was not taken")


def main(words: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_DENY_WRITE_EXECUTE, 1, 0, 0, 0):  # as systemd's MemoryDenyWriteExecute
        sys.stderr.write("this kernel cannot deny memory that is written and executed\n")
    load(json.loads(PROFILE.read_text()))
    os.execvp(words[0], words)


if __name__ == "__main__":
    main(sys.argv[1:])
