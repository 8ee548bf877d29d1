"""What a step minimises: cross-entropy, routing statistics, their losses."""
