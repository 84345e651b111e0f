"""Room 5: hosts; nothing here is imported unless asked for."""
