"""Real ultrasound files of public libraries, where a developer has them: BUSGEN_DATA names the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = os.environ.get("BUSGEN_DATA", "")
FOLDER = Path(DATA or ".") / "dicom_us"
FILES = sorted(path for path in FOLDER.glob("*/*") if path.is_file()) if DATA else []

needs_files = pytest.mark.skipif(not FILES, reason="BUSGEN_DATA names no folder with dicom_us in it")
