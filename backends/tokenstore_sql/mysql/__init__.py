"""MySQL and MariaDB, through aiomysql or asyncmy."""
