"""The transformer: attention, experts, and how tokens and experts meet."""
