"""`python -m busgen_cds` is `busgen-cds`."""

from busgen_cds.cli import main

main()
