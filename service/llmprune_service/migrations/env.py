"""Alembic's way into the database: the connection is handed over by :func:`llmprune_service.database.migrate`."""

from alembic import context

from llmprune_service.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=connection.dialect.name == "sqlite")
with context.begin_transaction():
    context.run_migrations()
