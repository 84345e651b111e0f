"""Room 6: words typed by a person; one file per command."""
