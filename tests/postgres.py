"""A PostgreSQL server of a test's own, on a free port and in a folder that goes away with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.programs import absent, free_port


@contextmanager
def running(*databases: str) -> Iterator[dict[str, str]]:
    """Addresses of the databases, by name."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        absent("not installed: postgresql; .ci/run lists the packages")
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    port = free_port()
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres")

    def run(program: str, *arguments: str) -> None:
        command = [*as_user, str(programs[-1] / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder)

    data = str(folder / "data")
    run("initdb", "-D", data, "-A", "trust", "-U", "busgen", "--no-sync")
    server = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", server, "start")
    try:
        for name in databases:
            run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "busgen", name)
        yield {name: f"postgresql+psycopg://busgen@127.0.0.1:{port}/{name}" for name in databases}
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
