"""Many pictures from a table: `rows` reads it, `work` draws what is not there yet."""
