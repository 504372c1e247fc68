"""Every statement that touches the table, as SQLAlchemy Core."""
