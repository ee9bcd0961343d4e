"""Alembic runs on the connection that `database.migrate` hands over, inside its transaction."""

from typing import Any, Literal

from alembic import context

from busgen_cds.store import database

_OURS = (database.UtcTime, database.Sealed, database.Blind, database.WrappedKey)


def _render(kind: str, item: Any, _autogenerate: Any) -> str | Literal[False]:
    return f"store.{type(item).__name__}()" if kind == "type" and isinstance(item, _OURS) else False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=database.all_tables(),
    render_as_batch=True,
    render_item=_render,
)
context.run_migrations()
