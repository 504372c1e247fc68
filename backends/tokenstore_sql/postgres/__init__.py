"""PostgreSQL, through asyncpg or psycopg."""
