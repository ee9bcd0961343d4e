"""Write the next migration: the difference between the tables as declared and the schema as migrated."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.config import Config

from busgen_cds.store import database


def main(message: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fresh = database.open(f"sqlite:///{Path(folder) / 'fresh.db'}")
        configuration = Config()
        configuration.set_main_option("script_location", str(database.MIGRATIONS))
        with fresh.engine.begin() as connection:
            configuration.attributes["connection"] = connection
            command.revision(configuration, message=message, autogenerate=True)
        fresh.close()


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "change")
