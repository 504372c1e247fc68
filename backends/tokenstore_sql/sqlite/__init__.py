"""SQLite: one writer at a time, and readers that never wait for it."""
