"""Who we say we are, on the network and in every file (PS3.7 D.3.3.2, PS3.10 7.1)."""

from __future__ import annotations

import busgen_cds

PRODUCT = "BUSGen-CDS"  # also our Manufacturer: nothing that carries it is ever read or routed as a study
IMPLEMENTATION_CLASS_UID = "2.25.577580225119960407844067461395241705"  # PS3.5 B.2: drawn once
IMPLEMENTATION_VERSION = f"BUSGENCDS_{busgen_cds.__version__}"[:16]
