"""Reports on runs and sweeps: tables, pictures."""
